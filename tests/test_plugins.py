"""Plugins: a file outside the package brings a strategy, a codec and the like, on every engine and in every process."""

from pathlib import Path

import pytest
import yaml
from conftest import PLUGINS, SMALL

from recbole_fedkd import load_data_and_model
from recbole_fedkd.command_line import main
from recbole_fedkd.config import FedKDConfig
from recbole_fedkd.errors import InputError, TrainingError
from recbole_fedkd.registry import NoSettings, Registry

pytestmark = pytest.mark.usefixtures("forgotten")

# Plugin to its own key with two values, and the other keys that have it run.
RUNS = {
    "damped": ("damping", 0.7, 0.1, {"strategy": "damped"}),
    "nearby": ("pull", 0.0, 50.0, {"strategy": "nearby"}),
    "steps": ("step_size", 0.01, 0.05, {"strategy": "fedavg", "codecs": ["steps"]}),
    "shorten": ("longest", 0.5, 0.1, {"strategy": "fedavg", "stages": ["shorten", "codecs"]}),
    "powers": ("sample_power", 0.3, 0.9, {"strategy": "afd", "aggregation": "powers"}),
    "sharpened": ("sharpness", 2.0, 5.0, {"strategy": "afd", "knowledge": "sharpened"}),
    "blocks": ("block_size", 6, 15, {"strategy": "local", "partition": "blocks"}),
}
ALL = [str(PLUGINS / f"{name}.py") for name in RUNS]
# Plugins without a key.
KEYLESS = {
    "tilt": {"metrics": ["Tilt", "MAE"], "valid_metric": "MAE"},
    "plain": {"model": "Plain", "strategy": "fedavg", "load_col": None, "vector_size": 4},
}


def test_every_plugin_of_the_docs_is_tried_and_short():
    assert {file.stem for file in PLUGINS.glob("*.py")} == RUNS.keys() | KEYLESS.keys()
    assert all(len(file.read_text().splitlines()) < 40 for file in PLUGINS.glob("*.py"))


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("engine", ["local", "fleet"])
def test_a_plugin_runs_and_its_key_counts(run, name, engine):
    key, value, other, rest = RUNS[name]
    keys = {"plugins": [str(PLUGINS / f"{name}.py")], "epochs": 2, "engine": engine, "saved": False, **rest}
    found, changed = run(**keys, **{key: value}), run(**keys, **{key: other})
    assert found["config"][key] == value
    assert found["engine"] == engine
    assert [found["best_valid_score"], found["rounds"][-1]["loss"]] != [
        changed["best_valid_score"],
        changed["rounds"][-1]["loss"],
    ]


@pytest.mark.parametrize("name", KEYLESS)
@pytest.mark.parametrize("engine", ["local", "fleet"])
def test_a_metric_and_a_model_of_ones_own_run(run, name, engine):
    keys = {"plugins": [str(PLUGINS / f"{name}.py")], "epochs": 1, "engine": engine, "saved": False, **KEYLESS[name]}
    found = run(**keys)
    assert found["engine"] == engine
    if name == "tilt":
        assert abs(found["test_result"]["tilt"]) <= found["test_result"]["mae"]
    else:
        assert found["config"]["model"] == "Plain" and found["communication"]["total_bytes"] > 0


