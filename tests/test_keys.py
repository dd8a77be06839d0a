"""Keys and values: whatever a user writes is read as he means it, or refused in one sentence before anything runs."""

import ast
import importlib.util
import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import SMALL, write_dataset
from hypothesis import given
from hypothesis import strategies as st

from recbole_fedkd import run_recbole_fedkd
from recbole_fedkd.checkpoint.resumed import resumable_keys
from recbole_fedkd.command_line import main, parse_arguments
from recbole_fedkd.config import FedKDConfig
from recbole_fedkd.config.early import recbole_arguments
from recbole_fedkd.config.files import DESCRIBED, PROPERTIES, files_of_model
from recbole_fedkd.config.keys import ROLES, keys_with, read_keys
from recbole_fedkd.config.known import KnownKeys, _keys_of_all_models
from recbole_fedkd.config.synonyms import synonyms
from recbole_fedkd.config.values import parse_value, read_yaml
from recbole_fedkd.errors import NAMED, InputError, TrainingError, listed, shown
from recbole_fedkd.registry import declared_settings

ROOT = Path(__file__).resolve().parent.parent


def config(model="AttnFedKD", dataset="ml-100k", **keys) -> FedKDConfig:
    return FedKDConfig(model, dataset, config_dict=keys)


def refusal(model="AttnFedKD", **keys) -> str:
    with pytest.raises(InputError) as caught:
        config(model, **keys)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 2001
    return str(caught.value)


def write_few(folder: Path, items: int, per_user: int) -> Path:
    """A dataset ``tiny`` of 12 users, each of whom has rated the next ``per_user`` items of a few."""
    rows = [
        f"u{user}\ti{(user + place) % items}\t{1 if (user + place) % 5 == 0 else 5}\t{100 * user + place}"
        for user in range(12)
        for place in range(per_user)
    ]
    (folder / "tiny").mkdir()
    header = "user_id:token\titem_id:token\trating:float\ttimestamp:float"
    (folder / "tiny" / "tiny.inter").write_text("\n".join([header, *rows]) + "\n")
    return folder


class TestValues:
    @pytest.mark.parametrize(
        ("text", "value"),
        [
            ("{inter: [user_id, item_id]}", {"inter": ["user_id", "item_id"]}),
            ("{split: {RS: [0.8, 0.1, 0.1]}}", {"split": {"RS": [0.8, 0.1, 0.1]}}),
            ("{ split: {LS: valid_and_test}, order: TO }", {"split": {"LS": "valid_and_test"}, "order": "TO"}),
            ("{sample_num: 4, dynamic: false}", {"sample_num": 4, "dynamic": False}),
            ("{'item.*': 1e-3, b: .5}", {"item.*": 0.001, "b": 0.5}),
            ("[{embedding_size: 4}, {}]", [{"embedding_size": 4}, {}]),
            ("{rating:3}", {"rating": 3}),
            ("{split:{LS:test_only},order:TO}", {"split": {"LS": "test_only"}, "order": "TO"}),
            ("{split:{RS:[8,1,1],LS:x}}", {"split": {"RS": [8, 1, 1], "LS": "x"}}),
            ("{partition:dirichlet:0.5}", {"partition": "dirichlet:0.5"}),
            ("[1e-3, 1E5, -2]", [0.001, 1e5, -2]),
            ("5,10", (5, 10)),
            ("null", None),
            ("[2,inf)", "[2,inf)"),
            ("{a, b", "{a, b"),
            ("{a, b}", "{a, b}"),
            ("2024-01-01", "2024-01-01"),
            ("[2024-01-01, 12:30]", ["2024-01-01", "12:30"]),
            ("!!python/object/apply:os.getcwd []", "!!python/object/apply:os.getcwd []"),
            ("[!!python/object/apply:os.getcwd []]", "[!!python/object/apply:os.getcwd []]"),
            ("b'x'", "b'x'"),
            ("...", "..."),
            ("[" * 5000, "[" * 5000),
            ("[" * 5000 + "]" * 5000, "[" * 5000 + "]" * 5000),
            ("", ""),
            (" ", " "),
        ],
    )
    def test_a_text_is_what_it_says_and_nothing_is_executed(self, text, value):
        assert parse_value(text) == value

    @given(st.text(max_size=60))
    def test_any_text_at_all_is_read(self, text):
        value = parse_value(text)
        assert value is None or isinstance(value, str | int | float | list | tuple | dict)

    def test_a_key_that_takes_texts_keeps_what_was_written(self):
        chosen = FedKDConfig("BPR", "ml-100k", command_line={"checkpoint_dir": "1_000", "wandb_project": "1e3"})
        assert (chosen["checkpoint_dir"], chosen["wandb_project"]) == ("1_000", "1e3")

    @pytest.mark.parametrize(
        ("key", "given", "value"),
        [
            ("attention", "yes", True),
            ("attention", "off", False),
            ("attention", 0, False),
            ("attention", "TRUE", True),
            ("learning_rate", "1e-3", 0.001),
            ("learning_rate", np.float32(0.5), 0.5),
            ("epochs", 4.0, 4),
            ("epochs", "1e1", 10),
            ("client_num", "+5", 5),
            ("topk", 5, [5]),
            ("topk", (5, 10), [5, 10]),
            ("topk", np.array([5, 10]), [5, 10]),
            ("metrics", "MAE", ["MAE"]),
            ("gpu_id", [0, 1], "0,1"),
            ("eval_args", {"split": {"RS": [8, 1, 1]}}, None),
        ],
    )
    def test_a_value_is_converted_where_its_meaning_is_plain(self, key, given, value):
        chosen = config(**{key: given})[key]
        assert value is None or (chosen == value and type(chosen) is type(value))

    def test_a_config_file_may_hold_any_of_them(self, tmp_path):
        file = tmp_path / "c.yaml"
        file.write_text("learning_rate: 1e-3\ngamma: '0.5'\nattention: yes\ntopk: 5\ngpu_id: !!python/tuple [0, 1]\n")
        chosen = FedKDConfig("AttnFedKD", "ml-100k", str(file))
        assert [chosen[key] for key in ("learning_rate", "gamma", "attention", "topk")] == [0.001, 0.5, True, [5]]

    def test_reading_a_config_leaves_yaml_of_the_process_as_it_was(self):
        config()
        assert yaml.load("1e-3", yaml.FullLoader) == "1e-3" and yaml.safe_load("2024-01-01").year == 2024


