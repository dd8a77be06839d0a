"""Screened rankings: lists are those of all scores where forecasts are off as often as they say, or nothing is screened."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from conftest import SMALL, needs_numba, write_dataset

from recbole_fedkd.config import FedKDConfig
from recbole_fedkd.evaluation import judge, screening
from recbole_fedkd.evaluation.screening import Screen
from recbole_fedkd.quick_start import _prepare

pytestmark = pytest.mark.without_loops

USERS, ITEMS, LENGTH = 600, 1500, 10


def made_up(functions: int, noise: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores ``[users, items]`` of some functions of users and items and noise, and what is masked."""
    generator = np.random.default_rng(seed)
    scores = generator.normal(size=(USERS, functions)) @ generator.normal(size=(functions, ITEMS))
    scores = 3 + 0.1 * scores + noise * generator.normal(size=scores.shape)
    masked = generator.random(scores.shape) < 0.05
    masked[:, 0] = True
    return torch.tensor(scores, dtype=torch.float32), torch.tensor(masked)


class Asked:
    """All scores of a model, which count how many of them are asked for."""

    def __init__(self, scores: torch.Tensor) -> None:
        self.scores, self.whole_users, self.some_items = scores, 0, 0

    def whole(self, users: torch.Tensor) -> torch.Tensor:
        self.whole_users += len(users)
        return self.scores[users].clone()

    def some(self, users: torch.Tensor) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        def scored(places: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
            self.some_items += items.numel()
            if items.shape[1] == ITEMS:
                self.whole_users += len(places)
            return self.scores[users[places].unsqueeze(1), items]

        return scored


def screened(asked: Asked, masked: torch.Tensor, length: int = LENGTH) -> torch.Tensor:
    users = torch.arange(USERS)
    screen = Screen.of(users, length, asked.whole, asked.some)
    assert screen is not None
    asked.whole_users, asked.some_items = 0, 0
    return torch.cat([screen.scores(part, masked[part]) for part in users.split(100)])


def lists(scores: torch.Tensor, masked: torch.Tensor, length: int = LENGTH) -> torch.Tensor:
    return scores.masked_fill(masked, -torch.inf).topk(length, 1).indices


@pytest.mark.parametrize(("functions", "noise"), [(3, 0.0), (5, 1e-3), (20, 0.02), (200, 0.02), (1, 1.0)])
@pytest.mark.parametrize("length", [1, 10, 50])
def test_lists_are_those_of_all_scores_however_bad_forecasts_are(functions, noise, length):
    scores, masked = made_up(functions, noise)
    found = screened(Asked(scores), masked, length)
    assert torch.equal(lists(found, masked, length), lists(scores, masked, length))


def test_what_is_in_a_list_is_a_score_and_no_forecast():
    scores, masked = made_up(20, 0.02)
    found = screened(Asked(scores), masked)
    listed = lists(scores, masked)
    assert torch.equal(found.gather(1, listed), scores.gather(1, listed))


def test_a_fifth_of_the_scores_does_where_users_say_much_the_same():
    scores, masked = made_up(5, 1e-3)
    asked = Asked(scores)
    screened(asked, masked)
    assert asked.some_items < USERS * ITEMS / 5
    assert asked.whole_users == 0


def test_users_whose_scores_tie_are_asked_for_every_item_so_that_ties_fall_as_before():
    scores, masked = made_up(5, 1e-3)
    scores[::7] = scores[::7].mul(4).round().div(4)
    asked = Asked(scores)
    found = screened(asked, masked)
    assert torch.equal(lists(found, masked), lists(scores, masked))
    assert asked.whole_users >= len(scores[::7]) // 2


def test_a_user_who_is_like_nobody_has_the_same_list():
    scores, masked = made_up(3, 1e-3)
    scores[1] = torch.tensor(np.random.default_rng(5).normal(size=ITEMS), dtype=torch.float32)
    found = screened(Asked(scores), masked)
    assert torch.equal(lists(found, masked), lists(scores, masked))


def test_users_who_may_be_recommended_next_to_nothing_have_the_same_candidates():
    scores, masked = made_up(5, 1e-3)
    masked[3] = True
    masked[3, [5, 900]] = False
    found = screened(Asked(scores), masked).masked_fill(masked, -torch.inf)
    assert found[3].topk(2).indices.tolist() == scores[3].masked_fill(masked[3], -torch.inf).topk(2).indices.tolist()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_scores_that_are_no_numbers_are_there_to_be_counted(bad):
    scores, masked = made_up(5, 1e-3)
    scores[1] = bad
    found = screened(Asked(scores), masked)
    assert torch.equal(found[1].isfinite(), scores[1].isfinite())
    assert torch.equal(lists(found[2:], masked[2:]), lists(scores[2:], masked[2:]))


def test_a_model_whose_scores_are_others_when_others_are_made_beside_them_is_not_screened():
    scores, _ = made_up(5, 1e-3)
    asked, others = Asked(scores), Asked(scores * (1 + 2e-7))
    assert Screen.of(torch.arange(USERS), LENGTH, asked.whole, others.some) is None


def test_who_was_audited_is_not_scored_again():
    scores, masked = made_up(5, 1e-3)
    asked = Asked(scores)
    screen = Screen.of(torch.arange(USERS), LENGTH, asked.whole, asked.some)
    assert screen is not None
    users = screen.audited(torch.arange(USERS))
    assert (screen.known.row_of[users] < 0).all()
    assert screen.is_right([(users, masked[users])])
    made = asked.whole_users, asked.some_items
    assert torch.equal(screen.scores(users, masked[users]), scores[users])
    assert (asked.whole_users, asked.some_items) == made


def test_a_model_that_says_no_number_of_anybody_is_not_screened():
    scores, _ = made_up(5, 1e-3)
    scores[:, 7] = float("nan")
    asked = Asked(scores)
    assert Screen.of(torch.arange(USERS), LENGTH, asked.whole, asked.some) is None


def test_a_model_that_says_the_same_of_all_items_is_asked_for_all():
    scores, masked = made_up(5, 1e-3)
    scores[:] = 0.0
    assert torch.equal(lists(screened(Asked(scores), masked), masked), lists(scores, masked))


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("many"), users=1000, items=1100, rows=12)


