"""Protocols: which rows, which candidates and which relevance stand behind a number.

RecBole evaluates one kind of metric per run. Here a model is judged by as many protocols as its metrics need; each is a
RecBole config, loader, collector and evaluator, run by RecBole's own evaluation code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from logging import getLogger
from typing import Any

import torch
from recbole.data.dataloader import FullSortEvalDataLoader
from recbole.evaluator import metric_types
from recbole.utils import EvaluatorType
from torch import Tensor

from recbole_fedkd.data.rows import PHASES, Rows, create_samplers, evaluation_loader
from recbole_fedkd.errors import InputError, listed
from recbole_fedkd.evaluation.candidates import CandidateLoader, samples_candidates
from recbole_fedkd.evaluation.labels import check_held_out, described_labels, label_set, relevant_rows
from recbole_fedkd.evaluation.ranking_context import rank_in_context


@dataclass
class Protocol:
    """One way of judging.

    Attributes:
        name: sentence for the reader of a number.
        config: the run's config, with the metrics and the mode of this protocol.
        loader: a RecBole evaluation loader.
        primary: whether it holds ``valid_metric``.
        labels: the labels that a row may have, ascending.
    """

    name: str
    config: Any
    loader: Any
    primary: bool
    labels: list[float]


@dataclass
class EvaluationData:
    """The protocols of one phase; what ``Trainer.evaluate`` takes in place of a single loader.

    Attributes:
        phase: ``valid`` or ``test``.
        protocols: in the order in which they are judged.
        train_data: training loader, from which some metrics take popularity.
        ranking: makes a full-sort loader, where no protocol has one; None where there are no rows.

    Whatever RecBole's own evaluation loader has (``dataset``, ``uid2history_item``, ...) is that of ``ranking_loader``, so
    that RecBole's ``full_sort_scores`` and ``full_sort_topk`` take this as their ``test_data``.
    """

    phase: str
    protocols: list[Protocol]
    train_data: Any
    ranking: Callable[[], Any] | None = None

    def __iter__(self) -> Iterator[Protocol]:
        return iter(self.protocols)

    def __bool__(self) -> bool:
        return any(len(protocol.loader) for protocol in self.protocols)

    def for_validation(self) -> EvaluationData:
        """The protocol of ``valid_metric`` alone: the others cost time in every epoch and decide nothing."""
        return EvaluationData(
            self.phase, [protocol for protocol in self.protocols if protocol.primary], self.train_data, self.ranking
        )

    @cached_property
    def ranking_loader(self) -> Any:
        """The full-sort loader of a protocol, or one made for it; None where there are no rows."""
        loaders = [protocol.loader for protocol in self.protocols]
        full_sort = next((loader for loader in loaders if isinstance(loader, FullSortEvalDataLoader)), None)
        return full_sort if full_sort is not None or self.ranking is None else self.ranking()

    @cached_property
    def uid2history_item(self) -> Any:
        """Items ``[users]`` that are no candidates; RecBole's loader knows those of users with relevant rows alone."""
        loader = self.ranking_loader
        histories = loader.uid2history_item.copy()
        for user, items in enumerate(histories):
            if items is None:
                histories[user] = torch.tensor(sorted(loader._sampler.used_ids[user]), dtype=torch.int64)
        return histories

    def __getattr__(self, name: str) -> Any:
        if (
            name.startswith("__")
            or name in ("ranking_loader", "uid2history_item")
            or "protocols" not in self.__dict__
            or self.ranking_loader is None
        ):
            raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")
        return getattr(self.ranking_loader, name)


