"""Keys are known, told and refused before torch is loaded."""

import importlib
import subprocess
import sys
from dataclasses import fields

import pytest

from recbole_fedkd.config import FedKDConfig
from recbole_fedkd.config.choices import _CHOICES, choices, shipped
from recbole_fedkd.config.early import check_early
from recbole_fedkd.config.known import KnownKeys
from recbole_fedkd.errors import InputError
from recbole_fedkd.model.network import ArchitectureSettings
from recbole_fedkd.registry import registries

WRONG = [
    ("AttnFedKD", {"lerning_rate": ".1"}),
    ("AttnFedKD", {"num_clients": "3"}),
    ("AttnFedKD", {"gamma": "x"}),
    ("AttnFedKD", {"strategy": "fedagv"}),
    ("AttnFedKD", {"codecs": "[fp17]"}),
    ("AttnFedKD", {"teacher": "{embeding_size: 3}"}),
    ("AttnFedKD", {"learner": "adm"}),
    ("AttnFedKD", {"eval_args": "{split: {RS: [1, 2]}}"}),
    ("AttnFedKD", {"device": "cpu"}),
    ("AttnFedKD", {"save_dataset": "True"}),
    ("AttnFedKD", {"user_inter_num_interval": "[x,y]"}),
    ("LightGCN", {"n_layers": "100000"}),
    ("BRP", {}),
    ("attnfedkd", {}),
    ("LightGBM", {}),
    (None, {}),
    (None, {"preset": "fdd"}),
    ("MF", {"dataset": "a/b"}),
]


@pytest.mark.parametrize(("model", "keys"), WRONG, ids=str)
def test_what_is_refused_early_is_refused_later_in_the_same_words(model, keys):
    told = []
    for check in (check_early, FedKDConfig):
        with pytest.raises(InputError) as refused:
            check(model, keys.get("dataset", "ml-100k"), [], command_line=keys)
        told.append(str(refused.value))
    assert told[0] == told[1]


@pytest.mark.parametrize(
    "keys", [{"preset": "fdin"}, {"model": "SimpleX", "margin": "0.5"}, {"gpu_id": "", "model": "BPR"}]
)
def test_what_can_be_used_passes_early(keys):
    check_early(None, "ml-100k", [], keys)
    FedKDConfig(None, "ml-100k", command_line=keys)


def test_keys_that_only_a_models_source_knows_pass_early(monkeypatch):
    """Without its file's keys a model's own are found in what it reads."""
    known = KnownKeys.knows
    monkeypatch.setattr(KnownKeys, "knows", lambda keys, name: name != "mlp_hidden_size" and known(keys, name))
    check_early("NeuMF", "ml-100k", [], {"mlp_hidden_size": "[8]"})


@pytest.mark.parametrize("kind", [*_CHOICES, *registries()])
def test_the_names_that_are_told_are_those_that_ship(kind):
    if kind in _CHOICES:
        module, attribute = _CHOICES[kind]
        registered = list(getattr(importlib.import_module(module), attribute))
    else:
        registered = [name for name, each in registries()[kind].items() if each.__module__.startswith("recbole_fedkd.")]
    assert sorted(shipped()[kind]) == sorted(registered)
    assert set(registered) <= set(choices(kind))
    assert all(sentence.endswith((".", "L")) for sentence in shipped()[kind].values())


def test_keys_of_a_network_are_those_that_its_file_lists():
    from recbole_fedkd.config.files import PROPERTIES
    from recbole_fedkd.config.keys import read_sections

    assert set(read_sections(PROPERTIES / "model" / "AttnStudent.yaml")["Network"]) == {
        each.name for each in fields(ArchitectureSettings)
    }


@pytest.mark.parametrize("model", [*shipped()["models"], "BPR", "DIN", "GRU4Rec"])
def test_files_of_a_model_by_name_are_those_of_its_class(model):
    from recbole_fedkd.config.files import files_of_model
    from recbole_fedkd.config.models import find_model

    assert files_of_model(model) == files_of_model(model, getattr(find_model(model), "embeds_features", False))


def loaded_after(code: str) -> str:
    """What a piece of code printed, and which of the heavy packages are loaded after it."""
    code += "\nimport sys; print([name for name in ('torch', 'recbole', 'pandas', 'scipy') if name in sys.modules])"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_a_wrong_key_is_refused_without_torch():
    code = (
        "from recbole_fedkd.command_line import main\n"
        "assert main(['--model=AttnFedKD', '--dataset=ml-100k', '--lerning_rate=1']) == 2\n"
        "assert main(['--model=AttnFedKD', '--dataset=ml-100k', '--strategy=fedagv']) == 2"
    )
    assert loaded_after(code).strip() == "[]"
