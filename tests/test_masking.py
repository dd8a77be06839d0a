"""Secure aggregation: the sum and nothing else, whoever falls silent."""

import os
import random
from fractions import Fraction
from pathlib import Path

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare, hypergeom

pytest.importorskip("cryptography")

from recbole_fedkd.errors import InputError
from recbole_fedkd.federated.aggregate import Sums
from recbole_fedkd.federated.clipping import ClipSettings
from recbole_fedkd.federated.message import Message
from recbole_fedkd.federated.random_k import common_places
from recbole_fedkd.privacy import masking
from recbole_fedkd.privacy.identity import MaskingError, new_identities
from recbole_fedkd.privacy.masking import MaskingClient, MaskingServer, neighbours_of, threshold_of, usual_degree
from recbole_fedkd.privacy.release import PrivateRelease
from recbole_fedkd.privacy.secure_sum import KEYS, STEPS, UNMASKING, Grid, SecureSum, fraction_bits
from recbole_fedkd.privacy.settings import PrivacySettings
from recbole_fedkd.privacy.shamir import PRIME, secret_of, shares_of


def kept(told, lost):
    return {number: each for number, each in told.items() if number not in lost}


def masked_sum(vectors, lost=((), (), ()), least_share=0.5, degree=None, least=3, seen=None):
    """The protocol over bytes; ``lost`` are the clients that fall silent before shares, masked vectors and unmasking."""
    length = len(next(iter(vectors.values())))
    server = MaskingServer(length, least, least_share, degree)
    clients = {number: MaskingClient(number, least_share) for number in vectors}
    told = kept(server.keys({number: each.keys() for number, each in clients.items()}), lost[0])
    told = kept(server.shares({number: clients[number].shares(each) for number, each in told.items()}), lost[1])
    masked = {number: clients[number].masked(each, vectors[number]) for number, each in told.items()}
    if seen is not None:
        seen.append(masked)
    told = kept(server.masked(masked), lost[2])
    total = server.unmasked({number: clients[number].unmasking(each) for number, each in told.items()})
    return server.summed, total


def vectors_of(count, length=7, seed=3):
    drawn = np.random.default_rng(seed).integers(-(2**40), 2**40, (count, length))
    return dict(enumerate(drawn))


def some(numbers, share, seed):
    generator = np.random.default_rng(seed)
    return set(generator.choice(sorted(numbers), int(share * len(numbers)), replace=False).tolist())


@pytest.mark.parametrize("count", [3, 4, 5, 16, 33, 60])
@pytest.mark.parametrize("step", [None, 0, 1, 2])
def test_the_sum_is_that_of_those_who_sent_with_three_in_ten_lost_at_any_step(count, step):
    vectors = vectors_of(count)
    # Of three clients none may be lost: the two that are left would know each other's vectors.
    gone = some(vectors, 0.3 if count > 5 else 0.2, count) if step is not None and count > 3 else set()
    lost = [gone if place == step else set() for place in range(3)]
    summed, total = masked_sum(vectors, lost, degree=count - 1)
    assert summed == sorted(set(vectors) - (gone if step in (0, 1) else set()))
    assert np.array_equal(total, sum(vectors[number] for number in summed))


def test_the_sum_is_right_with_three_in_ten_lost_at_every_step():
    vectors, lost = vectors_of(30), []
    there = set(vectors)
    for step in range(3):
        lost.append(some(there, 0.3, step))
        there -= lost[-1]
    summed, total = masked_sum(vectors, lost, least_share=0.2, degree=29)
    assert summed == sorted(set(vectors) - lost[0] - lost[1])
    assert np.array_equal(total, sum(vectors[number] for number in summed))


def test_a_single_upload_looks_like_noise_whatever_is_in_it():
    seen = []
    masked_sum({number: np.zeros(20_000, np.int64) for number in range(4)}, seen=seen)
    for content in seen[0].values():
        counts = np.bincount(np.frombuffer(content, np.uint8), minlength=256)
        assert chisquare(counts).pvalue > 1e-6
    first, second = (np.frombuffer(seen[0][number], "<u8") for number in (0, 1))
    assert abs(np.corrcoef(first.astype(float), second.astype(float))[0, 1]) < 0.05


