"""Scale: which weights are scale-invariant, how fast each turns, and whether growth and decay of its norm balance."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd

from normscope.core.record import Record
from normscope.metrics import equilibrium, tables

PARTIAL = 0.1  # defect below which a weight counts as scale-invariant; a random direction has 1
MIN_STEPS = 4  # steps with a gradient before that is said: so many random directions stay below in 1 of 5000 cases
GONE = 0.01  # of a layer's usual gain
_FACTS = ("module", "slot", "shape", "optimizer", "group", "rule", "decoupled", "nesterov", "dampening")
_NOT_PARAMETERS = ("input", "running")


@tables.once
def parameters(record: Record) -> pd.DataFrame:
    """Return what is known of the parameters, indexed by site.

    Args:
        record: record of one run.

    Returns:
        The columns module, slot, shape (a list), optimizer, group, rule, decoupled, nesterov, dampening; and of the
        normalization layer that takes the module's output as it is: feeds (its module, "" for none), norm, groups, eps.
    """
    frame = record.sites.reindex(columns=["site", "class", *_FACTS]).drop_duplicates("site", keep="last")
    frame = frame[frame["class"] == "Parameter"].set_index("site").drop(columns="class")
    frame["rule"] = frame["rule"].astype(object).where(frame["rule"].notna(), "")
    for name in ("decoupled", "nesterov"):
        frame[name] = frame[name].eq(True)
    frame["dampening"] = pd.to_numeric(frame["dampening"], errors="coerce").fillna(0.0)
    known = record.sites.reindex(columns=["module", "slot", "norm", "groups", "eps", "predecessor"])
    known = known[known["norm"].notna() & known["predecessor"].notna() & known["slot"].eq("output")]
    source = [tables.module_of(str(site)) for site in known["predecessor"]]
    fed = known.assign(source=source).drop_duplicates("source").set_index("source").reindex(frame["module"])
    for name in ("norm", "groups", "eps"):
        frame[name] = fed[name].to_numpy()
    frame["feeds"] = [name if isinstance(name, str) else "" for name in fed["module"]]
    return frame


def weights(record: Record) -> pd.DataFrame:
    """Return the rows of `parameters` with two dimensions or more."""
    frame = parameters(record)
    return frame[np.array([isinstance(shape, list) and len(shape) > 1 for shape in frame["shape"]], bool)]


@tables.once
def invariance(record: Record) -> pd.DataFrame:
    """Return which weights are scale-invariant, in which units, and how far from it they are.

    <w, grad> = 0 for a scale-invariant w (Euler). The defect of a unit is |<w, grad>| / (|w| |grad|) times the root of
    its size, the median over units and the root mean square over steps: about 1 for random directions, 0 for
    invariance, in between by how much eps or another path breaks it. The smallest units are named whose defect stays
    below `PARTIAL`.

    Args:
        record: record of one run.

    Returns:
        Indexed by site: unit ("row" for each row, a filter, by itself, "block" for groups of rows, "tensor" for the
        whole only, "none", or "" where fewer than `MIN_STEPS` steps tell), units (their number), defect (of these
        units, of the whole for "none"), n (steps), and from the last snapshot of a held problem, of the same units
        doubled, output and gradient (NaN where there is none).
    """
    held = {
        (role, stat): tables.table(record, stat, slot="*", role=role, phase="batch").ffill().tail(1)
        for role in ("value", "gradient")
        for stat in ("row_defect", "block_defect", "tensor_defect")
    }
    cosines = tables.arrays(record, "row_cosine", slot="*", role="gradient")
    sizes = {role: tables.arrays(record, "row_norm", slot="*", role=role) for role in ("value", "gradient")}
    whole = tables.table(record, "cosine", slot="*", role="gradient")
    rows = []
    for site, shape in weights(record)["shape"].items():
        site, elements = str(site), float(np.prod(shape))
        series = whole[site].to_numpy(float) if site in whole else np.empty(0)
        unit, units, defect, n = _unit(site, elements, series[np.isfinite(series)], cosines, sizes)
        found = [held[role, f"{unit if unit in _UNITS else 'tensor'}_defect"] for role in ("value", "gradient")]
        values = [float(frame[site].iloc[-1]) if len(frame) and site in frame else np.nan for frame in found]
        rows.append((site, unit, units, defect, n, *values))
    columns = ["site", "unit", "units", "defect", "n", "output", "gradient"]
    frame = pd.DataFrame(rows, columns=columns).set_index("site")
    return frame.astype({name: float for name in ("defect", "output", "gradient")})


_UNITS = ("row", "block", "tensor")
Arrays = dict[str, tuple[np.ndarray, np.ndarray]]


def _unit(
    site: str, elements: float, whole: np.ndarray, cosines: Arrays, sizes: dict[str, Arrays]
) -> tuple[str, int, float, int]:
    """Return the smallest invariant units of a weight, their number, their defect and the steps that tell."""
    steps, cosine = cosines.get(site, (np.empty(0), np.empty((0, 0))))
    if len(steps):
        value, gradient = (sizes[role][site][1] for role in ("value", "gradient"))
        here = np.isin(sizes["value"][site][0], steps)
        for units in _counts(cosine.shape[1]):
            defect, n = _block_defect(cosine, value[here], gradient, units, elements)
            if n >= MIN_STEPS and defect < PARTIAL:
                return "row" if units == cosine.shape[1] else "block" if units > 1 else "tensor", units, defect, n
    if len(whole) < MIN_STEPS:
        return "", 1, np.nan, len(whole)
    defect = float(np.sqrt(np.mean(whole**2) * elements))
    return "tensor" if defect < PARTIAL else "none", 1, defect, len(whole)


def _counts(rows: int) -> Iterator[int]:
    """Yield into how many blocks of equal size rows can be put, the most first; whole is last."""
    yield from (units for units in range(rows, 0, -1) if rows % units == 0)


def _block_defect(
    cosine: np.ndarray, value: np.ndarray, gradient: np.ndarray, units: int, elements: float
) -> tuple[float, int]:
    """Return the defect of blocks of rows, [steps, rows] each, and the number of steps with a gradient."""
    shape = (len(cosine), units, -1)
    with np.errstate(invalid="ignore", over="ignore"):  # a diverged run holds infinities
        inner = np.where(gradient > 0, cosine * value * gradient, 0.0).reshape(shape).sum(2)
        scale = np.sqrt((value**2).reshape(shape).sum(2) * (gradient**2).reshape(shape).sum(2))
    known = (scale > 0) & np.isfinite(scale) & np.isfinite(inner)
    told = known.any(axis=1)
    if not told.any():
        return np.nan, 0
    ratios = np.abs(np.divide(inner, scale, out=np.full_like(inner, np.nan), where=known))[told]
    median = np.nanmedian(ratios, axis=1) * np.sqrt(elements / units)
    return float(np.sqrt(np.mean(median**2))), int(told.sum())


@tables.once
def motion(record: Record) -> dict[str, pd.DataFrame]:
    """Return for each parameter, by sampled step, how it moves and what its optimizer's settings imply.

    Args:
        record: record of one run.

    Returns:
        site -> frame indexed by step with rate, decay, momentum (of its group at that step), norm, relative, radial,
        angle, effective (learning rate over |w|^2 for SGD, over |w| for Adam and Muon, whose updates do not depend on
        the gradient's size), shrink, expected (angle) and balance; NaN where the optimizer's rule is not known.
    """
    measured = {stat: tables.table(record, stat, slot="*", role="update") for stat in ("relative", "radial", "angle")}
    measured["norm"] = tables.table(record, "norm", slot="*")
    steps, known = measured["angle"].index, parameters(record)
    known = known[known.index.isin(measured["angle"].columns)]
    if not len(known):
        return {}
    relative, radial, angle, norm = (
        frame.reindex(index=steps, columns=known.index).to_numpy(float) for frame in measured.values()
    )
    rate, decay, momentum, shrink, expected = _implied(record, steps, known)
    power = known["rule"].map({"sgd": 2, "adam": 1, "muon": 1}).to_numpy(float)
    with np.errstate(divide="ignore", invalid="ignore"):
        effective = rate / norm**power
    balance = equilibrium.balance(relative, radial, shrink)
    settings = (rate, decay, momentum, effective, shrink, expected, balance)
    values = np.stack([relative, radial, angle, norm, *settings], axis=2)  # [steps, parameters, columns]
    kept = ~np.isnan(angle)
    return {
        str(site): pd.DataFrame(values[kept[:, i], i], index=steps[kept[:, i]], columns=list(_MOTION))
        for i, site in enumerate(known.index)
    }


_MOTION = (
    "relative",
    "radial",
    "angle",
    "norm",
    "rate",
    "decay",
    "momentum",
    "effective",
    "shrink",
    "expected",
    "balance",
)


def _implied(record: Record, steps: pd.Index, known: pd.DataFrame) -> np.ndarray:
    """Return rate, decay, momentum, shrink and expected angle, [5, steps, parameters], each group's computed once."""
    context = record.context.reindex(columns=["step", "optimizer", "group", "lr", "momentum", "decay"])
    groups = {
        key: part.drop_duplicates("step").set_index("step")[["lr", "decay", "momentum"]].astype(float).reindex(steps)
        for key, part in context.groupby(["optimizer", "group"])
    }
    unknown = pd.DataFrame(np.nan, index=steps, columns=["lr", "decay", "momentum"])
    found: dict[tuple[object, ...], np.ndarray] = {}
    facts = ["optimizer", "group", "rule", "decoupled", "nesterov", "dampening"]
    keys = list(known[facts].itertuples(index=False, name=None))
    for key in set(keys):
        optimizer, group, *rule = key
        at = groups.get((optimizer, group), unknown).fillna({"decay": 0.0, "momentum": 0.0}).to_numpy()
        options = dict(zip(facts[2:], rule, strict=True))
        shrink = [equilibrium.shrinkage(*row, **options) for row in at.tolist()]
        expected = [equilibrium.angle(*row, **options) for row in at.tolist()]
        found[key] = np.vstack([at.T, shrink, expected])
    return np.stack([found[key] for key in keys], axis=2)


@tables.once
def summary(record: Record) -> pd.DataFrame:
    """Return for each scale-invariant weight how its norm and its angle per step developed, and whether they balance.

    Args:
        record: record of one run.

    Returns:
        Indexed by site, in order of execution: unit (see `invariance`), rule, feeds; steps (from the first sampled one
        to the end of the run), norm_first, norm_last, rate_first, rate_last, effective_first, effective_last; of the
        late window angle and expected (in radians, root mean squares), decay, balance with balance_error (of a mean of
        independent steps) and constant (in steps); exposure, the time constants that the run has lasted, and consumed,
        the sum of `shrinkage` over its steps; settings between sampled steps are taken from the last sampled one.
    """
    units, known, moves = invariance(record), parameters(record), motion(record)
    end = int(record.context["step"].max()) + 1 if len(record.context) else 0
    rows = {}
    for site in units.index[units["unit"].isin(_UNITS)]:
        frame = moves.get(str(site), pd.DataFrame())
        if len(frame) >= MIN_STEPS:
            facts = {"unit": units["unit"][site], "rule": known["rule"][site], "feeds": known["feeds"][site]}
            rows[str(site)] = facts | _developed(frame, end, str(known["rule"][site]))
    return pd.DataFrame.from_dict(rows, orient="index", columns=None if rows else list(_SUMMARY)).rename_axis("site")


_SUMMARY = (
    "unit",
    "rule",
    "feeds",
    "steps",
    "norm_first",
    "norm_last",
    "rate_first",
    "rate_last",
    "effective_first",
    "effective_last",
    "angle",
    "expected",
    "decay",
    "balance",
    "balance_error",
    "constant",
    "exposure",
    "consumed",
)


@np.errstate(all="ignore")  # a diverged run holds infinities
def _developed(frame: pd.DataFrame, end: int, rule: str) -> dict[str, float]:
    late = frame.tail(max(MIN_STEPS, len(frame) // tables.LATE_FRACTION))
    steps = np.diff(np.append(frame.index.to_numpy(), max(end, int(frame.index[-1]) + 1)))
    constants = np.array([equilibrium.time_constant(k, rule) for k in frame["shrink"]])
    lost = (2 * late["shrink"] - late["shrink"] ** 2).to_numpy(float)
    balances = late["balance"].to_numpy(float)
    return {
        "steps": float(steps.sum()),
        **{f"{name}_{end}": float(frame[name].iloc[i]) for name in ("norm", "rate", "effective") for end, i in _ENDS},
        "angle": float(np.sqrt((late["angle"] ** 2).mean())),
        "expected": float(np.sqrt((late["expected"] ** 2).mean(skipna=False))),
        "decay": float(late["decay"].median()),
        "balance": float((balances * lost).sum() / lost.sum()) if (lost > 0).all() else np.nan,
        "balance_error": float(balances.std(ddof=1) / np.sqrt(len(late))),
        "constant": float(np.median(constants[-len(late) :])),
        "exposure": float((steps / constants).sum()),
        "consumed": float((steps * frame["shrink"]).sum(skipna=False)),
    }


_ENDS = (("first", 0), ("last", -1))


@tables.once
def gains(record: Record) -> pd.DataFrame:
    """Return what became of the gains of normalization layers, by which they multiply each channel.

    Args:
        record: record of one run.

    Returns:
        Indexed by site of the gain: gone, the fraction of channels whose gain is now below `GONE` times what is usual
        in the layer (its median at the start or, where that is zero, its largest now; all where that is zero too),
        first_max and last_max of |gain|, decay of its parameter group, and n, the channels; a layer that multiplies by
        1 + gain counts that sum.
    """
    known, moves = _norm_parameters(record), motion(record)
    known = known[known["gain"] == known["slot"]]
    values_of = {str(slot): tables.arrays(record, "value", slot=str(slot)) for slot in known["slot"].unique()}
    rows = []
    for site, slot, offset in zip(known.index, known["slot"], known["gain_offset"], strict=True):
        steps, values = values_of[str(slot)].get(str(site), (np.empty(0), np.empty(0)))
        if len(steps):
            size = np.abs(values + (offset if np.isfinite(offset) else 0.0))
            usual = float(np.median(size[0])) or float(size[-1].max())
            gone = float((size[-1] < GONE * usual).mean()) if usual > 0 else 1.0
            gone = gone if np.isfinite(size[-1]).all() else np.nan
            decays = moves[str(site)]["decay"] if str(site) in moves else pd.Series(dtype=float)
            decay = float(decays.iloc[-1]) if len(decays) else np.nan
            rows.append((site, gone, float(size[0].max()), float(size[-1].max()), decay, size.shape[1]))
    columns = ["site", "gone", "first_max", "last_max", "decay", "n"]
    return pd.DataFrame(rows, columns=columns).set_index("site").astype(float)


def decayed_norms(record: Record) -> list[str]:
    """Return the gains and biases of normalization layers that decay acts on, in order of execution.

    Args:
        record: record of one run.

    Returns:
        Sites.
    """
    moves = motion(record)
    return [str(site) for site in _norm_parameters(record).index if str(site) in moves and _decays(moves[str(site)])]


def _decays(frame: pd.DataFrame) -> bool:
    return len(frame) > 0 and bool(frame["decay"].iloc[-1] > 0)


def _norm_parameters(record: Record) -> pd.DataFrame:
    """Return the rows of `parameters` that belong to normalization layers, with gain and gain_offset of the layer."""
    layers = record.sites.reindex(columns=["module", "slot", "norm", "gain", "gain_offset"])
    layers = layers[layers["norm"].notna()].drop_duplicates("module").set_index("module")
    frame = parameters(record)
    frame = frame[frame["module"].isin(layers.index)]
    found = layers[["gain", "gain_offset"]].reindex(frame["module"]).set_axis(frame.index)
    return frame.join(found.assign(gain_offset=pd.to_numeric(found["gain_offset"], errors="coerce")))


def idle_biases(record: Record) -> pd.DataFrame:
    """Return the biases right before a batch or instance normalization, which takes each channel's mean away.

    Args:
        record: record of one run.

    Returns:
        Indexed by site: feeds, and share, the largest norm of its gradient over that of the weight beside it, in the
        late window: 0 up to rounding where the bias has no effect.
    """
    known = parameters(record)
    known = known[known["slot"].eq("bias") & known["norm"].isin(["batch", "instance"])]
    norms = tables.table(record, "norm", slot="*", role="gradient")
    rows = []
    for site, module, feeds in zip(known.index, known["module"], known["feeds"], strict=True):
        pair = [name for name in (str(site), f"{module}/weight") if name in norms]
        if len(pair) == 2:
            with np.errstate(divide="ignore", invalid="ignore"):
                share = tables.late(norms[pair[0]] / norms[pair[1]])
            rows.append((site, feeds, float(share.max()) if len(share) else np.nan))
    return pd.DataFrame(rows, columns=["site", "feeds", "share"]).set_index("site").astype({"share": float})
