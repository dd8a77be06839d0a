"""Every model of RecBole trains, judges and is loaded here, or is refused by its name and the reason.

A model that is in RecBole and not in these tables fails the first test.
"""

import warnings
from pathlib import Path

import numpy as np
import pytest

from recbole_fedkd import load_data_and_model, run_recbole_fedkd
from recbole_fedkd.config import FedKDConfig
from recbole_fedkd.config.models import recbole_models
from recbole_fedkd.errors import InputError
from recbole_fedkd.quick_start import build_trainer
from tests.conftest import ITEMS, write_dataset

INTER = ["user_id", "item_id", "rating", "timestamp"]
QUIET = {"epochs": 1, "show_progress": False, "state": "ERROR"}

GENERAL = {"load_col": {"inter": INTER}}
CLICKS = {
    "load_col": {"inter": INTER, "user": ["user_id", "group"], "item": ["item_id", "genre"]},
    "threshold": {"rating": 3},
}
GRAPH = {"load_col": {"inter": INTER, "kg": ["head_id", "relation_id", "tail_id"], "link": ["item_id", "entity_id"]}}
SEQUENCES = {"load_col": {"inter": INTER, "item": ["item_id", "genre"]}, "MAX_ITEM_LIST_LENGTH": 4}
CE = {**SEQUENCES, "train_neg_sample_args": None}
VECTORS = {
    **CE,
    "load_col": {**GRAPH["load_col"], "entity": ["ent_id", "ent_vec"], "relation": ["rel_id", "rel_vec"]},
    "additional_feat_suffix": ["entity", "relation"],
    "alias_of_entity_id": ["ent_id"],
    "alias_of_relation_id": ["rel_id"],
    "preload_weight": {"ent_id": "ent_vec", "rel_id": "rel_vec"},
    "embedding_size": 4,
}
BPR_LOSS = {"loss_type": "BPR", "train_neg_sample_args": {"distribution": "uniform"}}
MAX, SUM = {"pooling_mode": "max"}, {"pooling_mode": "sum"}
GENRE = {**CE, "selected_features": ["genre"]}