def test_a_round_that_is_run_again_has_other_masks():
    seen = []
    for _ in range(2):
        masked_sum(vectors_of(4), seen=seen)
    assert all(seen[0][number] != seen[1][number] for number in range(4))


@pytest.mark.parametrize("step", [0, 1, 2])
def test_below_the_threshold_a_round_ends_with_a_sentence_and_no_sum(step):
    vectors = vectors_of(10)
    lost = [set(range(8)) if place == step else set() for place in range(3)]
    with pytest.raises(MaskingError, match=r"needed|needs") as caught:
        masked_sum(vectors, lost)
    assert "\n" not in str(caught.value)


def test_fewer_clients_than_are_asked_for_are_no_sum():
    with pytest.raises(MaskingError, match="5 clients have sent keys, 8 are needed; nothing is revealed"):
        masked_sum(vectors_of(5), least=8)


@pytest.mark.parametrize("count", [1, 2])
def test_one_or_two_clients_hide_nothing_and_are_refused(count):
    with pytest.raises(MaskingError, match="3 are needed"):
        masked_sum(vectors_of(count))


def test_a_client_gives_one_share_of_a_neighbour_and_never_both():
    server = MaskingServer(3)
    clients = {number: MaskingClient(number) for number in range(5)}
    told = server.keys({number: each.keys() for number, each in clients.items()})
    told = server.shares({number: clients[number].shares(each) for number, each in told.items()})
    told = server.masked({number: clients[number].masked(each, np.zeros(3, np.int64)) for number, each in told.items()})
    clients[0].unmasking(told[0])
    with pytest.raises(MaskingError, match="never answered twice"):
        clients[0].unmasking(told[0])


def test_a_share_that_was_changed_on_its_way_is_held_by_nobody_and_the_sum_is_right():
    server, vectors = MaskingServer(3), vectors_of(4, 3)
    clients = {number: MaskingClient(number) for number in range(4)}
    told = server.keys({number: each.keys() for number, each in clients.items()})
    told = server.shares({number: clients[number].shares(each) for number, each in told.items()})
    first, *others = msgpack.unpackb(told[0])
    told[0] = msgpack.packb([[first[0], bytes(94), first[2]], *others])
    told = server.masked({number: clients[number].masked(each, vectors[number]) for number, each in told.items()})
    given = {number: clients[number].unmasking(each) for number, each in told.items()}
    assert [owner for owner, _ in msgpack.unpackb(given[0])] == [2, 3]
    assert np.array_equal(server.unmasked(given), sum(vectors.values()))


def test_any_shares_above_the_threshold_give_the_secret_and_one_less_does_not():
    secret = bytes(range(32))
    shares = shares_of(secret, list(range(9)), 4)
    for holders in ((0, 1, 2, 3), (8, 5, 2, 7), (1, 3, 4, 5, 6)):
        assert secret_of({holder: shares[holder] for holder in holders}) == secret
    assert secret_of({holder: shares[holder] for holder in (0, 1, 2)}) != secret


def test_the_field_is_one():
    sympy = pytest.importorskip("sympy")
    assert sympy.isprime(PRIME)


@pytest.mark.parametrize("count", [3, 10, 100, 1000])
def test_everybody_has_about_as_many_neighbours_and_ties_go_both_ways(count):
    degree = usual_degree(count)
    tied = neighbours_of(list(range(count)), degree)
    assert all(number in tied[other] and other != number for number, others in tied.items() for other in others)
    assert {len(others) for others in tied.values()} <= {degree, degree + 1}


