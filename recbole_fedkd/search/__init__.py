"""Search for hyper-parameters: what is searched, and the trials."""

from __future__ import annotations

from recbole_fedkd.search.parameters import Parameter, read_parameters
from recbole_fedkd.search.trials import Search, config_of, run_search, search_table

__all__ = ["Parameter", "Search", "config_of", "read_parameters", "run_search", "search_table"]
