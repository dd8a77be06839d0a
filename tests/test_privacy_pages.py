"""What pages of privacy say is what the records hold that the repository keeps; their pictures are drawn of the tables."""

import json
from pathlib import Path

ROOT = Path(__file__).parents[1]


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
    assert hidden and all(abs(each["membership"] - 0.5) < 0.02 and not each["exact"] for each in hidden)


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
