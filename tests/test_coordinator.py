"""A coordinator and parties that know each other by bytes alone come to the run of one process."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL, write_dataset
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from test_machines import ANYWHERE, Unreliable, answered, numbers

from recbole_fedkd.engine import ClientError, InProcess
from recbole_fedkd.errors import InputError, TrainingError
from recbole_fedkd.federated.envelope import Answer, check_numbers
from recbole_fedkd.federated.message import MessageError
from recbole_fedkd.files import held_alone
from recbole_fedkd.machines.coordinator import LOCK, SERVER_STATE, Coordinator, sole_coordinator
from recbole_fedkd.machines.journal import LOG, Follower, Journal, read_events, status
from recbole_fedkd.machines.judging import BINS, added, area_within, metrics_of
from recbole_fedkd.machines.manifest import Manifest
from recbole_fedkd.machines.party import Party
from recbole_fedkd.machines.ranking import ranking_due
from recbole_fedkd.machines.running import coordinate, coordinated, live
from recbole_fedkd.machines.trust import Trust
from recbole_fedkd.privacy.accountant import epsilon_of, noise_for
from recbole_fedkd.report import write_report
from recbole_fedkd.rounds import EpochRecord
from recbole_fedkd.splitting import split_federation

KEYS = {
    "strategy": "fedavg",
    "codecs": ["int8"],
    "metrics": ["MAE", "NMAE", "RMSE", "Accuracy", "LogLoss", "AUC", "LabelledNDCG"],
    "valid_metric": "MAE",
    "epochs": 4,
    "metric_decimal_place": 7,
}


@pytest.fixture(scope="module")
def cut(data_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cut") / "federation"
    folders = split_federation("AttnFedKD", "tiny", folder, [], {"data_path": str(data_path), **SMALL, **KEYS})
    return folder / "manifest", folders


def parties_of(cut, tmp_path):
    """Parties in copies of their folders."""
    manifest = Manifest.load(cut[0])
    parties = {}
    for folder in cut[1]:
        own = tmp_path / folder.name
        own.mkdir(exist_ok=True)
        for file in folder.iterdir():
            (own / file.name).write_bytes(file.read_bytes())
        party = Party(own, manifest)
        parties[party.number] = party
    return manifest, parties


class Interrupted(InProcess):
    """Breaks off after so many answers, as a coordinator that is killed."""

    def __init__(self, answering, after):
        super().__init__(answering)
        self.after, self.captured = after, []

    def exchange(self, requests, timeout):
        for number, answer in super().exchange(requests, timeout):
            self.captured += [requests[number], answer]
            self.after -= 1
            if self.after < 0:
                raise KeyboardInterrupt
            yield number, answer


def finished(cut, folder, after=10**9):
    """The result of a federation whose coordinator is killed after every so many answers; and all bytes that were seen."""
    manifest, parties = parties_of(cut, folder)
    declared, captured = {number: Answer.from_bytes(party.hello()).numbers for number, party in parties.items()}, []
    while True:
        transport = Interrupted({number: party.answer for number, party in parties.items()}, after)
        try:
            coordinator = Coordinator(manifest, transport, declared, folder / "server")
            result = coordinator.fit()
        except KeyboardInterrupt:
            after += 1  # else the test run of the same round would never end
            continue
        finally:
            captured += transport.captured
        for each in result["rounds"]:
            each.pop("seconds")
        return result, coordinator, captured


OF_PARTIES = {"parties", "at_test"}
"""What only the result of a coordinator has; ``refused`` comes with the program around it."""


def assert_same_form(found, local):
    """The result of a coordinator has what any run's has, key by key, and says None where a party alone knows it."""
    assert found.keys() - local.keys() == OF_PARTIES and not local.keys() - found.keys()
    for name in ("communication", "timing", "partition", "environment", "cold", "spread", "protocols"):
        assert found[name].keys() == local[name].keys(), name
    assert found["rounds"][0].keys() == local["rounds"][0].keys()
    assert {name for name, value in found.items() if value is None} == {
        "engine_fallback",
        "strangers",
        "epsilon",
        "user_metrics",
    }
    assert found["partition"]["clients"] == [] and local["partition"]["clients"]


