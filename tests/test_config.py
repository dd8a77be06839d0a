"""Config and command line: every bad input gets one clear line, and sys.argv is nobody's but the command line's."""

import dataclasses
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from conftest import SMALL, write_dataset

from recbole_fedkd.command_line import main, parse_arguments
from recbole_fedkd.config import FedKDConfig
from recbole_fedkd.config.files import PROPERTIES
from recbole_fedkd.config.keys import Key, declared_keys, read_keys
from recbole_fedkd.config.models import find_model
from recbole_fedkd.config.values import parse_value
from recbole_fedkd.errors import InputError
from recbole_fedkd.federated.strategy import STRATEGIES
from recbole_fedkd.registry import declared_settings

ROOT = Path(__file__).resolve().parent.parent


def config(model="AttnFedKD", dataset="ml-100k", **keys) -> FedKDConfig:
    return FedKDConfig(model, dataset, config_dict=keys)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"learning_rat": 0.1}, "key 'learning_rat' is unknown; did you mean 'learning_rate'"),
        ({"gama": 0.1}, "did you mean 'gamma'"),
        ({"eval_args": {"splitt": {}}}, "key 'eval_args.splitt' is unknown; did you mean 'split'"),
        ({"train_neg_sample_args": {"sample_nun": 1}}, "did you mean 'sample_num'"),
        ({"epochs": "abc"}, "epochs is 'abc'; it must be an integer"),
        ({"client_num": 0}, "client_num is 0; it must be an integer >= 1"),
        ({"client_num": 2.5}, "client_num is 2.5; it must be an integer >= 1"),
        ({"client_num": True}, "client_num is True"),
        ({"dropout_prob": 1.0}, "dropout_prob is 1.0; it must be a number in [0, 1)"),
        ({"gamma": -0.1}, "gamma is -0.1; it must be a number >= 0"),
        ({"temperature": 0}, "temperature is 0; it must be a number > 0"),
        (
            {"strategy": "afdd"},
            f"strategy is 'afdd'; it must be one of {', '.join(STRATEGIES)}, central; did you mean 'afd'",
        ),
        ({"backbone": "rnn"}, "backbone is 'rnn'; it must be one of cnn, mlp"),
        ({"engine": "fast"}, "engine is 'fast'"),
        ({"preset": "adf"}, "did you mean"),
        ({"label_mode": "stars"}, "label_mode is 'stars'; it must be one of rating, threshold, implicit"),
        ({"hidden_sizes": 3}, "hidden_sizes is 3; it must be a list"),
        ({"attention": "maybe"}, "attention is 'maybe'; it must be True or False"),
        ({"metrics": ["NDCG", "Acuracy"]}, "metric 'Acuracy' is unknown; did you mean 'accuracy'"),
        ({"valid_metric": "NDGC@10"}, "valid_metric 'NDGC@10' is unknown"),
        ({"valid_metric": "NDCG@5"}, "needs @k with a k of topk [10]"),
        ({"valid_metric": "NDCG"}, "needs @k with a k of topk [10]"),
        ({"valid_metric": "NDCG@ten"}, "needs @k with a k of topk [10]"),
        ({"valid_metric": "LabelledNDCG"}, "needs @k with a k of topk [10]"),
        ({"valid_metric": "MAE@10"}, "has a k, which MAE does not take"),
        ({"preset": None}, f"strategy is not set; it must be one of {', '.join(STRATEGIES)}"),
        ({"metrics": 5}, "metrics is 5; it must be a list of metric names"),
        ({"metrics": [5]}, "metric '5' is unknown"),
        ({"hidden_sizes": []}, "hidden_sizes is []; it must be a list of integers each in [1, 65536]"),
        ({"hidden_sizes": ["a"]}, "it must be a list of integers"),
        ({"label_values": ["a"]}, "label_values is ['a']; it must be a list of numbers"),
        ({"learning_rate": -1}, "learning_rate is -1; it must be a number >= 0"),
        ({"epochs": 0}, "epochs is 0; it must be an integer >= 1"),
        ({"seed": -1}, "seed is -1; it must be an integer in [0, 4294967295]"),
        ({"log_wandb": True}, "wandb is not installed"),
        ({"label_mode": "threshold", "threshold": {"rating": 2}}, "takes rating_threshold"),
        ({"metrics": ["MAE"], "valid_metric": "AUC"}, "valid_metric 'AUC' is not among metrics"),
        ({"strategy": "central"}, "use --model=AttnStudent"),
        ({"threshold": {"rating": 4}}, "threshold is set but label_mode is 'rating'"),
        ({"eval_args": {"mode": "sometimes"}}, "allowed are full, labeled, uni<N> and pop<N>"),
        ({"model": None}, "no model is named"),
    ],
)
def test_a_bad_key_or_value_is_told_in_one_line(keys, says):
    with pytest.raises(InputError) as caught:
        FedKDConfig(None if "model" in keys else "AttnFedKD", "ml-100k", config_dict=keys)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("AttnFedDK", "did you mean 'AttnFedKD'"),
        ("WideDeap", "did you mean 'WideDeep'"),
        ("bpr", "did you mean 'BPR'"),
        ("xgboost", "did you mean 'XGBoost'"),
        ("XGBoost", "model 'XGBoost' is not run here: RecBole has the library xgboost train its trees"),
        ("LightGBM", "model 'LightGBM' is not run here"),
        ("Qwertz", "model 'Qwertz' is unknown"),
    ],
)
def test_an_unknown_model_names_the_nearest(model, says):
    with pytest.raises(InputError, match=says):
        config(model)


