"""Tuned results on disk: the user's cache, one file per entry, and tables, one file per GPU.

A file can have been written by anyone, cut short, or made to do harm. It is JSON, it is checked
field by field, and whatever is wrong with it, it is as if it were not there, but for one warning.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import stat
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tritonnorm import settings
from tritonnorm.device import Device
from tritonnorm.tune.key import Key

__all__ = ["Entry", "UserCache", "append_line", "read_table", "shipped", "slug", "write_table"]

SCHEMA = 1
SHIPPED = Path(__file__).parent / "tables"
# An entry is about 700 bytes, and a table of a thousand shapes about half a megabyte.
MOST_ENTRY, MOST_TABLE = 1 << 14, 1 << 25

Identity = Mapping[str, "str | int"]


@dataclass(frozen=True)
class Entry:
    """One tuned result.

    Attributes:
        device: identity of the GPU (`Device.identity`).
        key: the problem.
        algorithm: the fastest.
        config: its configuration, the fields by name.
        revision: of the algorithm's kernels, when it was measured.
        us: microseconds it takes.
        formula_us: microseconds that the formula's choice takes.
        environment: versions and the like, for people.
    """

    device: Identity
    key: Key
    algorithm: str
    config: Mapping[str, Any]
    revision: int
    us: float
    formula_us: float
    environment: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """For `from_json`."""
        return {
            "schema": SCHEMA,
            "device": dict(self.device),
            "environment": dict(self.environment),
            **self.row(),
        }

    def row(self) -> dict[str, Any]:
        """What a table holds once per entry."""
        return {
            "key": self.key.to_json(),
            "algorithm": self.algorithm,
            "config": dict(self.config),
            "revision": self.revision,
            "us": self.us,
            "formula_us": self.formula_us,
        }

    @classmethod
    def from_json(cls, found: Any) -> Entry:
        """The entry that `to_json` wrote; nothing in ``found`` is trusted.

        Raises:
            ValueError: it is no entry.
        """
        if not isinstance(found, Mapping) or found.get("schema") != SCHEMA:
            raise ValueError(f"not an entry of schema {SCHEMA}")
        config, environment = found.get("config"), found.get("environment", {})
        if not isinstance(config, Mapping) or not isinstance(environment, Mapping):
            raise ValueError("config or environment is no object")
        for name, value in config.items():
            if not isinstance(name, str) or type(value) not in (int, bool):
                raise ValueError("a field of config is no integer")
        algorithm, revision = found.get("algorithm"), found.get("revision")
        if not isinstance(algorithm, str) or type(revision) is not int:
            raise ValueError("algorithm or revision is missing")
        us, formula_us = _time(found.get("us")), _time(found.get("formula_us"))
        device, key = _identity(found.get("device")), Key.from_json(found.get("key"))
        return cls(
            device, key, algorithm, dict(config), revision, us, formula_us, dict(environment)
        )


def _time(found: Any) -> float:
    if type(found) not in (int, float) or not 0 < found < math.inf:
        raise ValueError("a time is no positive number")
    return float(found)


def _identity(found: Any) -> dict[str, str | int]:
    """The identity of a device.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(found, Mapping) or set(found) != set(Device("", "", 1, 1).identity):
        raise ValueError("device is no identity")
    for name, value in found.items():
        if type(value) is not (str if name == "arch" else int):
            raise ValueError(f"device: {name} is no {'string' if name == 'arch' else 'integer'}")
    return dict(found)


def slug(device: Device) -> str:
    """The name of a GPU's table: "nvidia_h200"; identity, not the name, says what it is for."""
    return re.sub(r"[^a-z0-9]+", "_", device.name.lower()).strip("_") or "gpu"


class UserCache:
    """The user's tuned results: ``<folder>/v1/<GPU>/<key>.json``.

    Many processes may write at once without a lock: a file holds one entry and appears whole. Where
    nothing can be written, entries last as long as the process.

    Args:
        folder: None for the one that TRITONNORM_CACHE_DIR names, or the user's cache folder.
    """

    def __init__(self, folder: Path | None = None) -> None:
        folder = folder or settings.cache_dir() or _home()
        self.root = None if folder is None else folder / f"v{SCHEMA}"
        self._kept: dict[Path, Entry] = {}

    def put(self, entry: Entry) -> bool:
        """Keep an entry, in place of one of the same problem; whether it is on disk."""
        place = _place(entry)
        self._kept[place] = entry
        try:
            if self.root is None:
                raise OSError("there is no home folder")
            write_whole(self.root / place, json.dumps(entry.to_json(), sort_keys=True))
        except OSError as error:
            _warn_once(f"tuned results are not kept: {error}")
            return False
        return True

    def entries(self) -> list[Entry]:
        """What there is for all GPUs, on disk and in this process."""
        found: dict[Path, Entry] = {}
        faults: list[str] = []
        for place in self._places():
            assert self.root is not None
            try:
                entry = Entry.from_json(_json(self.root / place, MOST_ENTRY))
                if place != _place(entry):
                    raise ValueError("an entry under the name of another")
                found[place] = entry
            except FileNotFoundError:
                continue
            except (OSError, ValueError) as error:
                faults.append(f"{place} ({error})")
        if faults:
            _warn_once(
                f"{len(faults)} of the files in {self.root} are ignored: "
                f"{', '.join(faults[:3])}{', ...' if len(faults) > 3 else ''}"
            )
        return list((found | self._kept).values())

    def _places(self) -> list[Path]:
        """The files, relative to the root, in an order that does not depend on the file system."""
        if self.root is None:
            return []
        found: list[Path] = []
        try:
            for folder in sorted(os.listdir(self.root)):
                names = os.listdir(self.root / folder)
                found += [Path(folder, n) for n in sorted(names) if n.endswith(".json")]
        except FileNotFoundError:
            pass
        except OSError as error:
            _warn_once(f"the cache of tuned results cannot be read: {error}")
        return found


