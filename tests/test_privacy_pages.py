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
