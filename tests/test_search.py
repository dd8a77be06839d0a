"""Search: RecBole's parameter lines, trials by validation, and going on after an interruption."""

import io
import json
import math
from pathlib import Path

import optuna
import pytest
from conftest import SMALL
from filelock import FileLock
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from recbole_fedkd.command_line import main
from recbole_fedkd.config import FedKDConfig
from recbole_fedkd.errors import InputError, TrainingError
from recbole_fedkd.search import trials as search_module
from recbole_fedkd.search.parameters import Parameter, read_parameters
from recbole_fedkd.search.trials import Search, run_search, search_table


def parameters(text: str) -> list[Parameter]:
    Path("hyper.test").write_text(text)
    return read_parameters("hyper.test")


# The parameter file


def test_the_lines_mean_what_they_mean_in_recbole():
    read = parameters(
        "# what is searched\n"
        "backbone choice [cnn,mlp]\n"
        "\n"
        "hidden_sizes choice [[4, 8], [16]]  # two networks\n"
        "RATING_FIELD choice ['rating', \"stars\"]\n"
        "learning_rate   loguniform -8, -4\n"
        "dropout_prob uniform 0,0.5\n"
        "embedding_size quniform 8,64,8\n"
        "gamma quniform 0.1,0.5,0.1\n"
    )
    assert [each.name for each in read] == [
        "backbone",
        "hidden_sizes",
        "RATING_FIELD",
        "learning_rate",
        "dropout_prob",
        "embedding_size",
        "gamma",
    ]
    backbone, sizes, field, rate, dropout, embedding, gamma = read
    assert backbone.choices == ("cnn", "mlp")
    assert sizes.choices == ([4, 8], [16])
    assert field.choices == ("rating", "stars")
    assert rate.distribution() == FloatDistribution(math.exp(-8), math.exp(-4), log=True)
    assert dropout.distribution() == FloatDistribution(0, 0.5)
    assert embedding.distribution() == IntDistribution(1, 8)
    assert [embedding.value(drawn) for drawn in embedding.all_draws()] == [8, 16, 24, 32, 40, 48, 56, 64]
    assert all(isinstance(embedding.value(drawn), int) for drawn in embedding.all_draws())
    assert [gamma.value(drawn) for drawn in gamma.all_draws()] == [0.1, 0.2, 0.3, 0.4, 0.5]
    assert isinstance(sizes.distribution(), CategoricalDistribution)
    assert [sizes.value(drawn) for drawn in sizes.all_draws()] == [[4, 8], [16]]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("learning_rate", "'learning_rate' is not of the form <key> <choice|uniform|loguniform|quniform> <values>"),
        ("learning_rate unifrom 0,1", "'unifrom' is no kind of parameter; allowed are choice, uniform, loguniform, quniform"),
        ("learning_rate unifrom 0,1", "did you mean 'uniform'"),
        ("learning_rate uniform 0", "uniform takes 2 finite numbers with commas between, not '0'"),
        ("learning_rate uniform 0,1,2", "uniform takes 2 finite numbers"),
        ("learning_rate quniform 0,1", "quniform takes 3 finite numbers"),
        ("learning_rate uniform 0,inf", "uniform takes 2 finite numbers"),
        ("learning_rate uniform a,b", "'a,b' is not 2 numbers with commas between"),
        ("learning_rate uniform 1,0", "low 1 is above high 0"),
        ("learning_rate quniform 0,1,0", "step 0 is not above 0"),
        ("learning_rate loguniform 0,1000", "high 1000 is the logarithm of no number"),
        ("learning_rate loguniform -800,-4", "low -800 is the logarithm of no number"),
        ("learning_rate choice 3", "choice takes a list such as [a,b,c], not '3'"),
        ("learning_rate choice []", "choice takes a list"),
        ("learning_rate choice [1,", "choice takes a list"),
        ("learning_rate choice [1,2,1]", "1 stands in the choice twice"),
        ("gamma choice [1,2]", "parameter 'gamma' stands there twice"),
        ("valid_metric choice [MAE,AUC]", "key 'valid_metric' cannot be searched"),
    ],
)  # fmt: skip
def test_a_malformed_line_is_named(line, says):
    with pytest.raises(InputError) as caught:
        parameters(f"gamma uniform 0,1\n{line}\n")
    assert str(caught.value).startswith("params_file 'hyper.test', line 2: ")
    assert says in str(caught.value)


