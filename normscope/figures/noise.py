"""Pictures of the noise that batches bring."""

from __future__ import annotations

import numpy as np
import pandas as pd

from normscope.core.figure import Figure
from normscope.core.record import Record
from normscope.figures.frames import curve, over_depth, rules, tidy
from normscope.metrics import noise, tables

_LAYER = "layer named in the finding"
_LIMIT = "0.5, as with 6 independent values"
_RANDOM = "random draws"
_EQUAL = "noise equals signal"
_USED = "batch of this run"


def _moved(record: Record, sites: tuple[str, ...]) -> pd.DataFrame:
    columns = MOVED.columns
    shown = over_depth(noise.moved(record), sites, columns, _LAYER)
    if not len(shown):
        return shown
    ends = [0, max(int(shown["layer"].max()), 1)]
    return tidy([shown, curve(columns, ends, 0.5, _LIMIT, "")], columns)


def _sizes(record: Record, sites: tuple[str, ...]) -> pd.DataFrame:
    del sites  # the noisiest layers are shown, whichever were named
    columns, found = SIZES.columns, noise.at_sizes(record)
    if not len(found):
        return tidy([], columns)
    parts = [
        curve(columns, np.log2(part["batch"]), part["noise"].to_numpy(float), str(name), part["batch"].astype(int))
        for name, part in found.groupby("of", sort=False)
    ]
    ends = np.log2([noise.SIZES[0], noise.SIZES[-1]])
    parts.append(curve(columns, ends, 1.0, _EQUAL, ""))
    used = tables.context(record)["batch_size"].astype(float).median()
    return tidy([*parts, rules(columns, np.log2(used), _USED)] if used >= 1 else parts, columns)


def _ratio(record: Record, sites: tuple[str, ...]) -> pd.DataFrame:
    del sites  # it is seen on the model's input alone
    columns, values = RATIO.columns, tables.table(record, "ratio", slot="input")
    seen = values["/input"].dropna() if "/input" in values else pd.Series(dtype=float)
    if not len(seen):
        return tidy([], columns)
    expected = curve(columns, [seen.index[0], seen.index[-1]], 1.0, _RANDOM)
    return tidy([curve(columns, seen.index, seen.to_numpy(float), "batches of this run"), expected], columns)


MOVED = Figure(
    id="noise.moved",
    title="How far an output moves with the batch it is in",
    explains=("noise.small-batch", "noise.whitening-batch"),
    prepare=_moved,
    columns=("layer", "moved", "step", "site"),
    x_label="normalization layer, in order of execution",
    y_label="movement, relative to the output",
    reading="What the noise of mean and variance does to an output; it falls with one over the root of the batch size.",
    log_y=True,
    references=(_LIMIT,),
    rules=(_LAYER,),
)
SIZES = Figure(
    id="noise.sizes",
    title="What other batch sizes would give",
    explains=("noise.gradient-noise",),
    prepare=_sizes,
    columns=("doublings", "noise", "of", "batch"),
    x_label="batch size, as a power of two (5 is 32, 10 is 1024)",
    y_label="noise, relative to what it blurs",
    reading="Where the gradient's curve crosses 1, a step is half noise; left of it, most of a step is.",
    log_y=True,
    references=(_EQUAL,),
    rules=(_USED,),
)
RATIO = Figure(
    id="noise.ratio",
    title="Distance of a batch from those before",
    explains=("noise.batches-not-random",),
    prepare=_ratio,
    columns=("step", "ratio", "batches"),
    x_label="step",
    y_label="over that of random draws, squared",
    reading="Around 1 for shuffled data; sorted or repeated samples put every batch far from the others.",
    log_y=True,
    references=(_RANDOM,),
)