@pytest.mark.parametrize(
    ("model", "keys", "sentence"),
    [
        ("AttnStudent", {"strategy": "afd"}, "use --model=AttnFedKD"),
        ("MultiVAE", {"strategy": "fedavg"}, "in a way of its own"),
        ("CFKG", {"strategy": "fedavg"}, "in a way of its own"),
        ("Pop", {"strategy": "fedavg"}, "in a way of its own"),
        ("KD_DAGFM", {"strategy": "afd", "label_mode": "threshold"}, "both read alpha"),
        ("DIEN", {"label_mode": "threshold"}, "rows of its own for DIEN"),
        ("SASRec", {"label_mode": "threshold"}, "learns from labels, which SASRec is not"),
    ],
)
def test_a_model_that_a_strategy_cannot_run_over_is_told(model, keys, sentence):
    with pytest.raises(InputError, match=sentence):
        config(model, **keys)


def test_a_preset_names_its_model_and_label_mode_and_the_users_own_keys_win():
    chosen = config(None, preset="fdin")
    assert (chosen["model"], chosen["strategy"], chosen["label_mode"]) == ("DIN", "fedavg", "threshold")
    assert config("DeepFM", preset="fwd", strategy="local")["model"] == "DeepFM"


def test_a_click_model_refuses_rating_labels():
    for model in ("WideDeep", "BPR", "NeuMF"):
        with pytest.raises(InputError, match="use label_mode=threshold"):
            config(model, label_mode="rating")


def test_keys_that_mean_something_else_to_a_recbole_model_keep_its_default():
    assert config("EASE")["reg_weight"] == 250.0
    assert config("LightGCN")["reg_weight"] == 1e-5
    assert config("AttnFedKD", preset="afd")["reg_weight"] == 1e-5
    assert config("AttnFedKD", preset="fd")["reg_weight"] == 0.0