# Model to the configs that it runs with; the key of a variant is said in words.
RUNS: dict[str, dict[str, dict]] = {
    # without gradients
    "ADMMSLIM": {"": GENERAL},
    "AsymKNN": {"": GENERAL, "of users": {**GENERAL, "knn_method": "user"}},
    "EASE": {"": GENERAL},
    "ItemKNN": {"": GENERAL, "of users": {**GENERAL, "knn_method": "user"}},
    "NCEPLRec": {"": GENERAL},
    "Pop": {"": GENERAL},
    "Random": {"": GENERAL},
    "SLIMElastic": {"": GENERAL},
    # general
    "BPR": {
        "": GENERAL,
        "dynamic negatives": {
            **GENERAL,
            "train_neg_sample_args": {"distribution": "uniform", "sample_num": 1, "dynamic": True, "candidate_num": 2},
        },
        "popular negatives": {**GENERAL, "train_neg_sample_args": {"distribution": "popularity", "alpha": 0.5}},
        "three negatives": {**GENERAL, "train_neg_sample_args": {"sample_num": 3}},
    },
    "CDAE": {"": GENERAL, "no negatives": {**GENERAL, "train_neg_sample_args": None}},
    "ConvNCF": {"": {**GENERAL, "embedding_size": 8, "cnn_channels": [1, 4, 4], "cnn_kernels": [2, 4], "cnn_strides": [2, 4]}},
    "DGCF": {"": GENERAL},
    "DMF": {"": GENERAL, "ratings": {**GENERAL, "inter_matrix_type": "rating"}},
    "DiffRec": {"": GENERAL, "time-aware": {**GENERAL, "time-aware": True}},
    "ENMF": {"": {**GENERAL, "train_neg_sample_args": None}},
    "FISM": {"": GENERAL, "split": {**GENERAL, "split_to": 10, "alpha": 0.5}},
    "GCMC": {"": GENERAL, "stack": {**GENERAL, "accum": "stack", "sparse_feature": False}},
    "LDiffRec": {"": GENERAL, "time-aware": {**GENERAL, "time-aware": True}},
    "LINE": {"": GENERAL},
    "LightGCN": {"": GENERAL},
    "MacridVAE": {"": GENERAL},
    "MultiDAE": {"": GENERAL, "no negatives": {**GENERAL, "train_neg_sample_args": None}},
    "MultiVAE": {"": GENERAL},
    "NAIS": {"": GENERAL, "concat": {**GENERAL, "algorithm": "concat", "split_to": 10, "alpha": 0.5, "beta": 0.1}},
    "NGCF": {"": GENERAL},
    "NNCF": {"": GENERAL},
    "NeuMF": {"": GENERAL},
    "RaCT": {"": {**GENERAL, "metrics_k": 10, "pretrain_epochs": 1, "save_step": 1, "train_neg_sample_args": None}},
    "RecVAE": {"": GENERAL},
    "SGL": {"": GENERAL},
    "SimpleX": {each: {**GENERAL, "aggregator": each} for each in ("mean", "user_attention", "self_attention")},
    "SpectralCF": {"": GENERAL},
    # clicks
    **{
        name: {"": CLICKS}
        for name in (
            "AFM", "AutoInt", "DCN", "DCNV2", "DSSM", "DeepFM", "EulerNet", "FFM", "FM", "FNN", "FiGNN", "FwFM",
            "KD_DAGFM", "LR", "NFM", "WideDeep",
        )
    },
    "PNN": {f"inner {on}": {**CLICKS, "use_inner": on, "use_outer": on} for on in (True, False)},
    "xDeepFM": {"": CLICKS, "direct": {**CLICKS, "direct": True}},
    # sequences
    "BERT4Rec": {"": {**CE, "mask_ratio": 0.5}, "BPR": {**SEQUENCES, **BPR_LOSS, "mask_ratio": 0.5, "hidden_act": "swish"}},
    "CORE": {each: {**CE, "dnn_type": each} for each in ("trm", "ave")},
    "Caser": {"": CE, "BPR": {**SEQUENCES, **BPR_LOSS}},
    "DIEN": {"": SEQUENCES},
    "DIN": {"": SEQUENCES},
    "FDSA": {"": GENRE, "max": {**GENRE, **MAX}, "sum": {**GENRE, **SUM}},
    "FEARec": {"": CE},
    "FOSSIL": {"": CE},
    "FPMC": {"": SEQUENCES},
    "GCSAN": {"": CE, "BPR": {**SEQUENCES, **BPR_LOSS, "hidden_act": "tanh"}},
    "GRU4Rec": {"": CE, "BPR": {**SEQUENCES, **BPR_LOSS}},
    "GRU4RecCPR": {"": {**CE, "reranker_CAN_NUM": 10}},
    "GRU4RecF": {"": GENRE, "max": {**GENRE, **MAX}, "sum": {**GENRE, **SUM}},
    "GRU4RecKG": {"": VECTORS},
    "HGN": {"": CE, "BPR": {**SEQUENCES, **BPR_LOSS}},
    "HRM": {"": CE, "BPR": {**SEQUENCES, **BPR_LOSS}},
    "KSR": {"": {**VECTORS, "kg_embedding_size": 4}},
    "LightSANs": {"": CE, "BPR": {**SEQUENCES, **BPR_LOSS}},
    "NARM": {"": CE, "BPR": {**SEQUENCES, **BPR_LOSS}},
    "NPE": {"": CE, "BPR": {**SEQUENCES, **BPR_LOSS}},
    "NextItNet": {"": CE, "BPR": {**SEQUENCES, **BPR_LOSS}},
    "RepeatNet": {"": CE},
    "S3Rec": {"": {**CE, "item_attribute": "genre", "pretrain_epochs": 1, "save_step": 1, "mask_ratio": 0.5}},
    "SASRec": {"": CE, "BPR": {**SEQUENCES, **BPR_LOSS, "hidden_act": "relu"}},
    "SASRecCPR": {"": {**CE, "reranker_CAN_NUM": "20,10", "n_facet_all": 6}},
    "SASRecF": {"": GENRE, "max": {**GENRE, **MAX}, "sum": {**GENRE, **SUM}},
    "SHAN": {"": CE, "BPR": {**SEQUENCES, **BPR_LOSS}},
    "SINE": {"": CE, "BPR": {**SEQUENCES, **BPR_LOSS}, "NLL": {**CE, "loss_type": "NLL"}},
    "SRGNN": {"": CE, "BPR": {**SEQUENCES, **BPR_LOSS}},
    "STAMP": {"": CE, "BPR": {**SEQUENCES, **BPR_LOSS}},
    "TransRec": {"": SEQUENCES},
    # knowledge graphs
    "CFKG": {"": GRAPH, "transe": {**GRAPH, "loss_function": "transe"}},
    "CKE": {"": GRAPH},
    "KGCN": {each: {**GRAPH, "aggregator": each} for each in ("sum", "neighbor", "concat")},
    "KGNNLS": {each: {**GRAPH, "aggregator": each} for each in ("sum", "neighbor", "concat")},
    "KTUP": {
        "": {**GRAPH, "train_rec_step": 1, "train_kg_step": 1, "epochs": 2},
        "L1": {**GRAPH, "use_st_gumbel": False, "L1_flag": True},
        "one triple a batch": {**GRAPH, "train_rec_step": 0, "train_kg_step": 1, "train_batch_size": 1},
    },
    "MKR": {"": GRAPH, "no inner product": {**GRAPH, "use_inner_product": False}},
    "RippleNet": {"": {**GRAPH, "n_memory": 4, "n_hop": 1}},
}  # fmt: skip
NOT_RUN = {
    "LightGBM": "model 'LightGBM' is not run here: RecBole has the library lightgbm train its trees",
    "XGBoost": "model 'XGBoost' is not run here: RecBole has the library xgboost train its trees",
}
# They run where the package is there.
PACKAGE = {"KGAT": "dgl", "KGIN": "torch_scatter", "MCCLK": "torch_scatter", "NCL": "faiss"}
CASES = [(model, variant) for model, variants in RUNS.items() for variant in variants]


