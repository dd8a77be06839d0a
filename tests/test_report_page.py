"""What a report says and how it is written: tables, protocols, students of sizes, published numbers, Markdown, CSV, page."""

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
from report_records import (
    NAN,
    PARTITION,
    SCALE,
    Page,
    Records,
    cells,
    csv_lines,
    full_experiment,
    of_clients,
    scaled,
    users_of,
)

from recbole_fedkd.report import write_report
from recbole_fedkd.report.contents import NONE, Heading, percent
from recbole_fedkd.report.experiment import Published
from recbole_fedkd.report.files import table_texts
from recbole_fedkd.report.measures import client_quality, sizes_of
from recbole_fedkd.report.quality import (
    best_rows,
    metrics_of,
    protocol_sentences,
    published_table,
    quality_table,
)
from recbole_fedkd.report.statistics import compare, summary
from recbole_fedkd.report.tables import client_blocks, overview_table, size_sentences
from recbole_fedkd.report.verdict import verdict
from recbole_fedkd.report.writers import markdown


def texts(experiment):
    return table_texts(experiment, lambda group: [])


@pytest.fixture
def records(tmp_path):
    return Records(tmp_path / "grid")


def test_quality_table_by_hand(records):
    for seed, mae, auc in ((1, 0.70, 0.80), (2, 0.72, 0.82)):
        records.run("local", seed, {"mae": mae, "auc": auc, "ndcg@10": 0.5, "ndcg@5": 0.4})
    for seed, mae in ((1, 0.69), (2, 0.71)):
        records.run("afd", seed, {"mae": mae, "auc": 0.8})
    (group,) = records.read().groups
    table = quality_table(group)
    assert table.header == ("row", "MAE ↓", "AUC ↑", "NDCG@5 ↑", "NDCG@10 ↑", "seeds")
    deviation = f"{math.sqrt(2) * 0.01:.4f}"
    # A metric that a single row has is not its best.
    assert cells(table) == [
        ["local", f"0.7100 ± {deviation}", f"[0.8100 ± {deviation}]", "0.4000 ± 0.0000", "0.5000 ± 0.0000", "2"],
        ["afd", f"[0.7000 ± {deviation}]", "0.8000 ± 0.0000", NONE, NONE, "2"],
    ]
    assert f"| afd | **0.7000 ± {deviation}** | 0.8000 ± 0.0000 | {NONE} | {NONE} | 2 |" in markdown(table).splitlines()


def test_a_metric_that_a_seed_lacks_is_counted(records):
    records.run("afd", 1, {"mae": 0.5, "auc": 0.6})
    records.run("afd", 2, {"mae": 0.5, "auc": None})
    (group,) = records.read().groups
    assert cells(quality_table(group)) == [["afd", "0.5000 ± 0.0000", "0.6000 (n = 1)", "2"]]


def test_protocols_that_differ_are_told_and_nobody_is_best(records):
    records.run("afd", 1, {"mae": 0.5, "auc": 0.8}, protocols={"mae": "in stars", "auc": "in stars"})
    records.run("central", 1, {"mae": 0.4, "auc": 0.7}, protocols={"mae": "normalised", "auc": "in stars"})
    (group,) = records.read().groups
    assert best_rows(group) == {"mae": set(), "auc": {"afd"}}
    assert protocol_sentences(group) == [
        "AUC: in stars.",
        "MAE: the protocol differs between rows, so that they do not compare: in stars (afd); normalised (central).",
    ]
    assert {each.metric for each in compare(group, metrics_of(group))} == {"auc"}


def test_where_a_threshold_comes_from_makes_no_other_protocol(records):
    told = "held-out test rows, rating >= 4"
    records.run("afd", 1, {"mae": 0.5}, protocols={"mae": told})
    records.run("local", 1, {"mae": 0.6}, protocols={"mae": f"{told}, three quarters of the scale 1..5"})
    (group,) = records.read().groups
    assert protocol_sentences(group) == [f"MAE: {told}, three quarters of the scale 1..5."]
    assert best_rows(group)["mae"] == {"afd"}