class TestFiles:
    @pytest.mark.parametrize(
        ("content", "says"),
        [
            (b"a: [1, 2\nb: }", "is not valid yaml"),
            (b"- 1\n", "holds a list; it must hold `key: value` lines"),
            (b"just words", "holds a str"),
            (b"epochs: 1\n\tgamma: 2\n", "is not valid yaml"),
            (b"epochs: 1\nepochs: 2\n", "'epochs' stands there twice"),
            (b"gamma: \xff\xfe", "not encoded in utf-8"),
            (b"[" * 20_000, "nests too deep"),
            (b"gamma: " + b"[" * 2_000 + b"]" * 2_000, "nests too deep"),
            (b"gamma: &a [*a]", "nests too deep"),
            (
                b"".join([b"a: &a0 [1,1,1,1,1,1,1,1,1,1]\n"] + [
                    f"b{n}: &a{n} [{','.join([f'*a{n - 1}'] * 10)}]\n".encode() for n in range(1, 9)
                ]),
                "holds more than 100000 values",
            ),
            (b"1: 2\n", "key 1 is not a text"),
            (b"? [a, b]\n: 2\n", "is not valid yaml"),
            (b"gamma: !!python/object/apply:os.getcwd []\n", "is not valid yaml"),
            (b"gamma: .nan\n", "gamma is nan, which is no finite number; it must be a number >= 0"),
            (b"gamma: .inf\n", "gamma is inf, which is no finite number"),
            (b"a\x00b: 1\n", "is not valid yaml"),
            (b"epochs: " + b"9" * 6000, "is not valid yaml"),
        ],
    )  # fmt: skip
    def test_a_file_that_cannot_be_used_is_told_in_one_sentence(self, tmp_path, content, says):
        file = tmp_path / "c.yaml"
        file.write_bytes(content)
        with pytest.raises(InputError) as caught:
            FedKDConfig("AttnFedKD", "ml-100k", [str(file)])
        assert says in str(caught.value) and len(str(caught.value)) <= 2000 and "\n" not in str(caught.value)

    def test_a_folder_a_device_and_nothing_are_told(self, tmp_path):
        for place in (tmp_path, "/dev/zero", tmp_path / "none.yaml", "a\0b"):
            with pytest.raises(InputError, match="config file"):
                FedKDConfig("AttnFedKD", "ml-100k", [str(place)])

    def test_an_empty_file_and_one_with_a_byte_order_mark_are_read(self, tmp_path):
        (tmp_path / "empty.yaml").write_text("")
        (tmp_path / "marked.yaml").write_bytes(b"\xef\xbb\xbfgamma: 0.5\n")
        files = [str(tmp_path / "empty.yaml"), str(tmp_path / "marked.yaml")]
        assert FedKDConfig("AttnFedKD", "ml-100k", files)["gamma"] == 0.5

    def test_merge_keys_are_no_duplicates(self, tmp_path):
        file = tmp_path / "c.yaml"
        file.write_text("a: &base {x: 1, y: 2}\nb: {<<: *base, x: 3}\n")
        assert read_yaml(file, "file")["b"] == {"x": 3, "y": 2}


