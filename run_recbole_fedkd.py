"""Run a model on a dataset, as RecBole's ``run_recbole.py``; ``--help`` lists every key."""

from recbole_fedkd.__main__ import main

if __name__ == "__main__":
    main()
