"""Item factors: sums per item from which everybody computes the same item vectors."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from recbole_fedkd.distillation.exchange import FactorSettings
from recbole_fedkd.federated.knowledge.base import Arrays, StagedSums, Tensors, register_knowledge
from recbole_fedkd.federated.message import ArraySpec
from recbole_fedkd.federated.sum_tasks import FactorTask, TaughtTask
from recbole_fedkd.federated.task import Task


@register_knowledge
class FactorKnowledge(StagedSums):
    """Sums per item from which everybody computes the same item vectors, stage by stage (``distillation/exchange.py``).

    Up: in each round of the exchange the next stage's sums. Down: the totals of the stages that the client does not have. When
    the exchange is over nothing travels any more, and clients train their heads by themselves.
    """

    name = "factors"
    settings_type = FactorSettings
    accumulates = True

    def learns(self, received: Tensors) -> bool:
        """Once the exchange is over."""
        return self.next_stage(received) is None

    def statistics(self, task: Task, received: Tensors) -> dict[str, Tensor]:
        """The next stage's sums."""
        assert isinstance(task, FactorTask | TaughtTask)
        stage = self.next_stage(received)
        if stage is None:
            return {}
        exchange, unit, totals = task.teacher.exchange, self.sizes.user_unit, exact_sums(received)
        return exchange.answer(stage, totals) if unit is None else exchange.answer_of_bounded_users(stage, totals, unit)

    def taken_in(self, task: Task, received: Tensors, own: Tensors) -> None:
        """Tables of the items are computed of the totals, wherever there are new ones."""
        assert isinstance(task, FactorTask | TaughtTask)
        totals = {stage for stage in self.settings.stages if stage in received}
        if totals and totals != task.knows:
            task.teacher.know(exact_sums(received), exact_sums(own))
            task.knows = totals

    def upload(self, collected: Tensors, first: bool) -> Arrays:
        """The sums per item in single precision; what is no item's in double, which no codec takes."""
        stages = self.settings.stages
        sent = {name: value.float() if name in stages else value for name, value in collected.items()}
        return {name: value.cpu().numpy() for name, value in sent.items()}

    def upload_arrays(self) -> dict[str, ArraySpec]:
        """One stage of all, and what goes with it."""
        items, settings = self.sizes.items, self.settings
        arrays = {}
        for stage in settings.stages:
            arrays[stage] = ArraySpec((items, settings.numbers(stage, self.sizes.labels, items)), optional=True)
            for name, shape in settings.beside(stage).items():
                arrays[name] = ArraySpec(shape, np.float64, optional=True)
        return arrays

    def step(self, state: Tensors, statistics: Tensors) -> dict[str, Tensor]:
        """The totals of all stages so far."""
        return {**state, **statistics, "held": self.versions_of(state)}

    def possible(self, statistics: Tensors) -> Tensors:
        """Counts and squares are not negative, a curvature is symmetric and positive semi-definite."""
        corrected = dict(statistics)
        for name, value in statistics.items():
            if name in ("histogram", "squares"):
                corrected[name] = value.clamp(min=0)
            elif name.startswith("curvature"):
                symmetric = (value + value.T) / 2
                levels, directions = torch.linalg.eigh(symmetric)
                corrected[name] = directions * levels.clamp(min=0) @ directions.T if levels[0] < 0 else symmetric
        return corrected

    def download_arrays(self) -> dict[str, ArraySpec]:
        """Totals of any stages."""
        return self.upload_arrays()

    def download(self, state: Tensors, client: int, round_index: int) -> Arrays:
        """Totals of the stages that the client does not have."""
        stages = self._finished(state)[int(state["held"][client]) :] if "held" in state else []
        names = [name for stage in stages for name in (stage, *self.settings.beside(stage))]
        return {name: state[name].cpu().numpy() for name in names}

    def version(self, state: Tensors) -> int:
        """Stages that are over."""
        return len(self._finished(state))

    def _finished(self, totals: Tensors) -> list[str]:
        return [stage for stage in self.settings.stages if stage in totals]

    def next_stage(self, totals: Tensors) -> str | None:
        """What goes up next, given the totals so far; None once the exchange is over."""
        return next((stage for stage in self.settings.stages if stage not in totals), None)


def exact_sums(sums: Tensors) -> dict[str, Tensor]:
    """Sums of any stages as all that follows from them is computed: in double precision, and without what are no counts.

    A codec downwards may make less than nothing of a count, as one upwards may, see :meth:`FactorKnowledge.possible`.
    """
    wide = {name: value.double() for name, value in sums.items()}
    return {name: value.clamp(min=0) if name == "histogram" else value for name, value in wide.items()}