class TestNames:
    @pytest.mark.parametrize(
        ("name", "key"),
        [
            ("num_clients", "client_num"), ("n_clients", "client_num"), ("num_rounds", "epochs"), ("rounds", "epochs"),
            ("communication_rounds", "epochs"), ("lr", "learning_rate"), ("batch_size", "train_batch_size"),
            ("local_steps", "local_epochs"), ("local_epoch", "local_epochs"), ("E", "local_epochs"),
            ("fraction_fit", "clients_per_round"), ("client_fraction", "clients_per_round"),
            ("participation", "clients_per_round"), ("optimizer", "learner"), ("mu", "proximal_weight"),
            ("embedding_dim", "embedding_size"), ("emb_dim", "embedding_size"), ("temp", "temperature"),
            ("kd_weight", "alpha"), ("device", "gpu_id"), ("cuda", "gpu_id"), ("aggregation_method", "aggregation"),
            ("method", "strategy"), ("early_stopping", "stopping_step"), ("patience", "stopping_step"),
            ("num_negatives", "train_neg_sample_args"), ("compression", "codecs"), ("num-clients", "client_num"),
            ("random_seed", "seed"), ("num_workers", "worker"), ("output_dir", "checkpoint_dir"),
        ],
    )  # fmt: skip
    def test_the_fields_words_are_understood(self, name, key):
        assert f"{key}" in refusal(**{name: 1})

    def test_num_clients_is_called_client_num(self):
        assert refusal(num_clients=8) == "key 'num_clients' is unknown; here it is called client_num"

    def test_a_misspelling_names_the_nearest(self):
        assert "did you mean 'stopping_step'" in refusal(stoping_step=3)

    def test_every_synonym_names_a_key_that_there_is(self):
        known = {*config()._known.keys, *_keys_of_all_models()}
        others, notes = synonyms()
        assert {*others.values(), *notes} <= known
        assert all(name == name.lower() for name in others)

    def test_a_synonym_that_another_model_reads_is_still_told(self):
        assert config(n_heads=4).unread() == ["n_heads; here it is called attention_heads"]

    def test_a_computed_key_says_what_it_follows_from(self):
        assert "follows from gpu_id" in refusal(device="cuda")
        assert "follows from eval_args.mode" in refusal(valid_neg_sample_args={})


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"seed": 2**32}, "in [0, 4294967295]"),
        ({"attention_heads": 9223372036854775808}, "too large"),
        ({"embedding_size": 10**9}, "embedding_size is 1000000000; it must be an integer in [1, 65536]"),
        ({"train_batch_size": 10**30}, "too large"),
        ({"learning_rate": 10**400}, "too large"),
        ({"learning_rate": float("nan")}, "learning_rate is nan, which is no finite number"),
        ({"learning_rates": {"a*": float("inf")}}, "learning_rates.a* is inf, which is no finite number; it must be"),
        ({"privacy": {"clip": float("nan")}}, "privacy.clip is nan, which is no finite number; it must be a number > 0"),
        ({"privacy": {"clip": 1.0, "clips": {"a": float("nan")}}}, "privacy.clips.a is nan, which is no finite number"),
        ({"label_values": [1, float("nan")]}, "no finite number"),
        ({"stopping_step": -1}, "stopping_step is -1; it must be an integer >= 0"),
        ({"eval_step": -1}, "eval_step is -1"),
        ({"metric_decimal_place": -3}, "metric_decimal_place is -3"),
        ({"clients_per_round": 0.1}, "clients_per_round is 0.1; it must be an integer >= 1"),
        ({"client_num": -4}, "client_num is -4"),
        ({"local_epochs": 0}, "local_epochs is 0"),
        ({"topk": 0}, "topk is 0; it must be an integer >= 1 or a list of them"),
        ({"topk": []}, "topk is []"),
        ({"topk": [5, True]}, "topk is [5, True]"),
        ({"topk": [2.5]}, "topk is [2.5]"),
        ({"topk": None}, "topk is None"),
        ({"topk": "ten"}, "topk is 'ten'; it must be an integer or a list"),
        ({"unused_col": {"rating": 1}}, "key 'unused_col.rating' is unknown"),
        ({"unused_col": {"inter": 1}}, "unused_col.inter is 1; it must be a list of column names"),
        ({"load_col": {"inter": "user_id"}}, "load_col.inter is 'user_id'; it must be a list"),
        ({"load_col": "{inter: [user_id"}, "load_col is '{inter: [user_id'; it must be a dict"),
        ({"load_col": {"interactions": ["user_id"]}}, "key 'load_col.interactions' is unknown; allowed are inter, user, item"),
        ({"threshold": {"rating": "four"}, "label_mode": None, "preset": None}, "must name one column and a number"),
        ({"benchmark_filename": ["a", "b"]}, "must name three files"),
        ({"clip_grad_norm": {"max_norm": 0}}, "a number > 0"),
        ({"clip_grad_norm": {"maxnorm": 1}}, "did you mean 'max_norm'"),
        ({"eval_args": {"split": {}}}, "eval_args.split is {}; it must be one of {'RS': [0.8, 0.1, 0.1]}"),
        ({"eval_args": {"split": None}}, "eval_args.split is None"),
        ({"eval_args": {"split": {"RS": [8, 1, 1], "LS": "valid_only"}}}, "it must be one of"),
        ({"eval_args": {"split": {"KS": [8, 1, 1]}}}, "it must be one of"),
        ({"eval_args": {"split": {"RS": [0.8, 0.2]}}}, "[0.8, 0, 0.2] has no validation"),
        ({"eval_args": {"split": {"RS": [0.7, 0.1, 0.1, 0.1]}}}, "which are 4 shares"),
        ({"eval_args": {"split": {"RS": [0.5, 0.1, 0.1]}}}, "which sums to 0.7"),
        ({"eval_args": {"split": {"RS": [0.8, 0.3, -0.1]}}}, "negative share"),
        ({"eval_args": {"split": {"RS": [0, 0.5, 0.5]}}}, "nothing to train on"),
        ({"eval_args": {"split": {"RS": [1, 0, 0]}}}, "nothing to judge by"),
        ({"eval_args": {"split": {"RS": ["a", "b", "c"]}}}, "three shares"),
        ({"eval_args": {"split": {"RS": 0.8}}}, "three shares"),
        ({"eval_args": {"split": {"LS": "test"}}}, "valid_and_test, valid_only, test_only"),
        ({"eval_args": {"order": "RT"}}, "eval_args.order is 'RT'; it must be RO (random) or TO (by time)"),
        ({"eval_args": {"group_by": "item"}}, "eval_args.group_by is 'item'; it must be user or none"),
        ({"eval_args": {"mode": {"train": "full"}}}, "allowed are valid and test"),
        ({"eval_args": {"mode": 5}}, "eval_args.mode is 5"),
        ({"eval_args": {"mode": "uni0"}}, "allowed are full, labeled, uni<N> and pop<N>"),
        ({"eval_args": [1]}, "eval_args is [1]; it must be a dict"),
        ({"train_neg_sample_args": {"distribution": "even"}}, "one of uniform, popularity, none"),
        ({"train_neg_sample_args": {"sample_num": 0}}, "sample_num is 0; it must be an integer >= 1"),
        ({"train_neg_sample_args": {"dynamic": True}}, "candidate_num is 0; it must be an integer >= 1"),
        ({"gpu_id": "cuda:0"}, "gpu_id is 'cuda:0'; it must be the number of a GPU"),
        ({"learner": "adamm"}, "did you mean 'adam'"),
        ({"state": "LOUD"}, "state is 'LOUD'; it must be one of DEBUG"),
        ({"rm_dup_inter": "maybe"}, "one of first, last"),
        ({"epochs": "abc" * 1000}, "it must be an integer >= 1"),
        ({"hidden_sizes": [*range(1, 10_000), "a"]}, "it must be a list of integers"),
        ({5: 1}, "key 5 is not a text"),
        ({"x" * 5000: 1}, "is unknown"),
    ],
)  # fmt: skip
def test_a_value_that_cannot_be_used_is_told_before_anything_runs(keys, says):
    with pytest.raises(InputError) as caught:
        FedKDConfig("AttnFedKD", "ml-100k", config_dict=keys)
    assert says in str(caught.value) and len(str(caught.value)) <= 2000