@pytest.mark.parametrize(("keys", "preset", "knowledge"), [
    ({}, "factors", "factors"),
    ({"client_num": 16, "partition": "user", "engine": "fleet", "learning_rate": 0.1, "factor_size": 8}, "factors", "factors"),
    ({"label_mode": "threshold"}, "factors", "factors"),
    ({"label_mode": "implicit"}, "afd", "label"),
    ({"strategy": "fedavg"}, "afd", "label"),
    ({"knowledge": "item"}, "afd", "item"),
    ({"embedding_size": 16}, "afd", "label"),
    ({"feature_fields": []}, "afd", "label"),
    ({"gamma": 0.05}, "afd", "label"),
    ({"clients_per_round": 2}, "afd", "label"),
    ({"secure_aggregation": True}, "afd", "label"),
    ({"student_pool": [{}]}, "afd", "label"),
    ({"preset": "afd"}, "afd", "label"),
    ({"preset": "fd"}, "fd", "label"),
])  # fmt: skip
def test_a_population_is_the_configuration_worth_using_unless_a_key_speaks_of_students(keys, preset, knowledge):
    chosen = config("AttnFedKD", **keys)
    assert (chosen["preset"], chosen["knowledge"], chosen.unread_keys) == (preset, knowledge, [])


def test_keys_of_other_models_are_no_error_but_are_named():
    chosen = config("BPR", mlp_hidden_size=[8])
    assert chosen.unread_keys == ["mlp_hidden_size"]
    assert set(config("BPR", client_num=8, gamma=3.0).unread_keys) == {"client_num", "gamma"}
    assert config("BPR", strategy="fedavg", student_pool=[{"embedding_size": 4}]).unread_keys == ["student_pool"]
    assert config("AttnFedKD", enable_scaler=True, client_num=8).unread_keys == ["enable_scaler"]


def test_defaults_that_recboles_comments_misname_are_accepted():
    config("DiffRec", noise_scale=0.1)
    config("BERT4Rec", ft_ratio=0.1, train_neg_sample_args=None)
    assert config("BPR", gpu_id=(0, 1))["gpu_id"] == "0,1"  # a tuple, as RecBole reads --gpu_id=0,1


def test_a_subclass_of_the_population_is_a_federation():
    from recbole_fedkd.model import AttnFedKD

    class Mine(AttnFedKD):
        pass

    assert config(Mine, preset="afd")["strategy"] == "afd"


def test_order_of_precedence(tmp_path):
    low, high = tmp_path / "low.yaml", tmp_path / "high.yaml"
    low.write_text("gamma: 0.31\nalpha: 0.32\ntemperature: 3.0\nclient_num: 7\n")
    high.write_text("alpha: 0.42\ntemperature: 4.0\nclient_num: 8\n")
    chosen = FedKDConfig(
        "AttnFedKD",
        "ml-100k",
        [str(low), str(high)],
        {"temperature": 5.0, "client_num": 9},
        {"client_num": "10"},
    )
    assert [chosen[key] for key in ("gamma", "alpha", "temperature", "client_num")] == [0.31, 0.42, 5.0, 10]
    assert chosen["learner"] == "adam_to_sgd"  # preset afd
    assert config(preset="fd")["attention"] is False
    assert config(preset="fd", attention=True)["attention"] is True


