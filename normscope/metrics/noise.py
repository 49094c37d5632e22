"""Noise: how much outputs, statistics and the gradient move with the batch, and what another batch size would give."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from normscope.core.estimate import Estimate, Status
from normscope.core.record import Record
from normscope.metrics import tables

PHASE = "noise"
SIZES = (8, 16, 32, 64, 128, 256, 512, 1024)
GRADIENT = "gradient, noise over signal"
_CERTAIN = 2.0  # standard errors
_FEWEST = 5  # comparisons of a batch with those before


class Scale(NamedTuple):
    """The noise scale of the gradient, in samples.

    Attributes:
        estimate: tr(Sigma) / |G|^2; FEW_SAMPLES where |G|^2 cannot be told from 0.
        least: a value that it most likely exceeds, finite in that case too.
        micro: whether it comes from the micro-batches of training steps, else from held samples.
    """

    estimate: Estimate
    least: float
    micro: bool


def expected_relative(samples: float) -> float:
    """Return how far BatchNorm moves a sample's output with its batch, relative to its size.

    For Gaussian input of n independent values a channel, sqrt(3 / (2 n)): the mean moves by 1 / sqrt(n) and the
    deviation by 1 / sqrt(2 n).

    Args:
        samples: independent values n.

    Returns:
        The relative disturbance.

    >>> expected_relative(6)
    0.5
    """
    return float((1.5 / samples) ** 0.5)


def expected_whitening(features: float, samples: float) -> float:
    """Return the same of ZCA whitening of d features: sqrt((1 + (d + 1) / 4) / n).

    >>> expected_whitening(15, 20)
    0.5
    """
    return float(((1 + (features + 1) / 4) / samples) ** 0.5)


@tables.once
def layers(record: Record) -> pd.DataFrame:
    """Return the normalization layers whose output may depend on the batch, in order of execution.

    Args:
        record: record of one run.

    Returns:
        Indexed by site "<module>/output", with columns snd, error, relative, mean_noise and var_noise (of the median
        channel) and moved (see `moved`), from held samples in the late window, NaN without a problem; batch, samples in
        a forward pass; values, numbers a channel, pixels counted (BatchNorm alone); whitened and whitened_from
        (whitening layers alone); training, 1 or 0 in the late window, NaN where nothing tells.
    """
    known = tables.attributes(record)
    modules = _candidates(record, known)
    sites = [f"{module}/output" for module in modules]
    held = {
        name: _late(tables.table(record, stat, phase=PHASE), sites)
        for name, stat in (
            ("snd", "snd"),
            ("error", "snd_error"),
            ("relative", "relative"),
            ("mean_noise", "mean_noise.q50"),
            ("var_noise", "var_noise.q50"),
        )
    }
    inputs = [f"{module}/input" for module in modules]
    extra = record.sites.reindex(columns=["site", "whitened", "whitened_from"]).drop_duplicates("site", keep="last")
    extra = extra.set_index("site").reindex(inputs).astype(float)
    kind = tables.layers(record)["norm"].reindex(modules).to_numpy()
    values = _late(tables.table(record, "count", slot="input"), inputs)
    running = [f"{module}/running" for module in modules]
    return pd.DataFrame(
        {
            **held,
            "moved": _late(moved(record), sites),
            "batch": _late(tables.table(record, "batch", slot="input"), inputs),
            "values": np.where(kind == "batch", values, np.nan),
            "whitened": extra["whitened"].to_numpy(),
            "whitened_from": extra["whitened_from"].to_numpy(),
            "training": _late(tables.table(record, "training", slot="running"), running),
        },
        index=pd.Index(sites, name="site"),
    )


def moved(record: Record) -> pd.DataFrame:
    """Return how far the noise of batch statistics moves an output, relative to its size.

    For BatchNorm sqrt(mean_noise^2 + var_noise^2 / 4), of the median channel; else what resampling has shown. The two
    differ where a sample is a large part of its own batch.

    Args:
        record: record of one run.

    Returns:
        A row a step, a column a site, in order of execution.
    """
    relative, mean, var = (
        tables.table(record, stat, phase=PHASE) for stat in ("relative", "mean_noise.q50", "var_noise.q50")
    )
    return ((mean**2 + var**2 / 4) ** 0.5).reindex_like(relative).fillna(relative)


def sampling(record: Record) -> Estimate:
    """Return by what factor the means of batches vary more than those of random draws would.

    Seen on the model's input, which no weight moves: the mean squared distance of a batch's mean from that of all
    batches before it, over what the spread of samples within batches predicts; 1 for independent draws, the number of
    copies where samples are repeated, up to the batch size where a batch holds one class or domain.

    Args:
        record: record of one run.

    Returns:
        The factor with its standard error over sampled steps.
    """
    ratios = tables.table(record, "ratio", slot="input")
    seen = ratios["/input"].to_numpy() if "/input" in ratios else np.empty(0)
    seen = seen[np.isfinite(seen)]
    if not len(seen):
        return Estimate.missing(Status.NOT_RECORDED, "huang2020")
    error = float(seen.std(ddof=1)) / len(seen) ** 0.5 if len(seen) > 1 else np.nan
    status = Status.SAMPLED if len(seen) >= _FEWEST else Status.FEW_SAMPLES
    return Estimate(float(seen.mean()), error, n=len(seen), status=status, source="huang2020")


def sizes(record: Record) -> int:
    """Return how many different lengths the first dimension of the model's input had, 0 where it is unknown."""
    seen = tables.table(record, "seen", slot="input")
    return int(seen["/input"].nunique()) if "/input" in seen else 0


