"""Somebody who was never there: scores from a history alone, as a device that joins would compute them.

- ``Bias``, ``FoldIn``, ``MFEM``: the user's bias and vector are the closed forms of training.
- Item factors (``knowledge=factors``): the user's bias and vector follow from the items' tables; the head is that of a new
  client, which has not trained yet, or of the client that is named.
- This package's networks, and RecBole's with a row per user: the history is read where a network reads one, and the user's
  row is learned from it by the model's own loss, with a standard normal prior; every other parameter stays.
- RecBole's autoencoders, item-item models and sequential models read the history as they read any user's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from recbole.data.interaction import Interaction
from recbole.model.general_recommender import Pop
from recbole.utils import InputType
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from recbole_fedkd.data.labels import encode_labels
from recbole_fedkd.distillation import factors
from recbole_fedkd.distillation.features import ItemTables, KnownUsers, normal_logits
from recbole_fedkd.engine.fleet.group import Caller
from recbole_fedkd.engine.fleet.population import CompactPopulation
from recbole_fedkd.errors import InputError
from recbole_fedkd.federated.strategy import STRATEGIES
from recbole_fedkd.model import Bias
from recbole_fedkd.model import FoldIn as FloorOfVectors
from recbole_fedkd.model.factor_head import FactorHead
from recbole_fedkd.model.known import KnownPairs
from recbole_fedkd.model.pair import names_of
from recbole_fedkd.model.population import user_rows
from recbole_fedkd.model.shared import forget_cached, matching
from recbole_fedkd.model.student import LabelledRecommender
from recbole_fedkd.recommend.scoring import Scorer, flat, in_parts

STEPS = 25
"""Iterations of L-BFGS on one user's row; it stands still after about ten."""
NEGATIVES = 4
"""Sampled items per item of the history, where a model learns from clicks alone."""
ASKED = 16
"""Clients that are asked, where each keeps a network of its own and none is named."""