def test_sys_argv_is_never_read_by_a_library_call(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pytest", "--maxfail=1", "--learning_rate=0.5", "--epochs=3"])
    chosen = config(learning_rate=0.02)
    assert chosen["learning_rate"] == 0.02
    assert chosen["maxfail"] is None
    assert chosen["epochs"] != 3


def test_texts_are_read_as_values_and_never_executed():
    assert parse_value("[5, 10]") == [5, 10]
    assert parse_value("{'RS': [0.8, 0.1, 0.1]}") == {"RS": [0.8, 0.1, 0.1]}
    assert parse_value("true") is True and parse_value("None") is None and parse_value("1e-3") == 1e-3
    assert parse_value("__import__('os').getcwd()") == "__import__('os').getcwd()"
    assert parse_value("attribute:age") == "attribute:age"
    assert parse_value("[row_sparse, sign]") == ["row_sparse", "sign"] and parse_value("[MAE,AUC]") == ["MAE", "AUC"]
    assert parse_value("[2,inf)") == "[2,inf)"


def test_the_callers_dictionary_is_left_as_it_was():
    keys = {"train_neg_sample_args": {"distribution": "uniform"}, "topk": 5}
    FedKDConfig("BPR", "ml-100k", config_dict={**keys, "valid_metric": "MRR@5"})
    assert keys == {"train_neg_sample_args": {"distribution": "uniform"}, "topk": 5}


def test_arguments_of_the_command_line():
    assert parse_arguments(["--a=1", "--b", "2", "--c=x=y"]) == {"a": "1", "b": "2", "c": "x=y"}
    assert parse_arguments(["-m", "BPR", "-d", "ml-100k"]) == {"model": "BPR", "dataset": "ml-100k"}
    for bad in (["a=1"], ["--a"], ["--a=1", "--a=2"], ["--a", "--b=1"]):
        with pytest.raises(InputError):
            parse_arguments(bad)


def command(*arguments: str) -> list[str]:
    keys = {**{f"--{key}": str(value) for key, value in SMALL.items()}, "--epochs": "1"}
    given = {argument.partition("=")[0] for argument in arguments}
    return [*(f"{key}={value}" for key, value in keys.items() if key not in given), *arguments]


def refused(capsys, *arguments: str) -> str:
    before = {path for path in Path.cwd().rglob("*") if path.suffix in (".pth", ".json")}
    assert main(command(*arguments)) == 2
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if " WARNING " not in line]
    assert len(lines) == 1 and lines[0].startswith("error: "), error
    assert {path for path in Path.cwd().rglob("*") if path.suffix in (".pth", ".json")} == before
    return error


