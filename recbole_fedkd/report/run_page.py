"""The page of a single run: what it reached and what it cost, how it got there, its clients, and how it goes on."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.ticker import FuncFormatter, MaxNLocator

from recbole_fedkd.network import USUAL, Network, time_of
from recbole_fedkd.report.contents import (
    Block,
    Bullets,
    Command,
    Figures,
    Folded,
    Heading,
    Paragraph,
    Section,
    Table,
    byte_count,
    column,
    counted,
    duration,
    heading,
    usual_name,
)
from recbole_fedkd.report.drawing import COLOURS, Canvas
from recbole_fedkd.report.experiment import Group
from recbole_fedkd.report.measures import client_means, lengths_of_rounds
from recbole_fedkd.report.page import Page, environment_table, text_table
from recbole_fedkd.report.plots import learning_curves, partitions
from recbole_fedkd.report.quality import main_metrics, metrics_of, protocol_sentences
from recbole_fedkd.report.records import Run, as_text
from recbole_fedkd.report.statistics import lower_is_better

WORST = 10


def run_page(run: Run, folder: Path, finished: bool, network: Network = USUAL) -> Page:
    """The page of a run.

    Args:
        run: the run; without a result, what its checkpoint knows.
        folder: where it lies, for the commands.
        finished: whether it has a result.
        network: on which its time is reckoned.
    """
    group = Group({}, (run.row,), {run.row: (run,)}, run.row, network)
    canvases = [
        *learning_curves(group)[:1],
        *_losses(run),
        *_bytes(run),
        *partitions(group),
        *_client_values(run, group),
    ]
    blocks: list[Block] = []
    if run.test:
        blocks += [*_results(run, group), *_extras(run)]
    if canvases:
        blocks.append(Figures(tuple(canvas.draw(1) for canvas in canvases)))
    sections = [Section("run", "Result and course", tuple(blocks), tuple(_verdict(run, group, finished)))]
    if not run.central:
        sections += [*_on_network(run, group.network, folder)]
        sections.append(Section("clients", "Clients", tuple(_clients(run, group))))
    sections.append(Section("next", "How it goes on", tuple(_commands(folder, finished))))
    settings = [(key, as_text(value)) for key, value in run.settings.items()]
    every = [(key, as_text(value)) for key, value in run.config.items()]
    about: list[Block] = [text_table(("key", "given"), settings, "Keys that were given")] if settings else []
    about.append(Folded("Every key with its value", (text_table(("key", "value"), every, "Every key"),)))
    about += [environment_table([run.environment])] if run.environment else []
    sections.append(Section("settings", "Settings and environment", tuple(about)))
    last = run.rounds[-1].number if run.rounds else 0
    lead = f"Seed {run.seed}, {counted(last, _word(run))}{'' if finished else ' until now: the run has no result yet'}."
    return Page(run.cell, lead, tuple(sections))


def _word(run: Run) -> str:
    return "epoch" if run.central else "round"


def _verdict(run: Run, group: Group, finished: bool) -> list[str]:
    """What the run reached, what it cost, and who was missing."""
    sentences = []
    if run.test:
        reached = ", ".join(f"{usual_name(metric)} {run.test[metric]:.4f}" for metric in main_metrics(group))
        sentences.append(f"{run.row} reached {reached} on the test rows.")
    elif run.best_valid is not None:
        reached = f"{usual_name(run.valid_metric)} {run.best_valid:.4f}"
        sentences.append(f"{run.row} has reached {reached} in validation{'' if finished else '; it is not finished'}.")
    else:
        sentences.append(f"{run.row} was not validated{'' if finished else ' yet; it is not finished'}.")
    best = "" if run.best_round is None else f"; the best is {_word(run)} {run.best_round}"
    down, up = sum(record.bytes_down for record in run.rounds), sum(record.bytes_up for record in run.rounds)
    sent = "One model on all data, without a network"
    if not run.central:
        sent = f"Sent {byte_count(run.total_bytes)}" if run.total_bytes else "Sent nothing"
        sent += f" ({byte_count(down)} down, {byte_count(up)} up)" if run.total_bytes else ""
    engine = f", on engine {run.engine}" if run.engine else ""
    sentences.append(
        f"{sent}; {counted(len(run.rounds), _word(run))} in {duration(run.training_seconds)} of training{engine}{best}."
    )
    if run.engine_fallback:
        asked = as_text(run.config.get("engine", "asked for"))
        sentences.append(f"Engine {asked} cannot run this, engine {run.engine} does: {run.engine_fallback}.")
    values = _of_clients(run, group)
    if values is not None and len(values) > 1:
        metric = str(values.name)
        worst = values.idxmax() if lower_is_better(metric) else values.idxmin()
        sentences.append(
            f"The worst of {counted(len(values), 'client')} in {usual_name(metric)} is client {worst:.0f} with "
            f"{values[worst]:.4f}; their mean is {values.mean():.4f}."
        )
    missing = sum(len(record.missing) for record in run.rounds)
    if missing:
        sentences.append(f"Clients were left out of a round {counted(missing, 'time')}; see below.")
    return sentences


def _results(run: Run, group: Group) -> list[Block]:
    """Test metrics, validation of the judged round, and how each came about."""
    judged = next((record.valid for record in run.rounds if record.number == run.best_round), {})
    metrics = metrics_of(group)
    columns = {
        "test": column([run.test[metric] for metric in metrics], "{:.4f}".format),
        "validation": column([judged.get(metric) for metric in metrics], "{:.4f}".format),
    }
    table = Table.of_columns([heading(metric) for metric in metrics], columns, "Results", first="metric")
    return [table, Bullets(tuple(protocol_sentences(group)))]


def _extras(run: Run) -> list[Block]:
    """Held-out users, cold rows, epsilon: what few runs have."""
    if not run.extras:
        return []
    rows = [(name.replace("_", " "), f"{value:.6g}") for name, value in run.extras.items()]
    return [Heading("Also recorded"), text_table(("what", "value"), rows, "Also recorded")]


def _on_network(run: Run, network: Network, folder: Path) -> list[Section]:
    """How long its rounds would take on links and devices that were not there."""
    lengths = lengths_of_rounds(run, network)
    if not lengths:
        return []
    columns: dict[str, list[str]] = {"rounds": [], "time": [], "bytes": []}
    marks = {"all rounds": len(run.rounds)}
    if run.best_round is not None:
        quality = {record.number: record.valid for record in run.rounds}.get(run.best_round, {})
        reached = (
            f" ({usual_name(run.valid_metric)} {quality[run.valid_metric]:.4f})" if run.valid_metric in quality else ""
        )
        marks = {
            f"until the best round{reached}": sum(record.number <= run.best_round for record in run.rounds),
            **marks,
        }
    for count in marks.values():
        columns["rounds"].append(str(count))
        columns["time"].append(time_of(sum(lengths[:count])))
        columns["bytes"].append(byte_count(sum(record.bytes_moved for record in run.rounds[:count])))
    sentence = (
        f"Reckoned from its bytes and seconds for {network}; a round is as long as its slowest client takes, message down, "
        "training, message up. Of another network:"
    )
    command = f"recbole-fedkd report {shlex.quote(str(folder))} --uplink=1 --downlink=10 --latency=80 --slowdown=8"
    table = Table.of_columns(list(marks), columns, "Time on a network")
    return [Section("network", "Time on a network", (table, Paragraph(sentence), Command(command)))]


def _losses(run: Run) -> list[Canvas]:
    """Training loss against rounds."""
    points = [(record.number, record.loss) for record in run.rounds if record.loss is not None]
    if len(points) < 2:
        return []
    canvas, axes = Canvas.single(_word(run), "training loss")
    axes.plot([x for x, _ in points], [y for _, y in points], color=COLOURS[1], marker="o", markersize=4, linewidth=1.6)
    for x, y in points:
        canvas.tell(x, y, -1, f"{_word(run)} {x}: loss {y:.5g}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    how = "a sum over batches" if run.central else "a mean over samples"
    return [canvas.called("loss", "Training loss", f"Training loss of every {_word(run)}, as it is recorded: {how}.")]


def _bytes(run: Run) -> list[Canvas]:
    """Bytes up and down of every round."""
    if not any(record.bytes_moved for record in run.rounds):
        return []
    canvas, axes = Canvas.single("round", "bytes, over all clients")
    numbers = np.array([record.number for record in run.rounds])
    for shift, name, colour in ((-0.2, "down", COLOURS[0]), (0.2, "up", COLOURS[5])):
        counts = [getattr(record, f"bytes_{name}") for record in run.rounds]
        axes.bar(numbers + shift, counts, width=0.4, color=colour, label=name)
        for number, count in zip(numbers, counts, strict=True):
            canvas.tell(number + shift, count, -1, f"round {number}, {name}: {byte_count(count)}")
    canvas.explain(axes)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: byte_count(value)))
    return [
        canvas.called("bytes", "Bytes of every round", "Bytes from the server (down) and to it (up), over all clients.")
    ]


def _of_clients(run: Run, group: Group) -> pd.Series | None:
    """Each client's mean of the metric that chose the round, or a main one; None where the run did not record users."""
    metric = next((name for name in (run.valid_metric, *main_metrics(group)) if name in run.users), None)
    if metric is None or "client" not in run.users:
        return None
    return client_means(run.users["client"], run.users[metric]).rename(metric)