def test_a_file_without_parameters_is_told():
    with pytest.raises(InputError, match="holds no parameter"):
        parameters("# nothing\n")
    with pytest.raises(InputError, match="'missing' cannot be read: No such file"):
        read_parameters("missing")


# The search


def prepared(text: str, algorithm: str = "tpe", **keys) -> Search:
    common = {"model": "AttnFedKD", "dataset": "tiny", "preset": "local", **SMALL, **keys}
    return Search.prepare(parameters(text), common, (), algorithm)


@pytest.fixture
def trained(monkeypatch):
    """Trials cost nothing and are written down: the score is (gamma - 0.3)^2, and training fails above 0.9."""
    calls = []

    def stand_in(config_file_list, command_line):
        calls.append(command_line["gamma"])
        if command_line["gamma"] > 0.9:
            raise TrainingError("training loss is nan")
        score = (command_line["gamma"] - 0.3) ** 2
        # The test prefers another trial: a search that looked at it would show.
        return {"best_valid_score": score, "best_valid_result": {"mae": score}, "test_result": {"mae": 1 - score}}

    monkeypatch.setattr(search_module, "run_without_logs", stand_in)
    return calls


def test_the_better_of_two_learning_rates_is_found(data_path, capsys):
    Path("hyper.test").write_text("learning_rate choice [0.0,0.01]\n")
    given = {"preset": "local", "data_path": data_path, "epochs": 4, **SMALL}
    del given["learning_rate"]
    arguments = [f"--{key}={value}" for key, value in given.items()]
    command = ["search", "--params_file=hyper.test", "--model=AttnFedKD", "--dataset=tiny", "--algorithm=exhaustive"]
    assert main([*command, "--out=found/best.json", *arguments]) == 0
    content = json.loads(Path("found/best.json").read_text())
    assert content["best"]["parameters"] == {"learning_rate": 0.01}
    assert [each["parameters"]["learning_rate"] for each in content["trials"]] == [0.0, 0.01]
    assert content["trials"][0]["score"] > content["trials"][1]["score"] == content["best"]["score"]
    assert content["metric"] == "mae"
    assert content["best"]["valid"]["mae"] == pytest.approx(content["best"]["score"], abs=1e-3)
    assert content["best"]["test"]["mae"] > 0
    printed = capsys.readouterr()
    assert "best: learning_rate=0.01" in printed.out
    assert "trial 2/2, learning_rate=0.01: mae " in printed.err
    # One numbering: the line, the table and the file.
    assert [each["trial"] for each in content["trials"]] == [1, 2] and content["best"]["trial"] == 2
    assert {path.name for path in Path().iterdir()} == {"hyper.test", "found"}, "trials leave folders behind"
    # The best is handed on as a config file.
    best = FedKDConfig(config_file_list=["found/best.yaml"])
    assert (best["model"], best["dataset"], best["learning_rate"], best["epochs"]) == ("AttnFedKD", "tiny", 0.01, 4)
    assert "config of the best: found/best.yaml" in printed.out
    # The same command again has nothing to do.
    assert main([*command, "--out=found/best.json", *arguments]) == 0
    assert "trial" not in capsys.readouterr().err
    assert json.loads(Path("found/best.json").read_text()) == content


