"""The command line: ``--model --dataset --config_files --key=value`` as RecBole users know it. Only here is argv read."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence

from recbole_fedkd import __version__
from recbole_fedkd.command_line import commands
from recbole_fedkd.command_line.arguments import parse_arguments
from recbole_fedkd.command_line.completion import complete
from recbole_fedkd.command_line.help import help_text, usage_of
from recbole_fedkd.command_line.signals import Stopped, signals_that_stop
from recbole_fedkd.errors import InputError, TrainingError, nearest

_COMMANDS: dict[str, Callable[[Sequence[str]], int | None]] = {
    "compare": commands.compare,
    "report": commands.report,
    "audit": commands.audit,
    "search": commands.search,
    "import": commands.import_file,
    "recommend": commands.recommend,
    "split-federation": commands.split_federation,
    "manifest": commands.manifest,
    "bring": commands.bring,
    "coordinate": commands.coordinate,
    "party": commands.party,
    "status": commands.status,
    "cost": commands.cost,
    "presets": commands.presets,
    "completion": commands.completion,
}
_GOING_ON = ("compare", "search", "coordinate", "party")
_HELP = ("--help", "-h", "help")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    The exit code is 0, 2 for bad input, 1 for failed training, or 128 and the number of the signal that stopped it (130 for
    Ctrl-C, 143 for SIGTERM, 129 for SIGHUP), each told in one line.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    command = arguments[0] if arguments and arguments[0] in _COMMANDS else ""
    try:
        with signals_that_stop():
            return _run(command, arguments)
    except (InputError, TrainingError) as error:
        print(f"error: {_with_notes(error)}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    except KeyboardInterrupt as stop:
        going_on = command in _GOING_ON or any(
            argument.startswith(("--experiment", "--resume")) for argument in arguments
        )
        notes = ["nothing was made; start it again" if command else "nothing was trained yet; start it again"]
        notes = ["the same command goes on where it stopped"] if going_on else notes
        notes = getattr(stop, "__notes__", notes)
        print(f"\nstopped; {'; '.join(notes)}", file=sys.stderr)
        return 128 + (stop.signal if isinstance(stop, Stopped) else signal.SIGINT)
    except BrokenPipeError:
        # Whoever read the output has enough of it, such as `head`; Python would complain once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        where = f"'{error.filename}': " if error.filename else ""
        print(f"error: {where}{error.strerror or error}", file=sys.stderr)
        return 1


def _with_notes(error: Exception) -> str:
    return "; ".join([str(error), *getattr(error, "__notes__", [])]).replace("?; ", "? ")


def _run(command: str, arguments: list[str]) -> int:
    if any(argument in _HELP for argument in arguments):
        print(usage_of(command) if command else help_text(arguments), flush=True)
        return 0
    if "--version" in arguments:
        print(f"recbole_fedkd {__version__}", flush=True)
        return 0
    if command:
        return _COMMANDS[command](arguments[1:]) or 0
    if arguments and not arguments[0].startswith("-"):
        known = f"; commands are {', '.join(_COMMANDS)}; without one, --model=<name> --dataset=<name> runs a model"
        raise InputError(f"'{arguments[0][:100]}' is no command{nearest(arguments[0], _COMMANDS) or known}")
    return commands.run(parse_arguments(arguments, flags=("quiet", "verbose")))


def console() -> None:
    """Entry point of the installed command."""
    complete(_COMMANDS)
    sys.exit(main())