@pytest.mark.parametrize("spoiled", [b"", b"\xff", b"\x93\x01\x02\x03", b"\x91\x92\x01\x02", b"\x80", bytes(50)])
@pytest.mark.parametrize("place", range(4), ids=STEPS)
def test_whose_bytes_are_no_answer_has_fallen_silent_in_the_step_and_no_other_has(spoiled, place):
    vectors, server = vectors_of(5, 3), MaskingServer(3, 4)
    clients = {number: MaskingClient(number) for number in range(5)}
    told = dict.fromkeys(clients, b"")
    for step in STEPS:
        said = {
            number: client.keys() if step == KEYS else
            client.masked(told[number], vectors[number]) if step == "masked" else getattr(client, step)(told[number])
            for number, client in clients.items() if number in told
        }  # fmt: skip
        if step == STEPS[place]:
            said[2] = spoiled
        told = getattr(server, "unmasked" if step == UNMASKING else step)(said)
    assert list(server.faults) == [2] and "\n" not in server.faults[2] and not server.spoiling
    assert server.summed == ([0, 1, 2, 3, 4] if step == STEPS[place] else [0, 1, 3, 4])
    assert np.array_equal(told, sum(vectors[number] for number in server.summed))
    with pytest.raises(MaskingError, match="are no answer"):
        MaskingClient(0).shares(spoiled)


# In runs


def kind_of_run(**keys):
    return {"epochs": 2, "client_num": 4, "secure_aggregation": True, **keys}


@pytest.mark.parametrize(
    "keys",
    [
        {"strategy": "fedavg"},
        {"strategy": "fedavg", "client_weights": "uniform", "server_optimizer": "fedadam"},
        {"strategy": "fedgkd", "broadcast_codecs": ["fp16"], "stages": ["clip", "codecs"], "clip_norm": 0.1},
        {"strategy": "afd"},
        {"strategy": "afd", "aggregation": "weighted"},
        {"strategy": "afd", "knowledge": "item", "epochs": 3},
        {"strategy": "afd", "knowledge": "factors", "factor_size": 2, "sketch_width": 3, "sketch_passes": 1, "em_steps": 1},
    ],
)  # fmt: skip
def test_a_run_with_masks_ends_where_one_without_does(run, keys):
    masked, plain = (run(**{**kind_of_run(**keys), "secure_aggregation": each}) for each in (True, False))
    for name, value in plain["test_result"].items():
        assert masked["test_result"][name] == pytest.approx(value, abs=2e-3, nan_ok=True)
    for with_masks, without in zip(masked["rounds"], plain["rounds"], strict=True):
        assert with_masks["loss"] == pytest.approx(without["loss"], rel=1e-4)
        if without["bytes_up"]:
            assert with_masks["bytes_up"] > without["bytes_up"]


def test_the_server_of_a_run_never_gets_a_clients_own_upload(prepared, monkeypatch):
    from recbole_fedkd.federated.aggregate import WeightedMean

    _, trainer, _, _ = prepared(**kind_of_run(strategy="fedavg"))
    server = trainer.engine.server
    folds, taken = [], []
    empty = server.strategy.empty
    monkeypatch.setattr(server.strategy, "empty", lambda *given: folds.append(empty(*given)) or folds[-1])
    add = WeightedMean.add
    monkeypatch.setattr(WeightedMean, "add", lambda fold, upload: taken.append(fold) or add(fold, upload))
    trainer.engine.run_round(0)
    assert len(taken) == 4 and all(each is not folds[0] for each in taken)
    assert folds[0].sums and folds[0].weight == sum(trainer.engine.samples.values())


def test_a_client_that_fails_is_not_in_the_sum(prepared):
    found = []
    for secure in (True, False):
        _, trainer, _, _ = prepared(**kind_of_run(strategy="fedavg", min_clients=3, secure_aggregation=secure))
        trainer.engine.clients[1].train = lambda *given: 1 / 0
        report = trainer.engine.run_round(0)
        assert list(report.missing) == [1]
        found.append(trainer.engine.server.state)
    for name, value in found[1].items():
        np.testing.assert_allclose(found[0][name], value, rtol=1e-5, atol=1e-6)


