"""Every command tells what is wrong with keys and named files without torch."""

import json
import subprocess
import sys

from recbole_fedkd.command_line import _COMMANDS, main
from recbole_fedkd.config.early import check_early
from recbole_fedkd.data import schema
from recbole_fedkd.errors import InputError
from recbole_fedkd.machines import folders

KEYS = ["--model=AttnFedKD", "--dataset=ml-100k"]
UNKNOWN = [*KEYS, "--epochz=3"]
WRONG = {
    "": [
        [],
        UNKNOWN,
        [*KEYS, "--metrics=foo"],
        [*KEYS, "--valid_metric=foo"],
        [*KEYS, "--topk=[0]"],
        [*KEYS, "--eval_args={mode: foo}"],
        [*KEYS, "--partition=foo"],
        [*KEYS, "--partition=dirichlet:-1"],
        [*KEYS, "--partition=random:2"],
        [*KEYS, "--client_num=4", "--clients_per_round=50"],
        [*KEYS, "--client_num=4", "--min_clients=5"],
        [*KEYS, "--client_num=2", "--holdout_clients=.9"],
        [*KEYS, "--strategy=central"],
        ["--model=BPR", KEYS[1], "--strategy=afd"],
        [*KEYS, "--strategy=fedavg", "--secure_aggregation=True", "--codecs=[int8]"],
        [*KEYS, "--strategy=fedavg", "--secure_aggregation=True", "--codecs=[top_k]", "--stages=[clip,codecs]"],
        [*KEYS, "--secure_aggregation=True", "--min_clients=2"],
        [*KEYS, "--checkpoint_dir=full/file"],
        [*KEYS, "--field_separator="],
        [*KEYS, "--encoding=nope"],
        [*KEYS, "--result_file=missing/result.json"],
        [*KEYS, "--plugins=missing.py"],
        [*KEYS, "--config_files=missing.yaml"],
        [KEYS[0], "--dataset=nope"],
        ["--resume=missing"],
        ["--experiment=missing.yaml"],
    ],
    "compare": [["missing.yaml"], ["wrong.yaml"]],
    "report": [["missing"], ["empty"]],
    "audit": [["missing"], ["empty"], ["rows.csv"]],
    "search": [
        ["--params_file=missing", *KEYS],
        ["--params_file=wrong.test", *KEYS],
        ["--params_file=rate.test", *UNKNOWN],
        ["--params_file=rate.test", *KEYS, "--algorithm=foo"],
        ["--params_file=rate.test", *KEYS, "--learning_rate=1"],
        ["--params_file=rate.test", KEYS[0], "--dataset=nope"],
    ],
    "import": [["missing.csv"], ["missing.parquet"], ["empty"], ["rows.json"], ["rows.csv", "--usr=user"]],
    "recommend": [["missing", "--users=all"], ["empty", "--users=all"], ["rows.csv", "--users=all"]],
    "split-federation": [
        [],
        UNKNOWN,
        [KEYS[0], "--dataset=nope"],
        [*KEYS, "--out=full"],
        [*KEYS, "--partition=foo"],
        [*KEYS, "--metrics=[GAUC]"],
        [*KEYS, "--holdout_clients=.3"],
        ["--model=BPR", KEYS[1], "--strategy=fedavg"],
    ],
    "manifest": [
        ["missing.csv", KEYS[0], "--label_values=[1,2]"],
        ["missing.csv", KEYS[0], "--label_values=[1,1]"],
        ["missing.csv", KEYS[0], "--epochz=3"],
        ["missing.csv", KEYS[0]],
        ["items.csv", KEYS[0], "--label_values=[1,2]", "--metrics=[NDCG]", "--eval_args={mode: uni100}"],
    ],
    "bring": [
        ["missing.csv", "--manifest=missing", "--number=0", "--out=new"],
        ["missing.csv", "--manifest=manifest", "--number=0", "--out=new"],
        ["rows.csv", "--manifest=manifest", "--number=0", "--out=new", "--epochz=3"],
        ["rows.csv", "--manifest=manifest", "--number=4", "--out=new"],
        ["rows.csv", "--manifest=manifest", "--number=0", "--out=full"],
    ],
    "coordinate": [
        ["missing", "--address=unix:socket", "--out=new"],
        ["manifest", "--address=unix:socket", "--out=new", "--epochz=3"],
        ["manifest", "--address=unix:socket", "--out=new", "--learning_rate=.5"],
        ["manifest", "--address=nowhere", "--out=new"],
        ["manifest", "--address=unix:socket", "--out=new", "--secret=missing"],
        ["manifest", "--address=unix:socket", "--out=new", "--authority=missing"],
        ["manifest", "--address=flower:nowhere", "--out=new"],
        ["manifest", "--address=flower:unix:socket", "--out=new"],
    ],
    "party": [
        ["missing", "--address=unix:socket", "--manifest=missing"],
        ["missing", "--address=unix:socket", "--manifest=manifest"],
        ["missing", "--address=unix:socket", "--manifest=manifest", "--epochz=3"],
        ["party", "--address=nowhere", "--manifest=manifest"],
        ["party", "--address=unix:socket", "--manifest=manifest", "--secret=missing"],
        ["party", "--address=unix:socket", "--manifest=manifest", "--node-key=missing"],
        ["party", "--address=flower:nowhere", "--manifest=manifest"],
    ],
    "status": [["missing"], ["empty"]],
    "cost": [[], UNKNOWN, ["missing"], [KEYS[0], "--dataset=nope"], ["--model=AttnStudent", KEYS[1]]],
    "presets": [["more"]],
    "completion": [["foo"]],
}
REFUSING = """
import contextlib, importlib.abc, io, json, sys
class Refusing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] == "torch":
            raise AssertionError(name)
sys.meta_path.insert(0, Refusing())
from recbole_fedkd.command_line import main
answers = []
for arguments in json.load(sys.stdin):
    with contextlib.redirect_stderr(io.StringIO()) as told:
        try:
            code = main(arguments)
        except AssertionError as error:
            code = f"asked for {error}"
    answers.append([code, told.getvalue()])
print(json.dumps(answers))
"""


