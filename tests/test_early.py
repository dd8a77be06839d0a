"""Keys are known, told and refused before torch is loaded."""

import importlib
import subprocess
import sys
from dataclasses import fields, replace

import pytest
import recbole.data.dataset
from recbole.data.dataloader import TrainDataLoader
from recbole.data.utils import get_dataloader
from recbole.utils import get_trainer

from recbole_fedkd.config import FedKDConfig, outlines
from recbole_fedkd.config.choices import _CHOICES, choices, shipped
from recbole_fedkd.config.config import _outline_of
from recbole_fedkd.config.early import check_early
from recbole_fedkd.config.known import KnownKeys, keys_in_source
from recbole_fedkd.config.models import find_model, recbole_models
from recbole_fedkd.config.outlines import (
    described,
    has_dataset,
    has_loader,
    metric_names,
    metric_of,
    outline_of_name,
    trainer_name,
)
from recbole_fedkd.config.values import plain
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
    ("AttnFedKD", {"metrics": "foo"}),
    ("AttnFedKD", {"metrics": "[NDCG, AUC]", "valid_metric": "NDGC@10"}),
    ("AttnFedKD", {"valid_metric": "AUC@10"}),
    ("AttnFedKD", {"metrics": "NDCG", "valid_metric": "NDCG@7"}),
    ("AttnFedKD", {"topk": "[0]"}),
    ("AttnFedKD", {"eval_args": "{mode: foo}"}),
    ("BPR", {"eval_args": "{mode: labeled}"}),
    ("AttnFedKD", {"strategy": "central"}),
    ("AttnFedKD", {"strategy": "sums"}),
    ("AttnFedKD", {"strategy": "fedavg", "student_pool": "[{embedding_size: 3}]"}),
    ("AttnFedKD", {"knowledge": "gram"}),
    ("AttnFedKD", {"knowledge": "factors", "clients_per_round": "2"}),
    ("AttnFedKD", {"label_mode": "implicit", "knowledge": "fold_in"}),
    ("AttnStudent", {"strategy": "fedavg"}),
    ("AttnStudent", {"strategy": "central", "holdout_clients": ".5"}),
    ("MF", {"label_mode": "rating"}),
    ("MF", {"strategy": "fedkd"}),
    ("BPR", {"strategy": "fedgkd"}),
    ("Bias", {"label_mode": "implicit"}),
    ("GramEASE", {"strategy": "fedavg"}),
    ("BPR", {"strategy": "feddf"}),
    ("BPR", {"train_neg_sample_args": "~"}),
    ("BPR", {"strategy": "fedavg", "train_neg_sample_args": "{distribution: popularity}"}),
    ("Pop", {"strategy": "fedavg"}),
    ("RecVAE", {"strategy": "fedavg"}),
    ("CKE", {"label_mode": "threshold"}),
    ("KSR", {}),
    ("GRU4Rec", {"label_mode": "threshold"}),
    ("DIEN", {"label_mode": "threshold"}),
    ("BERT4Rec", {"transform": "crop_itemseq"}),
    ("SASRec", {"loss_type": "CE", "train_neg_sample_args": "{distribution: uniform, sample_num: 1}"}),
    ("KGAT", {}),
    ("AttnFedKD", {"threshold": "{rating: 3}", "label_mode": "threshold"}),
    ("AttnFedKD", {"RATING_FIELD": "user_id"}),
    ("AttnFedKD", {"privacy": "{epsilon: 1}"}),
    ("AttnFedKD", {"attack": "{kind: sign_flip}", "strategy": "local"}),
    ("AttnFedKD", {"secure_aggregation": "True", "strategy": "local"}),
    ("AttnFedKD", {"codecs": "[int8]", "stages": "[clip]"}),
    ("AttnFedKD", {"codecs": "[int8]", "stages": "[codecs, clip]"}),
    ("AttnFedKD", {"plugins": "missing.py"}),
    ("AttnFedKD", {"plugins": "missing_module"}),
]


@pytest.mark.parametrize(("model", "keys"), WRONG, ids=str)
def test_what_is_refused_early_is_refused_later_in_the_same_words(model, keys):
    told = []
    for check in (check_early, FedKDConfig):
        with pytest.raises(InputError) as refused:
            check(model, keys.get("dataset", "ml-100k"), [], command_line=dict(keys))
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
    outline = outline_of_name("NeuMF")
    assert "mlp_hidden_size" in outline.mentioned
    known = KnownKeys([], "NeuMF", "ml-100k", [], {"only_in_source"})
    assert known.knows("only_in_source")