class FoldIn:
    """Folds histories into a trained model; arguments as of ``Recommender``.

    Args:
        scorer: scores users of the model.
    """

    def __init__(self, config: Any, model: Any, dataset: Any, training: Any, scorer: Scorer) -> None:
        self.config, self.model, self.dataset, self.training, self.scorer = config, model, dataset, training, scorer
        self.name, self.item_count = config["model"], dataset.item_num

    def scores(self, items: Tensor, ratings: list[float | None], client: int | None = None) -> Tensor:
        """Scores ``[items]`` of somebody with a history.

        Args:
            items: item ids ``[h]``, the latest last.
            ratings: as many.
            client: whose network serves; None where no network is everybody's: the mean over ``ASKED`` clients at most,
                spread evenly.

        Raises:
            InputError: a rating that the model needs, or a model that has no answer.
        """
        of_users = getattr(self.model, "client_of_user", None)
        numbers = int(of_users.max()) + 1 if self.config.federated and of_users is not None else 0
        if client is not None and not (type(client) is int and 0 <= client < numbers):
            allowed = (
                f"it must be an integer in [0, {numbers - 1}]" if numbers else "the model was trained without clients"
            )
            raise InputError(f"client is {client!r}; {allowed}")
        clients: list[int | None] = [client]
        if client is None and self.config.federated and not self._shares_network:
            trained = torch.tensor(self.scorer.trained_clients)
            clients = trained[torch.linspace(0, len(trained) - 1, min(len(trained), ASKED)).long()].tolist()
        return torch.stack([self._scores_by(number, items, ratings) for number in clients]).mean(0)

    @property
    def _shares_network(self) -> bool:
        """Whether somebody who lives on no client has a network, or needs none that any client has trained."""
        sums = self.config.learns_factors or isinstance(self.model, Bias)
        return STRATEGIES[self.config["strategy"]].shares_parameters or sums

    def _scores_by(self, client: int | None, items: Tensor, ratings: list[float | None]) -> Tensor:
        """Scores ``[items]`` by a client's network, or the one that is everybody's."""
        if isinstance(self.model, LabelledRecommender):
            values = self._values(items, ratings).numpy()
            labels = torch.from_numpy(encode_labels(values, self.model.label_values.tolist()))
            if isinstance(self.model, Bias):
                return self._of_floor(items, labels)
            network, weights = self._network(client)
            if isinstance(network, FactorHead):
                return self._of_factors(network, weights, items, labels, client)
            known = getattr(network, "known", None)  # of sums of interactions it is a flag
            with known.of_somebody(items, labels) if isinstance(known, KnownPairs) else nullcontext():
                return self._of_network(network, weights, items, labels)
        return self._of_recbole(items, ratings, client)

    def _values(self, items: Tensor, ratings: list[float | None]) -> Tensor:
        """Label values ``[h]``."""
        mode = self.config["label_mode"]
        if mode == "implicit":
            return torch.ones(len(items), dtype=torch.double)
        missing = next((position for position, rating in enumerate(ratings) if rating is None), None)
        if missing is not None:
            token = self.dataset.id2token(self.dataset.iid_field, int(items[missing]))
            raise InputError(f"item '{token}' of the history has no rating, which model '{self.name}' learns from")
        values = torch.tensor([float(rating or 0) for rating in ratings], dtype=torch.double)
        return (values >= self.config["rating_threshold"]).double() if mode == "threshold" else values

    # Closed forms

    def _of_floor(self, items: Tensor, labels: Tensor) -> Tensor:
        model, known = self.model, self.model.label_values.double()
        if isinstance(model, FloorOfVectors):
            users = self._known(items, labels, model.tables, model.label_values)
            means = model.tables.mean + model.tables.bias + users.vectors @ users.fold.posterior.mean[0]
        else:
            rows = factors.Rows(torch.zeros_like(items), items, known[labels], 1, self.item_count)
            bias = factors.user_biases(rows, model.score_mean, model.item_bias, self.config["bias_shrinkage"])
            means = model.score_mean + bias + model.item_bias
        scores: Tensor = factors.distribution_of_mean(means, float(model.spread), known) @ known
        return scores.float()

    @torch.no_grad()
    def _of_factors(self, head: FactorHead, own: Any, items: Tensor, labels: Tensor, client: int | None) -> Tensor:
        values = head.exchange.values.float()
        mean, features = self._known(items, labels, head.tables, values).of_user(0)
        if client is None:
            logits = normal_logits(values, head.middles(mean), head.tables.noise.sqrt().float())
        else:
            logits = call(head, own, "described", head.middles(mean), features)
        scores: Tensor = logits.softmax(-1) @ values
        return scores

    def _known(self, items: Tensor, labels: Tensor, tables: ItemTables, values: Tensor) -> KnownUsers:
        """One user with this history, given what is known of the items."""
        rows = factors.Rows(torch.zeros_like(items), items, values.double()[labels], 1, self.item_count)
        return KnownUsers(rows, labels, tables, values, self.config["bias_shrinkage"])

    # Networks: the user's rows are learned

    def _network(self, client: int | None) -> tuple[nn.Module, dict[str, Tensor]]:
        """The network that serves somebody new, and the parameters in which it differs from what the module holds."""
        if not self.config.federated:
            return getattr(self.model, "network", self.model), {}
        number = self.scorer.trained_clients[0] if client is None else client
        if not isinstance(self.model, CompactPopulation):
            return self.model.networks[number], {}
        groups = self.model.client_groups
        group = groups[number % len(groups)]
        return self.model.network_of(number), group.served_by(torch.tensor(number // len(groups)), group.base())

    def _of_network(self, network: nn.Module, weights: Mapping[str, Tensor], items: Tensor, labels: Tensor) -> Tensor:
        weights = {**dict(network.named_parameters()), **weights, **self._buffers_of_history(network, items, labels)}
        rows = [name for name in names_of(network, "user_rows") if name in weights]
        whole = matching(weights, self.config["private_parameters"]) if self.config.federated else {}
        learned = {name: torch.zeros_like(weights[name][:1]) for name in rows}
        learned |= {name: torch.zeros_like(weights[name]) for name in whole if name not in rows}
        history = "history_items" in " ".join(names_of(network, "user_buffers"))
        if not learned and not history and getattr(network, "known", None) is None:
            raise InputError(
                f"model '{self.name}' has nothing of a user, neither a row nor a history, so that it ranks alike for everybody "
                "new; train it with use_user_id=True or history_length > 0"
            )
        if self.config["label_mode"] == "implicit":
            negatives = self._negatives(items, NEGATIVES * len(items))
            items, labels = torch.cat([items, negatives]), torch.cat([labels, torch.zeros_like(negatives)])
        values = self.model.label_values
        context = {
            field.name: torch.zeros(1, 1, dtype=torch.float32 if field.tokens is None else torch.long)
            for field in self.model.context_fields
        }

        def logits(changed: Mapping[str, Tensor], of: Tensor) -> Tensor:
            asked = {name: value.expand(1, len(of), *value.shape[2:]) for name, value in context.items()}
            scored: Tensor = functional_call(
                network, {**weights, **changed}, (torch.zeros(1, dtype=torch.long), of[None], asked)
            )
            return scored[0]

        learned_values = learn(
            learned, lambda changed: functional.cross_entropy(logits(changed, items), labels, reduction="sum")
        )
        with torch.no_grad():
            scores: Tensor = logits(learned_values, torch.arange(self.item_count)).softmax(-1) @ values
        return scores

    def _buffers_of_history(self, network: nn.Module, items: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """What a network holds of its users, of one with this history: the latest first, features unknown."""
        buffers = dict(network.named_buffers())
        own_buffers = {}
        for name in names_of(network, "user_buffers"):
            like = buffers[name]
            own = like.new_zeros(1, *like.shape[1:])
            kept = min(len(items), like.shape[1]) if like.dim() > 1 else 0
            if name.endswith("history_items"):
                own[0, :kept] = items.flip(0)[:kept]
            elif name.endswith("history_labels"):
                own[0, :kept] = labels.flip(0)[:kept]
            own_buffers[name] = own
        return own_buffers

    def _negatives(self, items: Tensor, count: int) -> Tensor:
        """Items that are not in the history, drawn by the run's seed."""
        others = torch.ones(self.item_count, dtype=torch.bool)
        others[items] = False
        others[0] = False
        pool = torch.nonzero(others).flatten()
        generator = torch.Generator().manual_seed(int(self.config["seed"]))
        return pool[torch.randint(max(1, len(pool)), (count if len(pool) else 0,), generator=generator)]

    # RecBole's models

    def _of_recbole(self, items: Tensor, ratings: list[float | None], client: int | None) -> Tensor:
        model, weights = self._recbole_network(client)
        if isinstance(model, Pop):
            return self.scorer.of_users(torch.zeros(1, dtype=torch.long))[0]
        read: Callable[..., Tensor | None]
        for read in (self._of_similar_items, self._of_encoded_history, self._of_sequence):
            scores = read(model, weights, items)
            if scores is not None:
                return scores
        try:
            scores = self._of_learned_row(model, weights, items, ratings)
            if not scores[1:].isfinite().all() and all(
                bool(parameter.isfinite().all()) for parameter in model.parameters()
            ):
                raise ValueError("its scores of whom it was not trained with are no finite numbers")
            return scores
        except InputError:
            raise
        except Exception as error:  # whatever anybody's model raises that is called as it was not written for
            reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
            raise InputError(f"model '{self.name}' has no answer for somebody who was never there: {reason}") from error

    def _recbole_network(self, client: int | None) -> tuple[nn.Module, dict[str, Tensor]]:
        network, weights = self._network(client)
        return (network, weights) if self.config.federated else (self.model, {})

    def _of_similar_items(self, model: Any, weights: Mapping[str, Tensor], items: Tensor) -> Tensor | None:
        """Sums of similarities to the history (EASE, SLIMElastic, ADMMSLIM, ItemKNN)."""
        similarity = getattr(model, "item_similarity", None)
        if similarity is None and getattr(model, "method", "item") == "item" and type(model).__name__ == "ItemKNN":
            similarity = model.w
        if similarity is None:
            return None
        counts = np.bincount(items.numpy(), minlength=self.item_count).astype(np.float64)
        means = model.item_means if getattr(model, "center_columns", False) else 0.0
        scores = np.asarray(similarity.T @ (counts - means) + means, dtype=np.float32)
        return torch.from_numpy(scores.flatten())

    def _of_encoded_history(self, model: Any, weights: Mapping[str, Tensor], items: Tensor) -> Tensor | None:
        """Autoencoders read a user's row of the interaction matrix."""
        if not hasattr(model, "get_rating_matrix"):
            return None
        device = self.config["device"]
        row = torch.zeros(1, self.item_count, device=device).index_fill_(1, items.to(device), 1.0)
        with replaced(model, "get_rating_matrix", lambda users: row.expand(len(users), -1)):
            nobody = Interaction({self.dataset.uid_field: torch.zeros(1, dtype=torch.long)})
            return self._full_sort(model, weights, nobody)

    def _of_sequence(self, model: Any, weights: Mapping[str, Tensor], items: Tensor) -> Tensor | None:
        """Sequential models read the sequence; those that rank by it and read the user too have no answer."""
        if not self.scorer.sequential:
            return None
        try:
            return self._full_sort(model, weights, Interaction(self._sequence(items)))
        except NotImplementedError:  # it scores pairs, as DIN does
            return None
        except KeyError as error:
            raise InputError(
                f"model '{self.name}' reads {error} beside the sequence, which somebody who was never there does not have"
            ) from error

    def _sequence(self, items: Tensor) -> dict[str, Tensor]:
        most = self.config["MAX_ITEM_LIST_LENGTH"]
        kept = items[-most:]
        padded = functional.pad(kept, (0, most - len(kept)))
        return {
            self.dataset.iid_field + self.config["LIST_SUFFIX"]: padded.unsqueeze(0),
            self.config["ITEM_LIST_LENGTH_FIELD"]: torch.tensor([len(kept)]),
            self.dataset.iid_field: kept[-1:],
        }

    @torch.no_grad()
    def _full_sort(self, model: Any, weights: Mapping[str, Tensor], rows: Interaction) -> Tensor:
        forget_cached(model)
        try:
            scores = call(model, weights, "full_sort_predict", rows.to(self.config["device"]))
        finally:
            forget_cached(model)
        return flat(scores)

    def _of_learned_row(
        self, model: Any, weights: Mapping[str, Tensor], items: Tensor, ratings: list[float | None]
    ) -> Tensor:
        """The padding user's rows stand for the new one's, and are learned by the model's own loss."""
        dataset = self.dataset
        weights = {**dict(model.named_parameters()), **weights}
        slices = user_rows(model, dataset.uid_field, dataset.user_num, dataset.item_num)
        places = {name: start for name, (start, _) in slices.items() if name in weights}
        if not places:
            raise InputError(
                f"model '{self.name}' has no row of a user that could be learned from a history, so it has no answer for "
                "somebody who was never there"
            )
        batch = self._batch(items, ratings, getattr(model, "input_type", None) == InputType.PAIRWISE)

        def changed(rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
            row_of = {name: torch.tensor([start], device=weights[name].device) for name, start in places.items()}
            return {
                **weights,
                **{name: weights[name].detach().index_copy(0, row_of[name], row) for name, row in rows.items()},
            }

        def loss(rows: Mapping[str, Tensor]) -> Tensor:
            forget_cached(model)
            losses = call(model, changed(rows), "calculate_loss", batch)
            parts = losses if isinstance(losses, tuple) else (losses,)
            return torch.stack(parts).sum() * len(items)

        zeros = {name: torch.zeros_like(weights[name][:1]) for name in places}
        rows = learn(zeros, loss)
        with torch.no_grad():
            forget_cached(model)
            try:
                return self._all_items(model, {name: value.detach() for name, value in changed(rows).items()}, items)
            finally:
                forget_cached(model)

    def _all_items(self, model: Any, weights: Mapping[str, Tensor], items: Tensor) -> Tensor:
        """Scores of all items for the padding user."""
        rows = Interaction(self._user_columns(torch.zeros(1, dtype=torch.long), items)).to(self.config["device"])
        try:
            scores = call(model, weights, "full_sort_predict", rows)
        except NotImplementedError:
            everything = torch.arange(self.item_count)
            pairs = self._pairs(everything, items).to(self.config["device"])
            scores = torch.cat([flat(call(model, weights, "predict", part)) for part in in_parts(pairs)])
        return flat(scores)

    def _user_columns(self, users: Tensor, items: Tensor) -> dict[str, Tensor]:
        """Columns of the padding user ``[n]``: features unknown, and the history where the model reads it."""
        columns = dict(self.scorer.rows(users).interaction)
        unknown = (
            [name for name in columns if name.endswith(self.config["LIST_SUFFIX"])] if self.scorer.sequential else []
        )
        columns |= {name: torch.zeros_like(columns[name]) for name in (*self.scorer.context, *unknown)}
        if self.config.reads_history or self.scorer.sequential:
            columns |= {
                name: value.expand(len(users), *value.shape[1:]) for name, value in self._sequence(items).items()
            }
        return columns

    def _pairs(self, targets: Tensor, items: Tensor) -> Interaction:
        pairs = Interaction(self._user_columns(torch.zeros(len(targets), dtype=torch.long), items))
        pairs.update(Interaction({self.dataset.iid_field: targets}))
        if self.dataset.item_feat is not None:
            pairs.update(self.dataset.item_feat[targets])
        return pairs

    def _batch(self, items: Tensor, ratings: list[float | None], pairwise: bool) -> Interaction:
        """The history as the model's loss reads it: against sampled items, or with labels."""
        dataset, config = self.dataset, self.config
        label = config["LABEL_FIELD"]
        if pairwise:
            targets = items.repeat(NEGATIVES)
            negatives = self._negatives(items, len(targets))
            batch = self._pairs(targets[: len(negatives)], items)
            prefix = config["NEG_PREFIX"]
            batch.update(Interaction({prefix + dataset.iid_field: negatives}))
            if dataset.item_feat is not None:
                features = dataset.item_feat[negatives].interaction
                batch.update(Interaction({prefix + name: value for name, value in features.items()}))
            return batch.to(config["device"])
        if (
            config["threshold"]
            and config["label_mode"] != "implicit"
            and config["train_neg_sample_args"]["distribution"] == "none"
        ):
            (bound,) = list(config["threshold"].values())[:1]
            if any(rating is None for rating in ratings):
                raise InputError(f"an item of the history has no rating, which model '{self.name}' learns from")
            labels = torch.tensor([float((rating or 0) >= bound) for rating in ratings])
        else:
            negatives = self._negatives(items, NEGATIVES * len(items))
            labels = torch.cat([torch.ones(len(items)), torch.zeros(len(negatives))])
            items = torch.cat([items, negatives])
        batch = self._pairs(items, items)
        batch.update(Interaction({label: labels}))
        return batch.to(config["device"])


def learn(start: Mapping[str, Tensor], loss: Callable[[Mapping[str, Tensor]], Tensor]) -> dict[str, Tensor]:
    """The tensors that a loss and a standard normal prior prefer, by L-BFGS from where they start."""
    tensors = {name: value.detach().clone().requires_grad_() for name, value in start.items()}
    if not tensors:
        return {}
    optimizer = torch.optim.LBFGS(list(tensors.values()), max_iter=STEPS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        total = loss(tensors) + sum(value.square().sum() for value in tensors.values()) / 2
        total.backward()
        return total

    optimizer.step(closure)
    return {name: value.detach() for name, value in tensors.items()}


def call(model: nn.Module, weights: Mapping[str, Tensor], method: str, *arguments: Any) -> Any:
    """A method of a model, with some of its parameters or buffers replaced."""
    return Caller(model, lambda network: getattr(network, method)(*arguments)).by(weights)


@contextmanager
def replaced(thing: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute of an object replaced for a while."""
    before = thing.__dict__.get(name)
    object.__setattr__(thing, name, value)
    try:
        yield
    finally:
        if before is None:
            object.__delattr__(thing, name)
        else:
            object.__setattr__(thing, name, before)