def evaluation_data(
    config: Any,
    dataset: Any,
    loaders: tuple[Any, Any, Any],
    phase: str,
    context: Sequence[str] = (),
    members: Tensor | None = None,
) -> EvaluationData:
    """Build the protocols of a phase.

    Value metrics judge the held-out rows as they are; ranking metrics rank the whole catalogue (or sampled negatives, if
    ``eval_args.mode`` says so) for each user's relevant held-out items. Where rows carry labels, relevant are those of the
    positive label; stock RecBole would count a one-star rating as relevant.

    Args:
        config: the run's config, a ``FedKDConfig``.
        dataset: the whole dataset.
        loaders: train, valid and test loaders of RecBole's ``data_preparation``.
        phase: ``valid`` or ``test``.
        context: columns of the rows that the model reads: a user's items are ranked in the context of a row of the user.
        members: bool ``[users]``, who is judged; None: everybody.

    Raises:
        InputError: the split asks for test rows and the data leave none, or what the phase asks for cannot be judged.
    """
    index = PHASES.index(phase)
    loader = loaders[index]
    if not len(loader._dataset):
        if holds_out(config, phase):
            sentence = (
                f"eval_args.split={config['eval_args']['split']} holds out no {phase} row of the {len(dataset.inter_feat)} "
                f"interactions of dataset '{config['dataset']}'; hold out a larger share, or set eval_args.group_by=None where "
                "users have few rows"
            )
            if phase == "test":
                raise InputError(sentence)
            getLogger().warning(sentence)
        return EvaluationData(phase, [], loaders[0])
    if members is not None:
        loaders = _of_users(config, dataset, loaders, phase, members)
        loader = loaders[index]
    check_held_out(config, dataset, loader._dataset, phase)
    labels = label_set(config, dataset)
    ranking = partial(_full_sort_loader, config, dataset, loaders, phase, context)
    held_out = loader._dataset.held_out
    by_type: dict[Any, list[str]] = {}
    for metric in config.judged_metrics:
        by_type.setdefault(metric_types[metric.lower()], []).append(metric)
    _check_label(config, by_type, loaders[0]._dataset, phase)
    if len(by_type) == 1 and config["label_mode"] is None:
        rank_in_context(loader, context)
        sentence = _describe(config, config, dataset, phase, False, context, loader, held_out)
        stock = Protocol(sentence, config, loader, True, labels)
        return EvaluationData(phase, [stock], loaders[0], ranking)
    protocols = []
    for kind, metrics in by_type.items():
        primary = kind == config["eval_type"]
        view = _view(config, kind, config.evaluation_modes(kind), metrics=metrics)
        positives_only = False
        if kind == EvaluatorType.RANKING or not primary:
            splits = _copied(loaders)
            if kind == EvaluatorType.RANKING:
                relevant = relevant_rows(view, splits[index])
                if relevant is not None:
                    splits[index] = splits[index].copy(splits[index].inter_feat[relevant])
                    positives_only = True
            loader_of_kind = _loader(view, dataset, splits, phase)
        else:
            loader_of_kind = loader
        rank_in_context(loader_of_kind, context)
        sentence = _describe(config, view, dataset, phase, positives_only, context, loader_of_kind, held_out)
        protocols.append(Protocol(sentence, view, loader_of_kind, primary, labels))
    return EvaluationData(phase, protocols, loaders[0], ranking)


def _of_users(
    config: Any, dataset: Any, loaders: tuple[Any, Any, Any], phase: str, members: Tensor
) -> tuple[Any, Any, Any]:
    """The three loaders, that of the phase with the rows of some users ``members [users]`` alone; candidates are theirs."""
    index = PHASES.index(phase)
    splits = [loader._dataset for loader in loaders]
    whole = splits[index]
    rows = torch.nonzero(members[whole.inter_feat[whole.uid_field]]).flatten()
    if not len(rows):
        raise InputError(
            f"holdout_clients={config['holdout_clients']} parts the users so that one side has no {phase} row; hold out "
            "another share of the clients, or more rows (eval_args.split)"
        )
    splits[index] = whole.copy(whole.inter_feat[rows])
    remade = list(loaders)
    remade[index] = _loader(config, dataset, splits, phase)
    return remade[0], remade[1], remade[2]


def holds_out(config: Any, phase: str) -> bool:
    """Whether a config asks for rows of a phase."""
    split = config["eval_args"]["split"] or {}
    for kind in ("RS", "TS"):
        if kind in split:
            return bool(split[kind][PHASES.index(phase)])
    return phase in str(split.get("LS", phase))


def _full_sort_loader(
    config: Any, dataset: Any, loaders: tuple[Any, Any, Any], phase: str, context: Sequence[str]
) -> Any:
    """A loader that ranks all items, for a run that is not judged by one."""
    view = _view(config, EvaluatorType.RANKING, dict.fromkeys(("valid", "test"), "full"))
    loader = _loader(view, dataset, _copied(loaders), phase)
    rank_in_context(loader, context)
    return loader


def _view(config: Any, kind: EvaluatorType, modes: Mapping[str, str], **changes: Any) -> Any:
    """The config of a protocol, with an evaluation mode for each phase."""
    view = config.view(eval_type=kind, eval_args={**config["eval_args"], "mode": modes}, **changes)
    for phase in modes:
        view._set_eval_neg_sample_args(phase)
    return view


def _copied(loaders: Sequence[Any]) -> list[Any]:
    """The datasets of loaders: RecBole's evaluation loaders sort the rows of those that they are given."""
    splits = [loader._dataset for loader in loaders]
    return [split.copy(Rows(dict(split.inter_feat.interaction))) for split in splits]


