"""The benchmarks run, and what they tell is what was measured."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_ratios_are_those_of_each_turn(benchmarks):
    import turns

    costs = {
        "slow": [turns.Cost(2.0, 8.0), turns.Cost(9.0, 4.0), turns.Cost(3.0, 3.0)],
        "fast": [turns.Cost(1.0, 2.0), turns.Cost(3.0, 4.0), turns.Cost(2.0, 1.0)],
    }
    found = turns.ratios(costs, "fast")
    assert found["slow"] == {"clock": [1.5, 2.0, 3.0], "processor": [1.0, 3.0, 4.0]}
    assert found["fast"] == {"clock": [1.0, 1.0, 1.0], "processor": [1.0, 1.0, 1.0]}
    told = turns.table(costs, "fast", {"compiler": 0.5})
    assert "| slow | 4.00 | 3.00 | 3.00 (1.00..4.00) | 2.00 (1.50..3.00) |" in told
    assert "compiler (0.5 cores)" in told


def test_works_take_turns_and_the_first_is_not_counted(benchmarks):
    import turns

    called = []
    costs = turns.take_turns({"a": lambda: called.append("a"), "b": lambda: called.append("b")}, turns=2)
    assert called == ["a", "b"] * 3
    assert {name: len(each) for name, each in costs.items()} == {"a": 2, "b": 2}


def test_whoever_waits_is_told_of_every_work_and_may_stop_with_the_turns_that_are_whole(benchmarks, capsys):
    import turns

    calls = []

    def stopped_in_the_third():
        calls.append("b")
        if calls.count("b") == 4:  # the first is not counted
            raise KeyboardInterrupt

    costs = turns.take_turns({"a": lambda: calls.append("a"), "b": stopped_in_the_third}, turns=5)
    assert {name: len(each) for name, each in costs.items()} == {"a": 2, "b": 2}
    told = capsys.readouterr().err.splitlines()
    heads = [line.partition(",")[0] for line in told]
    assert heads[:3] == ["not counted: a", "not counted: b", "turn 1 of 5: a"] and told[-1].startswith(
        "stopped; what was"
    )
    calls[:] = ["b"] * 3
    with pytest.raises(SystemExit, match="no turn was measured"):
        turns.take_turns({"a": lambda: None, "b": stopped_in_the_third}, turns=5)


def test_many_small_processes_of_one_name_are_told_together_and_those_that_ended_as_what_is_left(
    benchmarks, monkeypatch
):
    import turns

    now = iter([0.0, 10.0])
    used = iter(
        [
            {1: ("python", 5.0), 2: ("shell", 1.0)},
            {1: ("python", 5.8), 3: ("python", 0.7), 2: ("shell", 1.1)},
        ]
    )
    monkeypatch.setattr(turns, "perf_counter", lambda: next(now))
    in_all = iter(
        [100.0, 110.0]
    )  # .8 + .7 of python and .1 of the shell are of those who are still there, 1 second is own
    own = iter([7.0, 8.0])
    monkeypatch.setattr(turns, "_used_by_others", lambda: next(used))
    monkeypatch.setattr(turns, "_used_by_all", lambda: next(in_all))
    monkeypatch.setattr(turns, "_used_here", lambda: next(own))
    found = turns.Others().cores()
    assert found == {"python": 0.15, turns.ENDED: 0.74}
    assert (
        turns.in_words(found) == "python (0.15 cores), what ended since (0.74 cores)" and turns.in_words({}) == "nobody"
    )


def test_the_short_form_of_a_run_is_measured_in_all_its_parts(benchmarks, data_path, monkeypatch, tmp_path, capsys):
    import round_time

    out = tmp_path / "costs.json"
    arguments = ["--dataset=tiny", f"--data_path={data_path}", "--presets", "afd", "fd", "--turns=1", f"--out={out}"]
    monkeypatch.setattr(sys, "argv", ["round_time.py", *arguments])
    round_time.main()
    names = ["round of afd", "round of fd", "final test", "central epoch", "preparing the data"]
    assert list(json.loads(out.read_text())["ratios"]) == names
    printed = capsys.readouterr().out
    assert all(f"| {name} |" in printed for name in names)


def test_what_parties_cost_is_measured_every_so_many_rounds(benchmarks, data_path, capsys):
    """On the engine that starts nothing; on the others the loop is the same."""
    import parties

    assert (
        parties.main(["--engines=local", "--clients=2", "--rounds=2", "--dataset=tiny", f"--data_path={data_path}"])
        == 0
    )
    memory, cost = capsys.readouterr().out.splitlines()
    # Other tests of this process may have left processes of their own.
    assert re.fullmatch(r"round 2: [1-9]\d* MB here, \d+ MB of parties", memory) and cost.startswith("local: ")


def test_generated_populations_are_measured_and_laws_are_powers(benchmarks):
    import population

    power_laws = {users: {"linear": 3.0 * users, "constant": 7.0, "root": users**0.5} for users in (10, 100, 1000)}
    assert population.laws(power_laws) == pytest.approx({"linear": 1.0, "constant": 0.0, "root": 0.5})
    turns = {users: [{"clock_s": 2 * users}, {"clock_s": 4 * users}, {"clock_s": users}] for users in (10, 100)}
    told = population.table(turns)
    assert "| 100 | 3 | 200 (100..400) |" in told and "| grows as users to the power of |  | 1.00 |" in told
    keys = {"items": 40, "rounds": 1, "clients_per_round": 5, "serve_after": "training", "checkpoint": True}
    found = population.measured(12, population.argparse.Namespace(**keys))
    assert found.pop("files_gb") == 0  # of so few users nothing lies in files
    assert min(found.values()) > 0 and found["sent_gb"] * 1e9 > 2 * 5 * 41 * 32 * 4


def test_generated_populations_take_turns_and_one_that_takes_long_takes_one(benchmarks, monkeypatch, capsys):
    import population

    asked, used = [], iter(range(0, 1000, 10))

    def run(command, **_):
        asked.append(command[-2])
        return population.subprocess.CompletedProcess(command, 0, f'{{"clock_s": {len(asked)}}}\n')

    with monkeypatch.context() as patched:
        patched.setattr(population.subprocess, "run", run)
        patched.setattr(population, "used_by_children", lambda: next(used))
        patched.setattr(sys, "argv", ["population.py", "--users=12,20", "--turns=2"])
        population.main()
        assert asked == ["--users=12", "--users=20"] * 2 and "| 20 | 2 | 3 (2..4) |" in capsys.readouterr().out
        patched.setattr(sys, "argv", ["population.py", "--users=12,20", "--turns=2", "--short=5"])
        population.main()
        assert len(asked) == 6 and "| 20 | 1 |" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["population.py", "--users=12", "--items=40", "--rounds=1", "--turns=1"])
    population.main()
    printed = capsys.readouterr().out
    assert "| users | turns | processor_s |" in printed and "| 12 | 1 |" in printed and "Beside it ran: " in printed


def test_rounds_of_the_fleet_are_measured_each_case_in_a_process_of_its_own(
    benchmarks, data_path, monkeypatch, tmp_path, capsys
):
    import fleet

    out, cases = tmp_path / "costs.json", ["pfedrec on fleet", "afd on fleet"]
    run_apart, asked = fleet.run_apart, []

    def stopped_in_the_second_turn(case, arguments):
        asked.append(case)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return run_apart(case, arguments)

    monkeypatch.setattr(fleet, "run_apart", stopped_in_the_second_turn)
    arguments = ["--dataset=tiny", f"--data_path={data_path}", "--rounds=1", "--turns=9", f"--cases={','.join(cases)}"]
    monkeypatch.setattr(sys, "argv", ["fleet.py", *arguments, f"--reference={cases[1]}", f"--out={out}"])
    fleet.main()
    measured = json.loads(out.read_text())
    assert [row["clients"] for case in cases for row in measured[case]] == [30, 30]
    printed, told = capsys.readouterr()
    assert "turn 1 of 9: pfedrec on fleet, " in told and "stopped; " in told
    assert all(re.search(rf"^\| {case} \|.*\|$", printed, re.M) for case in cases)
    assert f"s | of {cases[1]}, processor |" in printed and re.search(r"afd on fleet: at most \d\.\d\d GB", printed)


@pytest.mark.parametrize(
    "argument, sentence",
    [
        ("--cases=pfedrec", "--cases: there is no 'pfedrec'; there are pfedrec on fleet, pfedrec on local, "),
        ("--reference=pfedrec by FedJAX", "--reference: 'pfedrec by FedJAX' is not measured; measured are pfedrec on "),
    ],
)
def test_a_case_that_there_is_not_is_refused_before_anything_is_measured(
    benchmarks, monkeypatch, capsys, argument, sentence
):
    import fleet

    monkeypatch.setattr(sys, "argv", ["fleet.py", argument])
    with pytest.raises(SystemExit) as ended:
        fleet.main()
    told = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 2 and told.startswith(f"fleet.py: error: {sentence}")


def test_parts_of_a_round_are_told_beside_what_the_machine_would_need(benchmarks, data_path, monkeypatch, capsys):
    import parts

    compiles = parts.has_compiler()
    monkeypatch.setattr(sys, "argv", ["parts.py", "--dataset=tiny", f"--data_path={data_path}", "--turns=1"])
    parts.main()
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith(("| a r", "| the"))]
    assert [row[0] for row in rows] == [
        "| a round of pfedrec",
        "| a round of afd",
        "| the final test of four clients",
    ]
    assert all("%" in row[5] for row in rows)
    assert parts.has_compiler() == compiles, "loops are compiled again"


def test_a_flame_graph_is_recorded_while_rounds_run(benchmarks, data_path, monkeypatch, tmp_path):
    """By a stand-in for py-spy, which may not be there nor look into this process."""
    import flame

    out = tmp_path / "graph.svg"
    monkeypatch.setattr(sys, "argv", ["flame.py", str(out), "--dataset=tiny", f"--data_path={data_path}", "--turns=1"])
    with monkeypatch.context() as patched:
        patched.setattr(flame.shutil, "which", lambda _: None)
        with pytest.raises(SystemExit, match="there is no py-spy; it comes with: pip install py-spy"):
            flame.main()
    looking = tmp_path / "py-spy"
    looking.write_text(f"""#!{sys.executable}
