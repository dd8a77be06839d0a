"""RecBole's evaluation loop, with a config of its own: nothing of a trainer changes while one is at work."""

from __future__ import annotations

from collections import OrderedDict
from contextlib import nullcontext
from typing import Any

import torch
from recbole.data.dataloader import FullSortEvalDataLoader
from recbole.data.interaction import Interaction
from recbole.trainer import Trainer
from recbole.utils import EvaluatorType
from torch import Tensor

from recbole_fedkd.data.rows import PAIRS, bring_together
from recbole_fedkd.evaluation.collector import DISTRIBUTION, LabelCollector, PlainEvaluator
from recbole_fedkd.evaluation.per_user import user_values
from recbole_fedkd.evaluation.screening import Screen, is_worth_it


class Judge(Trainer):
    """Judges models by one protocol.

    Args:
        config: the protocol's: the run's config, with its metrics and its mode.
        collector: keeps what the metrics need.
        device: where models live.
        board: RecBole's logger for Weights & Biases.
    """

    eval_collector: LabelCollector

    def __init__(self, config: Any, collector: LabelCollector, device: torch.device, board: Any) -> None:
        # Not RecBole's own, which makes a folder, boards and an optimiser. These are what its evaluation reads.
        self.config, self.eval_collector, self.evaluator = config, collector, PlainEvaluator(config)
        self.device, self.wandblogger = device, board
        self.test_batch_size = config["eval_batch_size"]
        self.gpu_available = torch.cuda.is_available() and config["use_gpu"]
        self.at_once = False  # whether all candidates of a user are scored together
        self.screen: Screen | None = None  # of a ranking of which lists alone are asked
        self.item_tensor: Any = None
        self.tot_item_num: Any = None

    def judged(self, model: Any, loader: Any, show_progress: bool) -> OrderedDict[str, float]:
        """Metrics of a model on the rows of a RecBole loader, in which those of a client are brought together."""
        homes = getattr(model, "client_of_user", None)
        if homes is not None:
            bring_together(loader, homes)
        self.model, self.at_once = model, bool(getattr(model, "ranks_chosen", False))
        with getattr(model, "unchanged", nullcontext)():
            self.screen = self._screen(loader) if getattr(model, "screens", False) else None
            result: OrderedDict[str, float] | None = self.evaluate(
                loader, load_best_model=False, show_progress=show_progress
            )
        return result or OrderedDict()

    def of_users(self, loader: Any) -> Any:
        """Metrics of every user of what was judged last."""
        ranked = self.config["eval_type"] == EvaluatorType.RANKING
        users = loader.ranked_users if ranked else None
        return user_values(self.evaluator.metric_class, self.evaluator.judged, self.config["topk"], users)

    @torch.no_grad()
    def _screen(self, loader: Any) -> Screen | None:
        """What spares the ranking of a loader most scores; None: its metrics need all, it is small, or a list is another."""
        if (
            not self.config["screened_rankings"]
            or not isinstance(loader, FullSortEvalDataLoader)
            or loader.is_sequential
            or self.eval_collector.needs_all_scores
        ):
            return None
        length, items = max(self.config["topk"]), loader._dataset.item_num
        if not is_worth_it(len(loader.uid_list), items, length):
            return None
        self.model.eval()
        row_of = torch.zeros(loader._dataset.user_num, dtype=torch.long)
        row_of[loader.uid_list] = torch.arange(len(loader.uid_list))

        def whole(users: Tensor) -> Tensor:
            scores: Tensor = self.model.full_sort_predict(loader.user_df[row_of[users]])
            return scores.view(len(users), items)

        screen = Screen.of(loader.uid_list, length, whole, self.model.scored_again)
        if screen is None:
            return None
        audited = screen.audited(loader.uid_list).split(max(1, PAIRS // items))
        return screen if screen.is_right((users, _masked(loader, users, items)) for users in audited) else None

    def _full_sort_batch_eval(self, batched_data: Any) -> Any:
        judged = super()._full_sort_batch_eval(batched_data) if self.screen is None else self._screened(batched_data)
        scores, history = judged[1], batched_data[1]
        masked = len(scores) + (len(history[0]) if history is not None else 0)  # the padding item, and what users know
        self.eval_collector.see_scores(scores, batched_data[0][self.config["USER_ID_FIELD"]], masked)
        return judged

    def _screened(self, batched_data: Any) -> Any:
        """As RecBole's full sort, but that scores which reach no list are forecasts."""
        assert self.screen is not None
        interaction, history, positive_users, positive_items = batched_data
        users = interaction[self.config["USER_ID_FIELD"]]
        masked = _padding(users, self.tot_item_num)
        masked[history] = True
        scores = self.screen.scores(users, masked).masked_fill_(masked, -torch.inf)
        return interaction, scores, positive_users, positive_items

    def _neg_sample_batch_eval(self, batched_data: Any) -> Any:
        if self.config["eval_type"] != EvaluatorType.VALUE:
            return self._rank_candidates(batched_data)
        if not hasattr(self.model, "predict_distribution"):
            interaction, scores, positive_u, positive_i = super()._neg_sample_batch_eval(batched_data)
            scores = scores.flatten()  # some models score [batch, 1]
        else:
            interaction, _, positive_u, positive_i = batched_data
            interaction = interaction.to(self.device)
            distribution: Tensor = self.model.predict_distribution(interaction)
            interaction.update(Interaction({DISTRIBUTION: distribution}))
            scores = distribution @ self.model.label_values
        self.eval_collector.see_scores(scores, interaction[self.config["USER_ID_FIELD"]])
        return interaction, scores, positive_u, positive_i

    def _rank_candidates(self, batched_data: Any) -> Any:
        """As RecBole's, which takes scores ``[batch]`` of 32 bits only; those of some models have 64, or are ``[batch, 1]``."""
        interaction, places, positive_users, positive_items = batched_data
        if self.at_once:
            given = self._of_each_user(interaction, places)
        elif interaction.length <= self.test_batch_size:
            given = self.model.predict(interaction.to(self.device))
        else:
            given = self._spilt_predict(interaction, interaction.length)
        given = given.flatten()
        self.eval_collector.see_scores(given, interaction[self.config["USER_ID_FIELD"]])
        shape = int(positive_users[-1]) + 1, self.tot_item_num
        scores = torch.full(shape, -torch.inf, dtype=given.dtype, device=self.device)
        scores[places, interaction[self.config["ITEM_ID_FIELD"]]] = given
        return interaction, scores, positive_users, positive_items

    def _of_each_user(self, interaction: Any, places: Tensor) -> Tensor:
        """Scores ``[rows]`` of a batch, all candidates of a user at once; ``places``: of each row's user, ascending."""
        users, items = (interaction[self.config[name]] for name in ("USER_ID_FIELD", "ITEM_ID_FIELD"))
        counts = torch.bincount(places)
        starts = counts.cumsum(0) - counts
        slots = torch.arange(len(places)) - starts[places]
        chosen = items.new_zeros(len(counts), int(counts.max()))
        chosen[places, slots] = items
        scores: Tensor = self.model.score_chosen(users[starts], chosen)
        return scores[places, slots]


def _masked(loader: FullSortEvalDataLoader, users: Tensor, items: int) -> Tensor:
    """What is not recommended to users ``[n]``, padding and what they know: bool ``[n, items]``."""
    masked = _padding(users, items)
    for row, user in enumerate(users.tolist()):
        history = loader.uid2history_item[user]
        if history is not None:
            masked[row, history] = True
    return masked


def _padding(users: Tensor, items: int) -> Tensor:
    """Where the padding item of users ``[n]`` is: bool ``[n, items]``."""
    masked = torch.zeros(len(users), items, dtype=torch.bool)
    masked[:, 0] = True
    return masked