@needs_numba
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"engine": "fleet"},
        {"partition": "user", "engine": "fleet"},
        {"partition": "user", "engine": "fleet", "knowledge": "item", "knowledge_use": "prior", "fleet_memory": 1},
        {"partition": "user", "engine": "fleet", "strategy": "fedkd", "serve": "teacher"},
        {"partition": "user", "engine": "fleet", "strategy": "fedkd", "serve": "both"},
        {"strategy": "fedkd", "serve": "both"},
        {"partition": "user", "engine": "fleet", "student_pool": [{}, {"hidden_sizes": [8]}]},
        {"client_num": 40},
        {"client_num": 40, "engine": "fleet", "fleet_memory": 1},
        {"client_num": 40, "partition": "quantity:0.5", "engine": "fleet", "student_pool": [{}, {"hidden_sizes": [8]}]},
    ],
    ids=[
        "few clients",
        "few on the fleet",
        "a user a client",
        "small packs with a prior",
        "a teacher",
        "teachers and students",
        "few teachers and students",
        "two architectures",
        "many clients",
        "many on the fleet",
        "clients of few users and of many",
    ],
)
def test_screened_metrics_are_those_of_all_scores(many, monkeypatch, more):
    keys = {"data_path": str(many), **SMALL, "metrics": ["NDCG", "Hit"], "topk": [5, 10], **more}
    trainer, loaders, evaluations = _prepare(FedKDConfig("AttnFedKD", "tiny", config_dict=keys))
    monkeypatch.setattr(screening, "FEW_USERS", 200)
    monkeypatch.setattr(screening, "WORTH", 2.0)
    made = []
    real = Screen.of
    monkeypatch.setattr(Screen, "of", classmethod(lambda cls, *given: made.append(real(*given)) or made[-1]))
    ranked = []
    screened = judge.Judge._screened
    monkeypatch.setattr(judge.Judge, "_screened", lambda *given: ranked.append(1) or screened(*given))
    for number in range(3):
        found = trainer.evaluate(evaluations[1], load_best_model=False)
        assert len(made) == number + 1 and made[-1] is not None
        with monkeypatch.context() as unscreened:
            unscreened.setattr(judge, "is_worth_it", lambda *sizes: False)
            assert trainer.evaluate(evaluations[1], load_best_model=False) == found
        trainer._train_once(loaders[0], number, None, False)
    assert ranked


def test_what_is_spared_is_that_of_all_who_are_audited_and_not_of_each_part():
    scores, masked = made_up(5, 1e-3)
    # Of these every score is the same, so that each of them is asked for every item.
    scores[:8] = 1.0
    screen = Screen.of(torch.arange(8, USERS), LENGTH, *(Asked(scores).whole, Asked(scores).some))
    assert screen is not None
    alike = torch.arange(8), masked[:8]
    assert not screen.is_right([alike])
    parts = [alike, *((users, masked[users]) for users in torch.arange(8, USERS).split(100))]
    assert screen.is_right(parts)