class TestSplits:
    @pytest.mark.parametrize("shares", [[8, 1, 1], [80, 10, 10], [0.8, 0.1, 0.1], [8.0, 1.0, 1.0], (8, 1, 1)])
    def test_shares_and_proportions_give_the_same_rows(self, run, shares):
        keys = {"epochs": 1, "eval_args": {"split": {"RS": shares}}, "metrics": ["MAE"]}
        first = run(saved=False, **keys)["test_result"]
        assert first == run(saved=False, **{**keys, "eval_args": {}})["test_result"]

    @pytest.mark.parametrize("split", [{"RS": [0.8, 0, 0.2]}, {"LS": "test_only"}, {"LS": "valid_only"}])
    def test_a_part_may_be_empty(self, run, split):
        result = run(saved=False, epochs=1, eval_args={"split": split})
        judged = result["best_valid_result"] if split == {"LS": "valid_only"} else result["test_result"]
        assert judged["mae"] > 0

    def test_what_a_user_leaves_out_of_eval_args_comes_from_the_layer_below(self, tmp_path):
        """RecBole fills it from fixed defaults: SASRec judged by a random split, a click model by modes it refuses."""
        args = config("SASRec", eval_args={"mode": "uni100"}, train_neg_sample_args=None)["eval_args"]
        assert args["split"] == {"LS": "valid_and_test"} and args["order"] == "TO"
        assert config("WideDeep", eval_args={"order": "TO"})["eval_args"]["mode"] == {
            "valid": "labeled",
            "test": "labeled",
        }
        (tmp_path / "c.yaml").write_text("eval_args: {split: {LS: valid_and_test}}\n")
        chosen = FedKDConfig("BPR", "ml-100k", [tmp_path / "c.yaml"], {}, {"eval_args": "{order: TO}"})["eval_args"]
        assert (chosen["split"], chosen["order"], chosen["group_by"]) == ({"LS": "valid_and_test"}, "TO", "user")
        assert (
            config("BPR", train_neg_sample_args={"sample_num": 4})["train_neg_sample_args"]["distribution"] == "uniform"
        )


