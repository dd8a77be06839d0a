"""The benchmarks run, and what they tell is what was measured."""

from __future__ import annotations

import json
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


def test_many_small_processes_of_one_name_are_told_together(benchmarks, monkeypatch):
    import turns

    now = iter([0.0, 10.0])
    used = iter(
        [
            {1: ("python", 5.0), 2: ("shell", 1.0)},
            {1: ("python", 5.8), 3: ("python", 0.7), 2: ("shell", 1.1)},
        ]
    )
    monkeypatch.setattr(turns, "perf_counter", lambda: next(now))
    monkeypatch.setattr(turns, "_used_by_others", lambda: next(used))
    assert turns.Others().told() == {"python": 0.15}


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
