"""Audits: what a server can tell of its clients, held against what is known; and canaries against the accountant."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SMALL
from sklearn.metrics import roc_auc_score

from recbole_fedkd.auditing import Tap, audit_of, audited_run, write_audit
from recbole_fedkd.command_line import main
from recbole_fedkd.config import FedKDConfig
from recbole_fedkd.errors import InputError
from recbole_fedkd.federated.aggregate import Sums, WeightedMean
from recbole_fedkd.federated.message import ArraySpec
from recbole_fedkd.privacy.accountant import epsilon_of, gaussian_epsilon
from recbole_fedkd.privacy.audit import (
    audited,
    deviation_by_chance,
    epsilon_at_least,
    guessable,
    item_scores,
    label_table,
    membership_auc,
)
from recbole_fedkd.privacy.noise import gaussian
from recbole_fedkd.privacy.release import PrivateRelease
from recbole_fedkd.privacy.settings import PrivacySettings
from recbole_fedkd.report.audit_page import verdict

FEDAVG = {"strategy": "fedavg", "partition": "user", "client_weights": "uniform", "epochs": 1}
FACTORS = {
    **{"strategy": "afd", "knowledge": "factors", "partition": "user", "label_mode": "rating", "epochs": 5},
    **{"factor_size": 2, "sketch_width": 3, "sketch_passes": 1, "em_steps": 1},
}
LABEL = {"strategy": "afd", "partition": "user", "aggregation": "weighted", "epochs": 1}
ITEM = {"strategy": "afd", "knowledge": "item", "partition": "user", "label_mode": "rating", "epochs": 1}


# The guesses


def test_an_items_score_is_the_length_of_what_changed_of_its_row():
    arrays = {
        "p:items": np.array([[0.0, 0.0, 7.0], [3.0, 5.0, 7.0]]),
        "n": np.array([2]),
        "half": np.array([1.0, -2.0]),
    }
    scores = item_scores(arrays, {"p:items": np.array([[0.0, 0.0, 7.0], [0.0, 1.0, 7.0]])}, 2)
    assert scores.keys() == {"p:items", "half", "half, of positives"}
    assert scores["p:items"].tolist() == [0, 5] and scores["half"].tolist() == [1, 2]
    assert scores["half, of positives"].tolist() == [1, -2]


def test_membership_is_guessed_within_an_item_so_that_popularity_tells_nothing():
    members = np.array([[1, 1], [1, 0], [1, 0], [0, 0]], dtype=bool)
    popularity = np.tile([9.0, 1.0], (4, 1))
    assert membership_auc(popularity, members) == 0.5
    assert membership_auc(members.astype(float), members) == 1.0
    assert membership_auc(-members.astype(float), members) == 0.0
    assert membership_auc(np.array([[2.0, 1.0], [1.0, 2.0], [3.0, 0.0], [2.0, 0.0]]), members) == pytest.approx(3.5 / 6)


def test_an_auc_over_random_numbers_is_a_half():
    members = np.random.default_rng(0).random((40, 50)) < 0.3
    assert membership_auc(gaussian((40, 50), 1.0), members) == pytest.approx(0.5, abs=0.05)


def test_how_far_chance_takes_an_auc_is_what_many_draws_of_random_messages_show():
    members = np.random.default_rng(0).random((40, 50)) < np.random.default_rng(1).random((40, 1))
    draws = np.random.default_rng(2).standard_normal((300, 40, 1)) * np.ones(
        50
    )  # a message that is all loud, or all quiet
    seen = [membership_auc(scores, members) for scores in draws]
    told = np.mean([deviation_by_chance(scores, members) for scores in draws[:20]])
    assert told == pytest.approx(np.std(seen), rel=0.15)
    assert deviation_by_chance(members.astype(float), np.ones_like(members)) == 0.0


def test_where_all_clients_have_the_same_items_nothing_is_guessed_rather_than_a_half():
    some = np.array([[1, 1, 0], [1, 0, 0]], dtype=bool)
    assert guessable(some) == 2 and membership_auc(some.astype(float), some) == 1.0
    for none in (np.ones((3, 4), bool), np.zeros((3, 4), bool), some[:1]):
        assert guessable(none) == 0 and membership_auc(none.astype(float), none) is None


def test_rows_are_counted_by_item_and_label_where_a_message_says_so():
    histogram = np.array([[0, 0], [1, 0], [2, 5]], np.float32)
    assert label_table({"histogram": histogram}, 2).tolist() == histogram.tolist()
    assert label_table({"weights": np.array([4, 1])}, 2).tolist() == [[4, 1]]
    assert label_table({"p:w": histogram}, 2) is None


# Canaries


def test_a_bound_by_canaries_is_that_of_the_paper():
    """At delta 0 it is an exact binomial test: 100 guesses, all right, p = q^100."""
    q = 0.05 ** (1 / 100)
    assert epsilon_at_least(100, 100, 100, 0.0) == pytest.approx(np.log(q / (1 - q)), abs=1e-3)
    assert epsilon_at_least(100, 100, 50, 1e-5) == 0.0
    assert epsilon_at_least(1000, 100, 95, 1e-5) < epsilon_at_least(1000, 100, 95, 0.0)


NOISES = ["central", "distributed", "local"]


def masks_of(noise):
    """Keys that a noise needs; a test that needs what is not installed is not run."""
    if noise == "distributed":
        pytest.importorskip("cryptography")
    return {"secure_aggregation": noise == "distributed"}


@pytest.mark.parametrize("keys", [FEDAVG, FACTORS], ids=["mean", "sums"])
@pytest.mark.parametrize("noise", [0.02, 2.0])
def test_canaries_show_less_than_is_accounted_and_much_where_there_is_hardly_any_noise(run, keys, noise):
    result = run(**keys, privacy={"clip": 0.5, "noise_multiplier": noise})
    made = audited_run(result["run_folder"], rounds=1, most=3)
    assert made.canaries.epsilon <= made.canaries.accounted
    assert made.canaries.epsilon > 2.5 if noise < 1 else made.canaries.epsilon < 3


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("fold", [Sums(), WeightedMean(lambda _: 1.0, 2)], ids=["sums", "mean"])
@pytest.mark.parametrize("rounds", [1, 4])
def test_canaries_see_the_noise_of_whoever_adds_it(noise, fold, rounds):
    """As many guesses are right as the noise that is accounted leaves, and over four rounds of twice the noise the same."""
    masks_of(noise)
    specs = {"a": ArraySpec((100, 10)), "b": ArraySpec((500,)), "n": ArraySpec((3,), np.int32, counts=True)}
    start = {"a": np.ones((100, 10), np.float32)} if isinstance(fold, WeightedMean) else {}
    link = SimpleNamespace(schema=SimpleNamespace(arrays=specs), reference=start)
    settings = PrivacySettings(clip=0.5, clips={"b": 3.0}, noise=noise, noise_multiplier=rounds**0.5)
    made = audited(PrivateRelease(settings), fold, link, 400, rounds, 3)
    assert made.epsilon < made.accounted == pytest.approx(gaussian_epsilon(1.0, 1, settings.delta))
    assert 115 < made.right < 192  # about 155, give or take 6
    hardly = PrivateRelease(PrivacySettings(clip=0.5, noise=noise, noise_multiplier=0.02))
    assert audited(hardly, fold, link, 400, rounds, 3).right == 200


def test_canaries_are_drawn_as_clients_are_and_held_against_the_account_of_the_draw():
    """Each goes into one round of ten. Of five 82 of 200 that are in were in any, so that 151 are
    right, give or take 7, where there is hardly any noise.
    """
    pytest.importorskip("opacus")
    specs = {"a": ArraySpec((100, 10))}
    link = SimpleNamespace(schema=SimpleNamespace(arrays=specs), reference={"a": np.ones((100, 10), np.float32)})
    release = PrivateRelease(PrivacySettings(clip=0.5, noise_multiplier=1.0), 10)
    release.clients = 100
    made = audited(release, WeightedMean(lambda _: 1.0, 2), link, 400, 5, 3)
    assert made.accounted == pytest.approx(epsilon_of(1.0, 5, 1e-5, 0.1)) and made.epsilon < made.accounted < 3
    quiet = PrivateRelease(PrivacySettings(clip=0.5, noise_multiplier=0.02), 10)
    quiet.clients = 100
    assert 115 < audited(quiet, WeightedMean(lambda _: 1.0, 2), link, 400, 5, 3).right < 185


@pytest.mark.parametrize("noise", NOISES)
def test_canaries_catch_a_release_without_noise(run, monkeypatch, noise):
    result = run(**FEDAVG, **masks_of(noise), privacy={"clip": 0.5, "noise_multiplier": 4.0, "noise": noise})
    made = audited_run(result["run_folder"], rounds=1, most=3)
    assert made.canaries.epsilon < made.canaries.accounted
    assert "the release is broken" not in write_audit(made, result_folder(result)).read_text()
    monkeypatch.setattr("recbole_fedkd.privacy.release.gaussian", lambda shape, deviation: np.zeros(shape))
    monkeypatch.setattr("recbole_fedkd.privacy.noise.gaussian", lambda shape, deviation: np.zeros(shape))
    if noise == "distributed":
        none = "recbole_fedkd.privacy.secure_sum.discrete_gaussian"
        monkeypatch.setattr(none, lambda count, deviation: np.zeros(count, np.int64))
    made = audited_run(result["run_folder"], rounds=1, most=3)
    assert made.canaries.epsilon > made.canaries.accounted
    assert "the release is broken" in write_audit(made, result_folder(result)).read_text()


def result_folder(result):
    return Path(result["run_folder"])


# What messages tell


@pytest.fixture
def seen_of(data_path):
    """What the server sees in the first rounds of a config."""

    def by(rounds=1, model="AttnFedKD", **keys):
        config = FedKDConfig(model, "tiny", config_dict={"data_path": str(data_path), **SMALL, **keys})
        made = audit_of(config, "a run", rounds)
        assert made.clients == (30, 30)
        return made.seen

    return by


@pytest.mark.parametrize("engine", ["local", "fleet"])
@pytest.mark.parametrize("codecs", [[], ["row_sparse", "sign"]], ids=["dense", "sparse"])
def test_an_update_tells_which_items_a_user_has_rated(run, codecs, engine):
    made = audited_run(run(**FEDAVG, codecs=codecs, engine=engine)["run_folder"], rounds=1)
    assert made.seen[0].membership > 0.99 and made.seen[0].exact > 0.9


def test_an_update_is_held_against_the_network_that_clients_have_heard_not_that_which_the_server_keeps(seen_of):
    first, second = seen_of(rounds=2, **FEDAVG, broadcast_codecs=["int8"])
    assert first.exact == second.exact > 0.9


def test_factors_tell_items_and_how_many_ratings_of_each_kind(seen_of):
    first, *others = seen_of(rounds=None, **FACTORS)
    assert first.membership == first.exact == first.labels == first.ratings == 1.0
    assert [each.round for each in (first, *others)] == [1, 2, 3, 4]
    assert all(each.membership > 0.99 for each in others)


def test_label_knowledge_tells_no_item_and_every_label_count(seen_of):
    (seen,) = seen_of(**LABEL)
    assert seen.membership == 0.5 and seen.array == "" and seen.labels == 1.0 and seen.ratings == 0.0


def test_a_labels_mean_over_one_sample_is_that_samples_logits(prepared):
    keys = {"strategy": "afd", "partition": "user", "label_mode": "rating", "knowledge_pass": "clean"}
    _, trainer, _, _ = prepared(**keys)
    tap, alone = Tap(trainer.engine.server), 0
    trainer.engine.run_round(0)
    for number, arrays in tap.arrays().items():
        task = trainer.engine.clients[number].task
        steps = [task.step(batch, True) for batch in task.clean_batches()]
        logits, labels = torch.cat([each.logits for each in steps]), torch.cat([each.labels for each in steps])
        for label in (labels.bincount() == 1).nonzero().ravel().tolist():
            np.testing.assert_allclose(arrays["sums"][label], logits[labels == label][0].detach(), rtol=1e-6)
            alone += 1
    assert alone > 10


def test_item_knowledge_is_the_table_of_items_and_ratings(seen_of):
    (seen,) = seen_of(**ITEM)
    assert seen.membership == seen.exact == seen.labels == seen.ratings == 1.0


@pytest.mark.parametrize("keys", [FEDAVG, FACTORS, LABEL, ITEM], ids=["fedavg", "factors", "label", "item"])
@pytest.mark.parametrize("private", [False, True])
def test_under_masks_the_server_guesses_like_a_coin(seen_of, keys, private):
    pytest.importorskip("cryptography")
    noise = {"privacy": {"clip": 0.5, "noise_multiplier": 1.0}} if private else {}
    (seen,) = seen_of(**keys, secure_aggregation=True, **noise)
    assert seen.masked and seen.exact == 0.0 and not seen.labels and not seen.ratings
    # Of several arrays the one that guesses best is told, so that chance is a little above a half.
    assert seen.membership == pytest.approx(0.5, abs=0.08) and (0 < seen.chance < 0.05 or not seen.array)


@pytest.fixture
def told(data_path, monkeypatch):
    """What a server gets in a round of one-user clients, as benchmarks/membership.py looks at it."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    from membership import told_by_a_round

    def by(model="AttnFedKD", **keys):
        given = {"data_path": str(data_path), **SMALL, "strategy": "fedavg", "partition": "user", **keys}
        return told_by_a_round(FedKDConfig(model, "tiny", config_dict=given), 30)

    return by