def test_an_audit_ends_as_soon_as_too_many_scores_were_needed():
    scores, masked = made_up(1, 1.0)
    asked = Asked(scores)
    screen = Screen.of(torch.arange(USERS), LENGTH, asked.whole, asked.some)
    assert screen is not None
    made, parts = asked.whole_users, torch.arange(USERS).split(200)
    assert not screen.is_right((users, masked[users]) for users in parts)
    assert asked.whole_users - made <= 200


def test_nothing_is_screened_where_a_forecast_spares_little():
    scores, masked = made_up(1, 1.0)
    screen = Screen.of(torch.arange(USERS), LENGTH, *(Asked(scores).whole, Asked(scores).some))
    assert screen is not None and not screen.is_right([(torch.arange(100), masked[:100])])


def test_scores_that_were_made_are_counted():
    scores, masked = made_up(5, 1e-3)
    asked = Asked(scores)
    screen = Screen.of(torch.arange(USERS), LENGTH, asked.whole, asked.some)
    asked.whole_users, asked.some_items = 0, 0
    assert screen is not None and screen.foretold(torch.arange(50), masked[:50])[1] == asked.some_items


@pytest.mark.parametrize("taste", [0.0, 2.0])
def test_tastes_for_single_items_which_no_forecast_knows_are_seen_in_lists_made_both_ways(taste):
    scores, masked = made_up(5, 1e-3)
    scores[torch.arange(USERS), torch.from_numpy(np.random.default_rng(2).integers(1, ITEMS, USERS))] += taste
    asked = Asked(scores)
    screen = Screen.of(torch.arange(USERS), LENGTH, asked.whole, asked.some)
    assert screen is not None and screen.is_right([(torch.arange(100), masked[:100])]) == (taste == 0)


@needs_numba
@pytest.mark.parametrize("keys", [{"screened_rankings": False}, {}])
def test_who_asks_for_every_score_gets_it_and_so_does_who_would_get_another_list(many, monkeypatch, keys):
    keys = {"data_path": str(many), **SMALL, "metrics": ["NDCG"], "topk": [5], **keys}
    trainer, _, evaluations = _prepare(FedKDConfig("AttnFedKD", "tiny", config_dict=keys))
    monkeypatch.setattr(screening, "FEW_USERS", 200)
    if "screened_rankings" not in keys:
        monkeypatch.setattr(Screen, "is_right", lambda *given: False)
    monkeypatch.setattr(judge.Judge, "_screened", lambda *given: pytest.fail("screened"))
    trainer.evaluate(evaluations[1], load_best_model=False)


@needs_numba
def test_a_model_that_reads_columns_of_users_is_given_them(many, monkeypatch):
    keys = {"data_path": str(many), **SMALL, "metrics": ["NDCG"], "topk": [5]}
    trainer, _, evaluations = _prepare(FedKDConfig("AttnFedKD", "tiny", config_dict=keys))
    monkeypatch.setattr(screening, "FEW_USERS", 200)
    known, real, read = evaluations[1].user_df, type(trainer.model).full_sort_predict, []
    user_field = trainer.config["USER_ID_FIELD"]
    column = next(name for name in known.columns if name != user_field)
    of_user = dict(zip(known[user_field].tolist(), known[column].tolist(), strict=True))

    def reading(model, rows):
        read.append(rows[column].tolist() == [of_user[user] for user in rows[user_field].tolist()])
        return real(model, rows)

    monkeypatch.setattr(type(trainer.model), "full_sort_predict", reading)
    trainer.evaluate(evaluations[1], load_best_model=False)
    assert read and all(read)


@needs_numba
def test_metrics_that_need_every_score_get_every_score(many, monkeypatch):
    keys = {"data_path": str(many), **SMALL, "metrics": ["GAUC", "NDCG"], "topk": [10]}
    trainer, _, evaluations = _prepare(FedKDConfig("AttnFedKD", "tiny", config_dict=keys))
    monkeypatch.setattr(Screen, "of", classmethod(lambda cls, *given: pytest.fail("screened")))
    trainer.evaluate(evaluations[1], load_best_model=False)


def test_few_users_few_items_and_long_lists_are_not_screened():
    assert screening.is_worth_it(6040, 3884, 10)
    assert not screening.is_worth_it(100, 3884, 10)
    assert not screening.is_worth_it(6040, 500, 10)
    assert not screening.is_worth_it(6040, 3884, 500)
    assert not screening.is_worth_it(6040, 100_000, 10)