def told_without_torch(lines, folder):
    """Exit code and sentence of every command line, in a process that cannot import torch."""
    run = subprocess.run(
        [sys.executable, "-c", REFUSING],
        input=json.dumps(lines),
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(run.stdout.splitlines()[-1])


def prepared(folder):
    """A folder with what the command lines name."""
    for name in ("empty", "full"):
        (folder / name).mkdir()
    (folder / "full" / "file").touch()
    (folder / "wrong.yaml").write_text("keys: {dataset: ml-100k, epochz: 3}\n")
    (folder / "rate.test").write_text("learning_rate choice [0.1]\n")
    (folder / "wrong.test").write_text("learning_ratee choice [0.1]\n")
    (folder / "rows.csv").write_text("user,item\na,b\n")
    (folder / "items.csv").write_text("item,kind\nb,x\nc,y\n")
    manifest = [
        folder / "items.csv",
        KEYS[0],
        "--label_values=[1,2]",
        "--metrics=[MAE]",
        f"--out={folder / 'manifest'}",
    ]
    assert main(["manifest", *map(str, manifest)]) == 0
    (folder / "brought.csv").write_text(
        "user,item,rating,time\n" + "".join(f"a,{'bc'[n % 2]},{n},{n}\n" for n in (1, 2))
    )
    named = [f"--manifest={folder / 'manifest'}", "--number=0", f"--out={folder / 'party'}"]
    assert main(["bring", str(folder / "brought.csv"), *named]) == 0


def test_every_command_is_asked():
    assert WRONG.keys() == {"", *_COMMANDS}


def test_every_command_refuses_wrong_keys_and_missing_files_without_torch_in_the_words_of_later(
    tmp_path, monkeypatch, capsys
):
    prepared(tmp_path)
    lines = [[command, *arguments] if command else arguments for command, each in WRONG.items() for arguments in each]
    early = told_without_torch(lines, tmp_path)
    monkeypatch.chdir(tmp_path)
    later = []
    capsys.readouterr()
    for arguments in lines:
        code = main(arguments)
        later.append([code, capsys.readouterr().err])
    for arguments, before, after in zip(lines, early, later, strict=True):
        assert before == after, arguments
        assert after[0] == 2, arguments


def test_a_wrong_value_of_any_key_is_refused_without_torch(tmp_path):
    """A list of dictionaries is what no key takes but student_pool, whose dictionaries it is wrong for."""
    values = "[{no_such_part: [{}]}]"
    names = []
    for name in sorted(check_early("AttnFedKD", "ml-100k", [], {})._known.keys):
        try:
            check_early("AttnFedKD", "ml-100k", [], {name: values})
        except InputError:
            names.append(name)
    assert len(names) > 100
    for name, (code, told) in zip(
        names, told_without_torch([[*KEYS, f"--{name}={values}"] for name in names], tmp_path), strict=True
    ):
        assert code == 2, (name, told)


def test_a_manifests_folder_is_known_by_the_file_that_a_schema_writes():
    assert (folders.SCHEMA, folders.TABLES) == (schema.SCHEMA, schema.TABLES)


def test_what_is_told_of_commands_needs_no_torch(tmp_path):
    lines = [["--help"], ["--version"], ["presets"], *([name, "--help"] for name in _COMMANDS)]
    assert [code for code, _ in told_without_torch(lines, tmp_path)] == [0] * len(lines)
