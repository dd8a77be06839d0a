"""Search for hyper-parameters: what is searched, and the trials.

``parameters`` reads what is searched, without torch; ``trials`` runs it.
"""
