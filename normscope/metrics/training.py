"""Training: how far weights are moved, which are not moved at all, and what the loop does to their gradients."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import pandas as pd

from normscope.core.record import Record
from normscope.metrics import scale, structure, tables

START = 3  # sampled steps that count as the start
IDLE = 0.01  # of the largest learning rate
LEARNED = 0.1  # of the loss at the start
PINNED = 1e-3  # relative distance from the largest gradient norm below which a step counts as clipped


class Rates(NamedTuple):
    """How far the weights of a run are moved: medians over its weight matrices.

    Attributes:
        weights: how many matrices.
        first: |dw| / |w| of a step, the largest of the first `START` sampled steps.
        late: the same over the late window.
        path: |dw| / |w| summed over all steps, sampled ones standing for those between; of the matrix with the longest.
        growth: last norm over the first.
        steps: steps of the run.
        fastest: site of the matrix with the largest first or late rate.
    """

    weights: int
    first: float
    late: float
    path: float
    growth: float
    steps: int
    fastest: str


@tables.once
def rates(record: Record) -> Rates | None:
    """Return how far a run moves its weights; None where no matrix was measured at two steps.

    Args:
        record: record of one run.
    """
    relative = tables.table(record, "relative", slot="*", role="update")
    norm = tables.table(record, "norm", slot="*")
    known = [site for site in scale.weights(record).index if site in relative and site in norm]
    moved = relative[known].replace([np.inf, -np.inf], np.nan)
    moved = moved.loc[:, (moved > 0).any()]
    if len(moved) < 2 or not moved.shape[1]:
        return None
    steps = len(tables.context(record))
    start, late = moved.head(START).max(), moved.tail(max(3, len(moved) // tables.LATE_FRACTION)).median()
    sizes = norm[list(moved.columns)]
    growth = sizes.apply(lambda column: column.dropna().iloc[-1] / column.dropna().iloc[0])
    fastest = pd.concat([start, late], axis=1).max(axis=1).dropna()
    return Rates(
        weights=moved.shape[1],
        first=float(start.median()),
        late=float(late.median()),
        path=float((moved.mean() * steps).max()),
        growth=float(growth.median()),
        steps=steps,
        fastest=str(fastest.idxmax()) if len(fastest) else "",
    )


def idle(record: Record) -> tuple[int | None, float]:
    """Return from which step on the learning rate stays below `IDLE` of its largest value, and the share of the run.

    Args:
        record: record of one run.

    Returns:
        The first such sampled step, None where the last one is above, and the share of sampled steps from it on.
    """
    rates = record.context.reindex(columns=["step", "lr"]).astype(float).groupby("step")["lr"].max().dropna()
    if not len(rates) or not rates.max() > 0:
        return None, 0.0
    since = tables.onset(rates < IDLE * rates.max())
    return since, 0.0 if since is None else float((rates.index >= since).mean())


class Losses(NamedTuple):
    """Loss at both ends of a run.

    Attributes:
        first: at the first step.
        start: median of the first tenth.
        late: median of the last quarter.
        n: recorded finite losses.
    """

    first: float
    start: float
    late: float
    n: int


def losses(record: Record) -> Losses | None:
    """Return the loss at both ends of a run; None where none was recorded.

    Args:
        record: record of one run.
    """
    loss = tables.context(record)["loss"]
    loss = loss[np.isfinite(loss)]
    if not len(loss):
        return None
    start = loss.head(max(3, len(loss) // 10))
    return Losses(float(loss.iloc[0]), float(start.median()), float(tables.late(loss).median()), len(loss))


def learned(record: Record) -> bool:
    """Tell whether the loss has come down to less than `LEARNED` of what it was.

    Args:
        record: record of one run.

    Returns:
        Whether it has; False where it is unknown.
    """
    found = losses(record)
    return found is not None and 0 <= found.late < LEARNED * found.start


def untrained(record: Record) -> pd.DataFrame:
    """Return what an optimizer holds and the run does not train.

    Args:
        record: record of one run.

    Returns:
        Indexed by site: module, matrix (whether it has two dimensions or more), reason (it is
        "frozen", "no gradient" reaches it, or it does "not move" though it has one), order of the module's output, and
        `enclosed`: whether a trained matrix comes before it in the order of execution, and feeds it: a table of
        embeddings has no layer before it, whenever it is read.
    """
    facts = record.sites.reindex(columns=["site", "class", "module", "slot", "shape", "trainable", "optimizer"])
    facts = facts[facts["class"] == "Parameter"].drop_duplicates("site", keep="last").set_index("site")
    moves = tables.table(record, "norm", slot="*", role="update")
    still = set(moves.columns[(moves.notna().sum() >= 2) & (moves.isna() | (moves == 0)).all()])
    pushes = tables.table(record, "norm", slot="*", role="gradient")
    pushed = set(pushes.columns[(pushes > 0).any()])
    layers = tables.layers(record)
    order, kinds = layers["order"].to_dict(), layers["class"].astype(str)
    rows = []
    for site, fact in facts.iterrows():
        reason = ""
        if site in still:
            reason = "frozen" if fact["trainable"] is False else "not move" if site in pushed else "no gradient"
        matrix = isinstance(fact["shape"], list) and len(fact["shape"]) > 1
        rows.append((site, fact["module"], matrix, reason, float(order.get(fact["module"], np.nan))))
    frame = pd.DataFrame(rows, columns=["site", "module", "matrix", "reason", "order"]).set_index("site")
    first = first_trained(frame)
    table = frame["module"].map(kinds.to_dict()).astype(str).str.contains("Embedding")
    frame["enclosed"] = (frame["order"] > first) & ~table if math.isfinite(first) else False
    return frame


def first_trained(frame: pd.DataFrame) -> float:
    """Return the place in the order of execution of the first matrix that is trained.

    Args:
        frame: parameters with reason, matrix and order, as `untrained` returns them.

    Returns:
        Its order, NaN where there is none.
    """
    return float(frame[(frame["reason"] == "") & frame["matrix"]]["order"].min())


def memory(record: Record) -> pd.Series:
    """Return over how many steps a weight averages, by site of the matrices that have decay, the fewest first.

    With decay a weight is an exponential moving average of its updates over 1 / shrink steps, shrink being eta lambda
    of decoupled decay, and eta lambda / (1 - momentum) where decay joins the gradient of SGD.

    Args:
        record: record of one run.

    Returns:
        Steps, the median over the run; empty where no decay acts or its form is not known.
    """
    matrices = set(scale.weights(record).index)
    shrinks = {site: frame["shrink"].median() for site, frame in scale.motion(record).items() if site in matrices}
    known = pd.Series(shrinks, dtype=float)
    return (1 / known[known > 0]).sort_values(kind="stable")


def clipped(record: Record) -> tuple[float, float, int]:
    """Return the largest gradient norm of a run, the fraction of steps at it, and the number of steps.

    Args:
        record: record of one run.

    Returns:
        The bound, the fraction of steps whose norm is within `PINNED` of it, and the finite norms; NaN without any.
    """
    norm = tables.context(record)["grad_norm"]
    norm = norm[np.isfinite(norm) & (norm > 0)]
    if not len(norm):
        return math.nan, math.nan, 0
    bound = float(norm.median())
    return bound, float((np.abs(norm / bound - 1) < PINNED).mean()), len(norm)


class Inputs(NamedTuple):
    """What the first weighted layer is given.

    Attributes:
        site: its input.
        rms: root mean square of a value.
        mean_share: share of the mean square that the features' means have; the rest varies between samples.
        feeds: the normalization layer that takes the layer's output as it is, "" for none.
    """

    site: str
    rms: float
    mean_share: float
    feeds: str


def inputs(record: Record) -> Inputs | None:
    """Return the scale of the first weighted layer's input; None where that is unknown, or not the model's own input.

    Args:
        record: record of one run.
    """
    whole = tables.table(record, "moment.trace", slot="input")
    spread = tables.table(record, "covariance.trace", slot="input")
    width = tables.table(record, "width", slot="input")
    known = tables.attributes(record)
    if not whole.shape[1]:
        return None
    site = str(whole.columns[0])
    embeds = known["class"].astype(str).str.contains("Embedding")
    before = known[known["norm"].notna() | embeds]["order"]
    if len(before) and before.min() < known["order"].get(site, math.inf):
        return None
    columns = [frame[site].dropna() for frame in (whole, spread, width) if site in frame]
    if len(columns) < 3 or not all(len(column) for column in columns):
        return None
    trace, varying, features = (float(column.median()) for column in columns)
    if not trace > 0 or not features > 0:
        return None
    facts = scale.parameters(record)
    feeds = facts["feeds"][facts["module"] == tables.module_of(site)]
    return Inputs(site, math.sqrt(trace / features), 1 - varying / trace, str(feeds.iloc[0]) if len(feeds) else "")


def outputs(record: Record) -> tuple[str, int, float]:
    """Return the last site with channels, their number, and the rms of its values at the first sampled step.

    Args:
        record: record of one run.

    Returns:
        Site, channels and rms; "" and NaN where there is none.
    """
    rms, known = tables.table(record, "rms"), tables.attributes(record)["channels"]
    mean = tables.table(record, "mean")
    size = rms if rms.shape[1] else mean
    if not size.shape[1]:
        return "", 0, math.nan
    site = str(size.columns[-1])
    channels = float(known.get(site, math.nan))
    values = size[site].dropna()
    return site, int(channels) if np.isfinite(channels) else 0, float(values.iloc[0]) if len(values) else math.nan


def left_over(record: Record) -> pd.Series:
    """Return what share of a gradient the step before has left, by sampled step.

    Args:
        record: record of one run.

    Returns:
        The largest share of any parameter looked at, 0 where it was cleared; empty where nothing was.
    """
    return tables.table(record, "left", slot="*", role="gradient").max(axis=1).dropna()


def damped(record: Record) -> pd.DataFrame:
    """Return, of parameters that Adam moves, the late share of entries whose steps its eps shortens by a tenth or more.

    Args:
        record: record of one run.

    Returns:
        Indexed by site, the largest share first: share, size (entries) and matrix (whether it has two dimensions).
    """
    frame = tables.table(record, "damped", slot="*", role="update")
    shapes = record.sites.reindex(columns=["site", "shape"]).drop_duplicates("site", keep="last").set_index("site")
    rows = []
    for site in frame:
        window, shape = tables.late(frame[site]), shapes["shape"].get(site)
        if len(window) and isinstance(shape, list):
            rows.append((site, float(window.median()), math.prod(shape), len(shape) > 1))
    found = pd.DataFrame(rows, columns=["site", "share", "size", "matrix"]).set_index("site")
    return found.sort_values("share", ascending=False, kind="stable")


def gain_sites(record: Record) -> list[str]:
    """Return the sites of the gains of normalization layers.

    Args:
        record: record of one run.
    """
    facts = structure.norms(record)
    return [f"{module}/{gain}" for module, gain in facts["gain"].items() if isinstance(gain, str)]


class Scales(NamedTuple):
    """The history of a loss scale.

    Attributes:
        first: at the first step.
        last: at the last step.
        largest: the largest of the run.
        halved: how often it was lowered.
        raised: how often it was raised.
        late: share of the steps of the later half at which it was lowered.
        since: step from which on it is below 1 to the end, None where it is not.
        steps: steps with a scale.
    """

    first: float
    last: float
    largest: float
    halved: int
    raised: int
    late: float
    since: int | None
    steps: int


def scales(record: Record) -> Scales | None:
    """Return the history of the loss scale; None without a gradient scaler, or with one step.

    Args:
        record: record of one run.
    """
    factor = tables.context(record)["loss_scale"].dropna()
    if len(factor) < 2:
        return None
    change = factor.diff()
    return Scales(
        first=float(factor.iloc[0]),
        last=float(factor.iloc[-1]),
        largest=float(factor.max()),
        halved=int((change < 0).sum()),
        raised=int((change > 0).sum()),
        late=float((change < 0).iloc[len(change) // 2 :].mean()),
        since=tables.onset(factor < 1),
        steps=len(factor),
    )


def still(record: Record) -> pd.Series:
    """Return, of parameters in half precision, the late fraction of entries with a gradient that a step does not move.

    Args:
        record: record of one run.

    Returns:
        A fraction by site, the largest first.
    """
    frame = tables.table(record, "still", slot="*", role="update")
    medians = frame.apply(lambda column: tables.late(column).median())
    return medians.dropna().sort_values(ascending=False, kind="stable") if len(frame) else pd.Series(dtype=float)
