"""Files of tuning results: one for each GPU and operation, readable by people, safe with many readers and writers.

Files and dataclasses only, so neither torch nor Triton is imported. What an entry is used for is decided elsewhere.
"""

from __future__ import annotations

import itertools
import json
import os
import reprlib
import warnings
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from filelock import FileLock, Timeout
from platformdirs import user_cache_path

FORMAT = 1
"""Of the files. Any other is not read, and a newer one is never replaced."""

LOCK_SECONDS = 60.0
"""How long :func:`add` waits for other writers, each of which holds the lock for milliseconds."""

_LARGEST = 1e12
"""No time in microseconds and no spread comes near it; what does is damaged."""


class TuningWarning(UserWarning):
    """A tuning file, or a part of it, cannot be used."""


class NewerFormatError(ValueError):
    """A tuning file was written by a newer version of this library."""


# ---- What a file holds ----------------------------------------------------------------------------------------------


def _require(holds: bool, name: str, given: object, allowed: str) -> None:
    if not holds:
        raise ValueError(f"{name}: got {reprlib.repr(given)}; allowed: {allowed}")


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value != ""


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@dataclass(frozen=True, order=True)
class Key:
    """What a configuration was chosen for. Sizes and flags are kept sorted, so that equal keys are equal however made.

    Raises:
        ValueError: a value of another type, a negative size, or a name that occurs twice.
    """

    dtype: str
    """Such as ``"bfloat16"``."""
    sizes: tuple[tuple[str, int], ...]
    """Names (rows, columns, width ...) with their values."""
    flags: tuple[str, ...]
    """What is switched on and changes the code."""

    def __post_init__(self) -> None:
        _require(_is_text(self.dtype), "dtype", self.dtype, "a dtype's name such as 'bfloat16'")
        for name, size in self.sizes:
            _require(_is_text(name) and name not in ("dtype", "flags"), "sizes", name, "names but 'dtype' and 'flags'")
            _require(_is_int(size) and size >= 0, name, size, "whole numbers from 0")
        _require(all(map(_is_text, self.flags)), "flags", self.flags, "names")
        for what, names in (("sizes", [name for name, _ in self.sizes]), ("flags", self.flags)):
            _require(len(set(names)) == len(names), what, names, "each name once")
        object.__setattr__(self, "sizes", tuple(sorted(self.sizes)))
        object.__setattr__(self, "flags", tuple(sorted(self.flags)))


@dataclass(frozen=True)
class Entry:
    """The configuration chosen for a key, and how it was found.

    Raises:
        ValueError: a value of another type, or a number that no measurement gives (NaN, infinite, negative).
    """

    key: Key
    config: dict[str, int | bool]
    origin: Literal["measured", "model"]
    microseconds: float
    formula_microseconds: float
    """Of the configuration that the default formula gives, found in the same way."""
    spread: float
    """Of the timing, relative to it; 0 for a model."""
    source: dict[str, str | int]
    """Where it comes from: versions, device, hashes. ``"date"`` (ISO 8601, UTC) tells which of two entries is newer."""

    def __post_init__(self) -> None:
        _require(isinstance(self.config, dict), "config", self.config, "names with their values")
        for name, value in self.config.items():
            _require(_is_text(name) and isinstance(value, int), f"config, {name}", value, "whole numbers and booleans")
        _require(self.origin in ("measured", "model"), "origin", self.origin, "'measured' and 'model'")
        for name in ("microseconds", "formula_microseconds"):
            time = getattr(self, name)
            _require(_is_number(time) and 0 < time <= _LARGEST, name, time, "finite numbers above 0")
        spread = self.spread
        _require(_is_number(spread) and 0 <= spread <= _LARGEST, "spread", spread, "finite numbers from 0")
        _require(isinstance(self.source, dict), "source", self.source, "names with their values")
        for name, fact in self.source.items():
            known = _is_text(name) and (isinstance(fact, str) or _is_int(fact))
            _require(known, f"source, {name}", fact, "strings and whole numbers")


@dataclass(frozen=True)
class Table:
    """The entries of one operation on one GPU, sorted by their keys.

    Raises:
        ValueError: an empty name, or two entries of the same key.
    """

    op: str
    device: str
    """Exact name of the GPU, such as ``"NVIDIA H200"``."""
    target: str
    """Its architecture, such as ``"sm_90"`` or ``"gfx942"``."""
    entries: tuple[Entry, ...]

    def __post_init__(self) -> None:
        for name in ("op", "device", "target"):
            _require(_is_text(getattr(self, name)), name, getattr(self, name), "a name")
        ordered = sorted(self.entries, key=lambda entry: entry.key)
        for earlier, later in itertools.pairwise(ordered):
            _require(earlier.key != later.key, "entries", later.key, "each key once")
        object.__setattr__(self, "entries", tuple(ordered))