def test_all_of_them_run_together_from_the_command_line_and_go_on_from_a_checkpoint(run, data_path, capsys):
    together = {"plugins": ALL, "strategy": "damped", "partition": "blocks", "block_size": 10, "damping": 0.7}
    together |= {"codecs": ["steps"], "stages": ["shorten", "codecs"], "longest": 0.5}
    whole = run(**together, epochs=2)
    typed = {**SMALL, **together, "plugins": ",".join(ALL), "data_path": data_path, "epochs": 1, "checkpoint_dir": "c"}
    named = ["--model=AttnFedKD", "--dataset=tiny"]
    assert main([*named, *(f"--{name}={value}" for name, value in typed.items())]) == 0
    (folder,) = Path("c").iterdir()
    with pytest.raises(InputError, match="plugins"):
        run(resume=str(folder))
    resumed = run(resume=str(folder), plugins=ALL, epochs=2)
    assert resumed["test_result"] == whole["test_result"]
    assert load_data_and_model(folder, {"plugins": ALL})[0]["damping"] == 0.7


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("damping", 1.5, "damping is 1.5; it must be a number in (0, 1]"),
        ("damping", "x", "damping is 'x'; it must be a number"),
        ("dampin", 0.5, "did you mean 'damping'"),
        ("strategy", "dampd", "did you mean 'damped'"),
        ("vector_size", 0, "vector_size is 0; it must be an integer in [1, 4096]"),
        ("vector_siz", 8, "did you mean 'vector_size'"),
    ],
)
def test_a_plugins_key_is_checked_as_any_other(name, value, says):
    own = [*ALL, str(PLUGINS / "plain.py")]
    model = "Plain" if name.startswith("vector") else "AttnFedKD"
    with pytest.raises(InputError) as refused:
        FedKDConfig(model, "ml-100k", config_dict={"plugins": own, "strategy": "damped", name: value})
    assert says in str(refused.value)


def test_keys_of_a_model_are_its_own(capsys):
    """Each has its default, whatever another model calls so; who does not read a key is told, and not refused."""
    own = {"plugins": [str(PLUGINS / "plain.py")]}
    config = FedKDConfig("Plain", "ml-100k", config_dict=own)
    assert config["vector_size"] == 32 and config.unread_keys == []
    other = FedKDConfig("BPR", "ml-100k", config_dict={**own, "vector_size": 8})
    assert other.unread_keys == ["vector_size"]
    with pytest.raises(InputError, match="key 'vector_size' is unknown"):
        FedKDConfig("BPR", "ml-100k", config_dict={"vector_size": 8})
    named = f"--plugins={PLUGINS / 'plain.py'}"
    for words in (["--help"], ["--help", "--model=Plain"], ["--help", "vector_size"]):
        assert main([*words, named]) == 0
        told = capsys.readouterr().out
        assert "Model Plain" in told and "--vector_size=32" in told and "an item's vector. [in [1, 4096]]" in told


def test_a_model_may_not_declare_a_key_of_every_run(tmp_path):
    text = (PLUGINS / "plain.py").read_text()
    (tmp_path / "rounds.py").write_text(text.replace("vector_size", "epochs"))
    with pytest.raises(InputError, match="model 'Plain' declares the key 'epochs', which every run has"):
        FedKDConfig("Plain", "ml-100k", config_dict={"plugins": str(tmp_path / "rounds.py")})


def test_help_tells_a_plugins_keys_and_names_where_it_is_given(capsys):
    assert main(["--help", f"--plugins={ALL[0]}"]) == 0
    told = capsys.readouterr().out
    assert "--damping=0.5" in told and "Share of the way to the clients' mean" in told
    assert main(["--help"]) == 0
    assert "--damping" not in capsys.readouterr().out


def test_cells_of_compare_have_the_plugins_of_its_file(tmp_path, data_path):
    """In processes of their own, in another folder, also where a plugin is named by a path from here or from the experiment."""
    (tmp_path / "mine.py").write_text((PLUGINS / "damped.py").read_text())
    small = {name: value for name, value in SMALL.items() if name != "state"}
    experiment = {
        "keys": {
            **small,
            "plugins": "mine.py",
            "epochs": 1,
            "data_path": str(data_path),
            "model": "AttnFedKD",
            "dataset": "tiny",
        },
        "rows": {"half": {"strategy": "damped"}, "own": {"model": "Plain", "strategy": "fedavg", "load_col": None}},
    }
    experiment["keys"]["plugins"] = ["mine.py", "beside.py"]
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "beside.py").write_text((PLUGINS / "plain.py").read_text())
    (tmp_path / "folder" / "e.yaml").write_text(yaml.safe_dump(experiment))
    assert main(["compare", "folder/e.yaml", "--out=out", "--workers=1"]) == 0
    assert len(list((tmp_path / "out" / "runs").iterdir())) == 2


