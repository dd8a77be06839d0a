"""A federation, put together: parties one by one, or all of them in one process."""

from recbole_fedkd.federation.parties import build_client, build_clients, build_server, federated_class
from recbole_fedkd.federation.together import Population, build_engine, build_population, population_of, save_federation

__all__ = [
    "Population",
    "build_client",
    "build_clients",
    "build_engine",
    "build_population",
    "build_server",
    "federated_class",
    "population_of",
    "save_federation",
]
