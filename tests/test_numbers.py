"""Numbers of the documentation are those of the records that the repository keeps."""

import re
from itertools import chain
from pathlib import Path

import pytest
from kept import FOLDERS, RESULTS, rows_of, runs_of

ROOT = Path(__file__).parents[1]
WITH_DEVIATION = re.compile(r"\d\.\d{4} ± \d\.\d{4}")
NONE = "\N{EN DASH}"
MEASURED = ("accuracy", "mae", "rmse", "auc", "hit@10", "ndcg@10")


def text_of(page):
    return (ROOT / page).read_text(encoding="utf-8").replace("**", "")


@pytest.mark.parametrize("folder", FOLDERS)
def test_tables_beside_records_are_those_of_their_runs(folder):
    table, cost = (text_of(f"experiments/results/{folder}/{name}.md").splitlines() for name in ("table", "cost"))
    for group in {tuple(sorted(run.group.items())) for run in runs_of(folder)}:
        for row, numbers in rows_of(folder, **dict(group)).items():
            own = [line for line in table if line.startswith(f"| {row} |")]
            for metric in numbers.keys() & set(MEASURED):
                assert any(f"| {numbers[metric]} |" in line for line in own), (row, metric, f"{numbers[metric]}")
            moved = f"| {numbers['bytes']:,} |" if "bytes" in numbers else f"| {NONE} |"
            assert any(line.startswith(f"| {row} |") and moved in line for line in cost), (row, moved)


def test_numbers_of_pages_with_their_deviation_stand_in_records():
    known = set(chain.from_iterable(WITH_DEVIATION.findall(file.read_text()) for file in RESULTS.glob("*/*.md")))
    for folder in FOLDERS:
        known |= {f"{numbers}" for row in rows_of(folder).values() for numbers in row.values()}
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    stale = {str(page): sorted(set(WITH_DEVIATION.findall(text_of(page))) - known) for page in pages}
    assert {page: numbers for page, numbers in stale.items() if numbers} == {}


def holds(page, *sentences):
    said = " ".join(text_of(page).split())
    assert [sentence for sentence in sentences if sentence not in said] == [], page


def per_cent(numbers, of, places=1):
    return f"{100 * numbers['bytes'].mean / of['bytes'].mean:.{places}f} %"


def test_the_front_door_says_what_was_measured():
    own = rows_of("factors-ml-100k")
    factors, average, central, seen = (
        own[row] for row in ("factors", "fedavg", "central", "AttnStudent, with what is known")
    )
    large, larger = rows_of("factors-ml-1m")["factors"], rows_of("bytes-and-quality-ml-1m")
    taught = larger["fedgkd, sign, averaged"]
    once, floor = rows_of("factors-ml-100k", 2020)["factors"], rows_of("factors-ml-100k", 2020)["Bias"]
    rows = [("`factors`", factors), ("`factors_xs`", own["factors_xs"]), ("`fedavg` of the attentive student", average)]
    bias = own["Bias"]
    holds(
        "README.md",
        f"| `Bias`, an offset a user and an item, on all data | {bias['accuracy']} | {bias['mae']} | {NONE} |",
        *(f"| {name} | {of['accuracy']} | {of['mae']} | {of['bytes']:,} |" for name, of in rows),
        f"| `central`: the attentive student on all data | {central['accuracy']} | {central['mae']} | {NONE} |",
        f"| the same, told what `factors` tells its heads | {seen['accuracy']} | {seen['mae']} | {NONE} |",
        f"which beats averaging for {per_cent(factors, average)} of its bytes",
        f"student on all data, for {per_cent(factors, average)} of averaging's bytes",
        f"accuracy {large['accuracy']:4} and MAE {large['mae']:4} against {larger['fedavg']['accuracy']:4} and "
        f"{larger['fedavg']['mae']:4}, for {per_cent(large, larger['fedavg'])}",
        f"on ml-1m accuracy {taught['accuracy']:4} for {taught['bytes'].mean / 1e6:.0f} MB, "
        f"{larger['fedavg']['accuracy']:4} for {larger['fedavg']['bytes'].mean / 1e6:.0f}",
    )
    for page in ("README.md", "docs/quick-start.md"):
        holds(
            page,
            f"accuracy 0{once['accuracy']:4} 0{floor['accuracy']:4} held-out test rows, ratings in stars",
            f"mae 0{once['mae']:4} 0{floor['mae']:4}",
            f"{once['bytes']:,} until the best",
        )


def test_who_chooses_a_method_reads_what_was_measured():
    own = rows_of("factors-ml-100k")
    average, central, small = own["fedavg"], own["central"], own["factors_xs"]
    device, sums = rows_of("cross-device-ml-100k"), rows_of("sums-ml-100k")["GramEASE over clients"]
    recent = rows_of("sums-recent-ml-100k")["GramEASE over clients, half-life 10"]
    large = rows_of("bytes-and-quality-ml-1m")

    def closed(row):
        floor, ceiling = large["local"]["accuracy"], large["central"]["accuracy"]
        shares = [(each - low) / (high - low) for each, low, high in zip(row["accuracy"], floor, ceiling, strict=True)]
        return f"{100 * sum(shares) / len(shares):.0f} %"

    both = [f"{row[metric]:4}" for row in (own["factors"], average, central) for metric in ("accuracy", "mae")]
    holds(
        "docs/choose.md",
        "accuracy {}, MAE {} against {}, {} and {}, {} | {} of averaging's |".format(
            *both, per_cent(own["factors"], average)
        ),
        f"accuracy {small['accuracy']:4}, MAE {small['mae']:4} | {per_cent(small, average)} |",
        f"on ml-1m {closed(large['fedgkd, sign, averaged'])} of what federation costs in accuracy | "
        f"{per_cent(large['fedgkd, sign, averaged'], large['fedavg'], 0)} |",
        f"on ml-1m {closed(large['fedavg'])} of it | 100 % |",
        f"NDCG@10 {recent['ndcg@10']:4} against {device['EASE']['ndcg@10']:4}; as it is without, {sums['ndcg@10']:4} | "
        f"{per_cent(sums, device['FedMF'])} of FedMF's",
        f"NDCG@10 {device['FedMF']['ndcg@10']:4} against {device['MF central']['ndcg@10']:4} |",
    )


def test_floors_and_ceilings_of_the_page_of_strategies_were_measured():
    small, large = rows_of("factors-ml-100k"), rows_of("factors-ml-1m")
    page = text_of("docs/strategies.md")
    for name, row in {
        "Bias": "Bias",
        "FoldIn": "FoldIn",
        "MFEM": "MFEM",
        "AttnStudent": "AttnStudent, with what is known",
    }.items():
        (line,) = re.findall(rf"^\| `{name}` \|.*", page, re.MULTILINE)
        told = [f"0{of[row]['mae']:4} / 0{of[row]['rmse']:4}" for of in (small, large) if row in of]
        assert all(numbers in line for numbers in told), (name, told)