def test_counts_of_single_seeds_make_no_other_protocol(records):
    told = "held-out test rows [{} of 60 rows repeat a pair]"
    for seed, repeated in ((1, 3), (2, 5)):
        for row, mae in (("afd", 0.4), ("local", 0.5)):
            records.run(row, seed, {"mae": mae}, protocols={"mae": told.format(repeated)})
    records.run("local", 3, {"mae": 0.5}, protocols={"mae": "held-out test rows"})
    (group,) = records.read().groups
    assert protocol_sentences(group) == ["MAE: held-out test rows [3 to 5 of 60 rows repeat a pair]."]
    assert best_rows(group)["mae"] == {"afd"}


def test_without_any_clients_nothing_is_said_of_them(records):
    records.run("local", 1, {"mae": 0.5}, users=users_of([0.5, 0.5]))
    experiment = records.read()
    assert client_blocks(experiment.groups[0]) == []
    assert texts(experiment)["clients.csv"] is None
    assert "Clients" not in Page(write_report(records.folder).read_text()).texts


POOL = [{"embedding_size": 8}, {}]


def students(records, reference=POOL):
    """Clients 0 and 2 have the small student, client 1 the row's own."""
    records.run("local", 1, {"mae": 1.0}, users=of_clients([2, 2, 2, 2, 2]), student_pool=reference)
    records.run("afd", 1, {"mae": 1.0}, users=of_clients([1, 1, 3, 3, 1.5]), student_pool=POOL)
    records.run("fedavg", 1, {"mae": 1.0}, users=of_clients([1, 1, 1, 1, 3]))
    records.run("other pool", 1, {"mae": 1.0}, users=of_clients([0] * 5), student_pool=[{}, {}, POOL[0]])
    other = {**PARTITION, "clients": PARTITION["clients"][:2]}
    records.run("other clients", 1, {"mae": 1.0}, users=of_clients([0] * 5), partition=other)
    records.run("central", 1, {"mae": 1.0}, users=users_of([4, 4, 1, 1, 4]), strategy="central", student_pool=POOL)
    return records.read()


@pytest.mark.parametrize("reference", [POOL, None, [{}, {"embedding_size": 2}, {}]])
def test_every_size_of_student_beside_the_references_clients_of_the_same_numbers(records, reference):
    (group,) = students(records, reference).groups
    small, own = [size for size in sizes_of(group) if list(size.pool) == POOL]
    assert small.rows == own.rows == ("local", "afd", "fedavg", "central")
    assert [
        (each.row, each.mean.mean, each.worst.mean, each.better, each.compared)
        for each in client_quality(group, ["mae"], small)
    ] == [("local", 2, 2, 0, 0), ("afd", 1.25, 1.5, 2, 2), ("fedavg", 2, 3, 1, 2), ("central", 4, 4, 0, 2)]
    assert [(each.row, each.mean.mean, each.difference) for each in client_quality(group, ["mae"], own)][1:] == [
        ("afd", 3, 1),
        ("fedavg", 1, -1),
        ("central", 1, -1),
    ]
    blocks = client_blocks(group)
    told = {block.text: blocks[place + 2].text for place, block in enumerate(blocks) if isinstance(block, Heading)}
    assert {"All clients", "Students 2 of 2 (the keys of the row)"} < told.keys()
    beside = "fedavg, central" if reference == POOL else "local, fedavg, central"
    assert told["Students 1 of 2 (embedding_size: 8)"] == (
        f"Clients 0, 2, which have this student. In {beside} the clients of the same numbers have the row's own model."
    )


def test_whether_every_size_gains_is_said(records):
    (group,) = students(records).groups
    sentences = size_sentences(group)
    assert sentences[0] == "afd against local, means over clients and seeds: in MAE only students of size 1 gain."
    # A row without sizes gains with no student of a size, so nothing is said of it.
    assert [sentence.split(" against")[0] for sentence in sentences] == ["afd", "other pool"]
    assert "in MAE students of every size gain" in sentences[1]


def test_the_csv_of_clients_has_a_line_per_size_row_and_metric(records):
    experiment = students(records)
    lines = csv_lines(texts(experiment)["clients.csv"])
    small = next(line for line in lines if (line["size"], line["row"]) == ("1", "afd"))
    assert (small["student"], small["better"], small["reference"]) == ('{"embedding_size": 8}', "lower", "local")
    assert (float(small["mean"]), float(small["worst"]), float(small["difference"])) == (1.25, 1.5, -0.75)
    assert (small["clients"], small["better_off"], small["compared"], small["seeds"]) == ("2", "2", "2", "1")
    assert [line["row"] for line in lines if not line["size"]][:2] == ["local", "afd"]


