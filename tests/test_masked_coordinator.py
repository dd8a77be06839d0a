"""A coordinator killed in any step of a sum under masks: the round is repeated, nothing is said twice under one mask."""

from collections import defaultdict

import msgpack
import pytest
import torch
from conftest import SMALL
from piped import coordinated
from test_coordinator import private_federation

pytest.importorskip("cryptography")

from recbole_fedkd.checkpoint.sealed import read_sealed
from recbole_fedkd.federated.envelope import JUDGE, MASK, TRAIN, Answer, Request
from recbole_fedkd.machines.folders import SERVER_STATE
from recbole_fedkd.machines.manifest import Manifest
from recbole_fedkd.machines.party import Party
from recbole_fedkd.privacy.accountant import epsilon_of
from recbole_fedkd.privacy.secure_sum import STEPS
from recbole_fedkd.splitting import split_federation

PHASES = (TRAIN, *STEPS, JUDGE)
KEYS = {
    **{"strategy": "fedavg", "client_num": 4, "epochs": len(PHASES), "stopping_step": 10},
    **{"metrics": ["MAE"], "valid_metric": "MAE"},
}


def phase_of(request):
    return msgpack.unpackb(request.message)[0] if request.operation == MASK else request.operation


def test_a_coordinator_killed_in_every_phase_repeats_the_round_with_new_keys_and_ends_as_without_masks(
    data_path, prepared, tmp_path
):
    """SIGKILL while one party has answered and the others have not: in a phase of each round, and before the sum is written."""
    given = {"data_path": str(data_path), **SMALL, **KEYS, "secure_aggregation": True}
    folders = split_federation("AttnFedKD", "tiny", tmp_path / "cut", [], given)
    manifest = Manifest.load(tmp_path / "cut" / "manifest")
    parties = {party.number: party for party in (Party(folder, manifest) for folder in folders)}
    killed, said = [], defaultdict(list)

    def answer(number, packed):
        request = Request.from_bytes(packed)
        phase = phase_of(request)
        if number == 1 and (request.round, phase) == (len(killed), PHASES[len(killed) % len(PHASES)]):
            killed.append(phase)
            return None
        made = parties[number].answer(packed)
        if phase in STEPS:
            said[number].append((request.round, phase, Answer.from_bytes(made).said))
        return made

    declared = {number: Answer.from_bytes(party.hello()).numbers for number, party in parties.items()}
    coordinated(tmp_path / "cut" / "manifest", declared, tmp_path / "server", answer)
    assert tuple(killed) == PHASES

    _, trainer, _, _ = prepared(**KEYS)
    for index in range(len(PHASES)):
        trainer.engine.run_round(index)
    state = read_sealed(tmp_path / "server" / SERVER_STATE, "state")[0]["engine"]["server"]["strategy"]
    for name, value in trainer.engine.server.state.items():
        torch.testing.assert_close(state[name], value, rtol=1e-5, atol=1e-6)

    for number, answers in said.items():
        attempts = []
        for index, phase, content in answers:
            assert content
            if phase == "keys":
                attempts.append((index, []))
            attempts[-1][1].append((phase, content))
        # Under one set of keys a party goes through the steps once; what it says in two attempts has nothing in common.
        assert all([phase for phase, _ in steps] == list(STEPS)[: len(steps)] for _, steps in attempts)
        for phase in ("keys", "shares", "masked"):
            told = [content for _, steps in attempts for each, content in steps if each == phase]
            assert len(told) == len(set(told))
        # One more in each round that was killed once keys were told.
        repeated = [index for index, phase in enumerate(PHASES) if phase in (*STEPS[number > 0 :], JUDGE)]
        assert [index for index, _ in attempts] == sorted([*range(len(PHASES)), *repeated])


@pytest.mark.parametrize(("answers", "counted"), [(14, (1, 2, 3)), (18, (2, 3))], ids=["masked", "unmasking"])
def test_a_sum_with_the_parties_noise_is_spent_once_its_masks_may_come_off(data_path, tmp_path, answers, counted):
    """Killed before that, a round is repeated for nothing; killed after it, two sums with two noises were told."""
    keys = {"partition": "random", "client_num": 4, "secure_aggregation": True}
    privacy = {"clip": 0.05, "noise_multiplier": 2.0, "epsilon": 4.0, "noise": "distributed", "unit": "client"}
    coordinator = private_federation(data_path, tmp_path, **keys, privacy=privacy)
    with pytest.raises(KeyboardInterrupt):
        coordinator(after=answers).fit()
    spent = [each["epsilon"] for each in coordinator().fit()["rounds"]]
    assert spent == pytest.approx([epsilon_of(2.0, count, 1e-5) for count in counted])
