"""Records of the runs, small enough to keep: the newest arrays alone, and floats of 10 bits, compressed."""

from __future__ import annotations

import json
import lzma
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from normscope.core.record import Block, Channels, Record
from normscope.probes import VERSION

FOLDER = Path(__file__).parent / "records" / f"probes-{VERSION}"
LARGEST = 200_000  # bytes of a file
_KEPT = 2  # newest arrays of each statistic
_KEPT_LONG = {"row_cosine": 5, "row_norm": 5}  # of those that are judged over time
_WIDEST = 1024  # elements of an array; longer ones are pictures' data
_DROPPED_BITS = 13  # of the 23 of a float32's mantissa: 1 part in 2048 is lost


def path_of(name: str) -> Path:
    """Return where the record of a case lies."""
    return FOLDER / f"{name}.xz"


def save(record: Record, path: Path) -> int:
    """Write what diagnostics read of a record and return the size of the file."""
    channels = [_newest(item) for item in record.channels if max(map(len, item.values)) <= _WIDEST]
    head = {
        "runs": [dict(run) for run in record.runs],
        "sites": record.sites.to_dict("split"),
        "context": record.context.to_dict("split"),  # as Python's JSON, which knows infinity
        "events": record.events.to_dict("split"),
        "blocks": [_told(block) for block in record.blocks],
        "channels": [_told(item) | {"sizes": [len(v) for v in item.values]} for item in channels],
    }
    parts = [block.values.T.ravel() for block in record.blocks] + [v for item in channels for v in item.values]
    numbers = _rounded(np.concatenate(parts).astype("<f4"))
    text = json.dumps(head, default=str).encode()
    planes = numbers.view(np.uint8).reshape(-1, 4).T.tobytes()  # like bytes side by side compress better
    data = lzma.compress(len(text).to_bytes(8, "little") + text + planes, preset=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return len(data)


def load(path: Path) -> Record:
    """Read what `save` wrote."""
    data = lzma.decompress(path.read_bytes())
    size = int.from_bytes(data[:8], "little")
    head = json.loads(data[8 : 8 + size])
    numbers = np.ascontiguousarray(np.frombuffer(data[8 + size :], np.uint8).reshape(4, -1).T).view("<f4").ravel()
    used = 0

    def take(n: int) -> np.ndarray:
        nonlocal used
        used += n
        return numbers[used - n : used]

    blocks = []
    for told in head["blocks"]:
        steps, stats = np.array(told.pop("steps"), np.int64), tuple(told.pop("stats"))
        values = take(len(steps) * len(stats)).reshape(len(stats), len(steps)).T
        blocks.append(Block(**told, stats=stats, steps=steps, values=values))
    channels = []
    for told in head["channels"]:
        steps, sizes = np.array(told.pop("steps"), np.int64), told.pop("sizes")
        channels.append(Channels(**told, steps=steps, values=tuple(take(n) for n in sizes)))
    frames = {name: _frame(head[name]) for name in ("sites", "context", "events")}
    return Record(runs=tuple(head["runs"]), blocks=tuple(blocks), channels=tuple(channels), **frames)


def _told(item: Block | Channels) -> dict[str, object]:
    names = ("run", "site", "phase", "role", "stat", "stats")
    return {name: getattr(item, name) for name in names if hasattr(item, name)} | {"steps": item.steps.tolist()}


def _newest(item: Channels) -> Channels:
    kept = _KEPT_LONG.get(item.stat, _KEPT)
    return replace(item, steps=item.steps[-kept:], values=item.values[-kept:])


def _rounded(numbers: np.ndarray) -> np.ndarray:
    bits = numbers.view("<u4")
    rounded = (bits + np.uint32(1 << (_DROPPED_BITS - 1))) & np.uint32(~((1 << _DROPPED_BITS) - 1) & 0xFFFFFFFF)
    return np.where(np.isfinite(numbers), rounded, bits).astype("<u4").view("<f4")


def _frame(told: dict[str, list[object]]) -> pd.DataFrame:
    return pd.DataFrame(told["data"], columns=told["columns"], index=told["index"])
