"""What lies on a disk about single users: who may be found in which file, of a run here and of a server elsewhere."""

import gzip
import io
import json
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL, USERS, write_dataset
from test_coordinator import KEYS, finished
from test_docs import ROOT

from recbole_fedkd import run_recbole_fedkd
from recbole_fedkd.auditing import audited_run, write_audit
from recbole_fedkd.checkpoint import large
from recbole_fedkd.checkpoint.sealed import read_sealed, write_sealed
from recbole_fedkd.data.schema import ClientRows
from recbole_fedkd.distillation.knowledge import AGGREGATIONS
from recbole_fedkd.federated.knowledge import KNOWLEDGE
from recbole_fedkd.machines.folders import SERVER_STATE
from recbole_fedkd.splitting import split_federation

RUNS = {
    "fedavg": {"strategy": "fedavg"},
    "label": {"strategy": "afd"},
    "factors": {"strategy": "afd", "knowledge": "factors", "epochs": 10},
    "fleet": {"strategy": "fedavg", "partition": "user", "engine": "fleet"},
    "few in a round": {"strategy": "fedavg", "clients_per_round": 2, "user_metrics": True},
}
USER = 9174000

TOKEN = re.compile(rb"(?<![\d.])91740\d\d(?!\d)")
"""A user's name, which is a number, as ids of users are."""


@pytest.fixture(scope="module")
def named(tmp_path_factory):
    """A data set whose users have names that no bytes have by chance."""
    folder = write_dataset(tmp_path_factory.mktemp("named"))
    for file in (folder / "tiny").iterdir():
        if file.suffix in (".inter", ".user"):
            file.write_text(re.sub(r"^u(\d+)", lambda user: f"91740{int(user[1]):02d}", file.read_text(), flags=re.M))
    return folder


def contents(name, content):
    """What is in a file: its bytes, and the text of what lies packed in it (zip, npz, pth, gz), to any depth."""
    yield content
    if zipfile.is_zipfile(io.BytesIO(content)):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            if any(
                member.endswith("data.pkl") for member in archive.namelist()
            ):  # torch's, numbers of a pickle are bytes
                yield str(plain(torch.load(io.BytesIO(content), weights_only=True))).encode()
            for member in archive.namelist():
                yield from contents(member, archive.read(member))
    elif content[:2] == b"\x1f\x8b":
        yield from contents(name, gzip.decompress(content))
    elif name.endswith(".bin"):  # large tensors, as they lie in memory
        held = (number for number in range(USER, USER + 100) if any(each in content for each in packed(number)))
        yield str(list(held)).encode()
    elif name.endswith(".npy"):
        yield str(np.load(io.BytesIO(content), allow_pickle=True).tolist()).encode()


def packed(number):
    """A number as any tensor that is as exact has it; of 8 bytes the first four are those of 4 where it is whole."""
    return [np.array(number, kind).tobytes() for kind in ("<i4", "<f4", "<f8")]