def test_it_is_the_run_of_one_process(run, cut, tmp_path):
    local = run(**KEYS)
    found, coordinator, captured = finished(cut, tmp_path)
    for each in local["rounds"]:
        each.pop("seconds")
    assert_same_form(found, local)
    assert found["cold"] == pytest.approx(local["cold"])
    # Predictions hardly vary: their deviation is what is left of sums of squares.
    assert found["spread"] == pytest.approx(local["spread"], rel=1e-5)
    floor = found["floors"]["Bias of each party"]
    assert floor.keys() == found["test_result"].keys() - {"auc"} and 0.3 < floor["mae"] < 1.2
    assert found["best_round"] == local["best_round"]
    for name in ("test_result", "best_valid_result"):
        # AUC comes from histograms: predictions that hardly vary share a bin.
        within = area_within(added(coordinator.test_sums)) + 0.01
        assert found[name].pop("auc") == pytest.approx(local[name].pop("auc"), abs=within), name
        assert found[name] == pytest.approx(local[name], abs=2e-6), name
        assert {"mae", "nmae", "labelledndcg@10"} <= found[name].keys()
    for one, other in zip(found["rounds"], local["rounds"], strict=True):
        assert {name: one[name] for name in ("loss", "bytes_up", "bytes_down", "codec_error")} == {
            name: other[name] for name in ("loss", "bytes_up", "bytes_down", "codec_error")
        }
    assert set(found["parties"]) == {"0", "1", "2"}
    server = (tmp_path / "server" / SERVER_STATE).read_bytes()
    assert not any(b"u17" in content or b"u2\x00" in content for content in [*captured, server])


class Asked(dict):
    judged_metrics = ("Hit", "MRR", "NDCG")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"hit@1": 3.0}, "'hit@1' is 3, and 'hit@10', of which it is a part, 2"),
        ({"mrr@10": 2.5}, "'mrr@10' is 2.5, and 'hit@10'"),
        ({"mrr@1": 1.0, "mrr@10": 0.5}, "'mrr@1' is 1, and 'mrr@10'"),
        ({"ndcg@1": 1.5}, "'ndcg@1' is 1.5, and 'hit@1'"),
        ({"hit@10": 1.5}, "'hit@10' is 1.5, where a count"),
        ({"ndcg@10": 5.0}, "'ndcg@10' is 5, where a number from 0 to 4"),
    ],
)
def test_sums_of_a_ranking_that_no_ranking_comes_to_are_not_taken(wrong, said):
    good = {
        "ranked users": 4.0,
        "hit@1": 1.0,
        "hit@10": 2.0,
        "mrr@1": 1.0,
        "mrr@10": 1.2,
        "ndcg@1": 1.0,
        "ndcg@10": 0.9,
    }
    due = ranking_due(Asked(topk=[10, 1]), good, 5.0)
    assert check_numbers(good, *due) == good
    with pytest.raises(MessageError, match=said):
        check_numbers({**good, **wrong}, *due)


WRONG_SUMS = {
    f"numbers: {what}": numbers(**{name: value})
    for what, name, value in (
        ("'cold' is 1e+06", "cold", 1e6),
        ("'predicted' is -1e+06", "predicted", -1e6),
        ("'labels squared' is 1e+09", "labels squared", 1e9),
        ("it has judged None rows", "rows", None),
        ("it has judged -5.0 rows", "rows", -5.0),
        ("it has judged 1000000000000.0 rows", "rows", 1e12),
        ("'labels squared' is 0 where", "labels squared", 0.0),
        ("'absolute' is missing", "absolute", None),
        ("'squared' is -1", "squared", -1.0),
        ("'squared' is 0 where", "squared", 0.0),
        ("'absolute' is 1e+06", "absolute", 1e6),
        ("'right' is 0.5", "right", 0.5),
        ("'log_loss' is 1e+09", "log_loss", 1e9),
        ("'clicks 4096' was not asked for", "clicks 4096", 1.0),
        ("'clicks 007' was not asked for", "clicks 007", 1.0),
        ("its histograms hold", "others 4095", 1.0),
        ("'labelledndcg@10' is 1e+06", "labelledndcg@10", 1e6),
        ("'judged users@10' is 1e+06", "judged users@10", 1e6),
        ("'luck' was not asked for", "luck", 1.0),
    )
}
WRONG_IN = {
    "judge": {**ANYWHERE, **WRONG_SUMS, "kind: it says 1 bytes": answered(said=b"x")},
    "test": {
        "numbers: 'floor absolute' is missing": numbers(**{"floor absolute": None}),
        **ANYWHERE,
        **WRONG_SUMS,
        "kind: it says 1 bytes": answered(said=b"x"),
    },
    "best": {**ANYWHERE, "kind: it says 1 bytes": answered(said=b"x"), "numbers: 'luck' was not": numbers(luck=1.0)},
}


