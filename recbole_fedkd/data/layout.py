"""What separates the fields of atomic files, by the config's keys; known without RecBole."""

from __future__ import annotations

import codecs
from dataclasses import dataclass

from recbole_fedkd.errors import InputError


@dataclass(frozen=True)
class Layout:
    """How atomic files are written: RecBole's keys ``field_separator``, ``seq_separator`` and ``encoding``."""

    separator: str = "\t"
    sequence_separator: str = " "
    encoding: str = "utf-8"

    def __post_init__(self) -> None:
        for key, value in (("field_separator", self.separator), ("seq_separator", self.sequence_separator)):
            if not isinstance(value, str) or not value or set(value) & set("\r\n"):
                raise InputError(f"{key} is {value!r}; it must be a text that separates, such as ',' or '\\t'")
        if self.separator == self.sequence_separator:
            raise InputError(f"field_separator and seq_separator are both {self.separator!r}; they must differ")
        try:
            codecs.lookup(self.encoding)
        except (LookupError, TypeError) as error:
            raise InputError(f"encoding is {self.encoding!r}, which Python does not know; utf-8 is usual") from error
