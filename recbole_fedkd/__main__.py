"""``python -m recbole_fedkd``: the command ``recbole-fedkd``."""

from recbole_fedkd.command_line import console

if __name__ == "__main__":
    console()