class TestCommandLine:
    def test_a_run_ends_with_zero(self, data_path):
        assert main(command("--model=AttnFedKD", "--dataset=tiny", f"--data_path={data_path}")) == 0

    def test_config_files_are_read_in_order(self, data_path, tmp_path):
        (tmp_path / "a.yaml").write_text("gamma: 0.5\nepochs: 1\n")
        (tmp_path / "b.yaml").write_text("gamma: 0.7\n")
        files = f"--config_files={tmp_path / 'a.yaml'} {tmp_path / 'b.yaml'}"
        out = tmp_path / "r.json"
        arguments = command("--model=AttnFedKD", "--dataset=tiny", f"--data_path={data_path}", files)
        assert main([*arguments, f"--result_file={out}"]) == 0
        assert yaml.safe_load(out.read_text())["config"]["gamma"] == 0.7

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            (["--model=AttnFedKD"], "no dataset is named"),
            (["--dataset=tiny"], "no model is named"),
            (
                ["--model=AttnFedKD", "--dataset=tiny", "--client_num=31"],
                "client_num is 31, but the dataset has only 30",
            ),
            (["--model=AttnFedKD", "--dataset=tiny", "--partition=halves"], "partition 'halves' is unknown"),
            (
                ["--model=AttnFedKD", "--dataset=tiny", "--label_values=[1,2,3]"],
                "holds the label 4, which is not among",
            ),
            (["--model=AttnFedKD", "--dataset=tiny", "--learner=adamm"], "learner is 'adamm'"),
            (["--model=AttnFedKD", "--dataset=tiny", "--config_files=nowhere.yaml"], "'nowhere.yaml' cannot be read"),
            (["--model=AttnFedKD", "--dataset=tiny", "--result_file=no/such/folder/r.json"], "cannot be written"),
            (["--model=AttnFedKD", "--dataset=tiny", "--resume=nowhere.pth"], "'nowhere.pth' does not exist"),
            (["--model=AttnFedKD", "--dataset=bogus"], "dataset 'bogus' is unknown"),
            (["--model=WideDeep", "--dataset=tiny"], "needs a label"),
            (["--model=AttnFedKD", "--dataset=tiny", "--partition=3"], "partition '3' is unknown"),
            (
                ["--model=AttnFedKD", "--dataset=tiny", "--eval_args={'order': 'TO'}", "--TIME_FIELD=when"],
                "has no column 'when' (TIME_FIELD); the columns of",
            ),
            (["stray"], "not of the form --key=value"),
        ],
    )
    def test_bad_input_gives_one_line_and_exit_code_two(self, capsys, data_path, arguments, says):
        assert says in refused(capsys, *arguments, f"--data_path={data_path}")

    def test_a_broken_config_file_is_named(self, capsys, tmp_path):
        (tmp_path / "bad.yaml").write_text("a: [1, 2\nb: }")
        assert "not valid yaml" in refused(capsys, f"--config_files={tmp_path / 'bad.yaml'}")
        (tmp_path / "list.yaml").write_text("- 1\n- 2\n")
        assert "holds a list" in refused(capsys, f"--config_files={tmp_path / 'list.yaml'}")

    def test_a_dataset_without_ratings_is_refused_in_rating_mode(self, capsys, tmp_path):
        folder = write_dataset(tmp_path / "data", ratings=False)
        arguments = ["--model=AttnFedKD", "--dataset=tiny", f"--data_path={folder}"]
        assert "load_col names 'rating', but the columns of" in refused(capsys, *arguments)
        arguments.append("--load_col=None")
        assert "needs ratings, but dataset 'tiny' has no column 'rating'" in refused(capsys, *arguments)
        assert main(command(*arguments, "--label_mode=implicit")) == 0

    def test_a_user_with_every_item_is_refused_before_training(self, capsys, tmp_path):
        folder = tmp_path / "data" / "full"
        folder.mkdir(parents=True)
        rows = [f"{user}\t{item}" for user in range(3) for item in range(4)]
        (folder / "full.inter").write_text("\n".join(["user_id:token\titem_id:token", *rows]) + "\n")
        arguments = ["--model=AttnFedKD", "--dataset=full", f"--data_path={tmp_path / 'data'}", "--label_mode=implicit"]
        said = "interacted with all items, so that there is none to sample; leave them out by user_inter_num_interval=[1,4)"
        assert said in refused(capsys, *arguments, "--load_col=None")

    @pytest.mark.parametrize("mode", ["full", "uni2", "pop2"])
    def test_a_user_with_every_item_is_judged_where_nothing_is_drawn_for_training(self, tmp_path, mode):
        folder = tmp_path / "data" / "full"
        folder.mkdir(parents=True)
        rows = [f"{user}\t{item}\t{1 + (user + item) % 5}" for user in range(3) for item in range(10) if user + item]
        text = "\n".join(["user_id:token\titem_id:token\trating:float", *rows]) + "\n"
        (folder / "full.inter").write_text(text)
        arguments = [
            "--model=AttnStudent",
            "--dataset=full",
            f"--data_path={tmp_path / 'data'}",
            "--metrics=[NDCG,MAE]",
        ]
        arguments += [f"--eval_args={{mode: {mode}}}", "--topk=[2]", "--epochs=1", "--gpu_id=", "--load_col=None"]
        assert main(command(*arguments)) == 0

    def test_missing_ratings_are_not_filled_in(self, capsys, tmp_path):
        folder = write_dataset(tmp_path / "data")
        file = folder / "tiny" / "tiny.inter"
        header, first, *rows = file.read_text().splitlines()
        user, item, _, time = first.split("\t")
        file.write_text("\n".join([header, f"{user}\t{item}\t\t{time}", *rows]) + "\n")
        assert "tiny.inter', line 2: 'rating' is ''" in refused(
            capsys, "--model=AttnFedKD", "--dataset=tiny", f"--data_path={folder}"
        )

    def test_a_header_without_types_is_named(self, capsys, tmp_path):
        folder = tmp_path / "data" / "bare"
        folder.mkdir(parents=True)
        (folder / "bare.inter").write_text("user_id\titem_id\n1\t2\n")
        error = refused(capsys, "--model=AttnFedKD", "--dataset=bare", f"--data_path={tmp_path / 'data'}")
        assert "bare.inter', line 1: the columns user_id, item_id have no types" in error

    def test_columns_of_other_names_are_found_by_their_field_keys(self, tmp_path):
        folder = write_dataset(tmp_path / "data")
        for file in (folder / "tiny" / "tiny.inter", folder / "tiny" / "tiny.user"):
            file.write_text(file.read_text().replace("user_id", "uid").replace("timestamp", "when"))
        arguments = command("--model=AttnFedKD", "--dataset=tiny", f"--data_path={folder}")
        arguments = [argument for argument in arguments if not argument.startswith("--load_col")]
        assert main([*arguments, "--USER_ID_FIELD=uid", "--TIME_FIELD=when"]) == 0

    def test_a_loss_that_is_no_number_ends_in_one_line(self, capsys, data_path):
        arguments = command("--model=AttnFedKD", "--dataset=tiny", f"--data_path={data_path}", "--learner=sgd")
        arguments = [argument for argument in arguments if not argument.startswith("--learning_rate")]
        assert main([*arguments, "--learning_rate=1e30"]) == 1
        assert "client 0, round 1, training: training loss is nan" in capsys.readouterr().err

    def test_an_incomplete_dataset_is_named(self, capsys, tmp_path):
        (tmp_path / "data" / "half").mkdir(parents=True)
        error = refused(capsys, "--model=AttnFedKD", "--dataset=half", f"--data_path={tmp_path / 'data'}")
        assert "half.inter" in error

    def test_without_network_it_says_what_to_download_and_where_to_put_it(self, capsys, tmp_path, monkeypatch):
        import urllib.error

        import recbole.data.dataset.dataset as recbole_dataset

        def offline(url):
            raise urllib.error.URLError("Name or service not known")

        monkeypatch.setattr(recbole_dataset, "decide_download", offline)
        folder = tmp_path / "data"
        error = refused(capsys, "--model=AttnFedKD", "--dataset=ml-1m", f"--data_path={folder}")
        assert "ml-1m.inter" in error and str(folder / "ml-1m") in error
        assert not (folder / "ml-1m").exists()

    def test_help_lists_every_key_and_writes_nothing(self, capsys):
        assert main(["--help"]) == 0
        text = " ".join(capsys.readouterr().out.split())
        for file in (PROPERTIES / "overall.yaml", PROPERTIES / "model" / "AttnStudent.yaml"):
            for key in read_keys(file).values():
                if key.sentence:
                    assert f"--{key.name}=" in text and (key.sentence in text or key.name.startswith("attention"))
        assert not list(Path.cwd().iterdir())


