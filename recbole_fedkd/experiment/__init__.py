"""An experiment: a grid of runs described by one yaml file, each run in a process of its own, kept as records.

``grid`` reads the file, without torch; ``runner`` runs its cells.
"""
