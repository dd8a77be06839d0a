"""What lies on a disk about single users: who may be found in which file, of a run here and of a server elsewhere."""

import json
from pathlib import Path

import pytest
import torch
from conftest import SMALL, USERS, write_dataset
from test_coordinator import KEYS, finished

from recbole_fedkd import run_recbole_fedkd
from recbole_fedkd.checkpoint import read_sealed
from recbole_fedkd.data.schema import ClientRows
from recbole_fedkd.machines.coordinator import SERVER_STATE
from recbole_fedkd.splitting import split_federation

RUNS = {
    "fedavg": {"strategy": "fedavg"},
    "label": {"strategy": "afd"},
    "factors": {"strategy": "afd", "knowledge": "factors", "epochs": 10},
    "fleet": {"strategy": "fedavg", "partition": "user", "engine": "fleet"},
}


@pytest.fixture(scope="module")
def named(tmp_path_factory):
    """A data set whose users have names that no bytes have by chance."""
    folder = write_dataset(tmp_path_factory.mktemp("named"))
    for file in (folder / "tiny").iterdir():
        lines = file.read_text().splitlines()
        of_users = file.suffix in (".inter", ".user")
        file.write_text(
            "\n".join([lines[0], *(f"person-{line[1:]}" if of_users else line for line in lines[1:])]) + "\n"
        )
    return folder


def naming(folder):
    """Files under a folder that hold the name of a user."""
    return {file.name for file in Path(folder).rglob("*") if file.is_file() and b"person-" in file.read_bytes()}


@pytest.mark.parametrize("case", RUNS)
def test_a_run_names_its_users_in_one_file(named, case):
    result = run_recbole_fedkd(
        "AttnFedKD", "tiny", config_dict={"data_path": str(named), **SMALL, "epochs": 2, **RUNS[case]}
    )
    assert naming(result["run_folder"]) == {"partition.json"}
    assert not naming("log") and not naming("log_tensorboard")
    partition = json.loads((Path(result["run_folder"]) / "partition.json").read_text())
    assert len(partition) == USERS and all(user.startswith("person-") for user in partition)


def test_the_server_of_parties_elsewhere_has_no_user_and_no_row_on_its_disk(named, tmp_path):
    folder = tmp_path / "federation"
    folders = split_federation("AttnFedKD", "tiny", folder, [], {"data_path": str(named), **SMALL, **KEYS})
    manifest = folder / "manifest"
    assert not naming(manifest)
    _, _, captured = finished((manifest, folders), tmp_path)
    assert not naming(tmp_path / "server")
    assert not any(b"person-" in content for content in captured)
    # Nothing there is as long as somebody's rows, or as all: tensors are the server's network, and what goes with it.
    state, _ = read_sealed(tmp_path / "server" / SERVER_STATE, "state")
    held = {len(ClientRows.load(party / "rows.npz").interactions["item_id"]) for party in folders}
    lengths = {tensor.shape[0] for tensor in tensors_of(state) if tensor.ndim}
    assert lengths and not lengths & {*held, sum(held), USERS, USERS + 1}


def tensors_of(value):
    """All tensors in a state."""
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else []
    return [tensor for part in parts for tensor in tensors_of(part)]