MODELS_OF_ANY_KIND = ("DeepFM", "BPR", "LDiffRec", "NCEPLRec", "SASRec", "SASRecF", "DIN", "CFKG", "Pop", "RepeatNet")
PRESETS = [*shipped()["presets"]]


def same_values(model, dataset, keys):
    """Assert that a config is early what it is later, but for what is of the machine."""
    early, later = check_early(model, dataset, [], keys), FedKDConfig(model, dataset, command_line=keys)
    values = [{name: plain(value) for name, value in each.final_config_dict.items()} for each in (early, later)]
    for own in ("device", "local_rank", "single_spec", "gpu_id"):
        for of_one in values:
            of_one.pop(own, None)
    assert values[0] == values[1]
    assert early.judged_metrics == later.judged_metrics
    for name in ("federated", "reads_history", "reads_features", "trains_teacher", "learns_mutually", "learns_factors"):
        assert getattr(early, name) == getattr(later, name), name


@pytest.mark.parametrize("dataset", ["ml-100k", "own"])
@pytest.mark.parametrize("model", [*shipped()["models"], *MODELS_OF_ANY_KIND])
def test_a_config_has_the_same_values_early_as_later(model, dataset):
    same_values(model, dataset, {"train_neg_sample_args": "~"} if model.startswith("SASRec") else {})


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_has_the_same_values_early_as_later(preset):
    same_values(None, "ml-100k", {"preset": preset})


def test_a_student_of_several_sizes_has_the_same_values_early_as_later():
    same_values(
        "AttnFedKD", "own", {"student_pool": "[{embedding_size: 8}, {}]", "client_num": "3", "metrics": "[MAE, Hit]"}
    )


@pytest.mark.parametrize("model", [*shipped()["models"], *recbole_models().values()])
def test_the_outline_of_a_model_is_that_of_its_class(model):
    try:
        model_class = find_model(model)
    except InputError:
        pytest.skip("RecBole needs a package for it that is not installed")
    early, later = outline_of_name(model), _outline_of(model_class)
    assert replace(early, mentioned=None, reads_negatives=None) == replace(later, mentioned=None, reads_negatives=None)
    if not early.own:
        assert early.reads_negatives == later.reads_negatives
        assert later.mentioned - {"seed"} == early.mentioned - {"seed"}
        assert trainer_name(model, early.kind) == get_trainer(model_class.type, model).__name__
        loader = get_dataloader({"model": model, "MODEL_TYPE": model_class.type}, "train")
        assert has_loader(model, early.kind) == (loader is not TrainDataLoader)
    assert has_dataset(model) == hasattr(recbole.data.dataset, f"{model}Dataset")


@pytest.mark.parametrize("model", shipped()["models"])
def test_every_key_that_a_model_of_this_package_reads_is_known_without_its_source(model):
    known = check_early(model, "ml-100k", [], {})._known
    assert [key for key in keys_in_source(find_model(model)) if not known.knows(key)] == []


def test_metrics_are_read_as_they_are_registered():
    metrics = {name: metric_of(name) for name in described()["metrics"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outlines, "_registered_metrics", lambda: None)
        assert metrics == {name: metric_of(name) for name in metric_names()}


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


def test_a_table_that_is_not_there_is_told_without_pandas():
    lines = (
        "['import', 'missing.csv']",
        "['import', 'missing.parquet', '--user=who']",
        "['import', 'a.csv', '--usr=who']",
    )
    code = "from recbole_fedkd.command_line import main\n" + "\n".join(f"assert main({line}) == 2" for line in lines)
    assert loaded_after(code).strip() == "[]"


def test_a_wrong_key_is_refused_without_torch():
    code = (
        "from recbole_fedkd.command_line import main\n"
        "assert main(['--model=AttnFedKD', '--dataset=ml-100k', '--lerning_rate=1']) == 2\n"
        "assert main(['--model=AttnFedKD', '--dataset=ml-100k', '--strategy=fedagv']) == 2"
    )
    assert loaded_after(code).strip() == "[]"
