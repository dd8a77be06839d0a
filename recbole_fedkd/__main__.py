"""``python -m recbole_fedkd``: the command ``recbole-fedkd``."""

import signal


def main() -> None:
    """Entry point of the installed command. Whoever stops it while it loads, when nothing is begun, reads no traceback."""
    stoppable = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if stoppable:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from recbole_fedkd.command_line import console

    if stoppable:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    console()


if __name__ == "__main__":
    main()