def plain(value):
    """A state of lists and numbers alone."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return [(plain(key), plain(each)) for key, each in value.items()]
    return [plain(each) for each in value] if isinstance(value, list | tuple) else value


def names(content, name=""):
    """Whether a user is named in bytes, as text or as a number."""
    return any(TOKEN.search(each) for each in contents(name, content))


def naming(folder):
    """Files under a folder that hold the name of a user."""
    return {file.name for file in Path(folder).rglob("*") if file.is_file() and names(file.read_bytes(), file.name)}


def test_a_name_is_found_in_whatever_it_is_packed_in(tmp_path):
    name = "9174017"
    np.savez_compressed(tmp_path / "text.npz", names=np.array([name]))
    np.savez_compressed(tmp_path / "object.npz", names=np.array([name], dtype=object))
    np.savez(tmp_path / "float.npz", names=np.array([9174017.0], np.float32))
    torch.save({"rows": torch.tensor([3, int(name)])}, tmp_path / "tensor.pth")
    torch.save({"rows": {int(name): 1}}, tmp_path / "key.pth")
    write_sealed({"names": [(name, 1)]}, tmp_path / "sealed.pth")
    for kind in ("<i4", "<i8", "<f4", "<f8"):
        (tmp_path / f"tensors-{kind[1:]}.bin").write_bytes(b"odd" + np.array([5, int(name)], kind).tobytes())
    (tmp_path / "log.gz").write_bytes(gzip.compress(name.encode()))
    with zipfile.ZipFile(tmp_path / "in.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(tmp_path / "text.npz")
    there = {file.name for file in tmp_path.iterdir()}
    (tmp_path / "other.json").write_text(json.dumps({"a": 0.9174017, "b": 91740170, "c": "917401"}))
    assert naming(tmp_path) == there


@pytest.mark.parametrize("case", RUNS)
def test_a_run_names_its_users_in_one_file_and_the_page_lists_all_that_it_writes(named, case, monkeypatch):
    monkeypatch.setattr(large, "LARGE", 64)
    result = run_recbole_fedkd(
        "AttnFedKD", "tiny", config_dict={"data_path": str(named), **SMALL, "epochs": 2, **RUNS[case]}
    )
    folder = Path(result["run_folder"])
    write_audit(audited_run(folder, rounds=1, most=3), folder)
    assert naming(folder) == {"partition.json"}
    written = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    assert any(file.startswith("tensors-") for file in written) == ("clients_per_round" in RUNS[case])
    listed = re.search(r"## On disk\n(.*?)\n## ", (ROOT / "docs" / "privacy.md").read_text(), re.DOTALL)
    known = re.findall(r"`(?:saved/<run>/)?([^`]+)`", listed[1])
    assert {file for file in written if re.sub(r"-\d+\.", "-<round>.", file) not in known} == set()
    assert not naming("log") and not naming("log_tensorboard")
    partition = json.loads((folder / "partition.json").read_text())
    assert len(partition) == USERS and all(TOKEN.fullmatch(user.encode()) for user in partition)


def test_the_server_of_parties_elsewhere_has_no_user_and_no_row_on_its_disk(named, tmp_path):
    folder = tmp_path / "federation"
    folders = split_federation("AttnFedKD", "tiny", folder, [], {"data_path": str(named), **SMALL, **KEYS})
    manifest = folder / "manifest"
    assert not naming(manifest)
    _, _, captured = finished((manifest, folders), tmp_path)
    assert not naming(tmp_path / "server")
    assert not any(map(names, captured))
    # Nothing there is as long as somebody's rows, or as all: tensors are the server's network, and what goes with it.
    state, _ = read_sealed(tmp_path / "server" / SERVER_STATE, "state")
    held = {len(ClientRows.load(party / "rows.npz").interactions["item_id"]) for party in folders}
    lengths = {tensor.shape[0] for tensor in tensors_of(state) if tensor.ndim}
    assert lengths and not lengths & {*held, sum(held), USERS, USERS + 1}


ROBUST = ("attentive", "median", "trimmed_mean", "krum", "multi_krum")
KEPT = {name: {"latest_means", "latest_counts", "teacher", "known"} for name in ROBUST} | {
    **{"prediction": {"predictions", "clients"}, "factors": {"held"}, "fold_in": {"held"}, "item": {"held", "spoken"}},
}


@pytest.mark.parametrize("kind", sorted({*KNOWLEDGE, *AGGREGATIONS} - {"label", "gram"}))
def test_the_page_names_all_that_a_server_keeps_of_single_clients(prepared, kind):
    """The file of a coordinator has this state; what has a row for each of seven clients is of single ones."""
    keys = {"knowledge": kind} if kind in KNOWLEDGE else {"aggregation": kind}
    _, trainer, _, _ = prepared(strategy="afd", label_mode="rating", client_num=7, hidden_model_epochs=1, **keys)
    trainer.engine.run_round(0)
    state = trainer.engine.server.state_dict()["strategy"]
    kept = {name for name, value in state.items() if value.ndim and value.shape[0] == 7}
    assert kept == KEPT.get(kind, set())
    page = (ROOT / "docs" / "privacy.md").read_text().splitlines()
    (row,) = (line for line in page if line.startswith("| a coordinator's folder"))
    told = set(re.findall(r"`(?:knowledge=)?(\w+)`", row))
    assert told >= kept and (kind in told) == bool(kept)


def tensors_of(value):
    """All tensors in a state."""
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else []
    return [tensor for part in parts for tensor in tensors_of(part)]