def test_the_csv_of_bytes_and_quality_by_hand(tmp_path):
    lines = csv_lines(texts(scaled(tmp_path / "grid", **SCALE).read())["scale.csv"])
    afd = next(line for line in lines if line["row"] == "afd")
    assert (float(afd["closed"]), afd["closed_seeds"], float(afd["bytes"])) == (pytest.approx(0.625), "2", 40.0)
    assert (float(afd["share_of_bytes"]), afd["front"], afd["metric"]) == (pytest.approx(0.2), "1", "mae")
    central = next(line for line in lines if line["row"] == "central")
    assert (central["bytes"], central["share_of_bytes"], central["front"]) == ("", "", "0")


def test_small_shares_keep_two_digits():
    assert [percent(share) for share in (0.5, 1.234, -0.5, -0.0, 0.0001234, -0.00999, 0.01)] == [
        "50.0 %",
        "123.4 %",
        "-50.0 %",
        "0.0 %",
        "0.012 %",
        "-1.00 %",
        "1.0 %",
    ]


def test_files_on_clients_and_scale_come_and_go_with_their_records(tmp_path):
    records = scaled(tmp_path / "grid", **SCALE)
    records.run("local", 5, {"mae": 3.0}, users=of_clients([1, 3, 2, NAN, 4]))
    cell = records.cells[-1]["cell"]
    report = write_report(records.done()).parent
    names = ("clients.md", "clients.csv", "scale.md", "scale.csv")
    page = Page((report / "index.html").read_text())
    assert set(names) <= {anchor["href"] for anchor in page.all("a")}
    assert {"Clients", "Bytes and quality", "All clients"} <= set(page.texts)
    assert "| afd | **0.7000** | 62.5 % | 40 | 20.0 % |" in (report / "scale.md").read_text().splitlines()
    assert "#### All clients" in (report / "clients.md").read_text().splitlines()
    (records.folder / "users" / f"{cell}.npz").unlink()
    records.plan["experiment"] = {}
    write_report(records.done())
    page = Page((report / "index.html").read_text())
    assert not set(names) & {anchor["href"] for anchor in page.all("a")}
    assert not any((report / name).exists() for name in names)


def published(tmp_path):
    content = {
        "published": {"afd": {"auc": 0.9, "minutes": "12-15", "ndcg": 0.95}, "absent": {"auc": 1}},
        "published_as": {"ndcg": "LabelledNDCG@10"},
        "published_source": "Journal <2021>",
    }
    records = Records(tmp_path / "grid", experiment=content)
    records.run("local", 1, {"auc": 0.7, "labelledndcg@10": 0.8})
    records.run("afd", 1, {"auc": 0.75, "labelledndcg@10": 0.85})
    return records


def test_published_beside_measured(tmp_path):
    records = published(tmp_path)
    experiment = records.read()
    table = published_table(experiment.groups[0], experiment.published)
    assert table.header == (
        "row",
        "auc, published",
        "AUC, measured",
        "minutes, published",
        "ndcg, published",
        "labelled NDCG@10, measured",
    )
    assert cells(table) == [["afd", "0.9", "0.7500", "12-15", "0.95", "0.8500"]]
    assert "Published, but not measured here: absent." in experiment.notes
    assert "Published (Journal &lt;2021>) and measured:" in texts(experiment)["table.md"]
    assert "Published (Journal <2021>) and measured:" in "".join(Page(write_report(records.folder).read_text()).texts)


def test_published_numbers_stand_only_beside_what_they_are_about(tmp_path):
    group = published(tmp_path).read().groups[0]
    settings = dict(group.settings)
    numbers = Published({"afd": {"auc": 0.9}}, {}, "", settings)
    assert published_table(group, numbers) is not None
    assert published_table(group, replace(numbers, settings={**settings, "label_mode": "another"})) is None


