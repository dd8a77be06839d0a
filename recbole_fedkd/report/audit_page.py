"""The page of an audit: what the server of a run could tell of its clients, for a reader who answers for their privacy."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recbole_fedkd.files import write_bytes
from recbole_fedkd.report.contents import NONE, Block, Bullets, Paragraph, Section, counted
from recbole_fedkd.report.page import Page, text_table
from recbole_fedkd.report.records import as_text
from recbole_fedkd.report.writers import html

_NOTHING, _ALL = 0.52, 0.98
"""Membership AUC up to which a server knows nothing to speak of, and from which it knows nearly all."""


def audit_page(audit: Mapping[str, Any]) -> Page:
    """The page of an audit, given as plain values."""
    looked_at, everybody = audit["clients"]
    messages = _messages(audit)
    sections = (
        Section("server", "What the server can tell", messages, verdict(audit)),
        Section("release", "What is let out", _release(audit["canaries"])),
        Section(
            "always",
            "What stands in every message",
            (
                Bullets(
                    (
                        "Who sent it, and in which round: nobody here is anonymous to the server.",
                        "How many rows the client has, how many it trained on, and the loss over them, each exact.",
                        "Its length in bytes: with row_sparse that says how many items the client has.",
                    )
                ),
            ),
        ),
        Section("settings", "The run", (text_table(("key", "value"), _settings(audit["settings"]), "Settings"),)),
    )
    lead = (
        f"The first {counted(len(audit['seen']), 'round')} of {audit['run']} again, with somebody who looks at what the server "
        f"gets: {counted(looked_at, 'client')} of {everybody}. Nothing is guessed of what the page does not name."
    )
    return Page("Audit of a federation", lead, sections)


def _like_a_coin(chance: float) -> float:
    """The largest AUC that says nothing: few clients guess above a half by chance. A certain guess is never a coin's."""
    return min(max(_NOTHING, 0.5 + 4 * chance), _ALL)


def verdict(audit: Mapping[str, Any]) -> tuple[str, ...]:
    """What the server can tell, in sentences, the first about items; what could not be guessed is not called safe."""
    seen = audit["seen"]
    if not seen:
        return ("No message came in the rounds that were looked at.",)
    guesses = [message for message in seen if message["membership"] is not None]
    worst, hidden = (
        max((message["membership"] for message in guesses), default=None),
        all(message["masked"] for message in seen) or _noisy(audit["settings"]),
    )
    coin = all(message["membership"] <= _like_a_coin(message["chance"]) for message in guesses)
    if worst is None and (sets := max(message["exact"] for message in seen)):
        first = (
            f"The server can tell all items that a client has rated, exactly, for {100 * sets:.0f} % of the clients."
        )
    elif worst is None:
        first = "There is nothing to guess: all clients have all items, or the same. What messages hide does not show."
    elif not any(message["array"] for message in seen):
        first = "No array of a message names an item, so that nobody has guessed which items a client has rated."
    elif coin and not hidden:
        first = (
            f"This guess at the items that a client has rated is a coin's ({worst:.2f}), but messages have neither masks nor "
            "noise of the clients: a better one may tell."
        )
    elif coin:
        first = f"The server cannot tell which items a client has rated: its best guess is a coin's ({worst:.2f})."
    elif worst >= _ALL:
        first = (
            f"The server can tell which items a client has rated: its guess is right {100 * worst:.0f} times in 100."
        )
    else:
        first = f"The server learns something of which items a client has rated: AUC {worst:.2f}, where .50 is nothing."
    exact = [message["labels"] for message in seen if message["labels"] is not None]
    rest = []
    if audit["users"] > 1:
        rest.append(
            f"A client has up to {counted(audit['users'], 'user')}: guesses are about clients, and what is told of a "
            "single user was not looked at."
        )
    if exact and max(exact) > 0:
        rest.append(
            f"How many ratings of each kind a client gave is told exactly for {100 * max(exact):.0f} % of the clients."
        )
    if tables := max((message["ratings"] or 0 for message in seen), default=0):
        rest.append(f"Which rating it gave to which item is told exactly for {100 * tables:.0f} % of the clients.")
    if all(message["masked"] for message in seen):
        rest.append("It gets messages under masks: of a single client nothing but numbers that look random.")
    return (first, *rest)


def _noisy(settings: Mapping[str, Any]) -> bool:
    """Whether every message has noise before the server gets it, under masks or not."""
    return (settings["privacy"] or {}).get("noise") in ("distributed", "local")


def _messages(audit: Mapping[str, Any]) -> tuple[Block, ...]:
    rows = [
        (
            str(message["round"]),
            f"{message['kind']}{', masked' if message['masked'] else ''}",
            message["array"] or "no array names an item",
            f"{message['pairs']:,}",
            *(
                (NONE, NONE)
                if message["membership"] is None
                else (f"{message['membership']:.3f}", f"± {message['chance']:.3f}")
            ),
            f"{100 * message['exact']:.0f} %",
            *(NONE if message[name] is None else f"{100 * message[name]:.0f} %" for name in ("labels", "ratings")),
        )
        for message in audit["seen"]
    ]
    header = (
        "round",
        "message",
        "told by",
        "clients and items to guess",
        "membership AUC",
        "by chance",
        "exact sets of items",
        "exact label counts",
        "exact ratings",
    )
    note = (
        "Membership AUC: how often a client that has an item would be told from one that has not, by the item's numbers in "
        "their messages; .50 is a coin, 1 is certainty. By chance: how far from .50 it is where messages say nothing, one "
        "standard deviation. Exact sets: clients whose items are those of rows that are not zero."
    )
    return text_table(header, rows, "Messages"), Paragraph(note)


def _release(canaries: Mapping[str, Any] | None) -> tuple[Block, ...]:
    if canaries is None:
        return (
            Paragraph(
                "The run has no differential privacy: whoever gets the model, or the server's messages, gets sums that are "
                "exact, and nothing bounds what they tell of one client.",
                soft=False,
            ),
        )
    sentence = (
        f"The accountant says that all rounds together spend at most epsilon {canaries['accounted']:.3f}. One run of the "
        f"release with {canaries['canaries']} canaries, of which somebody who knows them all guessed {canaries['guesses']}, "
        f"{canaries['right']} rightly, shows at least {canaries['epsilon']:.3f} (95 % sure)."
    )
    if canaries["epsilon"] > canaries["accounted"]:
        sentence += " More than is accounted: the release is broken, do not use it."
    else:
        sentence += " The two agree: a bound from below that is under the bound from above."
    return (Paragraph(sentence, soft=False),)


def _settings(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(name, as_text(value)) for name, value in settings.items()]


def write_audit_page(audit: Mapping[str, Any], folder: Path) -> Path:
    """Write ``<folder>/index.html``; returns its path."""
    page = folder / "index.html"
    write_bytes(html(audit_page(audit)).encode("utf-8"), page)
    return page