@pytest.mark.parametrize("algorithm", ["tpe", "random"])
def test_an_interrupted_search_goes_on_as_one_that_was_not(algorithm, trained, monkeypatch):
    search = prepared("gamma uniform 0,0.8\n", algorithm)
    whole = run_search(search, Path("whole.json"), 14, io.StringIO())
    assert len(trained) == 14
    trained.clear()

    going = search_module.run_without_logs

    def interrupted(*arguments):
        if len(trained) == 11:
            raise KeyboardInterrupt
        return going(*arguments)

    monkeypatch.setattr(search_module, "run_without_logs", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_search(search, Path("parts.json"), 14, io.StringIO())
    assert not Path("parts.json").exists()
    monkeypatch.setattr(search_module, "run_without_logs", going)
    parts = run_search(search, Path("parts.json"), 14, io.StringIO())
    assert len(trained) == 14
    assert parts == whole == json.loads(Path("parts.json").read_text())
    assert whole["best"]["score"] == min(each["score"] for each in whole["trials"])
    assert len({each["score"] for each in whole["trials"]}) == 14
    more = run_search(search, Path("parts.json"), 16, io.StringIO())
    assert more["trials"][:14] == whole["trials"]
    assert len(trained) == 16


def test_the_seed_of_the_run_is_that_of_the_search(trained):
    drawn = []
    for seed in (1, 1, 2):
        out = Path(f"{len(drawn)}.json")
        drawn.append(run_search(prepared("gamma uniform 0,0.8\n", seed=seed), out, 2, io.StringIO())["trials"])
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("algorithm", ["tpe", "random"])
def test_every_trial_is_another_one(algorithm, trained):
    search = prepared("gamma quniform 0,0.8,0.1\nbackbone choice [cnn,mlp]\n", algorithm)
    content = run_search(search, Path("out.json"), 15, io.StringIO())
    tried = [tuple(each["parameters"].values()) for each in content["trials"]]
    assert len(set(tried)) == len(tried) == len(trained) == 15
    parts = Path("parts.json")
    for trials in (4, 12, 13):
        run_search(search, parts, trials, io.StringIO())
    assert run_search(search, parts, 15, io.StringIO()) == content
    # Nothing is left to try after eighteen.
    assert len(run_search(search, parts, 100, io.StringIO())["trials"]) == 18


def test_an_exhaustive_search_tries_everything_once(trained):
    search = prepared("gamma quniform 0,0.4,0.2\nbackbone choice [cnn,mlp]\n", "exhaustive")
    some = run_search(search, Path("out.json"), 4, io.StringIO())
    assert len(some["trials"]) == 4
    content = run_search(search, Path("out.json"), None, io.StringIO())
    tried = [(each["parameters"]["gamma"], each["parameters"]["backbone"]) for each in content["trials"]]
    assert tried == [(gamma, backbone) for gamma in (0.0, 0.2, 0.4) for backbone in ("cnn", "mlp")]
    assert content["trials"][:4] == some["trials"]
    assert len(trained) == 6
    with pytest.raises(InputError, match="'gamma' is uniform, which an exhaustive search cannot go through"):
        prepared("gamma uniform 0,1\n", "exhaustive")


def test_a_failing_trial_is_told_and_the_search_goes_on(trained):
    said = io.StringIO()
    search = prepared("gamma choice [0.1,0.95,0.3]\n", "exhaustive")
    content = run_search(search, Path("out.json"), stream=said)
    assert "trial 2/3, gamma=0.95: failed: training loss is nan" in said.getvalue()
    assert [each["error"] for each in content["trials"]] == [None, "training loss is nan", None]
    assert content["best"]["parameters"] == {"gamma": 0.3}
    table = search_table(content)
    assert [line.split()[0] for line in table.splitlines()[2:5]] == ["3", "1", "2"]
    assert "failed" in table.splitlines()[4]
    with pytest.raises(TrainingError, match="no trial succeeded; the first one failed with: training loss is nan"):
        run_search(prepared("gamma choice [0.95]\n", "exhaustive"), Path("none.json"), stream=said)
    assert json.loads(Path("none.json").read_text())["best"] is None


def test_parameters_that_recbole_cannot_put_together_are_a_failed_trial(data_path):
    given = {"dataset": "tiny", "data_path": str(data_path), "epochs": 1, **SMALL}
    del given["embedding_size"]
    search = Search.prepare(
        parameters("n_heads choice [3,2]\n"),
        {"model": "SASRec", "train_neg_sample_args": None, **given},
        (),
        "exhaustive",
    )
    content = run_search(search, Path("out.json"), stream=io.StringIO())
    failed = content["trials"][0]["error"]
    assert failed.startswith(
        "model 'SASRec' cannot be built on dataset 'tiny' as configured: ValueError: The hidden size (64)"
    )
    assert content["best"]["parameters"] == {"n_heads": 2}


def test_a_search_in_which_nothing_succeeded_starts_anew(trained, monkeypatch):
    search, going = prepared("gamma uniform 0,0.8\n"), search_module.run_without_logs

    def missing(*arguments):
        raise InputError("'tiny' does not exist")

    monkeypatch.setattr(search_module, "run_without_logs", missing)
    with pytest.raises(TrainingError, match="no trial succeeded; the first one failed with: 'tiny' does not exist"):
        run_search(search, Path("out.json"), 3, io.StringIO())
    monkeypatch.setattr(search_module, "run_without_logs", going)
    mended = run_search(search, Path("out.json"), 3, io.StringIO())
    assert mended == run_search(search, Path("never_failed.json"), 3, io.StringIO())


def test_a_result_belongs_to_one_search(trained):
    search = prepared("gamma uniform 0,0.8\n")
    with FileLock(".out.json.lock"), pytest.raises(InputError, match="is in use by another search"):
        run_search(search, Path("out.json"), 1, io.StringIO())
    Path("folder").mkdir()
    with pytest.raises(InputError, match="out 'folder' is a folder; it must be a regular file"):
        run_search(search, Path("folder"), 1, io.StringIO())
    assert not trained


def test_more_is_better_where_it_is(trained):
    # The stand-in's score is an error; judged as an AUC, the worst is the best.
    search = prepared("gamma choice [0.1,0.3,0.8]\n", "exhaustive", metrics=["AUC"], valid_metric="AUC")
    content = run_search(search, Path("out.json"), stream=io.StringIO())
    assert content["bigger"] is True
    assert content["best"]["parameters"] == {"gamma": 0.8}


def test_a_journal_serves_one_search(trained):
    run_search(prepared("gamma uniform 0,1\n"), Path("out.json"), 1, io.StringIO())
    with pytest.raises(InputError, match="is that of another search; give another --out, or remove it"):
        run_search(prepared("gamma uniform 0,2\n"), Path("out.json"), 1, io.StringIO())
    with pytest.raises(InputError, match="is that of another search"):
        run_search(prepared("gamma uniform 0,1\n", epochs=7), Path("out.json"), 1, io.StringIO())
    run_search(prepared("gamma uniform 0,1\n", state="ERROR"), Path("out.json"), 1, io.StringIO())
    Path("bad.json.journal").write_text("no database, but long enough to be looked at" * 40)
    with pytest.raises(InputError, match=r"bad\.json\.journal' cannot be used"):
        run_search(prepared("gamma uniform 0,1\n"), Path("bad.json"), 1, io.StringIO())


def test_optuna_is_quiet(trained, capfd):
    run_search(prepared("gamma uniform 0,1\n"), Path("out.json"), 2, io.StringIO())
    assert capfd.readouterr() == ("", "")
    assert optuna.logging.get_verbosity() == optuna.logging.ERROR


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "search needs --params_file=<params_file>"),
        (["--params_file=hyper.test", "--dataset=tiny"], "search needs --model=<model>"),
        (["--params_file=hyper.test", "--preset=afd"], "search needs --dataset=<dataset>"),
        (["--trials=0"], "trials is '0'; it must be an integer >= 1"),
        (["--algorithm=bayes"], "algorithm is 'bayes'; it must be one of tpe, random, exhaustive"),
        (["--gamma=0.1"], "key 'gamma' is set and searched"),
        (["--resume=there"], "key 'resume' is that of a single run"),
        (["--gama=0.1"], "key 'gama' is unknown; did you mean 'gamma'"),
        (["--params_file=typo.test"], "key 'learning_rat' is unknown; did you mean 'learning_rate'"),
    ],
)
def test_a_wrong_search_is_told_in_one_line(arguments, says, capsys):
    Path("hyper.test").write_text("gamma uniform 0,1\n")
    Path("typo.test").write_text("learning_rat uniform 0,1\n")
    whole = ["--model=AttnFedKD", "--dataset=tiny"]
    if not any(argument.startswith("--params_file") for argument in arguments):
        whole.append("--params_file=hyper.test")
    given = arguments if "needs" in says else [*whole, *arguments]
    assert main(["search", *given]) == 2
    printed = capsys.readouterr().err
    assert says in printed
    assert printed.count("\n") == 1