def merge(first: Table, second: Table) -> Table:
    """The entries of both. Of two for the same key a measured one wins, then the later date, then the second table's.

    Raises:
        ValueError: tables of different operations, GPUs or architectures.
    """
    for name in ("op", "device", "target"):
        one, other = getattr(first, name), getattr(second, name)
        _require(one == other, name, (one, other), "tables of one operation on one GPU")
    entries = {entry.key: entry for entry in first.entries}
    for entry in second.entries:
        entries[entry.key] = max(entry, entries.get(entry.key, entry), key=_rank)
    return Table(first.op, first.device, first.target, tuple(entries.values()))


def _rank(entry: Entry) -> tuple[bool, str]:
    return entry.origin == "measured", str(entry.source.get("date", ""))


# ---- JSON -----------------------------------------------------------------------------------------------------------

_MEMBERS = ("format", "op", "device", "target", "entries")
_ENTRY_MEMBERS = tuple(field.name for field in fields(Entry))


def _encode(table: Table) -> bytes:
    """A line for each part of an entry: long enough to read, short enough for a diff."""
    head = {"format": FORMAT, "op": table.op, "device": table.device, "target": table.target}
    lines = "".join(f' "{name}": {json.dumps(value)},\n' for name, value in head.items())
    entries = ",".join(f"\n  {{\n{_entry_lines(entry)}\n  }}" for entry in table.entries)
    return f'{{\n{lines} "entries": [{entries}\n ]\n}}\n'.encode()


def _entry_lines(entry: Entry) -> str:
    key = {"dtype": entry.key.dtype, **dict(entry.key.sizes), "flags": entry.key.flags}
    members = {name: getattr(entry, name) for name in _ENTRY_MEMBERS} | {"key": key}
    for name in ("microseconds", "formula_microseconds", "spread"):
        members[name] = float(f"{members[name]:.5g}")  # more digits than any timing has
    return ",\n".join(f'   "{name}": {json.dumps(value)}' for name, value in members.items())


def _decode(data: bytes) -> tuple[Table, list[str]]:
    """The table, and what is wrong with the entries that were left out.

    Raises:
        NewerFormatError: a newer version of the library wrote it.
        ValueError: nothing of it can be used.
    """
    try:
        document = json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON in UTF-8 ({error})") from None
    _require(isinstance(document, dict), "file", document, "an object")
    format_ = document.get("format")
    if _is_int(format_) and format_ > FORMAT:
        raise NewerFormatError(f"format {format_} is newer than this version's {FORMAT}; upgrade triton-analog")
    _require(_is_int(format_) and format_ == FORMAT, "format", format_, str(FORMAT))
    _require(document.keys() == set(_MEMBERS), "file", list(document), ", ".join(_MEMBERS))
    _require(isinstance(document["entries"], list), "entries", document["entries"], "a list")
    table = Table(document["op"], document["device"], document["target"], ())

    entries: dict[Key, Entry] = {}
    findings = []
    for number, item in enumerate(document["entries"], start=1):
        try:
            entry = _entry(item)
            _require(entry.key not in entries, "key", entry.key, "each once")
        except ValueError as error:
            findings.append(f"entry {number}: {error}")
        else:
            entries[entry.key] = entry
    return Table(table.op, table.device, table.target, tuple(entries.values())), findings


def _entry(item: Any) -> Entry:
    _require(isinstance(item, dict) and item.keys() == set(_ENTRY_MEMBERS), "entry", item, ", ".join(_ENTRY_MEMBERS))
    key = item["key"]
    _require(isinstance(key, dict) and {"dtype", "flags"} <= key.keys(), "key", key, "dtype, flags and sizes")
    _require(isinstance(key["flags"], list), "flags", key["flags"], "a list")
    sizes = tuple((name, size) for name, size in key.items() if name not in ("dtype", "flags"))
    return Entry(**item | {"key": Key(key["dtype"], sizes, tuple(key["flags"]))})


# ---- Where files are ------------------------------------------------------------------------------------------------


def table_path(directory: Path, device: str, op: str) -> Path:
    """``<directory>/<device>/<op>.json``, in which underscores stand for the spaces of the GPU's name.

    Different names give different folders, unless the file system ignores case: ``device`` inside the file decides.

    Raises:
        ValueError: a name that cannot be a file's.
    """
    _require(device.strip(".") != "", "device", device, "the name of a GPU")
    _require(op.isidentifier(), "op", op, "the name of an operation")
    folder = quote(device, safe=" ").replace("_", "%5F").replace(" ", "_")
    return directory / folder / f"{op}.json"


def search_path(configured: str | None) -> tuple[Path, ...]:
    """The folders in which tables are looked for, the first one first.

    Args:
        configured: What the user set in ``TRITON_ANALOG_TUNING_DIR``; None or empty if nothing.
    """
    return (*_users_folders(configured), shipped_directory())