NEGATIVES = {
    **{"label_mode": "implicit", "learner": "sgd", "learning_rate": 0.5, "learning_rates": {"item_*": 2.0}},
    "train_neg_sample_args": {
        "distribution": "uniform",
        "sample_num": 4,
        "alpha": 1.0,
        "dynamic": False,
        "candidate_num": 0,
    },
}


@pytest.mark.parametrize("drawn", [None, 10], ids=["fedmf", "fedrec"])
def test_sampled_negatives_hide_nothing_the_sign_of_an_item_bias_tells_them_from_rated_items(told, drawn):
    start, messages, rows, _ = told("MF", **NEGATIVES, clients_per_round=drawn)
    assert messages
    for number, arrays in messages.items():
        (name,) = (name for name in arrays if "item_bias" in name)
        changed = (arrays[name] - start[name]).ravel()
        (there,) = changed.nonzero()
        rated = np.isin(there, rows[number].interactions["item_id"])
        assert 0 < rated.sum() < len(rated) and roc_auc_score(rated, changed[there]) == 1.0


def test_sampled_negatives_do_not_mislead_an_audit_and_rows_without_labels_are_taken(seen_of):
    (seen,) = seen_of(model="MF", **FEDAVG, **NEGATIVES)
    assert seen.membership == seen.exact == 1.0 and seen.array == "p:item_bias.weight, of positives"
    (seen,) = seen_of(
        model="BPR", **FEDAVG, train_neg_sample_args={**NEGATIVES["train_neg_sample_args"], "sample_num": 1}
    )
    assert seen.membership > 0.5


