"""The front of the command line: help, presets, completion, and what is said to a mistyped command."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from recbole_fedkd.command_line import _COMMANDS, main
from recbole_fedkd.command_line.completion import SHELLS
from recbole_fedkd.command_line.help import WIDTH, presets_described
from recbole_fedkd.config import FedKDConfig
from recbole_fedkd.config.choices import shipped
from recbole_fedkd.config.defaults import default_values
from recbole_fedkd.config.files import PROPERTIES
from recbole_fedkd.config.keys import read_keys, read_sections

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"


def told(capsys, *arguments) -> str:
    assert main(list(arguments)) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["presets"], ["--help", "attention"]], ids=str)
def test_help_needs_no_torch(arguments):
    code = (
        f"from recbole_fedkd.command_line import main; assert main({arguments}) == 0\n"
        "import sys; heavy = {'torch', 'recbole', 'pandas', 'scipy'} & sys.modules.keys(); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)


def test_python_runs_the_package_as_the_command(capsys):
    command = [sys.executable, "-m", "recbole_fedkd", "report", "--help"]
    assert subprocess.run(command, capture_output=True, check=True, text=True).stdout == told(capsys, *command[3:])


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["presets"],
        ["--help", "factor_size"],
        ["--help", "--preset=fdin"],
        *([name, "--help"] for name in _COMMANDS),
    ],
    ids=str,
)
def test_lines_fit_a_hundred_columns(capsys, arguments):
    text = told(capsys, *arguments)
    assert [line for line in text.splitlines() if len(line) > WIDTH] == []


def test_every_command_says_how_it_is_used():
    assert {file.stem for file in (PROPERTIES / "usage").glob("*.txt")} == {"run", *_COMMANDS}


def test_keys_stand_in_the_sections_of_the_yaml(capsys):
    text = told(capsys, "--help")
    place = -1
    for heading, keys in read_sections(PROPERTIES / "overall.yaml").items():
        if keys.keys() <= read_keys(PROPERTIES / "model" / "AttnStudent.yaml").keys():
            continue  # they stand under the model
        here = text.index(f"\n{heading}\n")
        assert here > place
        place = here
        assert all(f"  --{name}=" in text for name in keys)
    for name in ("data_path", "epochs", "gpu_id", "seed", "metrics", "eval_args", "load_col", "USER_ID_FIELD"):
        assert f"  --{name}=" in text
    assert all(f"  {preset} " in text for preset in shipped()["presets"])


@pytest.mark.parametrize(
    ("model", "preset"),
    [(None, "fd"), (None, "factors"), (None, "fdin"), (None, "fedmf"), *((name, None) for name in shipped()["models"]),
     *((name, None) for name in ("BPR", "WideDeep", "DIN", "SASRec", "CKE", "NeuMF"))],
)  # fmt: skip
def test_defaults_that_are_told_are_those_of_the_config(model, preset):
    given = {"preset": preset} if preset else {"train_neg_sample_args": None} if model == "SASRec" else {}
    config = FedKDConfig(model, "tiny", config_dict=given)
    values = default_values(config["model"], preset)
    computed = {
        "data_path",
        "valid_metric_bigger",
        "metrics",
        "eval_args",
        "train_neg_sample_args",
        "load_col",
        "threshold",
        "known_features",  # told as not set, with what follows from that
    }
    computed |= {"strategy"} if values["strategy"] is None else set()
    keys = {
        name
        for file in (PROPERTIES / "overall.yaml", PROPERTIES / "model" / "AttnStudent.yaml")
        for name in read_keys(file)
    }
    for name in (keys & values.keys()) - computed - {"preset"}:
        assert values[name] == config[name], name


def test_defaults_of_the_chosen_model_are_shown(capsys):
    assert "--mlp_hidden_size=[32, 16, 8]" in told(capsys, "--help", "--model=WideDeep")
    assert "--sketch_passes=3" in told(capsys, "--help", "--preset=factors")
    assert "--learner=adam_to_sgd" in told(capsys, "--help", "--preset=afd") and "--learner=sgd" in told(
        capsys, "--help", "--preset=fedmf"
    )


def test_a_word_finds_keys_values_and_presets(capsys):
    text = told(capsys, "--help", "attention")
    assert text.index("--attention=True") < text.index("--attention_heads=8")
    assert "--gamma" not in text
    assert "half precision" in told(capsys, "--help", "fp16").lower()
    assert "Networks up" in told(capsys, "--help", "fedavg")
    assert "--worker=0" in told(capsys, "--help", "worker")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["compar"], "'compar' is no command; did you mean 'compare'?"),
        (["Reprot", "x"], "did you mean 'report'?"),
        (["ml-100k"], "'ml-100k' is no command"),
        (["--help", "atention"], "did you mean 'attention'?"),
        (["--help", "num_clients"], "here it is called client_num"),
        (["--help", "--model=BRP"], "did you mean 'BPR'?"),
        (["--help", "--preset=fdd"], "did you mean 'fd'?"),
        (["presets", "fd"], "presets takes no arguments"),
        (["completion"], "completion needs the name of one shell: bash, zsh, fish"),
        (["completion", "tcsh"], "completion needs the name of one shell"),
    ],
)
def test_a_mistyped_command_is_answered_with_the_nearest(arguments, says, capsys):
    assert main(arguments) == 2
    printed = capsys.readouterr().err
    assert says in printed and printed.count("\n") == 1


def test_every_preset_tells_its_question_and_numbers_that_its_page_has(capsys):
    described = presets_described()
    assert described.keys() == shipped()["presets"].keys()
    for name, about in described.items():
        assert about["question"].endswith((".", "?", ")")), name
        measured = about["measured"]
        assert ("bytes" in measured or name == "central") and measured.keys() & {"MAE", "AUC", "NDCG@10"}, name
        rows = [line for line in (RESULTS / measured["page"]).read_text().splitlines() if line.startswith("|")]
        own = [row for row in rows if row.split("|")[1].strip() == measured["row"]]
        numbers = [value for key, value in measured.items() if key not in ("page", "data", "row", "with")]
        assert any(all(re.search(rf"\| (\*\*)?{re.escape(value)}( ±| \|)", row) for value in numbers) for row in own), (
            name
        )
        assert all(value in told(capsys, "presets") for value in numbers)


def test_what_measured_numbers_were_measured_with_can_be_set():
    for name, about in presets_described().items():
        keys = dict(part.split("=") for part in about["measured"].get("with", "").split(", ") if part)
        FedKDConfig(None, "ml-100k", command_line={"preset": name, **keys})


@pytest.mark.parametrize("shell", SHELLS)
def test_each_shell_gets_a_completion(capsys, shell):
    assert "recbole-fedkd" in told(capsys, "completion", shell)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("recbole-fedkd com", {"compare", "completion"}),
        ("recbole-fedkd --client", {"--client_num", "--client_timeout", "--client_weights", "--clients_per_round"}),
        ("recbole-fedkd --strategy=fedk", {"fedkd"}),
        ("recbole-fedkd --learner=adam_", {"adam_to_sgd"}),
        ("recbole-fedkd --user_metrics=T", {"True"}),
        ("recbole-fedkd recommend run --ex", {"--exclude-seen"}),
        ("recbole-fedkd compare it.yaml --work", {"--worker", "--workers"}),
        ("recbole-fedkd report run --e", set()),
    ],
)
def test_a_shell_is_answered(tmp_path, line, expected):
    answer = tmp_path / "answer"
    asked = {
        "_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": ",", "COMP_LINE": line, "COMP_POINT": str(len(line)), "COMP_TYPE": "9",
        "_ARGCOMPLETE_COMP_WORDBREAKS": " \t\n\"'><=;|&(:", "_ARGCOMPLETE_STDOUT_FILENAME": str(answer),
    }  # fmt: skip
    code = "from recbole_fedkd.command_line import console; console()"
    subprocess.run([sys.executable, "-c", code], env={**os.environ, **asked}, check=True)
    assert {each.strip() for each in answer.read_text().split(",")} - {""} == expected


def test_a_reader_that_has_enough_is_no_error():
    code = "import sys; from recbole_fedkd.command_line import console; sys.argv = ['x', '--help']; console()"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 0
