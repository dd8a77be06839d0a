"""The command line: ``--model --dataset --config_files --key=value`` as RecBole users know it. Only here is argv read."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from recbole_fedkd import __version__
from recbole_fedkd.config.early import check_early
from recbole_fedkd.errors import InputError, TrainingError

USAGE = """\
usage: python run_recbole_fedkd.py --model=MODEL --dataset=DATASET [--config_files="A.yaml B.yaml"] [--key=value ...]
       python run_recbole_fedkd.py --resume=CHECKPOINT [--epochs=N]
       python run_recbole_fedkd.py --experiment=EXPERIMENT.yaml [--out=FOLDER] [--workers=N] [--key=value ...]

Trains a model on a dataset and judges it by RecBole's evaluator. Installed, the same command is recbole-fedkd.

  compare EXPERIMENT.yaml   run a grid of models, datasets and seeds and make a report of it; also --experiment=
  report FOLDER             make that report again from the records alone
  search                    search for hyper-parameters by validation
  <one of these> --help     how it is used

  --model=MODEL          {models}, or any RecBole model
  --dataset=DATASET      ml-100k comes with RecBole; others lie in --data_path (default: dataset/) or are downloaded
  --config_files=FILES   yaml files, separated by spaces; later ones win, the command line wins over all
  --resume=CHECKPOINT    go on after the last epoch of a checkpoint file or run folder
  --result_file=FILE     write the whole result as JSON
  --epochs=N             rounds, of a federation; epochs, of any other training
  --help, --version      this text; the version

Examples:
  python run_recbole_fedkd.py --model=AttnFedKD --dataset=ml-100k
  python run_recbole_fedkd.py --model=AttnFedKD --dataset=ml-1m --preset=fd --client_num=16 --partition=dirichlet:0.5
  python run_recbole_fedkd.py --model=WideDeep --dataset=ml-100k --metrics="['AUC','MAE','Accuracy','NDCG']"

