"""Sums under masks over parties elsewhere: what a server gets, and parties that are killed in any step."""

from dataclasses import replace

import msgpack
import pytest
import torch
from test_machines import RUN, Federation

pytest.importorskip("cryptography")

from engines import lose_at_the_end

from recbole_fedkd.data.schema import read_schema
from recbole_fedkd.engine import ClientError, InProcess
from recbole_fedkd.errors import InputError
from recbole_fedkd.federated.envelope import MASK, TRAIN, Answer, Request
from recbole_fedkd.federated.message import Message
from recbole_fedkd.federated.random_k import common_places
from recbole_fedkd.machines.manifest import IDENTITY, Manifest, write_manifest
from recbole_fedkd.machines.party import Party
from recbole_fedkd.privacy.accountant import noise_for
from recbole_fedkd.privacy.identity import MaskingError
from recbole_fedkd.privacy.masking import MaskingClient
from recbole_fedkd.privacy.secure_sum import STEPS

CASES = {
    "fedavg": {"strategy": "fedavg"},
    "label": {"strategy": "afd", "knowledge": "label"},
    "item": {"strategy": "afd", "knowledge": "item"},
    "factors": {"strategy": "afd", "knowledge": "factors"},
    "clipped": {"strategy": "fedavg", "stages": ["clip", "codecs"], "clip_norm": 0.3},
}


@pytest.fixture
def parties(prepared, tmp_path):
    """Parties under masks, and the same federation without masks in one process."""

    def build(case, **keys):
        _local_config, trainer, loaders, _ = prepared(client_num=4, **CASES[case])
        config, *_ = prepared(client_num=4, secure_aggregation=True, **CASES[case], **keys)
        least = {"min_clients": keys["min_clients"]} if "min_clients" in keys else {}
        return Federation(tmp_path, trainer, loaders, config, InProcess, **least), trainer.engine

    return build


def listened(remote):
    """Every request and answer of a federation from now on, as ``(party, request, answer)``."""
    heard = []
    for number, ask in dict(remote.transport.answering).items():

        def answer(request, number=number, ask=ask):
            said = ask(request)
            heard.append((number, Request.from_bytes(request), Answer.from_bytes(said)))
            return said

        remote.transport.answering[number] = answer
    return heard


def step_of(request):
    return msgpack.unpackb(request.message)[0] if request.operation == MASK else None


@pytest.mark.parametrize("weights", ["uniform", "samples"])
def test_parties_round_to_steps_that_everybody_knows_under_a_codec(parties, weights):
    """Eight bits of the bound in words of two bytes; the network that has changed is what it is but for a step a client."""
    remote, local = parties("clipped", codecs=["int8"], broadcast_codecs=[], client_weights=weights)
    heard = listened(remote)
    before = {name: value.clone() for name, value in local.server.state.items()}
    remote.engine.run_round(0)
    local.run_round(0)
    length = sum(value.numel() for value in before.values())
    masked = [answer.said for _, request, answer in heard if step_of(request) == "masked"]
    assert {len(content) for content in masked} == {2 * length}
    if weights == "samples":  # as the federation without masks has it
        for name, value in local.server.state.items():
            torch.testing.assert_close(remote.engine.server.state[name], value, rtol=0, atol=4 * 0.3 / 127)