import signal, sys
given = dict(zip(sys.argv[2::1], sys.argv[3::1]))
signal.signal(signal.SIGINT, lambda *_: (open(given["--output"], "w").write(given["--pid"]), sys.exit(0)))
while True:
    signal.pause()
""")
    looking.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    flame.main()
    assert out.read_text() == str(os.getpid())


def test_answers_from_memory_are_timed_model_by_model(benchmarks, data_path, monkeypatch, capsys):
    import answers

    arguments = ["--dataset=tiny", f"--data_path={data_path}", "--answers=1", "AttnStudent", "BPR"]
    monkeypatch.setattr(sys, "argv", ["answers.py", *arguments])
    answers.main()
    told = capsys.readouterr().out.splitlines()
    assert [re.fullmatch(r"(\w+) +[\d.]+ ms, processor +[\d.]+ ms", line)[1] for line in told] == arguments[-2:]


def test_what_masks_cost_is_told_of_clients_and_server(benchmarks, monkeypatch, capsys):
    pytest.importorskip("cryptography")
    import masking

    monkeypatch.setattr(sys, "argv", ["masking.py", "--clients=6", "--numbers=50", "--lost=0.2"])
    masking.main()
    told = dict(line.split(": ") for line in capsys.readouterr().out.splitlines())
    assert list(told)[:2] == ["client s", "server s"] and int(told["up bytes"]) > 4 * 50
    assert told["plain bytes (float32)"] == "200"


def test_no_default_loses_to_bias_on_a_small_table(benchmarks, tmp_path, monkeypatch):
    import floors

    monkeypatch.setitem(floors.SETS, "small", floors.rated(floors.drawn(60, 30, 700)))
    keys = {"epochs": 4, "stopping_step": 4, "attention_heads": 2, "embedding_size": 4, "hidden_sizes": [4, 8]}
    rows = {"AttnStudent": {"model": "AttnStudent", **keys}, "factors": {"preset": "factors", "epochs": 12}}
    rows |= {name: {"model": name} for name in ("FoldIn", "MFEM")}
    told: list[str] = []
    found = floors.compared(["small"], rows, tmp_path, 2020, told.append)
    assert [one["row"] for one in found] == ["Bias", *rows] and len(told) == len(found)
    assert found[0]["mae_above"] == found[0]["rmse_above"] == 0
    assert not any(one["flat"] for one in found)
    bar = floors.SLACK * (5 - 1)
    assert all(max(one["mae_above"], one["rmse_above"]) <= bar for one in found)


@pytest.mark.parametrize("low, high, step", [(1, 5, 1), (1, 10, 1), (0.5, 5, 0.5)])
def test_labels_of_generated_tables_are_those_of_their_scale(benchmarks, low, high, step):
    import floors
    import numpy as np

    labels = floors.scale(low, high, step)(np.linspace(-9, 9, 400))
    assert labels.min() == low and labels.max() == high
    assert np.allclose(labels / step, np.round(labels / step))


def test_a_round_of_every_stage_is_timed_beside_one_of_fedmf(benchmarks, data_path, monkeypatch, tmp_path, capsys):
    import exchange_rounds

    out = tmp_path / "costs.json"
    arguments = ["--dataset=tiny", f"--data_path={data_path}", "--turns=1", "--heads=1", f"--out={out}"]
    monkeypatch.setattr(sys, "argv", ["exchange_rounds.py", *arguments])
    exchange_rounds.main()
    costs = json.loads(out.read_text())
    steps = [f"gradient_{number}" for number in range(4)]
    stages = ["histogram", "residuals", "product_0", "product_1", "product_2", *steps]
    assert set(costs) == {"fedmf", *stages, "leaves every row out", "head", "factors, mean round"}
    assert all(len(each) == 1 for each in costs.values())
    # A run of sixty rounds: the ten of the exchange, and fifty of heads.
    once = sum(costs[name][0]["processor"] for name in [*stages, "leaves every row out"])
    mean = (once + 50 * costs["head"][0]["processor"]) / 60
    assert costs["factors, mean round"][0]["processor"] == pytest.approx(mean)
    assert "| factors, mean round |" in capsys.readouterr().out


def test_who_gains_is_counted_by_what_clients_have(benchmarks):
    import gains
    import pandas as pd

    single = pd.DataFrame({"users": [1, 1, 1], "rows": [1, 3, 6], "gain": [0.5, -0.1, 0.2]})
    told = gains.table(single)
    assert "| 1 to 3 | 2 | 50% | 0.200 | 0.424 |" in told and "| 4 to 7 | 1 | 100% |" in told
    assert "In all 2 of 3 gain; they hold 70% of the test rows." in told
    several = gains.table(single.assign(users=[2, 9, 40]))
    assert "| users of a client | clients |" in several and "9 users: 0.100." in several