def test_a_download_from_a_server_works_and_who_comes_second_waits_for_it(tmp_path, data_path, monkeypatch):
    """RecBole's own download ends in a barrier of a process group that does not exist."""
    import functools
    import http.server
    import shutil
    import threading

    import recbole.data.dataset.dataset as recbole_dataset

    from recbole_fedkd.quick_start import create_dataset

    shutil.make_archive(str(tmp_path / "tiny"), "zip", data_path / "tiny")
    second_has_come, served = threading.Event(), []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            served.append(self.path)
            # The first request asks for the size; before the second RecBole has made the dataset's folder, which is empty.
            if len(served) == 2:
                second_has_come.wait(30)
            super().do_GET()

    handler = functools.partial(Handler, directory=str(tmp_path))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/tiny.zip"
    monkeypatch.setattr(recbole_dataset.Dataset, "_get_download_url", lambda *args, **kwargs: url)
    try:
        chosen = FedKDConfig("AttnStudent", "tiny", config_dict={"data_path": str(tmp_path / "fetched"), **SMALL})
        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(create_dataset, chosen)
            while not (tmp_path / "fetched" / "tiny").exists():
                assert not first.done()
                time.sleep(0.01)
            second = pool.submit(create_dataset, chosen)
            time.sleep(0.3)
            assert not second.done()
            second_has_come.set()
            assert first.result().user_num == second.result().user_num == 31
        assert served == ["/tiny.zip", "/tiny.zip"]
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    "file",
    sorted(file for file in PROPERTIES.glob("**/*.yaml") if file.parent.name != "described"),
    ids=lambda file: f"{file.parent.name}/{file.stem}",
)
def test_every_key_is_documented_where_it_is_defined(file):
    documented = {}
    for source in (PROPERTIES / "overall.yaml", *sorted((PROPERTIES / "model").glob("*.yaml"))):
        documented |= {name: key for name, key in read_keys(source).items() if key.sentence}
    recbole = Path(sys.modules["recbole"].__file__).parent / "properties"
    for source in (recbole / "overall.yaml", recbole / "dataset" / "sample.yaml"):
        documented |= read_keys(source)
    content = yaml.safe_load(file.read_text())
    if file.parent.name == "preset":
        model = content.pop("model")
        assert find_model(model)
        own = recbole / "model" / f"{model}.yaml"
        documented |= read_keys(own) if own.is_file() else {}
    assert content.keys() <= documented.keys()
    for name, value in content.items():
        documented[name].check(value)


