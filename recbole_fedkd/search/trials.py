"""Search for hyper-parameters by validation, on optuna, in this process and one trial after the other."""

from __future__ import annotations

import itertools
import json
import math
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import optuna
from optuna.distributions import FloatDistribution
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState
from texttable import Texttable

from recbole_fedkd.config import FedKDConfig
from recbole_fedkd.config.given import read_given
from recbole_fedkd.config.keys import keys_with
from recbole_fedkd.config.values import parse_value
from recbole_fedkd.errors import InputError, TrainingError
from recbole_fedkd.files import config_text, held_alone, regular_file, write_bytes, write_json
from recbole_fedkd.quick_start import run_without_logs
from recbole_fedkd.search.parameters import Parameter, check_searchable

DEFAULT_TRIALS = 10


@dataclass(frozen=True)
class Search:
    """What every trial of a search has in common.

    Attributes:
        parameters: what is searched.
        keys: the other config keys, texts or values, model and dataset among them.
        config_files: config files, which the keys win over.
        algorithm: ``tpe``, ``random`` or ``exhaustive``.
        seed: of the search.
        bigger: whether more of the validation score is better.
        metric: name of the validation score.
    """

    parameters: tuple[Parameter, ...]
    keys: Mapping[str, Any]
    config_files: tuple[str, ...]
    algorithm: str
    seed: int
    bigger: bool
    metric: str

    @classmethod
    def prepare(
        cls,
        parameters: Sequence[Parameter],
        keys: Mapping[str, Any],
        config_files: Sequence[str] = (),
        algorithm: str = "tpe",
    ) -> Search:
        """Check what trials have in common.

        Raises:
            InputError: something of it cannot be used.
        """
        check_searchable(parameters, keys, algorithm)
        config = FedKDConfig(config_file_list=list(config_files), command_line=keys)
        config.check_names([parameter.name for parameter in parameters])
        return cls(
            tuple(parameters),
            dict(keys),
            tuple(config_files),
            algorithm,
            int(config["seed"]),
            bool(config["valid_metric_bigger"]),
            str(config["valid_metric"]).lower(),
        )

    def identity(self) -> str:
        """What a search that goes on must share with the one before; the number of trials may grow."""
        given = read_given(list(self.config_files), None, self.keys)
        computed = {key: value for key, value in given.items() if key not in keys_with("aside")}
        lines = sorted(
            f"{parameter.name} {parameter.kind} {parameter.choices or parameter.numbers}"
            for parameter in self.parameters
        )
        return json.dumps([self.algorithm, lines, computed], sort_keys=True, default=str)

    def values(self, drawn: Mapping[str, Any]) -> dict[str, Any]:
        """Config keys of a trial from what optuna drew."""
        return {
            parameter.name: parameter.value(drawn[parameter.name])
            for parameter in self.parameters
            if parameter.name in drawn
        }

    def sampler(self, trials_before: int) -> BaseSampler:
        """The sampler of one trial; a search that was interrupted draws as one that was not."""
        seed = int(np.random.SeedSequence([self.seed, trials_before]).generate_state(1)[0])
        return TPESampler(seed=seed) if self.algorithm == "tpe" else RandomSampler(seed=seed)

    def points(self) -> list[list[Any]]:
        """What can be drawn, per parameter; nothing where one of them is a continuum."""
        if any(isinstance(parameter.distribution(), FloatDistribution) for parameter in self.parameters):
            return []
        return [parameter.all_draws() for parameter in self.parameters]


def run_search(search: Search, out: Path, trials: int | None = None, stream: TextIO | None = None) -> dict[str, Any]:
    """Search, or go on with a search that was interrupted, and write what was found.

    Trials are chosen by the validation score of their best epoch alone. What was tried before is not tried again.

    Args:
        search: what to search.
        out: JSON file of the result; beside it ``<out>.journal`` (SQLite, by optuna) holds the trials as they end, and
            :func:`config_of` of it the config of the best.
        trials: number of trials in all, those before the interruption included; not set: 10, or all of an exhaustive search.
            No search has more than there are different ones.
        stream: where one line per trial goes; not set: standard error.

    Returns:
        The content of ``out``: ``best`` (number, parameters, score, validation and test result of the best trial, or
        None), ``metric``, ``bigger`` and ``trials`` (number from 1, parameters, score, error).

    Raises:
        InputError: the result or the journal cannot be written, another search is at work with them, or the journal is
            that of another search.
        TrainingError: no trial succeeded.
    """
    regular_file(out, "out")
    regular_file(config_of(out), "out's config file")
    try:
        out.resolve().parent.mkdir(parents=True, exist_ok=True)
        (lock := out.with_name(f".{out.name}.lock")).touch()
    except OSError as error:
        raise InputError(f"out '{out}' cannot be written: {error.strerror}") from error
    with held_alone(lock, f"out '{out}' is in use by another search; wait for it, or give another --out"):
        return _search(search, out, trials, stream or sys.stderr)


