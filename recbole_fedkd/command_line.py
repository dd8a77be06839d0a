"""The command line: ``--model --dataset --config_files --key=value`` as RecBole users know it. Only here is argv read."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from recbole_fedkd import __version__
from recbole_fedkd.errors import InputError, TrainingError

USAGE = """\
usage: python run_recbole_fedkd.py --model=MODEL --dataset=DATASET [--config_files="A.yaml B.yaml"] [--key=value ...]
       python run_recbole_fedkd.py --resume=CHECKPOINT [--epochs=N]

Trains a model on a dataset and judges it by RecBole's evaluator.

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
        argument = _SHORT.get(arguments[position], arguments[position])
        position += 1
        if not argument.startswith("--") or argument == "--":
            raise InputError(f"argument '{argument}' is not of the form --key=value")
        key, equals, value = argument[2:].partition("=")
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code is 0, 2 for bad input or 1 for failed training, each told in one line."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if any(argument in ("--help", "-h", "help") for argument in arguments):
        print(help_text())
        return 0
    if "--version" in arguments:
        print(f"recbole_fedkd {__version__}")
        return 0
    try:
        keys = parse_arguments(arguments)
        files = keys.pop("config_files", "").split()
        model, dataset = keys.pop("model", None), keys.pop("dataset", None)
        from recbole_fedkd.quick_start import run_recbole_fedkd

        run_recbole_fedkd(model, dataset, files, command_line=keys)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except TrainingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; if an epoch is finished, --resume=<run folder> goes on after it", file=sys.stderr)
        return 130
    return 0


def console() -> None:
    """Entry point of the installed command."""
    sys.exit(main())