class TestMetrics:
    def test_the_default_valid_metric_follows_topk(self):
        assert config("BPR", topk=[5, 20])["valid_metric"] == "MRR@5"
        assert config("BPR", topk=[20, 10])["valid_metric"] == "MRR@10"
        assert config("BPR", topk=7)["valid_metric"] == "MRR@7"
        assert config("AttnFedKD", topk=[5, 20])["valid_metric"] == "MAE"

    def test_the_default_valid_metric_follows_metrics(self):
        assert config("BPR", metrics=["NDCG", "Hit"])["valid_metric"] == "NDCG@10"
        assert config("BPR", metrics=["ItemCoverage"], topk=[3])["valid_metric"] == "ItemCoverage@3"
        assert config("AttnFedKD", metrics=["Recall", "AUC"])["valid_metric"] == "Recall@10"
        assert config("AttnFedKD", metrics="RMSE")["valid_metric"] == "RMSE"

    def test_a_users_own_valid_metric_stands_or_is_refused_with_one_that_works(self):
        assert config("BPR", topk=[5, 20], valid_metric="NDCG@20")["valid_metric"] == "NDCG@20"
        told = refusal("BPR", topk=[5, 20], valid_metric="NDCG@10")
        assert "needs @k with a k of topk [5, 20], such as NDCG@5" in told
        assert "not among metrics" in refusal(metrics=["MAE"], valid_metric="AUC")

    def test_default_metrics_run_with_any_topk(self, run):
        result = run("BPR", saved=False, topk=[5, 20], epochs=1)
        assert {"mrr@5", "mrr@20"} <= result["test_result"].keys()


