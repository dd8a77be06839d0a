"""Products of the Gram matrix of interactions with a few directions, from which everybody ranks."""

from __future__ import annotations

from torch import Tensor

from recbole_fedkd.distillation import gram
from recbole_fedkd.distillation.gram import GramSettings
from recbole_fedkd.federated.knowledge.base import Arrays, StagedSums, Tensors, register_knowledge
from recbole_fedkd.federated.message import ArraySpec
from recbole_fedkd.federated.sum_tasks import SumTask
from recbole_fedkd.federated.task import Task


@register_knowledge
class GramKnowledge(StagedSums):
    """A block-Krylov range finder over the interactions of all clients (``distillation/gram.py``); ``strategy: sums``.

    Up: in each pass the product of the client's part of the Gram matrix with the directions, and once how many interactions
    each item has. Down: the directions of the next pass; in the end ``factors`` and ``diagonal``, from which every client
    scores the items for its own users. A client keeps neither.
    """

    name = "gram"
    settings_type = GramSettings
    keeps = False

    def learns(self, received: Tensors) -> bool:
        """Never: scores follow from the sums."""
        return False

    def taken_in(self, task: Task, received: Tensors, own: Tensors) -> None:
        """The network computes its scores, or keeps the directions until the client answers."""
        assert isinstance(task, SumTask)
        if "factors" in received:
            task.network.know(received["factors"].double(), received["diagonal"].squeeze(1).double())
        task.heard = {name: value.double() for name, value in received.items() if name.startswith("basis_")}

    def statistics(self, task: Task, received: Tensors) -> dict[str, Tensor]:
        """The next pass's product; that of the first, which starts from the public seed, where nothing has come down."""
        assert isinstance(task, SumTask)
        rows = task.network.rows
        if task.heard:
            (name, basis), task.heard = next(iter(task.heard.items())), {}
            return gram.answer(name.replace("basis", "product"), rows, basis)
        if task.network.informed:
            return {}
        first = gram.directions(self.settings, self.sizes.items, [], [])
        return gram.answer("product_0", rows, first.to(rows.items.device))

    def upload(self, collected: Tensors, first: bool) -> Arrays:
        """The sums in single precision."""
        return {name: value.float().cpu().numpy() for name, value in collected.items()}

    def upload_arrays(self) -> dict[str, ArraySpec]:
        """One pass of all, and the counts beside the first."""
        items = self.sizes.items
        shape = (items, self.settings.width(items))
        arrays = {stage: ArraySpec(shape, optional=True) for stage in self.settings.stages}
        return arrays | {"counts": ArraySpec((items, 1), optional=True)}

    def step(self, state: Tensors, statistics: Tensors) -> dict[str, Tensor]:
        """The next directions, or what follows from all passes."""
        settings, items = self.settings, self.sizes.items
        following = {**state, **statistics, "held": self.versions_of(state)}
        products = gram.products_of(settings, following)
        known = [gram.directions(settings, items, [], [])]
        known += [following[f"basis_{number}"].double() for number in range(1, len(products))]
        if len(products) < settings.sketch_passes:
            following[f"basis_{len(products)}"] = gram.directions(settings, items, products, known).float()
            return following
        following["factors"] = gram.gram_factors(settings, products, known).float()
        return following

    def download_arrays(self) -> dict[str, ArraySpec]:
        """Directions of a pass, or what ends the exchange."""
        items, settings = self.sizes.items, self.settings
        bases = {f"basis_{number}": (items, settings.width(items)) for number in range(1, settings.sketch_passes)}
        arrays = bases | {"factors": (items, settings.gram_size), "diagonal": (items, 1)}
        return {name: ArraySpec(shape, optional=True) for name, shape in arrays.items()}

    def download(self, state: Tensors, client: int, round_index: int) -> Arrays:
        """The latest, where the client does not have it."""
        if "held" not in state or int(state["held"][client]) == self.version(state):
            return {}
        if "factors" in state:
            return {"factors": state["factors"].cpu().numpy(), "diagonal": state["counts"].cpu().numpy()}
        name = f"basis_{self.version(state)}"
        return {name: state[name].cpu().numpy()}

    def version(self, state: Tensors) -> int:
        """Passes that are over."""
        return len(gram.products_of(self.settings, state))