def test_masks_and_noise_go_together(run):
    privacy = {"clip": 0.5, "noise_multiplier": 1.0}
    result = run(**kind_of_run(strategy="fedavg", partition="user", client_weights="uniform", privacy=privacy))
    assert result["epsilon"] > 0


def test_the_fleet_leaves_masks_to_the_local_engine(run):
    result = run(**kind_of_run(strategy="fedavg", engine="fleet"))
    assert result["engine"] == "local" and "masks" in result["engine_fallback"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"client_num": 2}, "needs three clients"),
        ({"clients_per_round": 2}, "clients_per_round is 2"),
        ({"min_clients": 1}, "min_clients is 1"),
        ({"strategy": "local"}, "clients send nothing"),
        ({"codecs": ["int8"]}, "codec 'int8' do not here"),
        ({"codecs": ["int8", "fp16"], "stages": ["clip", "codecs"]}, "codec 'fp16' do not here"),
        ({"codecs": ["int4"], "stages": ["clip", "codecs"], "strategy": "afd"}, "codec 'int4' do not here"),
        (
            {
                **{"codecs": ["int8"], "stages": ["clip", "codecs"], "client_weights": "uniform"},
                "privacy": {"clip": 1.0, "epsilon": 1.0, "unit": "client"},
            },
            "longer than privacy.clip",
        ),
        ({"codecs": ["row_sparse", "fp16"]}, "codec 'row_sparse'"),
        ({"codecs": ["int8", "random_k"], "stages": ["clip", "codecs"]}, "codec 'random_k' do not here"),
        ({"codecs": ["random_k", "random_k"], "stages": ["clip", "codecs"]}, "codec 'random_k' do not here"),
        ({"codecs": ["random_k"]}, "codec 'random_k' do not here"),
        ({"codecs": ["int8"], "stages": ["clip", "codecs"], "codec_arrays": {"int8": "item*"}}, "unset codec_arrays"),
        ({"row_mean": "changed"}, "needs every client's own"),
        ({"strategy": "afd", "aggregation": "attentive"}, "aggregation=attentive needs every client's own"),
        ({"strategy": "afd", "knowledge": "item", "min_clients": 3}, "knowledge=item tells more than later; unset them"),
        (
            {"privacy": {"clip": 1.0, "epsilon": 1.0, "unit": "client"}, "client_weights": "uniform", "clients_per_round": 3},
            "may draw fewer",
        ),
    ],
)  # fmt: skip
def test_what_masks_cannot_hide_is_refused_in_a_sentence(run, changes, said):
    from recbole_fedkd.errors import InputError

    with pytest.raises(InputError, match=said) as caught:
        run(**{**kind_of_run(strategy="fedavg"), **changes})
    assert "\n" not in str(caught.value)


def test_numbers_beyond_the_fixed_point_are_told(prepared):
    from recbole_fedkd.engine import ClientError

    _, trainer, _, _ = prepared(**kind_of_run(strategy="fedavg"))
    network = trainer.engine.clients[2].task.network
    train = trainer.engine.clients[2].train

    def too_far(*given):
        training = train(*given)
        for parameter in network.parameters():
            parameter.data += 1e9
        return training

    trainer.engine.clients[2].train = too_far
    with pytest.raises(ClientError, match="masks take numbers below"):
        trainer.engine.run_round(0)


def fold_of(count, shares, seed, least=3):
    """A masked sum of which in every step a share of those who are left falls silent; with the numbers, and who is left."""
    drawn = np.random.default_rng(seed).normal(size=(count, 3))
    hidden, fold, there = SecureSum(Sums, dict.fromkeys(range(count), 1), least), Sums(), set(range(count))
    for number, each in enumerate(drawn):
        hidden.add(Message("knowledge", 0, number, {"x": each}))

    def ask(step, letters):
        there.difference_update(some(there, shares[STEPS.index(step)], seed))
        return hidden._ask_here(step, {number: letters[number] for number in letters if number in there})

    hidden.ask = ask
    return hidden, fold, drawn, there


