"""A small dataset whose labels depend on the context of a row alone, which its tests share."""

from pathlib import Path
from typing import Any

import numpy as np

HOURS, DAYS = ("morning", "noon", "evening"), ("work", "free")


def write_context_dataset(
    folder: Path, name: str = "daily", users: int = 24, rows: int = 16, items: int = 30, header: str = ""
) -> Path:
    """Atomic files in which an even item is liked in the evening and an odd one at any other hour, whoever the user is.

    ``weather`` is noise, ``tags`` several tokens, ``degrees`` a number and ``visit`` another token in every row.
    """
    target = folder / name
    target.mkdir(parents=True)
    generator = np.random.default_rng(3)
    lines = [
        "user_id:token\titem_id:token\trating:float\ttimestamp:float\tdaytime:token\tweather:float\ttags:token_seq\tvisit:token"
    ]
    time = 1_600_000_000
    for user in range(users):
        for item in generator.choice(items, size=rows, replace=False):
            hour = HOURS[generator.integers(3)]
            liked = (item % 2 == 0) == (hour == "evening")
            stars = generator.integers(4, 6) if liked else generator.integers(1, 4)
            tags = " ".join(generator.choice(["a", "b", "c"], size=generator.integers(0, 3), replace=False))
            time += 1
            fields: list[Any] = [
                f"u{user}",
                f"i{item}",
                stars,
                time,
                hour,
                f"{generator.normal(20, 5):.2f}",
                tags,
                f"v{time}",
            ]
            lines.append("\t".join(map(str, fields)))
    (target / f"{name}.inter").write_text("\n".join(lines) + "\n")
    (target / f"{name}.user").write_text(
        "\n".join(
            [
                "user_id:token\tgroup:token\theight:float",
                *(f"u{user}\t{'ab'[user % 2]}\t{150 + user}" for user in range(users)),
            ]
        )
        + "\n"
    )
    (target / f"{name}.item").write_text(
        "\n".join(["item_id:token\tkind:token", *(f"i{item}\t{'eo'[item % 2]}" for item in range(items + 5))]) + "\n"
    )
    return folder