def test_bad_plugins_are_told_in_one_sentence(tmp_path):
    (tmp_path / "twice.py").write_text((PLUGINS / "damped.py").read_text().replace('"damped"', '"fedavg"'))
    (tmp_path / "taken.py").write_text((PLUGINS / "damped.py").read_text().replace("damping:", "epochs:"))
    (tmp_path / "other.py").write_text((PLUGINS / "damped.py").read_text().replace("damping:", "gamma:"))
    for value, says in (
        ("twice.py", "strategy 'fedavg' is registered already"),
        ("taken.py", "key 'epochs', which every run has"),
        ("other.py", "declares the key 'gamma', which strategy 'afd' declares in another way"),
        (3, "plugins is 3; it must be a list of texts"),
        ([3], "plugins is [3]; it must be a list of texts"),
        ("nowhere.py", "plugins names"),
    ):
        with pytest.raises(InputError) as refused:
            FedKDConfig("AttnFedKD", "ml-100k", config_dict={"plugins": value})
        assert says in str(refused.value) and "\n" not in str(refused.value)


FAULTY = {
    "loss": ("damped", "    def step(", "    def loss(self, step, received, shared):\n        {}\n\n    def step("),
    "encode": ("steps", "        codes = np.rint", "        {}\n        codes = np.rint"),
    "blocks": ("blocks", "    return np.arange", "    {}\n    return np.arange"),
    "calculate_metric": ("tilt", "        predicted, rated", "        {}\n        predicted, rated"),
}


@pytest.mark.parametrize("engine", ["local", "fleet"])
@pytest.mark.parametrize("where", FAULTY)
def test_what_a_plugin_does_wrong_is_told_in_one_sentence_with_its_line(where, engine, run, tmp_path):
    name, before, after = FAULTY[where]
    text = (PLUGINS / f"{name}.py").read_text()
    assert before in text
    file = tmp_path / f"{name}_{engine}.py"
    file.write_text(text.replace(before, after.format('raise LookupError("my own")')))
    keys = RUNS[name][3] if name in RUNS else KEYLESS[name]
    with pytest.raises(
        TrainingError, match=rf"(?m)LookupError: my own \({name}_{engine}.py, line \d+, in {where}\)$"
    ) as said:
        run(**keys, plugins=[str(file)], epochs=1, engine=engine, state="INFO")
    assert "\n" not in str(said.value)
    (log,) = Path("log").rglob("*.log")
    assert "Traceback" in log.read_text() and 'raise LookupError("my own")' in log.read_text()


@pytest.mark.parametrize("engine", ["local", "fleet"])
@pytest.mark.parametrize("loss", ["None", "3.0", "step.loss.expand(2)", '"low"'])
def test_a_loss_that_is_no_number_is_told(engine, loss, run, tmp_path):
    _, before, after = FAULTY["loss"]
    file = tmp_path / f"{engine}.py"
    file.write_text((PLUGINS / "damped.py").read_text().replace(before, after.format(f"return {loss}")))
    with pytest.raises(
        TrainingError, match=r"the loss of strategy 'damped' is .*; it must be a tensor that holds one number"
    ):
        run(plugins=[str(file)], strategy="damped", epochs=1, engine=engine, saved=False)


def test_a_cell_of_a_notebook_that_runs_again_registers_again():
    registry = Registry("thing", "things")

    def define(number):
        class Thing:
            name = "one"
            value = number

        return Thing

    registry.register(define(1))
    registry.register(define(2))
    assert registry["one"].value == 2 and registry.settings["one"] is NoSettings
    with pytest.raises(InputError, match="thing 'one' is registered already"):
        registry.register("one")(print)