def _check_label(config: Any, by_type: Mapping[Any, list[str]], training: Any, phase: str) -> None:
    """Raise :class:`InputError` for value metrics of rows that have no label."""
    metrics = by_type.get(EvaluatorType.VALUE)
    if metrics and config.evaluation_modes(EvaluatorType.VALUE)[phase] == "labeled":
        field = config["LABEL_FIELD"]
        if field not in training.inter_feat:
            raise InputError(
                f"value metrics {listed(metrics)} need a label, but dataset '{config['dataset']}' has no column '{field}'; "
                "set label_mode=threshold, or threshold={'<field>': <value>} as in RecBole"
            )


def _loader(view: Any, dataset: Any, splits: list[Any], phase: str) -> Any:
    """The evaluation loader of a view's mode: RecBole's, but for sampled candidates."""
    if samples_candidates(view[f"{phase}_neg_sample_args"]):
        return CandidateLoader(view, dataset, splits, phase)
    index = PHASES.index(phase)
    samplers = create_samplers(view, dataset, splits)
    return evaluation_loader(view, phase)(view, splits[index], samplers[index], shuffle=False)


def with_candidates(config: Any, dataset: Any, loaders: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
    """RecBole's three loaders, those of phases that judge by sampled candidates replaced by ours."""
    splits = [loader._dataset for loader in loaders]
    train, valid, test = loaders
    of_phase = {"valid": valid, "test": test}
    for phase, loader in of_phase.items():
        if len(loader._dataset) and samples_candidates(config[f"{phase}_neg_sample_args"]):
            of_phase[phase] = CandidateLoader(config, dataset, splits, phase)
    return train, of_phase["valid"], of_phase["test"]


def _facts(config: Any, loader: Any, held_out: Any) -> str:
    """What the data made of a protocol, in brackets behind its sentence; nothing where there is nothing to say."""
    facts = []
    if isinstance(loader, CandidateLoader) and loader.candidates.short:
        users = len(loader.uid_list)
        facts.append(f"{loader.candidates.short} of {users} users have fewer items left: all of theirs are candidates")
    if held_out.repeated:
        facts.append(
            f"{held_out.repeated} of {held_out.rows} rows repeat a pair of user and item of the training rows, "
            f"rm_dup_inter={config['rm_dup_inter']}"
        )
    return f" [{'; '.join(facts)}]" if facts else ""


def _held_out_rows(config: Any, phase: str, held_out: Any) -> str:
    """Which rows are held out, and how many of them ties in time decided, where there are such."""
    arguments = config["eval_args"]
    remarks = []
    if config["benchmark_filename"] is not None:
        remarks.append("of the benchmark file")
    elif "LS" in (arguments["split"] or {}):
        remarks.append(f"leave-one-out, {'the latest of each user' if arguments['order'] == 'TO' else 'at random'}")
    if held_out.tied:
        remarks.append(f"file order among equal times decided {held_out.tied} of {held_out.rows}")
    return f"held-out {phase} rows" + (f" ({'; '.join(remarks)})" if remarks else "")


def _describe(
    config: Any,
    view: Any,
    dataset: Any,
    phase: str,
    positives_only: bool,
    context: Sequence[str],
    loader: Any,
    held_out: Any,
) -> str:
    """The sentence of a protocol; what depends on the seed of a random split stands in brackets at its end."""
    sentence = _judged(config, view, dataset, phase, positives_only, context, _held_out_rows(config, phase, held_out))
    return sentence + _facts(config, loader, held_out)


def _judged(
    config: Any, view: Any, dataset: Any, phase: str, positives_only: bool, context: Sequence[str], rows: str
) -> str:
    """What is judged, and among what."""
    mode = str(view["eval_args"]["mode"][phase])
    if view["eval_type"] == EvaluatorType.VALUE:
        if mode == "labeled":
            labels = "ratings in stars" if config["label_mode"] == "rating" else "labels as they are"
            return f"{rows}, {described_labels(config, dataset) if config['label_mode'] == 'threshold' else labels}"
        return f"{rows} and {mode[3:]} sampled negative(s) each"
    relevant = rows
    if positives_only:
        relevant = f"{rows} with {described_labels(config, dataset)}"
    names = ", ".join(context)
    if mode == "full":
        ranked_in = f", each user in the context ({names}) of the first of its relevant rows" if context else ""
        return f"full sort of all items, relevant: {relevant}{ranked_in}"
    ranked_in = f", negatives in the context ({names}) of a relevant row of their user" if context else ""
    return f"{mode[3:]} {'uniform' if mode.startswith('uni') else 'popular'} negatives, relevant: {relevant}{ranked_in}"