@pytest.fixture(scope="module")
def graph_path(tmp_path_factory):
    """The small dataset with a knowledge graph, and vectors of its entities and relations."""
    folder = write_dataset(tmp_path_factory.mktemp("data"))
    generator = np.random.default_rng(1)

    def write(suffix, header, rows):
        lines = ["\t".join(header), *("\t".join(row) for row in rows)]
        (folder / "tiny" / f"tiny.{suffix}").write_text("\n".join(lines) + "\n")

    def vector():
        return " ".join(f"{value:.3f}" for value in generator.normal(size=4))

    entities, relations = [f"e{number}" for number in range(ITEMS + 20)], ["r0", "r1", "r2"]
    write("link", ["item_id:token", "entity_id:token"], [(f"i{item}", f"e{item}") for item in range(ITEMS)])
    triples = sorted(
        {
            (*generator.choice(entities, 1), *generator.choice(relations, 1), *generator.choice(entities, 1))
            for _ in range(150)
        }
    )
    write("kg", ["head_id:token", "relation_id:token", "tail_id:token"], triples)
    write("entity", ["ent_id:token", "ent_vec:float_seq"], [(name, vector()) for name in entities])
    write("relation", ["rel_id:token", "rel_vec:float_seq"], [(name, vector()) for name in relations])
    return folder


def test_the_tables_hold_every_model_of_recbole_once():
    tables = [*RUNS, *NOT_RUN, *PACKAGE]
    assert len(tables) == len(set(tables))
    assert set(tables) == set(recbole_models().values())


@pytest.mark.parametrize(("model", "variant"), CASES)
def test_it_trains_and_is_judged_without_a_warning(graph_path, model, variant):
    keys = {"data_path": str(graph_path), **QUIET, **RUNS[model][variant]}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        result = run_recbole_fedkd(model, "tiny", config_dict=keys, saved=False)
    assert not told, f"{told[0].filename}:{told[0].lineno}: {told[0].message}"
    assert result["test_result"]
    assert all(np.isfinite(value) for value in result["test_result"].values())
    unread = FedKDConfig(model, "tiny", config_dict=keys).unread_keys
    assert not unread, "a variant of a model names keys that it does not read"


@pytest.mark.parametrize("model", ["BPR", "DGCF", "WideDeep", "SASRec"])
def test_a_loaded_model_is_judged_without_a_warning(graph_path, model):
    keys = {"data_path": str(graph_path), **QUIET, **RUNS[model][""]}
    folder = run_recbole_fedkd(model, "tiny", config_dict=keys)["run_folder"]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        config, loaded, _, train, _, test = load_data_and_model(folder)
        trainer = build_trainer(config, loaded)
        trainer.evaluate(test, load_best_model=False)
        trainer.fit(train, saved=False)
    assert not told, f"{told[0].filename}:{told[0].lineno}: {told[0].message}"