def assert_half_a_step_a_client(summed, fold, drawn):
    for place, total in enumerate(fold.finish()["x"].tolist()):
        exact = sum(Fraction(float(each)) for each in drawn[summed, place])
        assert abs(Fraction(total) - exact) <= Fraction(len(summed), 2) / 2 ** fraction_bits(len(drawn))


def row(place, change):
    """An answer of rows of which the first has another part."""

    def changed(said, _other):
        rows = msgpack.unpackb(said)
        rows[0][place] = change(rows[0][place])
        return msgpack.packb(rows)

    return changed


def dealt(shares):
    """Shares that fit what was told of each, and that nobody gets the told secret of."""
    return {"shares_of": lambda secret, holders, threshold: shares(holders, threshold)}


RUBBISH = {
    "keys": {
        "bytes": lambda said, other: b"\xff",
        "another's": lambda said, other: other,
        "none": lambda said, other: msgpack.packb([]),
        "of two": lambda said, other: msgpack.packb(2 * msgpack.unpackb(said)),
        "no point": {"_public_bytes": lambda key: bytes(32)},
        "no point that gives nothing": {"_public_bytes": lambda key: bytes([1]) + bytes(31)},
        "changed": row(1, lambda key: key[::-1]),
        "short": row(1, lambda key: key[:31]),
        "unsigned": row(3, lambda signature: signature[::-1]),
    },
    "shares": {
        "truncated": lambda said, other: said[:-5],
        "of one too few": lambda said, other: msgpack.packb(msgpack.unpackb(said)[1:]),
        "doubled": lambda said, other: msgpack.packb(2 * msgpack.unpackb(said)),
        "another's": lambda said, other: other,
        "short": row(1, lambda sealed: sealed[:-1]),
        "without digest": row(2, lambda digests: b""),
        "that nobody can open": lambda said, other: msgpack.packb(
            [[holder, bytes(94), digests] for holder, _, digests in msgpack.unpackb(said)]
        ),
        "that fit no digest": lambda said, other: msgpack.packb(
            [[holder, sealed, bytes(32)] for holder, sealed, _ in msgpack.unpackb(said)]
        ),
        "of no secret": dealt(lambda holders, _: {each: bytes([0, each]) + os.urandom(31) for each in holders}),
        "of another secret": dealt(lambda holders, threshold: shares_of(os.urandom(32), holders, threshold)),
    },
    "masked": {
        "truncated": lambda said, other: said[:-8],
        "longer": lambda said, other: said + bytes(8),
        "nothing": lambda said, other: b"",
    },
    "unmasking": {
        "truncated": lambda said, other: said[:-5],
        "wrong share": row(1, lambda share: bytes(33)),
        "short": row(1, lambda share: share[1:]),
        "another's": lambda said, other: other,
        "of who is not there": row(0, lambda owner: 99),
        "number": lambda said, other: msgpack.packb(7),
    },
}
"""What a party may say in a step that is none, of what it should say and what another has said."""

CASES = [(step, kind) for step, kinds in RUBBISH.items() for kind in kinds]


@pytest.mark.parametrize(("step", "kind"), CASES)
@pytest.mark.parametrize("count", [4, 9])
def test_the_sum_is_that_of_the_others_whatever_rubbish_a_client_says_and_nothing_is_said_twice_under_one_mask(
    step, kind, count, monkeypatch
):
    identities, made, said = new_identities(range(count)), RUBBISH[step][kind], []
    drawn = np.random.default_rng(4).normal(size=(count, 3))
    hidden, fold = SecureSum(Sums, dict.fromkeys(range(count), 1), 3, identities=lambda: identities), Sums()
    hidden.signers = identities[0].directory
    for number, each in enumerate(drawn):
        hidden.add(Message("knowledge", 0, number, {"x": each}))

    def ask(asked, letters):
        deals = asked == step and isinstance(made, dict)
        answers = hidden._ask_here(
            asked, {number: each for number, each in letters.items() if number != 1 or not deals}
        )
        if deals and 1 in letters:
            with monkeypatch.context() as patched:
                for name, other in made.items():
                    patched.setattr(masking, name, other)
                answers |= hidden._ask_here(asked, {1: letters[1]})
        if asked == step and callable(made) and 1 in answers:  # who has spoiled a sum is not asked again
            answers[1] = made(answers[1], answers[0])
        if asked == "masked":
            said.extend(answers.values())
        return answers

    hidden.ask = ask
    summed = hidden.into(fold)
    assert summed == [number for number in range(count) if number != 1 or step == "unmasking"]
    assert list(hidden.faults) == [1] and len(hidden.faults[1]) == 1 and "\n" not in hidden.faults[1][0]
    assert_half_a_step_a_client(summed, fold, drawn)
    assert len(said) == len(set(said))


