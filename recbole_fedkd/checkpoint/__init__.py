"""Checkpoints: sealed files, what they must hold, which file is a run's state, and the config of a resumed run.

Nothing in a checkpoint is trusted: it is read without running code, checked against its digest and its form, and names no
file to open.
"""
