"""Results of other benchmarks as they reported them: nothing is derived, what a file lacks is "not reported".

One name means different things in different tools, so a figure is filed under what it *is* (`QUANTITIES`) and keeps the
key that its tool gave it. What each tool means by its figures is in `importers.py`. No torch here.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from zbench.cache import new_folder
from zbench.errors import UserError
from zbench.records import schema_version

IMPORTED = "imported.json"
SCHEMA_VERSION = 1
NOT_REPORTED = "not reported"


@dataclass(frozen=True, slots=True)
class Quantity:
    """What a figure can be, and the metric of zbench that is the same or the nearest thing."""

    heading: str
    unit: str
    metric: str  # "" where zbench has none
    spread: bool = False  # whether that metric has a part for each statistic


QUANTITIES: dict[str, Quantity] = {
    "ttft": Quantity("First token", "s", "served_ttft", spread=True),
    "tpot": Quantity("Per token after the first", "s/token", "tpot"),
    "tpot_with_first": Quantity("Per token, the first included", "s/token", ""),
    "inter_chunk": Quantity("Between chunks", "s", "inter_chunk_latency", spread=True),
    "decode_tps": Quantity("Tokens/s of one user", "tokens/s", "decode_tps"),
    "output_throughput": Quantity("Output tokens/s", "tokens/s", "throughput"),
    "prompt_throughput": Quantity("Prompt tokens/s", "tokens/s", ""),
    "total_throughput": Quantity("Prompt and output tokens/s", "tokens/s", ""),
    "request_throughput": Quantity("Requests/s", "requests/s", "request_throughput"),
    "request_latency": Quantity("Whole request", "s", "request_latency", spread=True),
    "acceptance_length": Quantity("Acceptance length", "tokens", "server_acceptance_length"),
    "acceptance_rate": Quantity("Drafts accepted", "1", "server_draft_acceptance_rate"),
}


@dataclass(frozen=True, slots=True)
class Figure:
    """One number as its tool reported it, in the unit of its quantity."""

    quantity: str
    statistic: str  # "mean", "p50", "std", ...; "" for a single value
    value: float
    key: str  # its name in the file


@dataclass(frozen=True, slots=True)
class Reported:
    """One result of a tool: what it measured under one load."""

    label: str
    settings: dict[str, str]  # as the tool reported them, for a reader
    figures: tuple[Figure, ...]
    notes: tuple[str, ...] = ()  # what is partial about it

    def of(self, quantity: str) -> dict[str, Figure]:
        """Its figures of one quantity, by statistic."""
        return {figure.statistic: figure for figure in self.figures if figure.quantity == quantity}


@dataclass(frozen=True, slots=True)
class Imported:
    """A file of another tool."""

    schema_version: int
    tool: str
    version: str  # of the tool
    label: str  # what reports call it; "" for the file's name
    source: str  # the file's name
    sha256: str
    imported: str  # ISO 8601, UTC
    results: tuple[Reported, ...]

    @property
    def name(self) -> str:
        return self.label or Path(self.source).stem

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, allow_nan=False, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Imported:
        """Inverse of `to_json`. Raises ValueError, TypeError, KeyError or AttributeError where it is not that."""
        data = json.loads(text)
        results = tuple(
            Reported(r["label"], r["settings"], tuple(Figure(**f) for f in r["figures"]), tuple(r["notes"]))
            for r in data.pop("results")
        )
        return cls(**data, results=results)


def read(path: Path, label: str = "") -> Imported:
    """A result file of one of the tools in `importers.py`, told apart by its keys.

    Raises UserError in one line: no such file, cut, of no known tool, or without a figure that zbench knows.
    """
    from zbench import importers

    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    objects = importers.objects(path, content)
    try:
        tool, version, results = importers.recognised(objects)
    except importers.Refused as reason:
        raise UserError(f"{path}: {reason}") from None
    if not any(result.figures for result in results):
        raise UserError(f"{path}: a result of {tool} without any figure; did its benchmark finish a request?")
    taken = Imported(
        schema_version=SCHEMA_VERSION,
        tool=tool,
        version=version or NOT_REPORTED,
        label=label,
        source=path.name,
        sha256=hashlib.sha256(content).hexdigest(),
        imported=datetime.now(UTC).isoformat(timespec="seconds"),
        results=tuple(_distinct(results)),
    )
    try:
        taken.to_json().encode()
    except UnicodeEncodeError:
        raise UserError(f"{path}: holds text that is not Unicode") from None
    return taken


def _distinct(results: Sequence[Reported]) -> Iterator[Reported]:
    """Labels made unique by a number."""
    seen: dict[str, int] = {}
    for result in results:
        seen[result.label] = count = seen.get(result.label, 0) + 1
        yield result if count == 1 else replace(result, label=f"{result.label} ({count})")


def write(found: Imported, out: Path) -> Path:
    """Into a new folder under `out`, which `zbench compare` takes like a run. Returns it."""
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", found.name).strip("-.")[:60]
    return new_folder(out, f"imported-{slug or 'result'}", {IMPORTED: found.to_json()})


def load(folder: Path) -> Imported:
    """What `write` wrote. Raises UserError where it is damaged or of another version."""
    path = folder / IMPORTED
    if (version := schema_version(path)) not in (None, SCHEMA_VERSION):
        raise UserError(f"{path} has schema {version}, this zbench reads {SCHEMA_VERSION}: import the file again")
    try:
        return Imported.from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        raise UserError(f"{path}: damaged; import the file again") from None