@settings(max_examples=25)
@given(st.integers(3, 12), st.lists(st.floats(0, 0.3), min_size=4, max_size=4), st.integers(0, 2**32))
def test_a_masked_sum_is_the_sum_within_half_a_step_a_client_or_none_whoever_falls_silent_in_any_step(
    count, shares, seed
):
    hidden, fold, drawn, there = fold_of(count, shares, seed)
    try:
        summed = hidden.into(fold)
    except MaskingError as error:
        assert "\n" not in str(error) and not fold.sums
        left = count - int(shares[0] * count)  # have told keys; all of them are each other's neighbours
        assert len(there) < 3 or len(there) - 1 < left / 2
    else:
        assert set(summed) >= there and len(summed) >= 3
        assert_half_a_step_a_client(summed, fold, drawn)


@pytest.mark.parametrize("step", range(4), ids=STEPS)
def test_one_of_three_that_falls_silent_ends_the_sum_and_nothing_is_revealed(step):
    hidden, fold, _, _ = fold_of(3, [0.34 * (place == step) for place in range(4)], 1)
    with pytest.raises(MaskingError, match=r"are needed.*nothing is revealed|has 1 neighbours|and needs 2"):
        hidden.into(fold)
    assert not fold.sums


def test_a_thousand_clients_on_a_sparse_graph_lose_three_in_ten_and_the_sum_is_right(monkeypatch):
    """With twelve neighbours, of whom two suffice, on a graph of a seed, so that it takes a second and always the same."""
    monkeypatch.setattr(masking, "usual_degree", lambda clients: 12)
    monkeypatch.setattr(masking, "threshold_of", lambda holders, share: 2)
    monkeypatch.setattr(masking.random, "SystemRandom", lambda: random.Random(2))
    hidden, fold, drawn, there = fold_of(1000, [0.0, 0.0, 0.3, 0.0], 1)
    summed = hidden.into(fold)
    assert set(summed) == there and len(there) == 700
    assert_half_a_step_a_client(summed, fold, drawn)


@pytest.mark.parametrize("seed", range(3))
def test_of_a_thousand_with_as_many_neighbours_as_are_shipped_each_keeps_what_opens_its_secret(seed, monkeypatch):
    """The graph and the shares alone; benchmarks/masking.py runs all of it, in two minutes."""
    monkeypatch.setattr(masking.random, "SystemRandom", lambda: random.Random(seed))
    tied, lost = neighbours_of(range(1000), usual_degree(1000)), some(range(1000), 0.3, seed)
    needed = {threshold_of(len(others), 0.5) for others in tied.values()}
    assert needed == {60} and all(len(set(others) - lost) >= 60 for others in tied.values())
    shares = shares_of(bytes(range(32)), tied[seed], 60)
    left = sorted(set(tied[seed]) - lost)[:60]
    assert secret_of({holder: shares[holder] for holder in left}) == bytes(range(32))


@pytest.mark.parametrize("steps", [2, 3])
def test_three_in_ten_lost_in_two_steps_after_the_keys_or_more_are_too_many_and_nothing_is_revealed(steps):
    hidden, fold, _, _ = fold_of(20, [0.3, *[0.3] * steps, 0.0][:4], 5)
    with pytest.raises(MaskingError, match=r"neighbours left and needs|are needed; nothing is revealed"):
        hidden.into(fold)
    assert not fold.sums


