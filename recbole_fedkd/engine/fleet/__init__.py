"""The ``fleet`` engine: the clients of a round train side by side, in tensors with a leading axis of clients."""

from recbole_fedkd.engine.fleet.agreement import disagreement
from recbole_fedkd.engine.fleet.engine import FleetEngine
from recbole_fedkd.engine.fleet.factors import FactorFleetPopulation, FactorSamples
from recbole_fedkd.engine.fleet.obstacle import batched_optimizer, obstacle
from recbole_fedkd.engine.fleet.population import CompactPopulation, FleetPopulation, RecBoleFleetPopulation
from recbole_fedkd.engine.fleet.samples import FleetTask, LabelledSamples, RecBoleSamples

__all__ = [
    "CompactPopulation",
    "FactorFleetPopulation",
    "FactorSamples",
    "FleetEngine",
    "FleetPopulation",
    "FleetTask",
    "LabelledSamples",
    "RecBoleFleetPopulation",
    "RecBoleSamples",
    "batched_optimizer",
    "disagreement",
    "obstacle",
]