@pytest.mark.parametrize("model", NOT_RUN)
def test_what_is_not_run_is_refused_by_name(model):
    with pytest.raises(InputError, match=NOT_RUN[model]):
        run_recbole_fedkd(model, "tiny", saved=False)


@pytest.mark.parametrize("model", PACKAGE)
def test_a_model_whose_package_is_missing_names_it(model, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    with pytest.raises(InputError, match=f"model '{model}' needs the package {PACKAGE[model]}, which is not installed"):
        run_recbole_fedkd(model, "tiny", saved=False)


@pytest.mark.parametrize(
    ("model", "keys", "says"),
    [
        ("FDSA", CE, "selected_features of model 'FDSA' names 'class', but the loaded columns of .item are"),
        ("S3Rec", {**CE, "mask_ratio": 0.5}, "item_attribute of model 'S3Rec' names 'class'"),
        ("SASRecCPR", CE, "reranker_CAN_NUM is 100, but dataset 'tiny' has 40 items"),
        ("RaCT", {**GENERAL, "train_stage": "critic_pretrain"}, "metrics_k is 100, but dataset 'tiny' has 40 items"),
        ("CKE", GENERAL, "model 'CKE' reads a knowledge graph, but load_col names no columns of .kg"),
        (
            "KSR",
            {**CE, "load_col": GRAPH["load_col"]},
            "reads vectors of entities, which preload_weight must name by 'ent_id'",
        ),
        ("GRU4Rec", {**CE, "loss_type": "MSE"}, "model 'GRU4Rec' cannot be built on dataset 'tiny' as configured"),
        ("SASRec", {**CE, "n_heads": 7}, "model 'SASRec' cannot be built on dataset 'tiny' as configured"),
        (
            "NeuMF",
            {**GENERAL, "use_pretrain": True, "mf_pretrain_path": "no.pth"},
            "No such file or directory: 'no.pth'",
        ),
        (
            "RaCT",
            {**GENERAL, "metrics_k": 9, "train_stage": "finetune", "pre_model_path": "no.pth"},
            "No such file or directory: 'no.pth'",
        ),
        ("CKE", {**GRAPH, "label_mode": "threshold"}, "label_mode=threshold .* knowledge graph"),
    ],
)
def test_what_a_model_lacks_is_said_before_training(graph_path, model, keys, says):
    with pytest.raises(InputError, match=says):
        run_recbole_fedkd(model, "tiny", config_dict={"data_path": str(graph_path), **QUIET, **keys}, saved=False)


def pretrained(graph_path, model, stages, **keys):
    """Run a model's stages one after another; each starts from the file that the last one left."""
    file, result = "", {}
    for stage in stages:
        given = {"data_path": str(graph_path), **QUIET, **RUNS[model][""], **keys, "train_stage": stage}
        result = run_recbole_fedkd(model, "tiny", config_dict={**given, "pre_model_path": file})
        file = f"saved/{model}-tiny-1.pth"
    return result


@pytest.mark.parametrize(
    ("model", "stages"),
    [("S3Rec", ["pretrain", "finetune"]), ("RaCT", ["actor_pretrain", "critic_pretrain", "finetune"])],
)
def test_stages_of_pretraining_follow_each_other(graph_path, model, stages, capfd):
    result = pretrained(graph_path, model, stages, state="INFO")
    assert result["test_result"]
    assert "Logging error" not in capfd.readouterr().err
    named = {"pre_model_path": result["config"]["pre_model_path"]}  # a checkpoint alone opens no other file
    assert load_data_and_model(result["run_folder"], named)[1] is not None


@pytest.mark.parametrize(
    ("teacher", "student", "keys"),
    [
        ("BPR", "ConvNCF", {"train_method": "after_pretrain", "pre_model_path": "{}"}),
        ("FISM", "NAIS", {"pretrain_path": "{}"}),
    ],
)
def test_a_checkpoint_of_a_run_pretrains_another_model(graph_path, teacher, student, keys):
    base = {"data_path": str(graph_path), **QUIET, **RUNS[student][""], "embedding_size": 8}
    size = {"embedding_size": 8} if teacher == "BPR" else {"embedding_size": 8, "weight_size": 8}
    first = run_recbole_fedkd(teacher, "tiny", config_dict={**base, **RUNS[teacher][""], **size})
    file = str(Path(first["run_folder"]) / "best.pth")
    given = {**base, **{key: value.format(file) for key, value in keys.items()}}
    assert run_recbole_fedkd(student, "tiny", config_dict=given, saved=False)["test_result"]