@pytest.mark.parametrize("operation", WRONG_IN)
def test_a_wrong_or_missing_answer_but_to_training_is_named_and_is_in_no_sum(cut, tmp_path, operation):
    """One fault a round in one operation, of one party of three; what the others say is what counts."""
    manifest, parties = parties_of(cut, tmp_path)
    manifest.config["min_clients"] = 2
    wire = Unreliable({number: party.answer for number, party in parties.items()})
    declared = {number: Answer.from_bytes(party.hello()).numbers for number, party in parties.items()}
    engine = Coordinator(manifest, wire, declared, tmp_path / "server").engine
    engine.phase, faults = "valid", WRONG_IN[operation]
    nothing = dict.fromkeys(declared, b"")
    engine.run_round(0)

    def asked():
        """Who has judged and kept what it was asked to."""
        engine.report.unserved = {}
        if operation == "best":
            engine.keep_best(0)
        else:
            good = engine.judged(0, nothing, "test" if operation == "test" else "valid")
            assert [*good, *engine.report.unserved] in ([0, 1, 2], [0, 2, 1])

    for wrong, fault in faults.items():
        wire.faults, wire.late = {(operation, 0): {1: fault}}, {}  # what is late answers the same question again
        asked()
        assert list(engine.report.unserved) == [1] and engine.report.unserved[1].startswith(wrong)
    wire.faults = {}
    asked()
    assert engine.report.unserved == {}
    wire.faults = {(operation, 0): {1: "away"}}
    for engine.min_clients in (None, *([3] if operation != "best" else [])):
        with pytest.raises(ClientError, match=r"client 1, (round 1|absent)"):
            asked()


def test_who_is_missing_in_judging_alone_stands_in_record_status_and_log(cut, tmp_path):
    manifest, parties = parties_of(cut, tmp_path)
    manifest.config["min_clients"] = 2

    class Gone(Unreliable):
        greeted = {number: Answer.from_bytes(party.hello()) for number, party in parties.items()}
        seen, refused = dict.fromkeys(parties, 1.0), 3

        def await_parties(self, numbers, timeout):
            return numbers

    wire = Gone({number: party.answer for number, party in parties.items()})
    wire.faults = {("judge", 1): {1: "late"}, ("train", 2): {2: "doubled"}, ("test", 3): {0: "away"}}
    result = coordinated(manifest, wire, tmp_path / "server", "here")
    absent = "absent: it has not answered within"
    assert [list(each.get("unserved", ())) for each in result["rounds"]] == [[], [1], [], []]
    assert result["rounds"][1]["unserved"][1].startswith(absent)
    assert result["rounds"][2]["ignored"] == {1: {"late": 1}}
    assert result["at_test"]["unserved"][0].startswith(absent) and list(result["parties"]) == ["1", "2"]
    assert result["refused"] == 3
    events = read_events(tmp_path / "server" / LOG)
    assert "1" in events[3]["unserved"] and events[4]["ignored"] == {"1": {"late": 1}} and "0" in events[-1]["unserved"]
    told = status(tmp_path / "server")
    rows = [line.split() for line in told[told.index("why at last") :].splitlines() if line[:1] in ("0", "1", "2")]
    assert "3 came who were not let in" in told
    assert [row[3:6] for row in rows[:3]] == [["0", "1", "0"], ["0", "1", "1"], ["0", "0", "0"]]
    assert (tmp_path / "server" / "record.jsonl").read_text().count('"unserved": {"1"') == 1


RANKINGS = {
    "metrics": ["Hit", "MRR", "NDCG", "Recall", "Precision", "MAP"],
    "topk": [1, 10, 30],
    "valid_metric": "NDCG@10",
}
LABELS = {"clicks": {"label_mode": "implicit"}, "stars": {"metrics": [*RANKINGS["metrics"], "MAE"]}}