def test_parties_send_the_places_that_a_public_draw_picks_round_by_round(parties):
    remote, _ = parties("clipped", codecs=["random_k"], broadcast_codecs=[])
    for index in range(2):
        before = {name: value.clone() for name, value in remote.engine.server.state.items()}
        remote.engine.run_round(index)
        for name, value in remote.engine.server.state.items():
            changed = torch.nonzero((value != before[name]).flatten()).flatten().tolist()
            assert set(changed) <= set(common_places(value.numel(), -(-value.numel() // 10), index).tolist())
            assert changed or name.endswith("bias")


def assert_near(remote, local):
    for name, value in local.server.state.items():
        torch.testing.assert_close(remote.engine.server.state[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_parties_under_masks_come_to_the_sum_of_those_without(parties, case):
    remote, local = parties(case)
    for index in range(3):
        masked, plain = remote.engine.run_round(index), local.run_round(index)
        assert masked.loss == pytest.approx(plain.loss, rel=1e-4)
    assert_near(remote, local)


def test_the_server_gets_no_number_of_a_message_but_under_masks(parties):
    remote, _ = parties("fedavg")
    heard = listened(remote)
    report = remote.engine.run_round(0)
    said = [answer for _, request, answer in heard if request.operation == TRAIN]
    assert all(array.size == 0 for each in said for array in Message.from_bytes(each.said).arrays.values())
    masked = {number: answer.said for number, request, answer in heard if step_of(request) == "masked"}
    length = 8 * sum(value.numel() for value in remote.engine.server.state.values())
    assert {len(content) for content in masked.values()} == {length} and len(set(masked.values())) == 4
    assert all(count > length for count in report.bytes_up.values())


@pytest.mark.parametrize("answered", [False, True], ids=["before it answers", "after it answered"])
@pytest.mark.parametrize("step", STEPS)
def test_a_party_killed_in_any_step_is_in_the_sum_with_new_keys_or_none(parties, step, answered):
    """All have to be in it: nothing is unmasked before that, and what is repeated draws new keys."""
    remote, local = parties("fedavg")
    ask, killed = dict(remote.transport.answering), []

    def dying(request):
        due = not killed and step_of(Request.from_bytes(request)) == step
        if due:
            killed.append(step)
            if answered:
                ask[1](request)
            remote.start(1)
        return ask[1](request)

    remote.transport.answering[1] = dying
    heard = listened(remote)
    remote.engine.run_round(0)
    local.run_round(0)
    assert killed == [step]
    assert_near(remote, local)
    for number in range(4):
        for each in ("keys", "masked"):
            told = [answer.said for party, request, answer in heard if party == number and step_of(request) == each]
            told = [content for content in told if content]
            assert len(told) == len(set(told)) >= 1
    # Asked for keys again it has others; killed in the last step its neighbours have what unmasks the sum.
    attempts = sum(1 for party, request, _ in heard if party == 0 and step_of(request) == "keys")
    assert attempts == (1 if step in ("keys", "unmasking") else 2)


@pytest.mark.parametrize("step", STEPS)
def test_a_party_that_stays_away_from_a_step_on_is_left_out_where_it_may_be(parties, step):
    remote, local = parties("fedavg", min_clients=3)
    ask = dict(remote.transport.answering)

    def silent(request):
        read = Request.from_bytes(request)
        if read.operation == MASK and STEPS.index(step_of(read)) >= STEPS.index(step):
            return Answer(1, read.run, MASK, read.round, b"?").to_bytes()
        return ask[1](request)

    remote.transport.answering[1] = silent
    report = remote.engine.run_round(0)
    local.min_clients = 3
    if step != "unmasking":
        assert "masks" in report.missing[1]
        local.held_out = frozenset({1})
        assert remote.engine.counted.keys() >= {0, 2, 3} and remote.engine.counted[1] == -1
    else:
        assert not report.missing  # its numbers are in the sum
    local.run_round(0)
    assert_near(remote, local)


def answered(**changes):
    return lambda packed: replace(Answer.from_bytes(packed), **changes).to_bytes()


RUBBISH = [
    ("keys", lambda packed: packed[:-3]),
    ("shares", answered(party=2)),
    ("masked", answered(said=b"", fault="failed", detail="Error")),
    ("unmasking", answered(operation=TRAIN)),
]


def test_a_party_that_says_rubbish_in_a_step_is_named_and_the_sum_is_that_of_all_others(parties, monkeypatch):
    """One kind of it a round, against clients of one process of which one fails at the end of the same rounds."""
    remote, local = parties("fedavg", min_clients=3)
    remote.engine.signers, local.min_clients = remote.manifest.signers, 3
    ask = dict(remote.transport.answering)

    def spoils(request):
        step, change = RUBBISH[remote.round]
        answer = ask[1](request)
        return change(answer) if step_of(Request.from_bytes(request)) == step else answer

    lose_at_the_end(monkeypatch, local, 1, {index for index, (step, _) in enumerate(RUBBISH) if step != "unmasking"})
    remote.transport.answering[1] = spoils
    for remote.round, (step, _) in enumerate(RUBBISH):
        found, _ = remote.engine.run_round(remote.round), local.run_round(remote.round)
        assert found.ignored == {1: {"mask": 1}}
        assert list(found.missing) == ([] if step == "unmasking" else [1])
        assert all(why.startswith("masks: ") for why in found.missing.values())
        assert_near(remote, local)


def test_a_party_that_says_rubbish_ends_a_run_that_needs_it_and_the_sentence_names_it(parties):
    remote, _ = parties("fedavg")
    ask = dict(remote.transport.answering)
    remote.transport.answering[1] = lambda request: (
        b"?" if step_of(Request.from_bytes(request)) == "shares" else ask[1](request)
    )
    with pytest.raises(
        MaskingError, match=r"3 clients have sent shares, 4 are needed.*client 1: step 'shares', malformed"
    ):
        remote.engine.run_round(0)


def test_a_party_that_must_not_be_missing_ends_the_run_and_nothing_was_unmasked(parties):
    remote, _ = parties("fedavg")
    ask = dict(remote.transport.answering)

    def silent(request):
        read = Request.from_bytes(request)
        return Answer(1, read.run, MASK, 0, b"?").to_bytes() if step_of(read) == "masked" else ask[1](request)

    remote.transport.answering[1] = silent
    heard, before = listened(remote), dict(remote.engine.server.state)
    with pytest.raises(MaskingError, match="3 clients have sent a masked vector, 4 are needed; nothing is revealed"):
        remote.engine.run_round(0)
    assert not [request for _, request, _ in heard if step_of(request) == "unmasking"]
    assert all(torch.equal(value, remote.engine.server.state[name]) for name, value in before.items())


def test_a_round_that_is_asked_for_again_draws_new_keys_and_one_question_gets_one_answer(parties):
    remote, local = parties("fedavg")
    heard = listened(remote)
    state = remote.engine.state_dict()
    remote.engine.run_round(0)
    keys = [answer.said for number, request, answer in heard if number == 2 and step_of(request) == "keys"]
    again = next(request for number, request, _ in heard if number == 2 and step_of(request) == "keys")
    assert Answer.from_bytes(remote.parties[2].answer(again.to_bytes())).said == keys[0]
    remote.engine.load_state_dict(state)
    remote.engine.run_round(0)
    local.run_round(0)
    assert_near(remote, local)
    keys = [answer.said for number, request, answer in heard if number == 2 and step_of(request) == "keys"]
    masked = [answer.said for number, request, answer in heard if number == 2 and step_of(request) == "masked"]
    assert len(set(keys)) == len(set(masked)) == 2


def test_a_step_out_of_turn_or_of_another_protocol_is_refused(parties):
    remote, _ = parties("fedavg")
    party = remote.parties[0]
    request = Request(RUN, MASK, 0, message=msgpack.packb(["keys", b""]))
    assert "no message of this round" in Answer.from_bytes(party.answer(request.to_bytes())).detail
    remote.engine.run_round(0)
    for told, said in [
        (b"?", "no step of a secure sum"),
        (msgpack.packb(["sum", b""]), "no step of a secure sum"),
        (msgpack.packb(["keys", b"\x00"]), "no terms"),
        (msgpack.packb(["shares", msgpack.packb([])]), "out of turn"),
    ]:
        answer = Answer.from_bytes(party.answer(Request(RUN, MASK, 0, 0, told).to_bytes()))
        assert said in answer.detail and not answer.said


def test_noise_of_the_parties_is_in_the_sum(parties):
    remote, _local = parties(
        "clipped",
        privacy={"clip": 2.0, "noise_multiplier": 3.0, "noise": "distributed", "unit": "client"},
        client_weights="uniform",
    )
    remote.engine.server.release.start(4, 2)
    before = {name: value.clone() for name, value in remote.engine.server.state.items()}
    remote.engine.run_round(0)
    changed = torch.cat(
        [(value - before[name]).flatten() for name, value in remote.engine.server.state.items()]
    ).double()
    assert float(changed.std()) == pytest.approx(3.0 * 2.0 / 4, rel=8 / len(changed) ** 0.5)


@pytest.mark.parametrize(
    ("asked", "multiplier"),
    [({"noise_multiplier": 3.0}, 3.0), ({"epsilon": 4.0, "epochs": 3}, noise_for(4.0, 3, 1e-5))],
    ids=["noise_multiplier", "epsilon"],
)
def test_parties_add_no_less_noise_than_their_own_config_asks_for(parties, asked, multiplier):
    rounds = {name: asked.pop(name) for name in ("epochs",) if name in asked}
    privacy = {"clip": 2.0, "noise": "distributed", "unit": "client", **asked}
    remote, _ = parties("fedavg", privacy=privacy, client_weights="uniform", **rounds)
    remote.engine.server.release.start(4, 3)
    remote.engine.run_round(0)
    party, share = remote.parties[0], multiplier / 2  # of four clients
    samples = remote.engine.sizes

    def told(noise, samples=samples):
        terms = msgpack.packb([list(samples.items()), noise, b"salt"])
        request = Request(RUN, MASK, 0, 0, msgpack.packb(["keys", terms]))
        return Answer.from_bytes(party.answer(request.to_bytes()))

    assert told(share).said and told(2 * share).said
    for noise in (None, 0.0, float("nan"), float("inf"), 1e-12, 0.99 * share):
        answer = told(noise)
        assert not answer.said and f"{noise or 0:.4g} times the clip" in answer.detail
        assert float(answer.detail.split()[-1]) == pytest.approx(share, rel=1e-3)
    # With clients that nobody knows each would add less.
    assert "client 4, who has no part" in told(multiplier / 5**0.5, {**samples, 4: 1}).detail


def test_a_manifest_names_the_noise_that_has_been_found_already(prepared, tmp_path):
    """A resumed run has that of its first rounds; more rounds would ask for more."""
    privacy = {"clip": 2.0, "epsilon": 4.0, "noise": "distributed", "unit": "client"}
    config, _, loaders, _ = prepared(
        strategy="fedavg", client_num=3, client_weights="uniform", secure_aggregation=True, privacy=privacy
    )
    write_manifest(config, read_schema(loaders[0]._dataset, 3), tmp_path / "manifest", {}, 2.5)
    assert Manifest.load(tmp_path / "manifest").config["privacy"] == {**privacy, "noise_multiplier": 2.5}


KILLED = """
import hashlib, os, signal, sys
from pathlib import Path

import msgpack

from recbole_fedkd.machines.masks import PartyMasks
from recbole_fedkd.privacy.secure_sum import STEPS

FOLDER, answer = Path({folder!r}), PartyMasks.answer


def dying(self, name, content):
    step, number = msgpack.unpackb(content)[0], self.client.number
    due = number == 1 and step == STEPS[self.message.round // 2]
    file = FOLDER / f"killed-{{self.message.round}}"
    if due and not self.message.round % 2 and not file.exists():
        file.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    said = answer(self, name, content)
    with (FOLDER / "said").open("a") as writing:
        writing.write(f"{{step}} {{number}} {{self.message.round}} {{hashlib.sha256(said).hexdigest()}}\\n")
    if due and self.message.round % 2 and not file.exists():
        file.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return said


if getattr(sys.modules["__main__"].__spec__, "name", "") == "recbole_fedkd.machines.nursery":
    PartyMasks.answer = dying  # in the processes of parties alone
"""


def test_processes_that_are_killed_in_every_step_under_masks_end_as_one_process_without(run, tmp_path):
    """SIGKILL to a party in a round's step, another in every round, before it answers and before the answer leaves."""
    (tmp_path / "killed_parties.py").write_text(KILLED.format(folder=str(tmp_path)))
    keys = {"strategy": "fedavg", "client_num": 4, "epochs": 2 * len(STEPS), "stopping_step": 10, "saved": False}
    one = run(**keys)
    other = run(**keys, engine="processes", secure_aggregation=True, plugins=[str(tmp_path / "killed_parties.py")])
    assert other["engine"] == "processes" and other["engine_fallback"] is None
    assert len(list(tmp_path.glob("killed-*"))) == len(other["rounds"]) == 2 * len(STEPS)
    assert not any(each["missing"] for each in other["rounds"])
    for metric, value in one["test_result"].items():
        assert other["test_result"][metric] == pytest.approx(value, abs=1e-3), metric
    said = [line.split() for line in (tmp_path / "said").read_text().splitlines()]
    for step in ("keys", "masked"):  # of all that was drawn and made nothing was the same twice
        told = [digest for each, _, _, digest in said if each == step]
        assert len(told) == len(set(told)) > 4 * len(other["rounds"])


def test_what_parties_do_not_answer_is_a_client_error_where_all_have_to(parties):
    remote, _ = parties("fedavg")
    ask = dict(remote.transport.answering)
    remote.transport.answering[1] = lambda request: (
        b"?" if Request.from_bytes(request).operation == TRAIN else ask[1](request)
    )
    with pytest.raises(ClientError, match="malformed"):
        remote.engine.run_round(0)


def test_parties_notice_keys_that_the_server_has_swapped(parties):
    """The server of a round puts keys of its own in the place of a party's; whoever is told them says so, and no more."""
    remote, _ = parties("fedavg")
    ask = dict(remote.transport.answering)
    own = MaskingClient(1)

    def swapped(request):
        answer = Answer.from_bytes(ask[1](request))
        told = {"said": own.keys()} if step_of(Request.from_bytes(request)) == "keys" else {}
        return replace(answer, **told).to_bytes()

    remote.transport.answering[1] = swapped
    heard = listened(remote)
    with pytest.raises(MaskingError, match="1 clients have sent shares, 4 are needed; nothing is revealed"):
        remote.engine.run_round(0)
    refused = [answer for number, request, answer in heard if step_of(request) == "shares" and number != 1]
    assert all("told keys of client 1 that client 1 has not signed" in each.detail for each in refused)
    assert not any(each.said for each in refused)
    assert not [request for _, request, _ in heard if step_of(request) == "masked"]


def test_a_party_signs_by_the_key_that_the_manifest_says(parties):
    remote, _ = parties("fedavg")
    manifest, folder = remote.parties[0].manifest, remote.parties[0].folder
    assert (folder / IDENTITY).stat().st_mode & 0o777 == 0o600
    for content, said in [
        (b"00" * 32, "is not the key that"),
        (b"?", "is not the private key of a party"),
        (None, "No such file"),
    ]:
        (folder / IDENTITY).unlink()
        if content is not None:
            (folder / IDENTITY).write_bytes(content)
        with pytest.raises(InputError, match=said) as caught:
            Party(folder, manifest)
        assert "\n" not in str(caught.value)
        (folder / IDENTITY).touch()
