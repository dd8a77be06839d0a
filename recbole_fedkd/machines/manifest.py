"""The manifest: what all parties of a federation and its server know alike, in one folder; and a folder per party.

A party's folder holds its number, the digest of the manifest, and its own rows; nobody else's.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Set
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recbole_fedkd.config import FedKDConfig
from recbole_fedkd.data.schema import SCHEMA, TABLES, ClientRows, DataSchema
from recbole_fedkd.errors import InputError
from recbole_fedkd.files import regular_file, write_json
from recbole_fedkd.machines.folders import CONFIG, IDENTITY, KEYS, PARTY, ROWS, read_config, read_party
from recbole_fedkd.registry import registries

if TYPE_CHECKING:
    from recbole_fedkd.privacy.identity import Identity


@dataclass(frozen=True)
class Manifest:
    """What is public of a federation.

    Attributes:
        folder: where it lies.
        config: of the run.
        schema: of the data.
    """

    folder: Path
    config: FedKDConfig
    schema: DataSchema

    @classmethod
    def load(cls, folder: str | Path, given: Mapping[str, Any] | None = None, own: Set[str] | None = None) -> Manifest:
        """Read what :func:`write_manifest` has written.

        Args:
            folder: the manifest's.
            given: keys that are not for others to say: where a file lies, and which code is run (``plugins``).
            own: the keys that ``given`` may say otherwise than the manifest; None: all.

        Raises:
            InputError: it is no manifest, or it names files to open or code to run that ``given`` does not name, or ``given``
                says otherwise what the manifest says for all.
        """
        folder = Path(folder)
        config = read_config(folder, given or {}, own, FedKDConfig)
        return cls(folder, config, DataSchema.load(folder))

    @cached_property
    def digest(self) -> bytes:
        """What tells this manifest from others, 16 bytes."""
        return digest_of(self.folder)

    @cached_property
    def signers(self) -> dict[int, bytes] | None:
        """Public keys by which parties sign what they say under masks; None where nobody has one.

        Raises:
            InputError: the file of them cannot be read.
        """
        if not (self.folder / KEYS).is_file():
            return None
        file = regular_file(self.folder / KEYS)
        try:
            keys = json.loads(file.read_text(encoding="utf-8"))
            return {int(number): bytes.fromhex(key) for number, key in keys.items()}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise InputError(f"'{file}' does not hold the parties' public keys: {error}") from error

    def identity_of(self, folder: Path, number: int) -> Identity | None:
        """Who a party is to the others under masks; None where nobody has a signing key.

        Raises:
            InputError: the party's key is not the one that the manifest says, or there is none.
        """
        if self.signers is None:
            return None
        from recbole_fedkd.privacy.identity import Identity, public_key  # needs an extra

        try:
            own = bytes.fromhex((folder / IDENTITY).read_text(encoding="ascii").strip())
            fits = public_key(own) == self.signers.get(number)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"'{folder / IDENTITY}' is not the private key of a party: {reason}") from error
        if not fits:
            raise InputError(
                f"'{folder / IDENTITY}' is not the key that '{self.folder / KEYS}' says party {number} signs by"
            )
        return Identity(number, own, self.signers)

    def number_of(self, folder: Path) -> int:
        """The number of the party that a folder is of.

        Raises:
            InputError: the folder is that of none, or of another federation.
        """
        number, manifest = read_party(folder)
        if manifest != self.digest.hex():
            raise InputError(f"party '{folder}' belongs to another manifest than that in '{self.folder}'")
        if not 0 <= number < self.schema.clients:
            raise InputError(f"'{folder / PARTY}' says that it is party {number} of {self.schema.clients}")
        return number


def digest_of(folder: Path) -> bytes:
    """The digest of a manifest's folder, 16 bytes."""
    digest = hashlib.blake2b(digest_size=16)
    for name in (CONFIG, SCHEMA, TABLES, *([KEYS] if (folder / KEYS).is_file() else [])):
        content = (folder / name).read_bytes()
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.digest()


def write_manifest(
    config: FedKDConfig, schema: DataSchema, folder: Path, parties: Mapping[int, Path], noise: float | None = None
) -> None:
    """Write what is public into a folder; under masks also whose key is whose, and into each party's folder its own.

    ``noise`` is the multiplier of ``privacy``, where it has been found already.
    """
    identities = {}
    if config["secure_aggregation"]:
        # Needs an extra, and says so before anything is written.
        from recbole_fedkd.privacy.identity import new_identities

        identities = new_identities(parties)
    folder.mkdir(parents=True, exist_ok=True)
    schema.save(folder)
    # What another's code in this process declares, and this federation leaves as it is, no party needs to know.
    others = {
        key.name: key.default
        for registry in registries().values()
        for owner, key in registry.declared()
        if not registry[owner].__module__.startswith("recbole_fedkd.")
    }
    values = {
        name: value for name, value in config.plain_values().items() if name not in others or others[name] != value
    }
    if noise:
        values["privacy"] = {**values["privacy"], "noise_multiplier": noise}
    # Whose machine it was is nobody's business.
    write_json({**values, "data_path": f"dataset/{values['dataset']}"}, folder / CONFIG)
    for number, identity in identities.items():
        parties[number].mkdir(parents=True, exist_ok=True)
        file = os.open(parties[number] / IDENTITY, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(file, "w", encoding="ascii") as writing:
            writing.write(identity.own.hex() + "\n")
    if identities:
        directory = next(iter(identities.values())).directory
        write_json({str(number): key.hex() for number, key in directory.items()}, folder / KEYS)


def write_party(
    manifest: Path, number: int, rows: ClientRows, folder: Path, held_out: Mapping[str, ClientRows] | None = None
) -> None:
    """Write what one party begins with into a folder of its own.

    Args:
        manifest: folder of the manifest.
        number: of the party.
        rows: its training rows.
        folder: of the party.
        held_out: rows that it judges by, ``valid`` and ``test``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows.save(folder / ROWS)
    for phase, part in (held_out or {}).items():
        part.save(folder / f"{phase}.npz")
    write_json({"number": number, "manifest": digest_of(manifest).hex()}, folder / PARTY)