def scale(record: Record) -> Scale:
    """Return the noise scale of the gradient, B = tr(Sigma) / |G|^2, in the late window of the run.

    At batches of B samples noise and signal are equal: far smaller ones average over noise, far larger ones waste
    samples. With g the gradient of b samples, B = b (E |g|^2 / |G|^2 - 1).

    Args:
        record: record of one run.

    Returns:
        The scale; its standard error from that of both means, which for micro-batches comes from the spread over steps.
    """
    micro = _parts(record, "train")
    found = _parts(record, PHASE) if micro is None else micro
    if found is None:
        return Scale(Estimate.missing(Status.NOT_RECORDED, "mccandlish2018"), np.nan, False)
    chunk, signal, signal_error, square, square_error, n = found
    most = signal + _CERTAIN * signal_error
    least = np.inf if most <= 0 else chunk * (square / most - 1)
    value = chunk * (square / signal - 1) if signal > 0 else np.inf
    error = chunk * float(np.hypot(square_error / signal, square * signal_error / signal**2)) if signal > 0 else np.inf
    status = Status.SAMPLED if signal > _CERTAIN * signal_error else Status.FEW_SAMPLES
    status = status if np.isfinite(square) and np.isfinite(signal) else Status.NON_FINITE
    return Scale(Estimate(value, error, "samples", n, status, "mccandlish2018"), least, micro is not None)


def at_sizes(record: Record, wanted: Sequence[int] = SIZES, most: int = 3) -> pd.DataFrame:
    """Return what other batch sizes would give: relative noise of the noisiest layers, and that of the gradient.

    What a layer's output moves and the relative noise of the gradient, sqrt(B_noise / B), fall with 1 / sqrt(B).

    Args:
        record: record of one run, attached with a problem.
        wanted: the batch sizes.
        most: number of layers.

    Returns:
        Columns batch, noise and of, the site or `GRADIENT`; NaN where a layer could not whiten.
    """
    frame: pd.DataFrame = (
        layers(record).dropna(subset=["moved", "batch"]).sort_values("moved", ascending=False, kind="stable")
    )
    batches = np.asarray(wanted, float)
    parts = []
    for site, row in frame.head(most).iterrows():
        noise = row["moved"] * (row["batch"] / batches) ** 0.5
        full = row["whitened_from"] / row["batch"] * batches > row["whitened"]
        noise = noise if np.isnan(row["whitened"]) else np.where(full, noise, np.nan)
        parts.append(pd.DataFrame({"batch": batches, "noise": noise, "of": str(site)}))
    found = scale(record).estimate
    if found.usable and found.value > 0:
        parts.append(pd.DataFrame({"batch": batches, "noise": (found.value / batches) ** 0.5, "of": GRADIENT}))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=["batch", "noise", "of"])


def _candidates(record: Record, known: pd.DataFrame) -> list[str]:
    """Return the modules that were measured with held samples, and BatchNorm and whitening layers."""
    measured = [tables.module_of(str(site)) for site in tables.table(record, "snd", phase=PHASE)]
    whitened = pd.to_numeric(record.sites.reindex(columns=["site", "whitened"])["whitened"], errors="coerce").notna()
    named = [tables.module_of(str(site)) for site in record.sites.reindex(columns=["site"])["site"][whitened]]
    batch = known.loc[known["norm"] == "batch", "module"].tolist()
    chosen = {*measured, *named, *batch}
    return [module for module in dict.fromkeys(known["module"]) if module in chosen]


def _late(frame: pd.DataFrame, sites: list[str]) -> np.ndarray:
    return tables.late_medians(frame).set_index("site")["value"].reindex(sites).to_numpy(float)


def _parts(record: Record, phase: str) -> tuple[float, float, float, float, float, int] | None:
    """Return chunk, |G|^2, its error, E |g|^2, its error and the number of steps, in the late window."""
    names = ("chunk", "signal", "square", "signal_error", "square_error")
    found = [tables.table(record, name, role="gradient", phase=phase) for name in names]
    columns = {name: t["/output"] for name, t in zip(names, found, strict=True) if "/output" in t}
    if not {"chunk", "signal", "square"} <= columns.keys():
        return None
    late = pd.DataFrame(columns).dropna(subset=["chunk"])
    late = late.tail(max(3, len(late) // tables.LATE_FRACTION))
    if not len(late):
        return None
    if "signal_error" in late:
        errors = [float(late[f"{name}_error"].mean()) for name in ("signal", "square")]
    else:
        errors = [float(late[name].std(ddof=1)) / len(late) ** 0.5 for name in ("signal", "square")]
    means = late[["chunk", "signal", "square"]].mean()
    return float(means["chunk"]), float(means["signal"]), errors[0], float(means["square"]), errors[1], len(late)