@pytest.mark.parametrize("count", [45, 100, 300, 1000, 5000])
def test_a_round_is_lost_once_in_a_thousand_at_most_where_three_in_ten_are(count):
    degree, left = usual_degree(count), count - int(0.3 * count)
    keeps_too_few = hypergeom.cdf(degree // 2, count - 1, left - 1, degree)
    assert count * keeps_too_few <= 1e-3 and degree < 160


# Who is who


def told_keys(context=b"run, round, terms"):
    """Three clients that know each other's signing keys, and what the server tells client 0 of the others' keys."""
    identities = new_identities(range(3))
    clients = {number: MaskingClient(number, identity=identities[number], round_of=context) for number in range(3)}
    server = MaskingServer(5)
    said = {number: client.keys() for number, client in clients.items()}
    return clients, server, said, identities


def test_keys_that_their_client_has_signed_for_the_round_are_taken():
    clients, server, said, _ = told_keys()
    assert clients[0].shares(server.keys(said)[0])


@pytest.mark.parametrize("fake", ["unsigned", "of an identity made up", "of another client", "of another round"])
def test_a_server_that_swaps_keys_is_noticed_by_the_clients(fake):
    clients, server, said, identities = told_keys()
    if fake == "unsigned":
        said[1] = MaskingClient(1).keys()
    elif fake == "of an identity made up":
        said[1] = MaskingClient(1, identity=new_identities([1])[1], round_of=clients[0].round_of).keys()
    elif fake == "of another client":
        said[1] = said[2]
    else:
        said[1] = MaskingClient(1, identity=identities[1], round_of=b"another").keys()
    with pytest.raises(
        MaskingError, match="told keys of client 1 that client 1 has not signed for this round"
    ) as caught:
        clients[0].shares(server.keys(said)[0])
    assert "\n" not in str(caught.value)


def test_a_client_that_nobody_has_heard_of_is_noticed():
    clients, server, said, _ = told_keys()
    said[7] = MaskingClient(7, identity=new_identities([7])[7], round_of=clients[0].round_of).keys()
    with pytest.raises(MaskingError, match="keys of client 7 that client 7 has not signed"):
        clients[0].shares(server.keys(said)[0])


def test_a_server_that_swaps_keys_ends_a_run_of_one_process(prepared):
    _, trainer, _, _ = prepared(**kind_of_run(strategy="fedavg"))
    engine, hides = trainer.engine, trainer.engine.server.hides

    def hidden(*given):
        made = hides(*given)
        made.ask = lambda step, told: (
            made._ask_here(step, told) | ({1: MaskingClient(1).keys()} if step == KEYS else {})
        )
        return made

    engine.server.hides = hidden
    with pytest.raises(MaskingError, match="has not signed for this round"):
        engine.run_round(0)


# Codecs under masks


def changed_of(prepared, **keys):
    """What a round changes of the server's network, and bytes that came up from each client."""
    _, trainer, _, _ = prepared(**kind_of_run(strategy="fedavg", stages=["clip", "codecs"], clip_norm=0.5, **keys))
    state = {name: value.double() for name, value in trainer.engine.server.state.items()}
    report = trainer.engine.run_round(0)
    after = trainer.engine.server.state
    return {name: (after[name].double() - value).numpy() for name, value in state.items()}, report.bytes_up


@pytest.mark.parametrize(("codec", "levels"), [("int8", 127), ("int4", 7)])
def test_codecs_sum_under_masks_on_the_scale_of_the_clip_in_a_quarter_of_the_bytes(prepared, codec, levels):
    exact, bytes_of_words = changed_of(prepared, secure_aggregation=False)[0], changed_of(prepared)[1]
    rounded, bytes_up = changed_of(prepared, codecs=[codec], broadcast_codecs=[])
    numbers = sum(value.size for value in exact.values())
    assert all(bytes_of_words[number] - bytes_up[number] == 6 * numbers for number in bytes_up)
    differences = np.concatenate([(rounded[name] - value).ravel() for name, value in exact.items()])
    # Four clients, each less than a step of the bound times its share off, and as often above as below.
    assert 0 < np.abs(differences).max() <= 4 * 0.5 / levels
    assert abs(differences.mean()) < 6 * differences.std() / len(differences) ** 0.5


def test_numbers_at_common_places_sum_under_masks_and_all_others_stay_as_they_were(prepared):
    exact, bytes_of_all = changed_of(prepared, secure_aggregation=False)[0], changed_of(prepared)[1]
    told, bytes_up = changed_of(prepared, codecs=["random_k"], random_k_share=0.25, broadcast_codecs=[])
    rounded, bytes_of_steps = changed_of(
        prepared, codecs=["random_k", "int8"], random_k_share=0.25, broadcast_codecs=[]
    )
    kept = 0
    for name, value in exact.items():
        places = common_places(value.size, -(-value.size // 4), 0)
        there = np.isin(np.arange(value.size), places)
        for changed, atol in ((told, 1e-6), (rounded, 4 * 0.5 / 127)):
            np.testing.assert_allclose(changed[name].ravel()[there], value.ravel()[there], atol=atol)
            assert not changed[name].ravel()[~there].any()
        kept += len(places)
    numbers = sum(value.size for value in exact.values())
    assert all(bytes_of_all[number] - bytes_up[number] == 8 * (numbers - kept) for number in bytes_up)
    assert all(bytes_of_all[number] - bytes_of_steps[number] == 8 * numbers - 2 * kept for number in bytes_up)


def test_noise_under_masks_goes_with_common_places(run):
    privacy = {"clip": 0.5, "noise_multiplier": 1.0, "noise": "distributed"}
    keys = {"strategy": "fedavg", "partition": "user", "client_weights": "uniform", "codecs": ["random_k"]}
    assert run(**kind_of_run(**keys, privacy=privacy))["epsilon"] > 0


def test_a_grid_has_words_that_hold_the_sum_and_rounds_without_a_bias():
    grid = Grid(dict.fromkeys(range(258), 1), 127, clip=ClipSettings(2.0))
    assert grid.word == 2 and Grid(dict.fromkeys(range(259), 1), 127).word == 4
    assert grid.step(Sums(), "w") == 2.0 / 127
    rounded = grid.rounded(np.full(100_000, 0.25))
    assert set(rounded.tolist()) == {0, 1} and rounded.mean() == pytest.approx(0.25, abs=0.01)
    assert grid.rounded(np.array([126.999999999, -127.0000001])).tolist() == pytest.approx([127, -127], abs=1)


def test_every_attempt_whose_masks_may_come_off_is_spent():
    """Late answers tell a curious server the sum of an attempt that is repeated, with noise of its own."""
    release = PrivateRelease(PrivacySettings(clip=1.0, noise_multiplier=4.0, noise="distributed"))
    release.clients, spent = 5, []
    release.spends = lambda state: spent.append(state["releases"])
    hidden = SecureSum(Sums, dict.fromkeys(range(5), 1), release=release)
    for number in range(5):
        hidden.add(Message("any", 0, number, {"x": np.zeros(3)}))
    hidden.repeats, asked = 2, []

    def ask(step, letters):
        answers = hidden._ask_here(step, letters)
        asked.append(step)
        late = step == UNMASKING and asked.count(UNMASKING) < 3
        return {0: answers[0]} if late else answers

    hidden.ask = ask
    assert hidden.into(Sums()) == list(range(5))
    assert spent == [1, 2, 3]


def test_noise_that_whole_numbers_round_to_none_is_refused(run):
    privacy = {"clip": 1e-12, "noise_multiplier": 1.0, "noise": "distributed"}
    with pytest.raises(InputError, match=r"privacy.clip is 1e-12, .* clip must be at least "):
        run(
            "AttnFedKD",
            strategy="fedavg",
            partition="user",
            client_weights="uniform",
            secure_aggregation=True,
            privacy=privacy,
        )
    assert not list(Path("saved").glob("*/*"))
