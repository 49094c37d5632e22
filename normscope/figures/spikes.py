"""Picture of a spike: which tensors moved, and from which step on."""

from __future__ import annotations

import numpy as np
import pandas as pd

from normscope.core.figure import Figure
from normscope.core.record import Record
from normscope.metrics import onset, spikes

ROWS = 14  # tensors
EARLIER, LATER = 24, 8  # steps around the spike


def raster(record: Record, account: spikes.Account) -> pd.DataFrame:
    """Return how far each tensor lay above its usual range around a spike, those that moved first on top.

    Args:
        record: record of one run.
        account: the account of the spike.

    Returns:
        A row a tensor, a column a step: robust standard deviations, the largest of gradient, update and RMS_t; without
        rows where nothing moved or the steps were not kept.
    """
    found = onset.window(record, account.spike.step)
    if found is None or not len(account.moved):
        return pd.DataFrame()
    first = [site for site in account.sites if site in account.moved.index]
    rows = list(dict.fromkeys([*first[: ROWS // 2], *account.moved.index]))[:ROWS]
    parts = [onset.scores(frame, found.base)[rows] for frame in (found.gradient, found.update, found.rms_t)]
    score = np.fmax.reduce([part.to_numpy(float) for part in parts])
    whole = pd.DataFrame(score, index=parts[0].index, columns=rows)
    start = min(account.since - 4, account.spike.step - EARLIER)
    return whole.loc[start : account.spike.step + LATER].T


def _onsets(record: Record, sites: tuple[str, ...]) -> pd.DataFrame:
    """Cells of the spike of a finding."""
    accounts = spikes.accounts(record)
    mine = [account for account in accounts if account.sites == sites] or list(accounts)
    return cells(record, mine[0]) if mine else pd.DataFrame(columns=list(ONSETS.columns))


def cells(record: Record, account: spikes.Account) -> pd.DataFrame:
    """Return the raster of a spike as `ONSETS` draws it: 1 is twice the distance from which on a tensor has moved.

    Args:
        record: record of one run.
        account: the account of the spike.
    """
    frame = raster(record, account)
    if not len(frame):
        return pd.DataFrame(columns=list(ONSETS.columns))
    long = (frame / (2 * onset.ONSET)).clip(0, 1).stack().reset_index()
    long.columns = pd.Index(["tensor", "step", "moved"])
    long["tensor"] = [str(site).replace("/", ".") for site in long["tensor"]]
    return long.assign(spike=f"spike at step {account.spike.step}")[list(ONSETS.columns)]


ONSETS = Figure(
    id="spikes.onsets",
    title="What moved first",
    explains=tuple(
        f"spikes.{kind}"
        for kind in ("second-moment", "attention", "schedule", "overflow", "outside", "instability", "data")
    ),
    prepare=_onsets,
    columns=("step", "tensor", "spike", "moved"),
    x_label="step",
    y_label="tensor",
    reading="Dark from where gradient, update or RMS_t of a tensor lies far above its usual range; the first to move "
    "on top. Dark at the spike alone is the spike itself, dark before it is its cause.",
    mark="cell",
)