class TestBeforeTraining:
    """What only the data can tell is told before the first round."""

    @pytest.fixture(autouse=True)
    def _no_training(self, monkeypatch):
        from recbole_fedkd.trainer import CheckpointTrainer

        def trained(*_, **__):
            raise AssertionError("it has been trained")

        monkeypatch.setattr(CheckpointTrainer, "_train_epoch", trained)

    @pytest.mark.parametrize(
        ("keys", "says"),
        [
            ({"topk": [10, 50]}, "topk holds 50, but dataset 'tiny' has only 40 item"),
            ({"clients_per_round": 5}, "clients_per_round is 5, but there are only 3 clients"),
            ({"clients_per_round": 31, "partition": "user"}, "there are only 30 clients"),
            ({"client_num": 31}, "client_num is 31, but the dataset has only 30"),
        ],
    )
    def test_more_than_the_data_have(self, run, keys, says):
        with pytest.raises(InputError, match=says):
            run(**keys)

    @pytest.mark.parametrize("model", ["AttnFedKD", "BPR"])
    def test_a_default_topk_is_shortened_to_a_small_catalogue_with_a_word(self, tmp_path, model, caplog):
        path = write_few(tmp_path, items=7, per_user=5)
        keys = {key: value for key, value in SMALL.items() if key not in ("topk", "load_col")}
        keys.update(data_path=str(path), metrics=["NDCG", "MRR"])
        with pytest.raises(AssertionError, match="trained"):
            run_recbole_fedkd(model, "tiny", config_dict=keys)
        assert (
            "topk holds 10, but dataset 'tiny' has only 7 item(s): judged at topk=[7], as you set none" in caplog.text
        )
        for own in ({"topk": [10]}, {"valid_metric": "NDCG@10"}):
            with pytest.raises(InputError, match="topk holds 10, but dataset 'tiny' has only 7"):
                run_recbole_fedkd(model, "tiny", config_dict={**keys, **own})

    def test_one_item_is_told_by_whatever_samples_first(self, tmp_path):
        path = write_few(tmp_path, items=1, per_user=1)
        with pytest.raises(InputError, match="has one item, so that there is nothing to sample or to rank it against"):
            run_recbole_fedkd(
                "AttnFedKD", "tiny", config_dict={**SMALL, "data_path": str(path), "topk": [1], "load_col": None}
            )

    def test_parameters_beyond_the_machine(self, run, monkeypatch):
        import psutil

        monkeypatch.setattr(psutil, "virtual_memory", type("Memory", (), {"total": 2000}))
        with pytest.raises(InputError, match="model 'NeuMF': its parameters take more than the 0 GB of this machine"):
            run("NeuMF", mf_embedding_size=32)

    @pytest.mark.parametrize("model", ["BPR", "FPMC", "LightGCN"])
    def test_a_model_of_pairs_needs_sampled_negatives(self, run, model):
        with pytest.raises(InputError, match=f"model '{model}' learns .* train_neg_sample_args"):
            run(model, train_neg_sample_args=None)

    def test_topk_of_the_whole_catalogue_is_none_too_many(self, run):
        with pytest.raises(AssertionError, match="trained"):
            run(topk=[40])

    def test_vectors_beyond_the_machine(self, run, monkeypatch):
        import psutil

        monkeypatch.setattr(psutil, "virtual_memory", type("Memory", (), {"total": 1000}))
        with pytest.raises(InputError, match="embedding_size is 4: the vectors of 30 users and 40 items"):
            run()