def test_an_update_tells_liked_from_not_liked_by_its_direction_as_often_as_the_page_says(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    from membership import RECORDS, liked

    assert liked(12) == pytest.approx(json.loads(RECORDS.read_text(encoding="utf-8"))["liked"], abs=0.01)


# The page


def test_an_audit_is_a_page_and_a_file_beside_it(run, capsys):
    folder = run(**FEDAVG, privacy={"clip": 0.5, "noise_multiplier": 1.0})["run_folder"]
    assert main(["audit", folder, "--rounds=1", "--clients=5"]) == 0
    told = capsys.readouterr().out
    assert "membership AUC 1.000" in told and "accounted" in told
    page = (result_folder({"run_folder": folder}) / "audit" / "index.html").read_text()
    assert "can tell which items a client has rated" in page and "5 clients of 30" in page
    kept = json.loads((result_folder({"run_folder": folder}) / "audit" / "audit.json").read_text())
    assert kept["seen"][0]["membership"] == 1.0


def test_an_audit_looks_at_no_more_rounds_than_the_budget_lasts_for(run, capsys):
    for epochs, privacy in ((1, {"epsilon": 8.0}), (9, {"noise_multiplier": 1.5, "epsilon": 4.0})):
        result = run(**{**FEDAVG, "epochs": epochs}, privacy={"clip": 0.5, **privacy})
        assert main(["audit", result["run_folder"], "--clients=5", "--rounds=5"]) == 0
        assert "--rounds=5: looked at 1; the budget of privacy lasts for no more" in capsys.readouterr().out
        kept = json.loads((result_folder(result) / "audit" / "audit.json").read_text())
        assert [each["round"] for each in kept["seen"]] == [1]
        assert kept["canaries"]["accounted"] == pytest.approx(result["epsilon"])


def test_an_audit_says_that_an_exchange_was_over_before_the_rounds_that_it_was_asked_for(run, capsys):
    folder = run(**{**FACTORS, "epochs": 1})["run_folder"]
    assert main(["audit", folder, "--rounds=9", "--clients=2"]) == 0
    assert "--rounds=9: looked at 4; clients send nothing after them" in capsys.readouterr().out


def test_an_audit_without_guesses_does_not_say_that_the_server_cannot_tell(run, tmp_path, capsys):
    (tmp_path / "tiny").mkdir()
    rows = [f"u{user}\ti{item}\t{1 + (user * item) % 5}\t{item}" for user in range(12) for item in range(10)]
    head = "user_id:token\titem_id:token\trating:float\ttimestamp:float"
    (tmp_path / "tiny" / "tiny.inter").write_text("\n".join([head, *rows]) + "\n")
    keys = {"data_path": str(tmp_path), "load_col": {"inter": ["user_id", "item_id", "rating"]}, "feature_fields": []}
    folder = run(strategy="fedavg", client_num=2, epochs=1, **keys)["run_folder"]
    assert main(["audit", folder, "--rounds=1"]) == 0
    told, page = capsys.readouterr().out, (Path(folder) / "audit" / "index.html").read_text()
    kept = json.loads((Path(folder) / "audit" / "audit.json").read_text())
    assert kept["seen"][0]["membership"] is None and kept["seen"][0]["pairs"] == 0 and kept["users"] == 6
    for text in (told, page):
        assert "cannot tell" not in text and "nothing to guess: all clients have all items" in text
        assert "up to 6 users" in text and "not looked at" in text


def test_a_guess_like_a_coins_is_called_safe_behind_masks_and_noise_of_clients_alone():
    seen = {**dict.fromkeys(("labels", "ratings")), "array": "a", "membership": 0.5, "exact": 0.0, "masked": False}
    seen["chance"] = 0.01
    for privacy, masked, safe in [
        (None, False, False),
        ("central", False, False),
        ("local", False, True),
        (None, True, True),
    ]:
        settings = {"privacy": privacy and {"noise": privacy}}
        first, *_ = verdict({"seen": [{**seen, "masked": masked}], "settings": settings, "users": 1})
        assert ("cannot tell" in first) == safe, (privacy, masked)
    alone = {**seen, "membership": None, "exact": 1.0}
    assert "all items" in verdict({"seen": [alone], "settings": {"privacy": None}, "users": 1})[0]
    for guess, chance, coin in [(0.53, 0.012, True), (0.53, 0.001, False), (0.519, 0.0, True), (0.99, 0.3, False)]:
        of_few = {**seen, "masked": True, "membership": guess, "chance": chance}
        first, *_ = verdict({"seen": [of_few], "settings": {"privacy": None}, "users": 1})
        assert ("cannot tell" in first) == coin, (guess, chance)
    label = verdict({"seen": [{**seen, "array": ""}], "settings": {"privacy": None}, "users": 3})
    assert "names an item" in label[0] and "up to 3 users" in label[1]


def test_there_is_nothing_to_audit_where_nobody_sends_anything(run):
    with pytest.raises(InputError, match="nothing to audit"):
        audited_run(run(strategy="local", epochs=1)["run_folder"])
    with pytest.raises(InputError, match="nothing to audit"):
        audited_run(run("AttnStudent", epochs=1)["run_folder"])


def test_a_coordinators_folder_has_nothing_to_run_again(tmp_path, capsys):
    (tmp_path / "server.pth").touch()
    assert main(["audit", str(tmp_path)]) == 2
    assert "is a coordinator's, whose rows are with its parties" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["--rounds=1"]])
def test_an_audit_needs_a_run(arguments, capsys):
    assert main(["audit", *arguments]) == 2
    assert "audit needs the folder of one run" in capsys.readouterr().err


@pytest.mark.parametrize(("noise", "least", "most"), [(1e-6, 0.99, 1.0), (20.0, 0.4, 0.62)], ids=["hardly any", "much"])
def test_noise_of_clients_hides_items_without_masks(seen_of, noise, least, most):
    keys = {**FEDAVG, "privacy": {"clip": 0.5, "noise_multiplier": noise, "noise": "local"}}
    (seen,) = seen_of(**keys)
    assert least <= seen.membership <= most