def _place(entry: Entry) -> Path:
    """Where an entry lies: ``<GPU>/<key>.json``."""
    return Path(_digest(entry.device), f"{_digest(entry.key.to_json())}.json")


def write_whole(path: Path, text: str) -> None:
    """Write a file so that others see all of it or none, and so that it survives a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        with open(scratch, "x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink()


def append_line(path: Path, value: Mapping[str, Any]) -> None:
    """Append a line of JSON to a file that other processes append to as well."""
    line = json.dumps(dict(value), sort_keys=True) + "\n"
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        with open(descriptor, "wb", buffering=0) as file:  # one write: lines do not mix
            file.write(line.encode())
    except OSError as error:
        _warn_once(f"{path} cannot be written: {error}")


def write_table(path: Path, device: Device, entries: Iterable[Entry]) -> int:
    """Write the table of a GPU, one entry per line in the order of their keys; how many there are.

    The environment is that of the last entry measured.
    """
    mine = [e for e in entries if e.device == device.identity]
    rows = sorted(json.dumps(e.row(), sort_keys=True) for e in mine)
    head = {
        "schema": SCHEMA,
        "name": device.name,
        "device": device.identity,
        "environment": dict(mine[-1].environment) if mine else {},
    }
    lines = [f"{json.dumps(name)}: {json.dumps(value)}," for name, value in head.items()]
    write_whole(path, "\n".join(["{", *lines, '"entries": [', ",\n".join(rows), "]}", ""]))
    return len(rows)


def read_table(path: Path) -> list[Entry]:
    """The entries of a table.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no table, or a line of it is no entry.
    """
    found = _json(path, MOST_TABLE)
    if not isinstance(found, Mapping) or not isinstance(found.get("entries"), list):
        raise ValueError(f"{path}: expected a table of tuned results")
    common = {name: found.get(name) for name in ("schema", "device", "environment")}
    entries = []
    for i, row in enumerate(found["entries"]):
        try:
            if not isinstance(row, Mapping):
                raise ValueError("it is no object")
            entries.append(Entry.from_json({**row, **common}))
        except ValueError as error:
            raise ValueError(f"{path}: entry {i}: {error}") from None
    return entries


def shipped(files: Iterable[Path]) -> list[Entry]:
    """The entries of tables, the most trusted first; one that cannot be used is left out."""
    entries: list[Entry] = []
    for path in files:
        try:
            entries += read_table(path)
        except (OSError, ValueError) as error:
            _warn_once(f"a table of tuned results is ignored: {error}")
    return entries


def _json(path: Path, most: int) -> Any:
    """The content of a JSON file, which must be a plain file of at most ``most`` bytes.

    Raises:
        OSError: it cannot be read.
        ValueError: it is something else.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe must not make anyone wait
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError("not a plain file")
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"larger than {most} bytes")
    try:
        return json.loads(content.decode("utf-8"))
    except RecursionError:
        raise ValueError("nested too deep") from None
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from None


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(dict(value), sort_keys=True).encode()).hexdigest()[:32]


def _home() -> Path | None:
    """The user's cache folder, or None if the user has no home."""
    try:
        import platformdirs
    except ImportError:  # the package runs from its sources, without an installation
        _warn_once("platformdirs is not installed, so results of tuning are not kept")
        return None
    with contextlib.suppress(RuntimeError, OSError, KeyError):
        folder = platformdirs.user_cache_path("tritonnorm")
        return folder if folder.is_absolute() else None
    return None


_warned: set[str] = set()


def _warn_once(text: str) -> None:
    """Warnings about the same files, again and again, help nobody."""
    if text not in _warned:
        _warned.add(text)
        settings.logger.warning("%s", text)