def test_defaults_satisfy_their_own_rules():
    chosen = config()
    for source in (PROPERTIES / "overall.yaml", PROPERTIES / "model" / "AttnStudent.yaml"):
        for name, key in read_keys(source).items():
            key.check(chosen[name])


def test_a_line_with_a_rule_is_read():
    key = Key("x", "1", (int,), ">= 1", "An x.")
    key.check(1)
    with pytest.raises(InputError):
        key.check(0)


def test_seen_fields_and_labels_come_from_the_data():
    assert config()["LABEL_FIELD"] == "rating"
    assert config(label_mode="threshold")["threshold"] == {"rating": None}  # settled by the data
    assert config(label_mode="threshold", rating_threshold=3)["threshold"] == {"rating": 3}
    assert config(label_mode="implicit")["train_neg_sample_args"]["sample_num"] == 1


@pytest.mark.parametrize(("dataset", "genre"), [("ml-100k", "class"), ("ml-1m", "genre")])
def test_side_features_of_movielens_are_loaded_where_labels_are_made(dataset, genre):
    """A checkout once lacked these files, and everything ran on ids alone."""
    for model in ("AttnFedKD", "WideDeep"):
        columns = FedKDConfig(model, dataset, config_dict={"label_mode": "threshold"})["load_col"]
        assert columns["user"] == ["user_id", "age", "gender", "occupation"]
        assert columns["item"] == ["item_id", "release_year", genre]


@pytest.mark.parametrize(("name", "key"), declared_keys().items())
def test_a_line_of_overall_yaml_is_read_as_what_its_owner_declares(name, key):
    told = read_keys(PROPERTIES / "overall.yaml")[name]
    assert dataclasses.replace(told, default="") == dataclasses.replace(key, default="")
    assert yaml.safe_load(told.default) == declared_settings()[name].default


def test_a_model_of_sums_reads_the_keys_of_its_sums_on_all_data_too():
    keys = {"sketch_width": 9, "em_steps": 2, "gram_size": 5, "head_size": 8}
    unread = {
        name: FedKDConfig(name, "ml-100k", config_dict=keys).unread_keys for name in ("FoldIn", "MFEM", "PureSVD")
    }
    assert unread["FoldIn"] == ["gram_size", "head_size"]
    assert unread["MFEM"] == ["sketch_width", "gram_size", "head_size"]
    assert unread["PureSVD"] == ["em_steps", "head_size"]
