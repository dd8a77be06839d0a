"""What pages of privacy say is what the records hold that the repository keeps; their pictures are drawn of the tables."""

import json
from pathlib import Path
from statistics import mean, stdev

from kept import rows_of

ROOT = Path(__file__).parents[1]
MINUS = "\N{EN DASH}"


def test_pages_on_membership_have_the_numbers_of_their_records(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import membership

    records = json.loads(membership.RECORDS.read_text(encoding="utf-8"))
    page, front = (
        (ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("results/membership.md", "privacy.md")
    )
    for made in "\n".join(membership.tables(records)).split("\n\n"):
        assert made in page, made
    assert f"liked or not with AUC {records['liked']:.3f}" in page
    assert f"liked or not with AUC {records['liked']:.3f}".replace("0.", ".") in front
    hidden = [
        each for name, record in records.items() if name.endswith(("masks", "both")) for each in record.get("seen", [])
    ]
    nothing = {"array": "histogram", "membership": None, "exact": 0.0, "ratings": None, "chance": 0.0}
    assert membership.cell({"seen": [nothing]}, 0) == "nothing to guess"
    assert hidden and all(abs(each["membership"] - 0.5) < 0.02 and not each["exact"] for each in hidden)


def test_tables_of_quality_at_epsilon_are_those_of_their_records(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "hooks"))
    import dots

    def told(values):
        return f"{mean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")

    def change(row, against, metric):
        per_cent = round(100 * (mean(row[metric]) / mean(against[metric]) - 1), 1)
        return f"{'+' if per_cent > 0 else MINUS}{abs(per_cent)} %"

    large, small = rows_of("epsilon-ml-1m"), rows_of("epsilon-ml-100k")
    tables = dots.tables((ROOT / "docs" / "results" / "epsilon.md").read_text(encoding="utf-8"))
    tables = [[[cell.replace("**", "") for cell in row] for row in table] for table in tables]
    _, *rows = tables[0]
    names = ["preset", "no noise", *(f"epsilon {epsilon}" for epsilon in (8, 4, 2, 1))]
    assert [row[0] for row in rows[2:6]] == names[2:] and len(rows) == 7
    preset, plain = large["factors, preset"], large["factors, no noise"]
    for name, row in zip([*(f"factors, {name}" for name in names), "Bias"], rows, strict=True):
        scores = large[name]
        assert row[2:5] == [told(scores[metric]) for metric in ("accuracy", "mae", "rmse")], name
        assert row[5] == ("" if scores is preset else change(scores, preset, "rmse")), name
        assert row[6] == (change(scores, plain, "rmse") if "epsilon" in name else ""), name
    for (_, *rows), scores in zip([t for t in tables if t[0][0] == "epsilon"], (small, large), strict=True):
        for name, row in zip(["no noise", *names[2:]], rows, strict=True):
            own, plain = scores[f"fedavg, {name}"], scores["fedavg, no noise"]
            assert row[0] in ("no bound, no noise", name.removeprefix("epsilon "))
            assert row[1:] == [told(own["auc"]), "" if own is plain else change(own, plain, "auc")], name


def test_the_table_of_attacks_and_defences_is_whole_and_that_of_its_records(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "hooks"))
    import dots

    found = {}
    for file in (ROOT / "experiments" / "results" / "wrong-clients-ml-100k" / "runs").iterdir():
        head, *_, last = map(json.loads, file.read_text(encoding="utf-8").splitlines())
        found[head["row"], head["seed"]] = last["test"]["rmse"]
    head, *rows = dots.tables((ROOT / "docs" / "results" / "wrong-clients.md").read_text(encoding="utf-8"))[0]
    assert len(rows) == 6 and len(head) == 8
    for row in rows:
        attack = row[0].split("`")[0].replace("_", " ").replace("item ", "")
        for defence, cell in zip(head[1:], row[1:], strict=True):
            of = {"no defence": "", "norm bound 3": ", norm bound"}.get(defence, f", {defence.lower()}")
            rmse, nobody = (found[f"{name}{of}", 2020] for name in (attack, "none"))
            cost = f"{abs(round(rmse - nobody, 4)):.4f}"[1:]
            sign = "\N{EN DASH}" if rmse < nobody else ""
            assert cell == f"{rmse:.4f}" + ("" if attack == "none" else f" ({sign}{cost})"), (attack, defence)