def _client_values(run: Run, group: Group) -> list[Canvas]:
    """How a metric differs between the clients."""
    values = _of_clients(run, group)
    if values is None or len(values) < 2:
        return []
    canvas, axes = Canvas.single(f"test {heading(str(values.name))} of a client", "clients")
    name = usual_name(str(values.name))
    heights, edges, _ = axes.hist(values, bins=min(30, max(5, len(values) // 3)), color=COLOURS[2], edgecolor="white")
    canvas.tell_bars(
        heights,
        edges,
        lambda left, right, height: f"{name} {left:.4f} to {right:.4f}: {counted(int(height), 'client')}",
    )
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    caption = f"Test {name} of the clients: each client's mean over its users that are judged by it."
    return [canvas.called("client-values", f"Test {name} of the clients", caption)]


def _clients(run: Run, group: Group) -> list[Block]:
    """The worst clients, and those that were left out of rounds."""
    blocks: list[Block] = []
    values = _of_clients(run, group)
    if values is None and run.parties:
        blocks += _parties(run)
    elif values is None:
        blocks.append(
            Paragraph("Metrics of single users were not recorded, so that nothing is known of single clients.")
        )
    else:
        metric = str(values.name)
        order = values.sort_values(ascending=not lower_is_better(metric)).index[:WORST]
        users = run.users["client"].value_counts()
        parts = run.partition["clients"] if run.partition else []
        samples = [parts[int(client)]["samples"] if client < len(parts) else None for client in order]
        metrics = [name for name in metrics_of(group) if name in run.users]
        means = {name: client_means(run.users["client"], run.users[name]) for name in metrics}
        columns = {
            "users": column([users.get(client) for client in order], "{:,.0f}".format),
            "training samples": column(samples, "{:,}".format),
            **{
                heading(name): column([means[name].get(client) for client in order], "{:.4f}".format)
                for name in metrics
            },
        }
        blocks += [
            Heading(f"The worst clients in {usual_name(metric)}"),
            Table.of_columns([f"client {client:.0f}" for client in order], columns, "The worst clients"),
            Paragraph("A client's metric is the mean over its users that are judged by it."),
        ]
    reasons: dict[str, list[str]] = {}
    for record in run.rounds:
        for client, why in record.missing.items():
            reasons.setdefault(f"client {client}: {why}", []).append(str(record.number))
    if reasons:
        blocks += [Heading("Left out of rounds"), Bullets(tuple(_left_out(reasons)))]
    return blocks


def _parties(run: Run) -> list[Block]:
    """What parties have judged at home, the worst first."""
    metric = run.valid_metric if run.valid_metric in run.test else next(iter(run.test), "")
    lower = lower_is_better(metric)
    last = float("-inf") if lower else float("inf")
    order = sorted(run.parties, key=lambda number: run.parties[number].get(metric, last), reverse=lower)
    columns = {
        heading(name): column([run.parties[number].get(name) for number in order], "{:.4f}".format) for name in run.test
    }
    return [
        Heading(f"Parties, the worst in {usual_name(metric)} first"),
        Table.of_columns([f"party {number}" for number in order], columns, "Parties"),
        Paragraph("Each has judged its own test rows where they are; single users are known to nobody else."),
    ]


def _left_out(reasons: dict[str, list[str]]) -> Sequence[str]:
    lines = [
        f"{who} ({'round' if len(rounds) == 1 else 'rounds'} {', '.join(rounds[:8])}{', ...' if len(rounds) > 8 else ''})"
        for who, rounds in list(reasons.items())[:20]
    ]
    return [*lines, f"and {len(reasons) - 20} more"] if len(reasons) > 20 else lines


def _commands(folder: Path, finished: bool) -> list[Block]:
    quoted = shlex.quote(str(folder))
    how = "Go on for more rounds than it had" if finished else "Go on where it stopped"
    return [
        Paragraph(f"{how}, bit for bit as if it had not stopped:"),
        Command(f"recbole-fedkd --resume={quoted}{' --epochs=N' if finished else ''}"),
        Paragraph("Its model, ready to predict, in Python:"),
        Command(
            "from recbole_fedkd import load_data_and_model\n"
            f"config, model, dataset, train_data, valid_data, test_data = load_data_and_model({str(folder)!r})"
        ),
    ]