class TestDatasets:
    @pytest.mark.parametrize(
        ("name", "says"),
        [
            ("ml-1mm", "did you mean 'ml-1m'"),
            ("tinny", "did you mean 'tiny'"),
            ("qqqqqqqqq", "name the parent of its folder by --data_path"),
            ("../tiny", "must be the name of a folder in data_path"),
            ("tiny/", "must be the name of a folder"),
            ("..", "must be the name of a folder"),
        ],
    )
    def test_an_unknown_dataset_has_a_suggestion_and_nothing_before_it(self, capsys, data_path, name, says):
        assert main(["--model=AttnFedKD", f"--dataset={name}", f"--data_path={data_path}"]) == 2
        captured = capsys.readouterr()
        assert says in captured.err and len(captured.err.splitlines()) == 1 and not captured.out
        assert not list(Path.cwd().rglob("*.log"))

    def test_a_file_in_the_place_of_the_folder(self, tmp_path):
        (tmp_path / "flat").write_text("")
        with pytest.raises(InputError, match="is a file"):
            run_recbole_fedkd("AttnFedKD", "flat", config_dict={"data_path": str(tmp_path)})

    def test_a_name_that_looks_like_a_number(self, tmp_path):
        folder = write_dataset(tmp_path, "1_000")
        keys = {f"--{key}": str(value) for key, value in {**SMALL, "epochs": 1}.items()}
        arguments = [f"{key}={value}" for key, value in keys.items()]
        assert main(["--model=AttnFedKD", "--dataset=1_000", f"--data_path={folder}", *arguments]) == 0


class TestSentences:
    def test_long_lists_are_counted(self):
        assert listed(range(3)) == "0, 1, 2"
        assert listed(range(943)) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 933 more"
        assert listed(dict.fromkeys("ab")) == "a, b" and NAMED == 10

    def test_values_are_shown_short(self):
        loop: list = []
        loop.append(loop)
        assert len(shown(loop)) < 200 and len(shown("x" * 10_000)) < 300
        assert (
            len(shown(dict.fromkeys(range(10_000)))) < 400
            and shown({"RS": [0.8, 0.1, 0.1]}) == "{'RS': [0.8, 0.1, 0.1]}"
        )


@pytest.mark.parametrize(
    ("model", "keys", "says"),
    [
        ("SASRec", {"n_layers": 10**9}, "n_layers is 1000000000; it must be 1024 at most"),
        ("SASRec", {"hidden_size": 10**9}, "hidden_size is 1000000000; it must be 65536 at most"),
        ("LightGCN", {"n_layers": 10**9}, "n_layers is 1000000000; it must be 1024 at most"),
        ("WideDeep", {"mlp_hidden_size": [10**9]}, "mlp_hidden_size is .1000000000.; it must be 65536 at most"),
        ("DiffRec", {"steps": 10**9}, "steps is 1000000000; it must be 65536 at most"),
        ("ItemKNN", {"k": 10**6}, "k is 1000000; it must be 65536 at most"),
    ],
)
def test_sizes_of_recboles_models_are_bounded(model, keys, says):
    with pytest.raises(InputError, match=says):
        config(model, **keys, **({"train_neg_sample_args": None} if model == "SASRec" else {}))


@pytest.mark.parametrize("suffixes", [[0], (0, "x"), 3, [None], [["x"]]])
def test_a_suffix_that_is_no_text_is_refused_wherever_it_is_read_first(suffixes):
    for keys in ({}, {"unload_col": {"item_id": ["a"]}}):
        assert refusal(**keys, additional_feat_suffix=suffixes)


def test_a_default_of_none_is_not_told_as_a_kind_of_value():
    assert refusal(topk="ten").endswith("it must be an integer or a list")


def test_counts_of_steps_and_large_weights_are_not():
    config("MultiDAE", anneal_steps=10**7)
    config("EASE", reg_weight=250_000)


@pytest.mark.parametrize(
    "arguments",
    [["--model=BPR", "--metrics=NDGC"], ["--model"], ["-m"], ["--=1"], ["---"], ["--a=1", "--a=2"], ["model=BPR"]],
)
def test_the_exit_code_of_bad_input_is_two(capsys, arguments):
    assert main([*arguments, "--dataset=ml-100k"] if len(arguments) > 1 else arguments) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_arguments_may_hold_equal_signs_and_stand_apart():
    assert parse_arguments(["--a=b=c", "--gamma", "-0.5", "-d", "x", "-m=BPR"]) == {
        "a": "b=c", "gamma": "-0.5", "dataset": "x", "model": "BPR"
    }  # fmt: skip


def test_every_pair_of_a_key_and_an_odd_value_is_read_or_refused():
    odd = [None, True, -1, 2**70, float("nan"), "", "x", [], [[]], {}, {"a": {"b": 1}}, (1,), "[1", "1e400"]
    base = config()
    for name, value in itertools.product(base._known.keys, odd):
        if name in ("model", "dataset", "config_files"):
            continue
        try:
            base._known.check({name: value})
        except InputError as error:
            assert len(str(error)) <= 2000