def _search(search: Search, out: Path, trials: int | None, stream: TextIO) -> dict[str, Any]:
    """What :func:`run_search` does, alone with its files."""
    study = _open_study(search, out)
    points = search.points()
    if trials is None:
        trials = math.prod(map(len, points)) if search.algorithm == "exhaustive" else DEFAULT_TRIALS
    limit = min(trials, math.prod(map(len, points))) if points else trials
    _queue_what_is_owed(study, search, limit)
    distributions = {parameter.name: parameter.distribution() for parameter in search.parameters}
    while len(ended := _ended(study)) < limit:
        study.sampler = search.sampler(len(ended))
        trial = study.ask(distributions)
        tried = [other.params for other in ended]
        if trial.params in tried:
            # A sampler returns to what it takes for the best.
            trial.set_user_attr("repeated", True)
            study.tell(trial, state=TrialState.FAIL)
            study.enqueue_trial(_untried(search, points, tried))
            continue
        values = search.values(trial.params)
        try:
            score = _score(search, trial)
        except Exception as error:  # also RecBole's own, of parameters that do not go together
            reason = str(error) if isinstance(error, InputError | TrainingError) else f"{type(error).__name__}: {error}"
            trial.set_user_attr("error", reason)
            study.tell(trial, state=TrialState.FAIL)
            outcome = f"failed: {reason}"
        else:
            study.tell(trial, score)
            outcome = f"{search.metric} {score:.6g}"
        print(f"trial {len(ended) + 1}/{limit}, {_spelled(values)}: {outcome}", file=stream, flush=True)
    content = _content(search, study)
    write_json(content, out)
    if content["best"] is None:
        raise TrainingError(f"no trial succeeded; the first one failed with: {content['trials'][0]['error']}")
    write_bytes(_config_of_best(search, content["best"]).encode(), config_of(out))
    return content


def config_of(out: Path) -> Path:
    """Where the config of the best trial lies beside a result."""
    return out.with_suffix(".yaml") if out.suffix != ".yaml" else out.with_name(f"{out.stem}-best.yaml")


def _config_of_best(search: Search, best: Mapping[str, Any]) -> str:
    """The keys of the best trial, as a config file that a run takes."""
    about = f"best of a search by validation {search.metric}, {best['score']:.6g}: {_spelled(best['parameters'])}"
    given = read_given(list(search.config_files), None, {**search.keys, **best["parameters"]})
    keys = {name: value for name, value in given.items() if name not in keys_with("aside")}
    return config_text(
        about, {name: parse_value(value) if isinstance(value, str) else value for name, value in keys.items()}
    )


def _open_study(search: Search, out: Path) -> optuna.Study:
    """The study of the journal, new or as it was left."""
    journal = out.resolve().with_name(f"{out.name}.journal")
    optuna.logging.set_verbosity(optuna.logging.ERROR)

    def opened() -> optuna.Study:
        return optuna.create_study(
            storage=f"sqlite:///{journal}",
            study_name="search",
            direction="maximize" if search.bigger else "minimize",
            load_if_exists=True,
        )

    try:
        study = opened()
        if not study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
            # What kept every trial from succeeding may be mended by now, and nothing is lost.
            optuna.delete_study(study_name="search", storage=f"sqlite:///{journal}")
            study = opened()
    except Exception as error:  # of the operating system, SQLAlchemy, alembic and optuna
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"journal '{journal}' cannot be used: {reason}") from error
    identity = search.identity()
    if study.user_attrs.setdefault("search", identity) != identity:
        raise InputError(f"journal '{journal}' is that of another search; give another --out, or remove it")
    study.set_user_attr("search", identity)
    return study