@pytest.mark.parametrize("labels", LABELS)
def test_parties_rank_all_items_for_their_own_users_as_one_process_does(run, data_path, tmp_path, labels):
    keys = {**KEYS, **RANKINGS, **LABELS[labels], "epochs": 2}
    local = run(**keys)
    told = {"data_path": str(data_path), **SMALL, **keys}
    folders = split_federation("AttnFedKD", "tiny", tmp_path / "cut", [], told)
    found, _, _ = finished((tmp_path / "cut" / "manifest", folders), tmp_path)
    assert found["test_result"] == pytest.approx(local["test_result"], abs=2e-6)
    assert found["best_valid_result"] == pytest.approx(local["best_valid_result"], abs=2e-6)
    assert len(found["test_result"]) == 18 + (labels == "stars")
    relevant = "relevant: its held-out rows" + (" with rating >= 4;" if labels == "stars" else ";")
    assert found["protocols"]["map@30"].startswith("full sort") and relevant in found["protocols"]["map@30"]
    if labels == "stars":  # as one process says it
        assert "rating >= 4" in local["protocols"]["map@30"] and "rating" not in found["protocols"]["mae"]


@pytest.mark.parametrize("after", [2, 5])
def test_killed_in_training_and_in_judging_it_goes_on_to_the_same(cut, tmp_path, after):
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    whole, undisturbed, _ = finished(cut, tmp_path / "whole")
    found, killed, _ = finished(cut, tmp_path / "killed", after)
    for result in (found, whole):
        result.pop("run_folder")
        result.pop("timing")
    assert found == whole
    for name, value in undisturbed.engine.server.state.items():
        assert torch.equal(killed.engine.server.state[name], value), name


PRIVATE = {
    "strategy": "fedavg",
    "partition": "user",
    "client_weights": "uniform",
    "epochs": 3,
    "metrics": ["MAE"],
    "privacy": {"clip": 0.05, "epsilon": 8.0, "clip_quantile": 0.5},
}


def private_federation(data_path, tmp_path, **keys):
    """Manifest and parties of one user each, and a coordinator that breaks off after so many answers."""
    told = {"data_path": str(data_path), **SMALL, **PRIVATE, **keys}
    folders = split_federation("AttnFedKD", "tiny", tmp_path / "federation", [], told)
    manifest = Manifest.load(tmp_path / "federation" / "manifest")
    parties = {party.number: party for party in (Party(folder, manifest) for folder in folders)}
    declared = {number: Answer.from_bytes(party.hello()).numbers for number, party in parties.items()}

    def coordinator(after=10**9):
        transport = Interrupted({number: party.answer for number, party in parties.items()}, after)
        return Coordinator(manifest, transport, declared, tmp_path / "server")

    return coordinator


def test_a_coordinator_adds_noise_accounts_for_it_and_ends_with_the_budget(data_path, tmp_path):
    result = private_federation(data_path, tmp_path)().fit()
    noise = noise_for(8.0, 3, 1e-5)
    spent = [each["epsilon"] for each in result["rounds"]]
    assert spent == pytest.approx([epsilon_of(noise, count, 1e-5) for count in (1, 2, 3)])
    assert result["epsilon"] == spent[-1] <= 8.0
    assert result["rounds"][0]["clip"] == 0.05 and len({each["clip"] for each in result["rounds"]}) == 3