@pytest.mark.parametrize(
    ("model", "keys", "says"),
    [
        (
            "BPR",
            {"metrics": ["MAE", "NDCG"]},
            "value metrics MAE need a label, but dataset 'tiny' has no column 'label'",
        ),
        ("BPR", {"metrics": ["AUC"]}, "value metrics AUC need a label"),
        ("BPR", {"metrics": ["AUC"], "eval_args": {"mode": "full"}}, "eval_args.mode is full, which ranks all items"),
        ("BPR", {"eval_args": {"mode": "labeled"}}, "eval_args.mode is labeled, which judges rows one by one"),
        ("BPR", {"LABEL_FIELD": "user_id"}, "USER_ID_FIELD and LABEL_FIELD are both 'user_id'"),
        ("BPR", {"TIME_FIELD": " "}, "TIME_FIELD is ' '; it must be the name of a column"),
        ("BPR", {"learner": "sparse_adam"}, "learner 'sparse_adam' does not go with the gradients of model 'BPR'"),
        ("MF", {"learning_rates": {"nothing.*": 0.1}}, "no parameter of the network matches 'nothing.*'"),
    ],
)
def test_what_does_not_go_together_is_told_by_the_keys_that_mend_it(run, model, keys, says):
    with pytest.raises((InputError, TrainingError)) as caught:
        run(model, saved=False, epochs=1, **keys)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_random_configs_are_run_or_refused_in_a_sentence(tmp_path):
    """The short form of benchmarks/fuzz_configs.py."""
    spec = importlib.util.spec_from_file_location("fuzz_configs", ROOT / "benchmarks" / "fuzz_configs.py")
    fuzz_configs = importlib.util.module_from_spec(spec)
    sys.modules["fuzz_configs"] = fuzz_configs
    spec.loader.exec_module(fuzz_configs)
    broken = fuzz_configs.fuzz(cases=120, runs=40, seed=7, folder=tmp_path / "data")
    assert not broken, broken[0]


class TestRoles:
    def test_every_role_that_a_line_names_is_one_and_every_one_is_named(self):
        files = (DESCRIBED, *PROPERTIES.glob("model/*.yaml"), PROPERTIES / "overall.yaml")
        named = {role for file in files for key in read_keys(file).values() for role in key.roles}
        assert named == ROLES.keys()

    def test_where_a_run_lies_and_how_fast_it_is_is_the_same_list_for_everybody(self):
        aside = keys_with("aside")
        assert {"data_path", "checkpoint_dir", "state", "torch_threads", "fleet_threads", "gpu_id", "device"} <= aside
        assert not aside & {"seed", "epochs", "learning_rate", "strategy", "gamma", "model", "dataset", "metrics"}
        assert aside <= resumable_keys() and {"epochs", "plugins", "topk"} <= resumable_keys()
        assert not resumable_keys() & {"seed", "learning_rate", "gamma", "client_num", "dataset", "model"}

    def test_whatever_is_declared_in_python_is_the_federations(self):
        assert declared_settings().keys() <= keys_with("federation")
        assert not keys_with("federation") & {"epochs", "label_mode", "attention", "reg_weight", "learning_rates"}

    def test_no_module_keeps_a_list_of_key_names_beside_the_declarations(self):
        """What else is told of a key is one of its roles."""
        known = set(KnownKeys(recbole_arguments(), "AttnFedKD", "ml-100k", files_of_model("AttnFedKD")).keys)
        # Synonyms, checks by key, columns and files as parts of code.
        apart = {"synonyms.py", "shapes.py", "columns.py", "completion.py", "collector.py", "student.py"}
        for file in sorted((ROOT / "recbole_fedkd").rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text())) if file.name not in apart else ():
                names = node.elts if isinstance(node, ast.Tuple | ast.Set | ast.List) else []
                texts = [each.value for each in names if isinstance(each, ast.Constant) and isinstance(each.value, str)]
                lowered = [text for text in texts if text in known and not text.isupper()]
                assert len(lowered) < 4 or len(lowered) < len(texts), f"{file}, line {node.lineno}: {texts}"