def results_directory(configured: str | None) -> Path:
    """Where new tables belong: the first of the folders that are the user's.

    Args:
        configured: As in :func:`search_path`.

    Raises:
        OSError: there is none, as in a container whose user has no home.
    """
    folders = _users_folders(configured)
    if not folders:
        raise OSError(
            "there is no folder for tuning results, as this user has no home directory; set TRITON_ANALOG_TUNING_DIR to a "
            "folder (or HOME, or XDG_CACHE_HOME)"
        )
    return folders[0]


def _users_folders(configured: str | None) -> list[Path]:
    """Without the user's cache where nobody knows the user's home."""
    own = [Path(os.path.expanduser(configured))] if configured else []
    try:
        cache = user_cache_path("triton_analog") / "tuning"
    except RuntimeError:
        return own
    return [*own, cache] if cache.is_absolute() else own


def shipped_directory() -> Path:
    """The tables that come with the library: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parents[1]
    installed = package / "tuning_cache"
    return installed if installed.is_dir() else package.parent / "tuning_cache"


# ---- Reading --------------------------------------------------------------------------------------------------------

_reported: set[str] = set()


def read(path: Path) -> Table | None:
    """The table in ``path`` without its damaged entries; None if there is no such file or nothing of it can be used.

    Never raises for what is in the file: one :class:`TuningWarning` for each path and process says what is wrong. No lock
    is taken, since a file only ever changes as a whole.
    """
    table, findings = _load(path)
    name = os.path.abspath(path)
    if findings and name not in _reported:
        _reported.add(name)
        warnings.warn(
            f"{path}: {_summary(findings)}. Defaults are used instead. Repair or delete the file, or re-create it with "
            "`python -m triton_analog.tuning sweep`.",
            TuningWarning,
            stacklevel=2,
        )
    return table


def problems(path: Path) -> list[str]:
    """What :func:`read` would warn of, one text for each finding; none if there is no such file."""
    return _load(path)[1]


def _load(path: Path) -> tuple[Table | None, list[str]]:
    try:
        return _decode(path.read_bytes())
    except FileNotFoundError:
        return None, []
    except OSError as error:
        return None, [f"cannot be read ({error.strerror})"]
    except ValueError as error:
        return None, [str(error)]


def _summary(findings: list[str]) -> str:
    shown = "; ".join(findings[:3])
    return shown if len(findings) <= 3 else f"{shown}; and {len(findings) - 3} more"


# ---- Writing --------------------------------------------------------------------------------------------------------


def add(directory: Path, table: Table) -> Path:
    """Merge ``table`` into its file below ``directory``, and return the file's path.

    Any number of processes may do so at once. At every moment, whatever fails, the file is the old one or the new one. A
    file with damage is first kept beside it under another name, with a :class:`TuningWarning`.

    Raises:
        NewerFormatError: a newer version of the library wrote the file.
        ValueError: the file holds another architecture, or a GPU whose name differs in nothing but case.
        TimeoutError: other processes held the lock for ``LOCK_SECONDS``.
        OSError: the file cannot be read or written (disk full, no permission).
    """
    path = table_path(directory, table.device, table.op)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f".{path.name}.lock")
    try:
        held = FileLock(lock).acquire(timeout=LOCK_SECONDS, poll_interval=0.01)
    except Timeout:
        raise TimeoutError(
            f"{lock}: locked by other processes for {LOCK_SECONDS:g} s; nothing was written to {path}. "
            "Wait for them and try again; if there are none, delete the lock."
        ) from None
    with held:
        existing, findings, data = _load_to_replace(path)
        merged = merge(existing, table) if existing else table
        if findings:
            kept = _free_name(path)
            _write(kept, data)
        _write(path, _encode(merged))
    if findings:
        warnings.warn(
            f"{path}: {_summary(findings)}. The file was kept as {kept.name} and replaced by one without the damage.",
            TuningWarning,
            stacklevel=2,
        )
    return path


def _load_to_replace(path: Path) -> tuple[Table | None, list[str], bytes]:
    """As :func:`_load`, with the file's contents; raises where nothing may be written."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None, [], b""
    try:
        return *_decode(data), data
    except NewerFormatError as error:
        raise NewerFormatError(f"{path}: {error}; nothing was written") from None
    except ValueError as error:
        return None, [str(error)], data


def _free_name(path: Path) -> Path:
    first = path.with_name(f"{path.name}.damaged")
    numbered = (path.with_name(f"{path.name}.damaged.{number}") for number in itertools.count(2))
    return next(name for name in itertools.chain([first], numbered) if not name.exists())


def _write(path: Path, data: bytes) -> None:
    """Replace ``path`` as a whole. Only under the lock, which makes one name enough for the temporary file: what a killed
    process left there is removed by the next one."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        with open(temporary, "xb") as file:  # tempfile's would be readable by this user alone
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """The new file outlives a power cut. Not everywhere can folders be synced, and it is no reason to fail."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