def test_tables_depend_on_neither_times_nor_repetition(tmp_path):
    quick, slow = (full_experiment(tmp_path / name, slower) for name, slower in (("a", 1.0), ("b", 60.0)))
    report = write_report(quick).parent
    names = ("table.md", "table.csv", "significance.csv", "cost.md", "cost.csv", "index.html")
    first = {name: (report / name).read_bytes() for name in names}
    (report / "plots" / "9-stale.png").write_bytes(b"")
    assert write_report(quick) == report / "index.html"
    assert {name: (report / name).read_bytes() for name in names} == first
    other = write_report(slow).parent
    for name in ("table.md", "table.csv", "significance.csv"):
        assert (other / name).read_bytes() == first[name]
    assert (other / "cost.md").read_bytes() != first["cost.md"]
    pictures = {file.name for file in (report / "plots").iterdir()}
    kinds = ("mae-against-rounds", "mae-against-seconds", "mae-against-bytes", "clients")
    fronts = ("bytes-and-test-mae", "bytes-and-test-ndcg-10")
    assert pictures == {f"{number}-{kind}.png" for number in (1, 2) for kind in (*kinds, *fronts)}


def test_the_page_stands_alone_and_escapes_names(tmp_path):
    folder = full_experiment(tmp_path / "grid")
    text = write_report(folder).read_text()
    page = Page(text)
    assert not [tag for tag, _ in page.tags if tag in ("iframe", "object", "b", "img")]
    assert page.all("script") == [{}] and page.all("link") == [{"rel": "icon", "href": "data:,"}]
    # Nothing is fetched: what looks like an address names a kind of document.
    assert set(re.findall(r"https?://[^\s\"'<>]+", text)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert "@import" not in text and set(re.findall(r"url\((.)", text)) <= {"#"}
    pictures = [attributes for attributes in page.all("div") if attributes.get("class") == "picture"]
    assert len(pictures) == len(page.all("svg")) == 12
    for picture in pictures:
        assert len(picture["aria-label"]) > 40
        for x, y, row, told in json.loads(picture["data-points"]):
            assert 0 <= x <= 461 and 0 <= y <= 404 and -1 <= row < 4 and told
    identifiers = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(set(identifiers)) == len(identifiers)
    for anchor in page.all("a"):
        target = anchor["href"]
        if target.startswith("#"):
            assert any(attributes.get("id") == target[1:] for _, attributes in page.tags), target
        else:
            assert (folder / "report" / target).is_file(), target
    assert all(attributes.get("scope") in ("col", "row") for attributes in page.all("th"))
    assert len(page.all("table")) == sum(attributes.get("class") == "scroll" for attributes in page.all("div"))
    assert len(page.all("h1")) == 1
    for name in ("local | <b>none</b>", "_fd_ & \"more\" <script>alert('x')</script>", "InputError: a | b <c>"):
        assert name in page.texts, name


def test_markdown_escapes_names(tmp_path):
    folder = full_experiment(tmp_path / "grid")
    lines = (write_report(folder).parent / "table.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("|")]
    # Two groups of a header, a ruler and four rows; a pipe in a name opens no new cell.
    assert len(rows) == 12
    assert {line.replace(r"\|", "").count("|") for line in rows} == {5}
    assert any(line.startswith(r"| local \| &lt;b>none&lt;/b> |") for line in rows)
    assert any(line.startswith(r"| afd \*T=3\* $x_1 |") for line in rows)


def test_csv_holds_full_precision(records):
    records.run("afd", 1, {"mae": 1 / 3})
    records.run("afd", 2, {"mae": 1 / 7})
    (line,) = csv_lines((write_report(records.done()).parent / "table.csv").read_text())
    assert float(line["mean"]) == summary([1 / 3, 1 / 7]).mean
    assert float(line["deviation"]) == summary([1 / 3, 1 / 7]).deviation
    assert (line["dataset"], line["row"], line["metric"], line["better"]) == ("ml-100k", "afd", "mae", "lower")
    assert (line["seeds"], line["best"], line["protocol"]) == ("2", "0", "held-out test rows")


def judged(records):
    experiment = records.read()
    (group,) = experiment.groups
    return verdict(group, compare(group, metrics_of(group)), experiment.scale)


def test_the_verdict_says_who_is_best_significantly_and_at_what_cost(records):
    for seed, noise in ((1, 0.000), (2, 0.001), (3, 0.003)):
        records.run("alone", seed, {"mae": 0.9 + noise}, moved=0)
        records.run("all data", seed, {"mae": 0.5 + 2 * noise}, moved=0, strategy="central", seconds=30.0)
        records.run("dear", seed, {"mae": 0.6 - noise}, moved=2_000_000)
        records.run("cheap", seed, {"mae": 0.6 + 3 * noise}, moved=1000)
    told = judged(records)
    assert told == (
        "“all data” is best in MAE: 0.5027 ± 0.0031 over 3 seeds, "
        "significantly better than every other row (over seeds).",
        "“all data” trained one model on all data, without a network, judged after 2 of 2 epochs, and trained for 60 s.",
        "Of the rows that send something, dear is best: 0.5987 ± 0.0015 over 3 seeds, "
        "significantly worse than “all data” (over seeds). "
        "dear sent 4 MB, judged after 2 of 2 rounds, and trained for 2.0 s.",
        "No test tells it from cheap, which sends 0.050 % of its bytes: 0.6040 ± 0.0046 over 3 seeds.",
        "Against the reference, alone, of 3 rows 3 are significantly better and 0 significantly worse in MAE.",
    )


def test_the_verdict_does_not_claim_what_no_test_shows(records):
    records.run("a", 1, {"mae": 0.5})
    assert judged(records)[0] == "a has MAE 0.5000 over 1 seed; there is no other row to compare it with."
    records.run("b", 1, {"mae": 0.6})
    assert "but nothing can be tested" in judged(records)[0]
    for seed, (a, b) in enumerate([(0.5, 0.6), (0.6, 0.5), (0.5, 0.65)], start=2):
        records.run("a", seed, {"mae": a})
        records.run("b", seed, {"mae": b})
    assert "not significantly better than any other row" in judged(records)[0]
    records.run("c", 1, {"mae": 0.1}, protocols={"mae": "normalised"})
    assert judged(records) == (
        "The rows were judged by different protocols in MAE, so that none can be called the best.",
    )


def test_the_verdict_claims_no_more_than_the_table_beside_it(records):
    # One metric by itself would tell them apart (p .029); among two it does not.
    for seed, (gap, other) in enumerate([(0.10, 0.01), (0.13, -0.01), (0.07, 0.002)], start=1):
        records.run("reference", seed, {"mae": 0.8, "auc": 0.6})
        records.run("best", seed, {"mae": 0.8 - gap, "auc": 0.6 + other})
    told = judged(records)
    assert "best is best in MAE" in told[0] and "not significantly better than any other row" in told[0]
    assert told[-1].endswith("of 1 row 0 are significantly better and 0 significantly worse in MAE.")


def test_the_verdict_opens_the_page_and_users_alone_can_decide(records):
    users = np.random.default_rng(3).normal(0.7, 0.02, 40)
    records.run("worse", 1, {"mae": 0.8}, users=users_of(users + 0.1))
    records.run("better", 1, {"mae": 0.7}, users=users_of(users, 1))
    sentence = "better is best in MAE: 0.7000 over 1 seed, significantly better than every other row (over users)."
    page = Page(write_report(records.done()).read_text())
    assert page.texts.index(sentence) < page.texts.index("row")


def test_the_overview_marks_what_a_test_tells_from_the_reference_and_which_way_is_good(records):
    for seed, noise in ((1, 0.000), (2, 0.001), (3, 0.002)):
        for row, mae, auc in (("ours", 0.5, 0.6), ("reference", 0.6, 0.7), ("like it", 0.6 + 50 * noise**2, 0.7)):
            test = {"mae": mae + noise * len(row) / 10, "auc": auc + noise * len(row) / 10}
            records.run(
                row,
                seed,
                test,
                moved=7_040_000,
                engine="fleet",
                extras={"epsilon": 8.0, "strangers": {"users": 3, "test_result": test}},
            )
    records.plan["reference"] = "reference"
    (group,) = records.read().groups
    table = overview_table(group, compare(group, metrics_of(group)), None)
    assert table.header == (
        *("row", "MAE ↓", "strangers, MAE ↓", "epsilon", "bytes", "best round", "seconds", "engine", "seeds"),
    )
    ours, reference, like = table.rows
    assert [cell.trend for cell in (ours[1], reference[1], like[1])] == ["better", "", ""]
    assert ours[1].hint == "-0.1005 against reference, significant over seeds" and ours[1].strong
    assert [cell.text for cell in ours[2:]] == ["0.5004", "8", "14.1 MB", "2 of 2", "2.0 s", "fleet", "3"]
    page = write_report(records.folder).read_text()
    assert '<span class="sign" aria-label="better">▲</span> 0.5004' in page
