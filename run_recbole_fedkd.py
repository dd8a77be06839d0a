"""Run a model on a dataset, as RecBole's ``run_recbole.py``; ``--help`` lists every key."""

from recbole_fedkd.command_line import console

if __name__ == "__main__":
    console()