Every key of this package (RecBole's own keys work too, see https://recbole.io/docs/user_guide/config_settings.html):
"""

COMPARE_USAGE = """\
usage: recbole-fedkd compare EXPERIMENT.yaml [--out=FOLDER] [--workers=N] [--key=value ...]
       python run_recbole_fedkd.py --experiment=EXPERIMENT.yaml [--out=FOLDER] [--workers=N] [--key=value ...]

Runs every cell of an experiment in a process of its own, keeps a record of each, and makes a report. Runs that are finished
are never repeated: the same command goes on after an interruption, and tries again what failed.

  --out=FOLDER     where records and report go (default: results/<name of the yaml file>)
  --workers=N      runs at a time (default: the number of processors)
  --key=value      a config key that wins in every cell, such as --data_path=... or --epochs=2

The yaml file:

  keys: {epochs: 16, client_num: 4}      # config keys of every cell
  grid:                                  # config key -> list of values; the cells are the product
    dataset: [ml-100k]
    partition: [random, "dirichlet:0.3"]
    label_mode: [threshold, rating]
    seed: [2020, 2021, 2022]             # default: [2020]
  rows:                                  # name in the table -> config keys of that row, which win over keys and grid
    local: {preset: local}
    central: {preset: central}
    AFD+CNN: {preset: afd}
    FD+CNN: {preset: fd, by: {label_mode: {threshold: {gamma: 0.3}}}}   # by: keys that hold for this value of a grid key
    WideDeep: {model: WideDeep, only: {label_mode: [threshold]}}   # only: the row exists for these values of the grid
  reference: FD+CNN                      # the row that the others are tested against; may be left out
  scale:                                 # for a table of bytes against quality; each part may be left out
    floor: local                         # the row whose quality is 0 % ...
    ceiling: central                     # ... and the one whose quality is 100 %
    bytes: FD+CNN                        # the row whose bytes are 100 %

Without rows, the values of model, preset and strategy name a row. Without model and preset, the model is AttnFedKD. A row that
sets a key of the grid has that one value on the axis. config_files (in keys, in a row or on the command line) names config
files. published, published_as, published_for (the values of grid keys that they are about) and published_source hand numbers of
a publication on to the report.
"""

REPORT_USAGE = """\
usage: recbole-fedkd report FOLDER

Makes the report of an experiment again, from the records in its folder alone.
"""

SEARCH_USAGE = """\
usage: recbole-fedkd search --params_file=FILE --model=MODEL --dataset=DATASET [--config_files="A.yaml B.yaml"]
                            [--trials=N] [--algorithm=tpe|random|exhaustive] [--out=FILE.json] [--key=value ...]

Searches for hyper-parameters by the validation score of each trial's best epoch; the test result is that of the best trial.
The same command goes on after an interruption; nothing is tried twice.

  --params_file=FILE   one parameter a line, as RecBole's hyper.test
  --trials=N           trials in all (default: 10; of an exhaustive search, every combination)
  --algorithm=NAME     tpe (default), random, or exhaustive (choice and quniform only)
  --out=FILE.json      the result (default: results/search-<model>-<dataset>.json), with FILE.json.journal beside it

Lines of the parameter file:

  backbone choice [cnn,mlp]
  dropout_prob uniform 0,0.5
  learning_rate loguniform -8,-4       # exponents of e
  embedding_size quniform 8,64,8       # multiples of 8
"""

# RecBole's own script has these.
_SHORT = {"-m": "--model", "-d": "--dataset"}


def parse_arguments(arguments: Sequence[str]) -> dict[str, str]:
    """``--key=value`` and ``--key value`` to a dictionary of texts.

    Raises:
        InputError: an argument that is no key, a key without a value, or one given twice with different values.
    """
    parsed: dict[str, str] = {}
    position = 0
    while position < len(arguments):
        short, equals, value = arguments[position].partition("=")
        argument = _SHORT.get(short, short) + equals + value
        position += 1
        if not argument.startswith("--") or argument == "--":
            raise InputError(f"argument '{argument}' is not of the form --key=value")
        key, equals, value = argument[2:].partition("=")
        if not key.strip("-"):
            raise InputError(f"argument '{argument}' is not of the form --key=value")
        if not equals:
            if position == len(arguments) or arguments[position].startswith("--"):
                raise InputError(f"--{key} has no value; write --{key}=<value>")
            value = arguments[position]
            position += 1
        if parsed.get(key, value) != value:
            raise InputError(f"--{key} is given twice, as '{parsed[key]}' and as '{value}'")
        parsed[key] = value
    return parsed


def help_text() -> str:
    """Usage and every key of the properties files with its default and meaning."""
    from recbole_fedkd.config import PROPERTIES, read_keys
    from recbole_fedkd.model import MODELS

    lines = [USAGE.format(models=", ".join(sorted(MODELS)))]
    for file in (PROPERTIES / "overall.yaml", PROPERTIES / "model" / "AttnStudent.yaml"):
        for key in read_keys(file).values():
            if key.sentence:
                rule = f" [{key.rule}]" if key.rule else ""
                lines.append(f"  --{key.name}={key.default}\n        {key.sentence}{rule}")
    return "\n".join(lines)


class Stopped(KeyboardInterrupt):
    """A scheduler (SIGTERM) or a closed terminal (SIGHUP) ends the run, as Ctrl-C does.

    Attributes:
        signal: number of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = number


@contextmanager
def signals_that_stop() -> Iterator[None]:
    """Signals that ask a process to end raise :class:`Stopped`; those that it was told to ignore (nohup) stay ignored.

    The first one counts: what ends a run well is not to be interrupted again. The handlers are as before afterwards.
    """
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():
        numbers = []
    before = {number: signal.getsignal(number) for number in numbers}
    taken = [number for number in numbers if before[number] not in (signal.SIG_IGN, None)]

    def stop(number: int, frame: object) -> None:
        for each in taken:
            signal.signal(each, signal.SIG_IGN)
        raise Stopped(number)

    for number in taken:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, before[number])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    The exit code is 0, 2 for bad input, 1 for failed training, or 128 and the number of the signal that stopped it (130 for
    Ctrl-C, 143 for SIGTERM, 129 for SIGHUP), each told in one line.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    command = arguments[0] if arguments and arguments[0] in _COMMANDS else ""
    if any(argument in ("--help", "-h", "help") for argument in arguments):
        print(_COMMANDS[command][1] if command else help_text())
        return 0
    if "--version" in arguments:
        print(f"recbole_fedkd {__version__}")
        return 0
    try:
        with signals_that_stop():
            return _COMMANDS[command][0](arguments[1:]) if command else _run(parse_arguments(arguments))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except TrainingError as error:
        print(f"error: {'; '.join([str(error), *getattr(error, '__notes__', [])])}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        many = command or any(argument.startswith("--experiment") for argument in arguments)
        told = ["the same command goes on where it stopped" if many else "nothing was trained yet; start it again"]
        told = getattr(stop, "__notes__", told)
        print(f"\nstopped; {'; '.join(told)}", file=sys.stderr)
        return 128 + (stop.signal if isinstance(stop, Stopped) else signal.SIGINT)
    except OSError as error:
        where = f"'{error.filename}': " if error.filename else ""
        print(f"error: {where}{error.strerror or error}", file=sys.stderr)
        return 1


def _run(keys: dict[str, str]) -> int:
    """One run, or with ``--experiment`` many."""
    if "experiment" in keys:
        return _compare(keys.pop("experiment"), keys)
    files = keys.pop("config_files", "").split()
    model, dataset = keys.pop("model", None), keys.pop("dataset", None)
    if "torch" not in sys.modules:  # else the full check comes at once
        check_early(model, dataset, files, keys)
    from recbole_fedkd.quick_start import run_recbole_fedkd

    run_recbole_fedkd(model, dataset, files, command_line=keys)
    return 0


def _compare_command(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0].startswith("-"):
        raise InputError("compare needs an experiment; write compare <experiment>.yaml [--key=value ...]")
    return _compare(arguments[0], parse_arguments(arguments[1:]))


def _compare(file: str, keys: dict[str, str]) -> int:
    """Run an experiment and make its report; the exit code is 1 if a run failed."""
    out = Path(keys.pop("out", f"results/{Path(file).stem}"))
    workers = _count(keys, "workers", most=1024) or os.cpu_count() or 1
    from recbole_fedkd.experiment import read_experiment, run_experiment
    from recbole_fedkd.report import write_report

    outcome = run_experiment(read_experiment(file, keys), out, workers)
    print(outcome)
    print(f"report: {write_report(out)}")
    return 1 if outcome.failed else 0


def _report_command(arguments: Sequence[str]) -> int:
    if len(arguments) != 1 or arguments[0].startswith("-"):
        raise InputError("report needs the folder of one experiment; write report <folder>")
    if not Path(arguments[0]).is_dir():
        raise InputError(f"folder '{arguments[0]}' does not exist; report needs the folder of an experiment")
    from recbole_fedkd.report import write_report

    print(f"report: {write_report(Path(arguments[0]))}")
    return 0


def _search_command(arguments: Sequence[str]) -> int:
    keys = parse_arguments(arguments)
    for name in ("params_file", "model", "dataset"):
        if name not in keys:
            raise InputError(f"search needs --{name}=<{name}>; see search --help")
    out = Path(keys.pop("out", f"results/search-{keys['model']}-{keys['dataset']}.json"))
    trials = _count(keys, "trials")
    file, files = keys.pop("params_file"), keys.pop("config_files", "").split()
    algorithm = keys.pop("algorithm", "tpe")
    from recbole_fedkd.search import Search, read_parameters, run_search, search_table

    search = Search.prepare(read_parameters(file), keys, files, algorithm)
    content = run_search(search, out, trials)
    print(search_table(content))
    print(f"result: {out}")
    return 0


def _count(keys: dict[str, str], name: str, most: int | None = None) -> int | None:
    """Take a number from 1, to ``most`` where there is a bound, out of the keys; None if it is not there."""
    text = keys.pop(name, None)
    if text is None:
        return None
    allowed = ">= 1" if most is None else f"in [1, {most}]"
    if not re.fullmatch(r"\d{1,10}", text, re.ASCII) or not 1 <= int(text) <= (most or 10**10):
        raise InputError(f"{name} is '{text[:40]}'; it must be an integer {allowed}")
    return int(text)


_COMMANDS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "compare": (_compare_command, COMPARE_USAGE),
    "report": (_report_command, REPORT_USAGE),
    "search": (_search_command, SEARCH_USAGE),
}


def console() -> None:
    """Entry point of the installed command."""
    sys.exit(main())