def test_what_parties_have_heard_is_counted_though_the_coordinator_was_killed_before_it_wrote_that_down(
    data_path, tmp_path
):
    """Killed while parties take the first round's sum in: run again it has other noise, and both rounds are spent."""
    coordinator = private_federation(data_path, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        coordinator(after=45).fit()  # 30 have trained, 15 have heard the sum
    result = coordinator().fit()
    assert len(result["rounds"]) == 2
    noise = noise_for(8.0, 3, 1e-5)
    assert [each["epsilon"] for each in result["rounds"]] == [epsilon_of(noise, count, 1e-5) for count in (2, 3)]


def test_a_folder_of_another_federation_is_refused(cut, data_path, tmp_path):
    manifest, _ = parties_of(cut, tmp_path)
    Coordinator(manifest, InProcess({}), {0: {"samples": 1}}, tmp_path / "server")._write()
    other = {"data_path": str(data_path), **SMALL, **KEYS, "seed": 5}
    folders = split_federation("AttnFedKD", "tiny", tmp_path / "other", [], other)
    with pytest.raises(InputError, match="is the run of another manifest"):
        Coordinator(
            Manifest.load(tmp_path / "other" / "manifest"), InProcess({}), {0: {"samples": 1}}, tmp_path / "server"
        )
    with pytest.raises(InputError, match="belongs to another manifest"):
        Party(folders[0], manifest)
    with pytest.raises(InputError, match="not empty"):
        split_federation("AttnFedKD", "tiny", tmp_path / "other", [], other)
    with pytest.raises(InputError, match="metrics itemcoverage are not sums"):
        split_federation("AttnFedKD", "tiny", tmp_path / "third", [], {**other, "metrics": ["ItemCoverage", "MAE"]})
    # What a coordinator would refuse is refused before anything is cut.
    two = {**other, "codecs": [], "client_num": 2, "secure_aggregation": True}
    with pytest.raises(InputError, match="secure_aggregation=True needs three clients"):
        split_federation("AttnFedKD", "tiny", tmp_path / "third", [], two)
    assert not (tmp_path / "third").exists()


def test_three_terminals_and_a_stranger(cut, tmp_path):
    """The commands of docs/deploy.md; a party and the coordinator are killed on the way."""
    _, parties = parties_of(cut, tmp_path)
    key, wrong = tmp_path / "key", tmp_path / "wrong"
    key.write_text("k" * 32)
    wrong.write_text("w" * 32)
    address = f"--address=unix:{tmp_path}/s"
    command = [sys.executable, str(Path(__file__).parent.parent / "run_recbole_fedkd.py")]

    def start(*arguments, secret=key):
        told = [*command, *map(str, arguments), address, f"--secret={secret}"]
        return subprocess.Popen(told, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    coordinate = ("coordinate", cut[0], f"--out={tmp_path / 'server'}")
    ask = [("party", party.folder, f"--manifest={cut[0]}") for party in parties.values()]
    running = [start(*coordinate)]
    try:
        assert "waiting" in running[0].stdout.readline()
        stranger = start(*ask[0], secret=wrong)
        assert "do not share a key" in stranger.communicate(timeout=120)[0] and stranger.returncode == 2
        running += [start(*each) for each in ask]
        assert "does not know the key" in running[0].stdout.readline()
        assert any("round 1" in line for line in iter(running[0].stdout.readline, ""))
        for place, arguments in ((1, ask[0]), (0, coordinate)):
            os.kill(running[place].pid, signal.SIGKILL)
            running[place].wait()
            running[place] = start(*arguments)
        assert running[0].wait(timeout=300) == 0, running[0].stdout.read()
    finally:
        for process in running:
            process.kill()
            process.wait()
    expected, _, _ = finished(cut, tmp_path)
    found = json.loads((tmp_path / "server" / "result.json").read_text())
    assert found["test_result"] == expected["test_result"]
    told = subprocess.run([*command, "status", tmp_path / "server"], capture_output=True, text=True, check=True).stdout
    assert told.startswith("finished: best round") and "4 of 4 rounds" in told and "last seen (UTC)" in told
    events = read_events(tmp_path / "server" / LOG)
    assert [event["round"] for event in events if event["event"] == "round"] == [1, 2, 3, 4]
    page = write_report(tmp_path / "server").read_text()
    assert "histograms of 4096 bins" in page and "judged by each party where its rows are" in page
    assert "Parties, the worst in MAE first" in page and f"{found['parties']['2']['rmse']:.4f}" in page
    assert "Time on a network" in page and "10 Mbit/s up, 50 down, 40 ms" in page


def test_coordinator_and_parties_that_are_killed_at_any_moment_change_nothing(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    import kills

    found = kills.measured_all({"strategy": "fedavg", "codecs": ["row_sparse", "int8"]}, kills=6, seed=3)
    assert found["kills"] >= 6 and found["different runs"] == 0


def test_a_second_process_of_a_folder_is_refused_and_takes_nothing_from_the_first(cut, tmp_path):
    address = f"unix:{tmp_path}/s"
    folder = parties_of(cut, tmp_path)[1][1].folder
    with held_alone(folder / LOCK, ""):
        (written := folder / ".state.pth.0123abcd").touch()
        with pytest.raises(InputError, match="runs already; end that process first"):
            live(folder, cut[0], address, Trust(), {})
        assert written.exists()
    with pytest.raises(InputError, match="does not say which party it is"):
        live(tmp_path / "mistyped", cut[0], address, Trust(), {})
    assert not (tmp_path / "mistyped").exists()
    with sole_coordinator(tmp_path / "server"):
        (tmp_path / "s").touch()
        with pytest.raises(InputError, match="another coordinator runs in"):
            coordinate(cut[0], address, tmp_path / "server", Trust(), {})
        assert (tmp_path / "s").exists()


def test_what_would_have_been_passed_over_or_met_too_late_is_refused_at_once(cut, tmp_path):
    folder, address = parties_of(cut, tmp_path)[1][1].folder, f"unix:{tmp_path}/s"
    with pytest.raises(InputError, match="--authority is of a SuperLink's certificate"):
        coordinate(cut[0], address, tmp_path / "server", Trust(authority="ca.crt"), {})
    with pytest.raises(InputError, match="--node-key is of a node of a SuperLink"):
        live(folder, cut[0], address, Trust(node_key="node"), {})
    for key, value in {"learning_rate": "0.5", "metrics": "[MAE]", "model": "BPR", "config_files": "x"}.items():
        sentence = f"{key} is .* here and .* in manifest '{cut[0]}', by which everybody computes"
        given = {key: value, "client_timeout": "0.1", "torch_threads": "1"}
        with pytest.raises(InputError, match=sentence):
            coordinate(cut[0], address, tmp_path / "server", Trust(), given)
        with pytest.raises(InputError, match=sentence):
            live(folder, cut[0], address, Trust(), given)
    with pytest.raises(InputError, match="key 'lr' is unknown; here it is called learning_rate"):
        coordinate(cut[0], address, tmp_path / "server", Trust(), {"lr": "0.5"})
    assert not (tmp_path / "server").exists()
    with pytest.raises(InputError, match="min_clients is 4, but only 3 clients take part"):
        coordinate(cut[0], address, tmp_path / "server", Trust(), {"min_clients": 4, "client_timeout": 0.1})
    for out, how in ((cut[0], "is a manifest"), (folder / "server", "lies in a party's folder"), (tmp_path, "holds")):
        with pytest.raises(InputError, match=f"out '{out}' {how}"):
            coordinate(cut[0], address, out, Trust(), {})
    free = {
        "learning_rate": 0.01,
        "epochs": 7,
        "min_clients": 1,
        "gpu_id": "",
        "client_timeout": 0.1,
        "model": "AttnFedKD",
    }
    with pytest.raises(TrainingError, match="have not come"):  # what is the manifest's word may be said again
        coordinate(cut[0], address, tmp_path / "server", Trust(), free)
    for damaged in (b"", b"rubbish", (folder / "valid.npz").read_bytes()[:-200]):
        (folder / "valid.npz").write_bytes(damaged)
        with pytest.raises(InputError, match="does not hold arrays of this package: it is truncated or damaged"):
            live(folder, cut[0], address, Trust(), {})


def histogram(places, name):
    counts = np.bincount(places, minlength=BINS)
    return {f"{name} {place}": float(count) for place, count in enumerate(counts) if count}


@given(st.lists(st.tuples(st.integers(0, BINS - 1), st.booleans()), min_size=2, max_size=40))
def test_auc_of_histograms_is_that_of_the_rows_where_no_two_share_a_bin_by_chance(rows):
    """Rows with equal scores count half, so scores that are bins have the AUC of their histograms."""
    places, clicked = np.array([place for place, _ in rows]), np.array([clicked for _, clicked in rows])
    base = {"rows": 1.0, "absolute": 0.0, "squared": 0.0, "right": 0.0, "log_loss": 0.0}
    sums = base | histogram(places[clicked], "clicks") | histogram(places[~clicked], "others")
    if clicked.all() or not clicked.any():
        assert "auc" not in metrics_of(sums, [0.0, 1.0])
    else:
        assert metrics_of(sums, [0.0, 1.0])["auc"] == pytest.approx(roc_auc_score(clicked, places))
        apart = places + np.where(clicked, 0.5, 0.0)  # the worst that rows of one bin can be
        assert abs(metrics_of(sums, [0.0, 1.0])["auc"] - roc_auc_score(clicked, apart)) <= area_within(sums) + 1e-9


def test_a_log_goes_on_after_a_kill_in_a_line_and_misses_no_round(tmp_path):
    records = [
        EpochRecord(1.0, 0.5, 10, 20, valid={"mae": 0.7}, epsilon=1.25),
        EpochRecord(1.0, 0.4, 10, 20, missing={1: "absent"}),
    ]
    said, heard = [], []
    journal = Journal(tmp_path, said.append)
    journal.write("waiting", parties=2, address="here")
    follower = Follower(tmp_path, heard.append)
    journal.write("begin", round=1, epochs=3, parties={"0": 1234, "1": 5}, there=2)
    follower.look()
    journal.rounds(records[:1], {0: 0.0, 1: 0.0})
    follower.look()
    follower.look()
    assert said == ["waiting for 2 parties at here", *heard]
    assert heard == [
        "2 of 2 parties are there; 0 of 3 rounds are done",
        "round 1: loss 0.5000, mae 0.7000, 30 B, epsilon 1.25, 1.0 s",
    ]
    with (tmp_path / LOG).open("ab") as log:
        log.write(b'{"time": "cut of')
    again = Journal(tmp_path)
    again.write("begin", round=2, epochs=3, parties={"0": 1234, "1": 5}, there=2)
    again.rounds(records, {0: 60.0})
    again.rounds(records, {0: 60.0})
    assert [event.get("round") for event in read_events(tmp_path / LOG)] == [None, 1, 1, 2, 2]
    with (tmp_path / LOG).open("ab") as log:
        log.write(b'{"time": "2026-01-01T00:00:00+00:00", "event": "round"}\n')
    told = status(tmp_path)
    assert told.startswith("training; 2 of 3 rounds") and "60 bytes: 20 down, 40 up" in told
    assert "1970-01-01T00:01:00" in told and "absent" in told and "1,234" in told and "0.7000" in told
    with pytest.raises(InputError, match=r"holds no log\.jsonl that a coordinator"):
        status(tmp_path / "elsewhere")


def test_numbers_and_texts_of_a_party_break_neither_sums_nor_a_terminal(cut, tmp_path, caplog, capsys):
    manifest, parties = parties_of(cut, tmp_path)
    manifest.config["min_clients"], manifest.config["epochs"] = 1, 4
    escape = "\x1b[31m\u202e"
    wire = Coming(parties, [3])
    told = Unreliable(wire.answering)
    told.faults = {
        ("train", 0): {1: numbers(loss=1.7e308), 2: numbers(dropped=1e300)},
        ("train", 1): {1: numbers(whole=1.7e308), 2: numbers(seen=2.0**32)},
        ("train", 2): {1: answered(fault="failed", detail=escape), 2: numbers(**{escape: 1.0})},
        ("train", 3): {number: numbers(whole=5e-324, dropped=1e38) for number in parties},
        ("judge", 3): {1: answered(fault=escape, detail=escape)},
    }
    wire.exchange = told.exchange
    result = coordinated(manifest, wire, tmp_path / "server", "here")
    missing = [each.get("missing", {}) for each in result["rounds"]]
    assert [list(each) for each in missing] == [[1, 2], [1, 2], [1, 2], []]
    assert missing[0][1].startswith("numbers: 'loss' is 1.7e+308, where a number from -1e+19 to 1e+19 is due")
    assert result["rounds"][3]["unserved"][1].startswith("?[31m?")
    assert all(np.isfinite([each["loss"], each["codec_error"]]).all() for each in result["rounds"])
    shown = caplog.text + capsys.readouterr().out + status(tmp_path / "server")
    assert "?[31m?" in shown and "\x1b" not in shown and "\u202e" not in shown


def test_a_log_that_holds_null_or_an_escape_is_told(tmp_path):
    heard = []
    journal, follower = Journal(tmp_path), Follower(tmp_path, heard.append)
    journal.write("begin", round=1, epochs=3, parties={"0": 1234}, there=1)
    journal.rounds([EpochRecord(1.0, np.inf, 1, 2, valid={"mae": np.nan}, missing={0: "\x1b[2J"})], {})
    journal.write("failed", why="\x1b[2J")
    follower.look()
    assert heard[1].startswith("round 1: loss not finite, mae not finite, 3 B")
    told = status(tmp_path)
    assert told.startswith("stopped: ?[2J;") and told.count("?[2J") == 2 and told.count("not finite") == 2


def test_status_tells_who_was_not_let_in_over_all_lives_of_a_coordinator(tmp_path):
    journal, record = Journal(tmp_path), EpochRecord(1.0, 0.5, 10, 20)
    lines = [("waiting", None, 0), ("begin", 2, 2), ("round", 3, 3), ("failed", 3, 3)]
    lines += [("waiting", None, 3), ("begin", 1, 4), ("end", 4, 7)]
    for event, refused, total in lines:
        if event == "round":
            journal.rounds([record], {}, refused)
        else:
            known = {} if refused is None else {"refused": refused}
            journal.write(event, round=1, epochs=3, parties={}, there=0, **known)
        assert (f"{total} came who were not let in" in status(tmp_path)) == bool(total), event
        assert ("came who" in status(tmp_path)) == bool(total)


class Overheard(InProcess):
    """Parties of this process that have come already; keeps every byte of both directions."""

    refused = 0

    def __init__(self, parties):
        super().__init__({number: party.answer for number, party in parties.items()})
        self.bytes = [party.hello() for party in parties.values()]
        self.greeted = {number: Answer.from_bytes(party.hello()) for number, party in parties.items()}
        self.seen = dict.fromkeys(parties, 1.0)

    def await_parties(self, numbers, timeout):
        return numbers

    def exchange(self, requests, timeout):
        self.bytes += requests.values()
        for number, answer in super().exchange(requests, timeout):
            self.bytes.append(answer)
            yield number, answer


def test_a_token_and_a_row_that_were_planted_with_a_party_are_nowhere_else(tmp_path):
    """Neither in what crosses, nor in the manifest, nor in any file of the coordinator's folder."""
    write_dataset(tmp_path)
    file, token, moment = tmp_path / "tiny" / "tiny.inter", "Zorro-7f3a", 1_717_171_712
    lines = file.read_text().replace("u17\t", f"{token}\t").splitlines()
    place = next(place for place, line in enumerate(lines) if line.startswith(token))
    lines[place] = lines[place].rpartition("\t")[0] + f"\t{moment}"
    file.write_text("\n".join(lines) + "\n")
    users = tmp_path / "tiny" / "tiny.user"
    users.write_text(users.read_text().replace("u17\t", f"{token}\t"))
    given = {"data_path": str(tmp_path), **SMALL, **KEYS}
    folders = split_federation("AttnFedKD", "tiny", tmp_path / "cut", [], given)
    manifest = Manifest.load(tmp_path / "cut" / "manifest")
    parties = {party.number: party for party in (Party(folder, manifest) for folder in folders)}
    times = np.concatenate([party.rows.interactions["timestamp"].numpy() for party in parties.values()])
    marks = [token.encode(), str(moment).encode(), np.float32(moment).tobytes(), np.float64(moment).tobytes()]
    assert np.float32(moment) in times
    wire, out = Overheard(parties), tmp_path / "server"
    coordinated(manifest, wire, out, "here")
    files = [each for folder in (out, manifest.folder) for each in folder.rglob("*") if each.is_file()]
    assert {SERVER_STATE, LOG, "result.json", "record.jsonl"} <= {each.name for each in files}
    for content in [*wire.bytes, *(each.read_bytes() for each in files)]:
        assert not any(mark in content for mark in marks)


class Coming(Interrupted):
    """Parties of which so many have come at each look."""

    refused = 0

    def __init__(self, parties, looks, after=10**9):
        super().__init__({number: party.answer for number, party in parties.items()}, after)
        self.greeted = {number: Answer.from_bytes(party.hello()) for number, party in parties.items()}
        self.seen, self.looks = dict.fromkeys(parties, 1.0), iter(looks)

    def await_parties(self, numbers, timeout):
        return set(range(next(self.looks)))


def test_a_coordinator_that_goes_on_says_so_when_somebody_is_there_and_a_finished_one_waits_for_nobody(cut, tmp_path):
    manifest, parties = parties_of(cut, tmp_path)
    out = tmp_path / "server"

    def events():
        return [event["event"] for event in read_events(out / LOG)]

    with pytest.raises(KeyboardInterrupt):
        coordinated(manifest, Coming(parties, [3], after=12), out, "here")
    manifest.config["client_timeout"] = 0.0
    with pytest.raises(TrainingError, match=r"client\(s\) 1, 2 have not come; the run goes on when 3 are there"):
        coordinated(manifest, Coming(parties, [1, 1]), out, "here")
    assert events()[-2:] == ["waiting", "failed"]
    assert status(out).startswith("stopped: client(s) 1, 2 have not come")
    assert all(each["refused"] == 0 for each in read_events(out / LOG) if each["event"] in ("begin", "failed"))
    manifest.config["client_timeout"] = 60.0
    told = coordinated(manifest, Coming(parties, [0, 1, 3]), out, "here")
    again = coordinated(manifest, Coming(parties, []), out, "here")
    assert again["test_result"] == told["test_result"] and events()[-2:] == ["end", "end"]