def _untried(search: Search, points: list[list[Any]], tried: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A draw at random, of as many as there are, that is not among those tried."""
    generator = np.random.default_rng([search.seed, len(tried), 1])
    while True:
        drawn = {
            parameter.name: some[generator.integers(len(some))]
            for parameter, some in zip(search.parameters, points, strict=True)
        }
        if drawn not in tried:
            return drawn


def _queue_what_is_owed(study: optuna.Study, search: Search, limit: int) -> None:
    """Queue the points of an exhaustive search, and of any other the trials that were interrupted."""
    # Optuna's GridSampler forgets a point whose trial was interrupted.
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)
    names = [parameter.name for parameter in search.parameters]
    if search.algorithm == "exhaustive":
        points = itertools.islice(itertools.product(*search.points()), limit)
        owed = [dict(zip(names, point, strict=True)) for point in points]
    else:
        failed = study.get_trials(deepcopy=False, states=(TrialState.FAIL,))
        owed = [trial.params for trial in failed if not trial.user_attrs.keys() & {"error", "repeated"}]
    waiting = study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
    known = [trial.params for trial in _ended(study)] + [trial.system_attrs.get("fixed_params") for trial in waiting]
    for params in owed:
        if params not in known:
            study.enqueue_trial(params)
            known.append(params)


def _ended(study: optuna.Study) -> list[FrozenTrial]:
    """Trials that need not be repeated: those with a score, and those that failed of themselves."""
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.FAIL))
    return [trial for trial in trials if trial.state == TrialState.COMPLETE or "error" in trial.user_attrs]


def _score(search: Search, trial: optuna.Trial) -> float:
    """Validation score of a trial's best epoch."""
    with tempfile.TemporaryDirectory() as checkpoints:
        own = {"checkpoint_dir": checkpoints, **search.keys, **search.values(trial.params)}
        try:
            result = run_without_logs(list(search.config_files), {"state": "WARNING", **own})
        except KeyboardInterrupt as stop:
            getattr(stop, "__notes__", []).clear()  # a trial's folder goes with it
            raise
    score = result["best_valid_score"]
    if score is None or not math.isfinite(score):
        raise TrainingError(f"the validation score is {score}; a search needs validation data and a finite score")
    # The test result waits here until the best trial is known.
    trial.set_user_attr("results", {"valid": result["best_valid_result"], "test": result["test_result"]})
    return float(score)


def _content(search: Search, study: optuna.Study) -> dict[str, Any]:
    """What the search found; the test result is that of the best trial alone."""
    ended = _ended(study)
    numbers = {trial.number: number for number, trial in enumerate(ended, start=1)}
    trials = [
        {
            "trial": numbers[trial.number],
            "parameters": search.values(trial.params),
            "score": trial.value,
            "error": trial.user_attrs.get("error"),
        }
        for trial in ended
    ]
    scored = [trial for trial in ended if trial.value is not None]
    best = None
    if scored:
        chosen = (max if search.bigger else min)(scored, key=lambda trial: trial.value or 0.0)
        results = chosen.user_attrs["results"]
        best = {**trials[numbers[chosen.number] - 1], "valid": results["valid"], "test": results["test"]}
        del best["error"]
    return {"metric": search.metric, "bigger": search.bigger, "best": best, "trials": trials}


def search_table(content: Mapping[str, Any]) -> str:
    """A text table of the trials, the best first, and the test result of the best.

    Args:
        content: what :func:`run_search` returned.
    """
    names = list(content["best"]["parameters"])
    sign = -1.0 if content["bigger"] else 1.0
    ordered = sorted(content["trials"], key=lambda tried: math.inf if tried["score"] is None else sign * tried["score"])
    table = Texttable(max_width=120)
    table.set_deco(Texttable.HEADER)
    table.set_cols_dtype(["t"] * (len(names) + 2))
    table.set_cols_align(["r", *["l"] * len(names), "r"])
    rows = [
        [
            str(tried["trial"]),
            *(_short(tried["parameters"].get(name)) for name in names),
            "failed" if tried["score"] is None else f"{tried['score']:.4f}",
        ]
        for tried in ordered
    ]
    table.add_rows([["trial", *names, f"valid {content['metric']}"], *rows])
    test = ", ".join(f"{name} {value:.4f}" for name, value in (content["best"]["test"] or {}).items())
    return f"{table.draw()}\n\nbest: {_spelled(content['best']['parameters'])}\ntest of the best: {test}"


def _spelled(values: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={_short(value)}" for name, value in values.items())


def _short(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
