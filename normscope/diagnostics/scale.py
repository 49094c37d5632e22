"""Scale: do scale-invariant weights turn at a rate that lasts, and do growth and decay of their norms balance."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import replace

import numpy as np
import pandas as pd

from normscope.core.finding import Finding, Verdict
from normscope.core.record import Record
from normscope.diagnostics.rule import Rule
from normscope.diagnostics.words import count, fold
from normscope.metrics import equilibrium as forms
from normscope.metrics import scale as metrics
from normscope.metrics import tables

# origin of each threshold: the `threshold_source` of the rule that uses it
NORM = 10.0  # growth or shrinkage of a norm since the start: for SGD 100 of the effective learning rate
FAST = 0.3  # radians per step
LASTED = 1.0  # time constants from which a balance is expected
NEAR = 10.0  # times the present decay: one further away is no advice for a run so short
GROWN = 1.5  # growth of a norm without decay
COLLAPSED = 0.5  # fraction of a layer's gains
IDLE = 1e-3  # gradient of a bias over that of the weight beside it
EPS_SHARE = 0.1  # of the denominator of a normalization layer

INVARIANCE = Rule(
    id="scale.invariance",
    threshold=metrics.PARTIAL,
    threshold_source="identity: <w, grad> = 0 for a scale-invariant weight, a random direction has a defect of 1; "
    "measured: below 3e-4 at weights before BatchNorm in float32, 0.03 where decay shrank them, above 1 at others",
    source="ba2016",
    cause="Something else than the normalized output depends on the size of this weight.",
    remedy="Do not read the norm of this weight as a free parameter: its size matters, and so does decay on it.",
)
EFFECTIVE_RATE = Rule(
    id="scale.effective-rate",
    threshold=NORM,
    threshold_source="measured: in healthy runs of 300 to 1500 steps, with and without decay, norms change less than "
    "4-fold; identity: a weight that turns by 0.3 rad per step forgets its direction in 1 / 0.3^2 = 11 steps",
    source="vanlaarhoven2017",
    cause="The first steps were so long that they inflated the weight: of a scale-invariant weight only the learning "
    "rate over its squared norm counts.",
    remedy="Lower the learning rate or warm it up (torch.optim.lr_scheduler.LinearLR), and give these weights decay "
    "(weight_decay= of their parameter group), which brings the norm back.",
)
EQUILIBRIUM = Rule(
    id="scale.equilibrium",
    threshold=forms.BAND[1],
    threshold_source="identity: the balance is 1 where the norm stays; measured: 0.8 to 1.25 for AdamW and Muon in "
    "equilibrium",
    source="kosson2023",
    cause="The learning rate or the gradient has changed faster than the norm can follow.",
    remedy="Nothing must be done; for a known learning rate per layer keep settings constant for the steps stated, or "
    "rescale the weight: multiply it by (new / old learning rate)^(1/4) for SGD, ^(1/2) for AdamW.",
)
DECAY = Rule(
    id="scale.decay",
    threshold=LASTED,
    threshold_source="identity: decay shrinks a norm by exp(-sum of eta lambda); |w|^4 (SGD) or |w|^2 (others) relaxes "
    "in one time constant",
    source="kosson2023",
    cause="Weight decay is zero or too weak to act within the run, so norms grow and effective learning rates fall on "
    "their own schedule.",
    remedy="Set weight_decay of the parameter group to the value stated, or leave it and let the learning rate "
    "schedule do what decay would.",
)
GAIN_DECAY = Rule(
    id="scale.gain-decay",
    threshold=0.0,
    threshold_source="identity: weight_decay of the parameter group that holds the gains and biases",
    source="summers2020",
    cause="All parameters are in one group, so decay pulls gains and biases of normalization layers to zero as well.",
    remedy="Put parameters of one dimension in a group of their own: torch.optim.AdamW([{'params': matrices}, "
    "{'params': vectors, 'weight_decay': 0.0}]). With Muon decay on gains is wanted: it keeps them bounded.",
)
BIAS_BEFORE_NORM = Rule(
    id="scale.bias-before-norm",
    threshold=IDLE,
    threshold_source="identity: the normalization subtracts the channel's mean, so the gradient is 0 up to rounding",
    source="ioffe2015",
    cause="The normalization layer that follows takes the mean of each channel away, and the bias with it.",
    remedy="Build the layer with bias=False; the bias of the normalization layer does its work.",
)
GAIN_COLLAPSE = Rule(
    id="scale.gain-collapse",
    threshold=COLLAPSED,
    threshold_source="measured: gains below a hundredth of the usual one are 0 in healthy runs, 0.18 and 0.68 of all "
    "with an L1 penalty of 1e-3 and 1e-2 on them",
    source="liu2017",
    cause="A penalty or decay on the gains, or a branch that training does not use, has driven them to zero.",
    remedy="Take the gains out of weight decay (a parameter group with weight_decay=0.0); if they were to become "
    "sparse, remove the channels.",
)


def invariance(record: Record) -> list[Finding]:
    """Judge which weights are scale-invariant, and whether those in front of a normalization layer are.

    Args:
        record: record of one run.

    Returns:
        One finding, none where no weight has enough steps with a gradient.
    """
    frame = metrics.invariance(record)
    frame = frame[frame["unit"] != ""]
    if not len(frame):
        return []
    known = metrics.weights(record).loc[frame.index]
    kept = frame[frame["unit"] != "none"]
    units = [
        f"{(kept['unit'] == unit).sum()} by {unit}" for unit in ("row", "block", "tensor") if unit in set(kept["unit"])
    ]
    said = f"{len(kept)} of {count(len(frame), 'weight')} scale-invariant"
    evidence = _numbers(
        weights=len(frame), invariant=len(kept), defect=kept["defect"].max(), output=kept["output"].max()
    )
    broken = frame[(frame["unit"] == "none") & (known["feeds"] != "").to_numpy()]
    broken = broken.sort_values("defect", ascending=False)
    broken = broken[[not _with_bias(record, known.loc[name]) for name in broken.index]]
    if not len(broken):
        largest = f" ({', '.join(units)}); largest defect {kept['defect'].max():.1g}" if len(kept) else ""
        return INVARIANCE.ok(f"{said}{largest} (threshold {metrics.PARTIAL:g}).", evidence)
    site = str(broken.index[0])
    defect, facts = float(broken["defect"].iloc[0]), known.to_dict("index")[site]
    cause, remedy = _breaking(record, facts)
    return INVARIANCE.found(
        Verdict.NOTE,
        f"{site} feeds {facts['feeds']} and is not scale-invariant: its gradient has a defect of {defect:.2g}, "
        f"0 expected (threshold {metrics.PARTIAL:g}); {said}.",
        sites=[str(name) for name in broken.index],
        evidence=evidence | {"largest_defect": defect},
        cause=cause,
        remedy=remedy,
    )


def effective_rate(record: Record) -> list[Finding]:
    """Judge whether effective learning rates of scale-invariant weights collapsed or exploded with their norms.

    Args:
        record: record of one run.

    Returns:
        One finding, none without scale-invariant weights.
    """
    frame = metrics.summary(record)
    if not len(frame):
        return []
    change = (frame["norm_last"] / frame["norm_first"]).where(np.isfinite(frame["norm_last"]), np.nan)
    size = np.maximum(change, 1 / change)
    worst = frame.assign(change=change, size=size).sort_values("size", ascending=False, na_position="last")
    top, site = worst.iloc[0], str(worst.index[0])
    angle = frame["angle"].where(np.isfinite(frame["angle"]))
    turning = angle.max()
    evidence = _numbers(
        norm_change=top["change"],
        angle=turning,
        effective_first=top["effective_first"],
        effective_last=top["effective_last"],
    )
    said = f"{site}: the norm went from {top['norm_first']:.3g} to {top['norm_last']:.3g} in {top['steps']:.0f} steps"
    alone = _alone(worst).iloc[0]
    said += f", which alone multiplies its effective learning rate by {alone:.2g}" if np.isfinite(alone) else ""
    beyond = worst[worst["size"] > NORM]
    if len(beyond):
        shrunk = top["change"] < 1
        return EFFECTIVE_RATE.found(
            Verdict.WARNING,
            f"{said} (threshold {NORM:g}-fold of the norm); {len(beyond)} of {len(frame)} scale-invariant weights are "
            "beyond it.",
            sites=[str(name) for name in beyond.index],
            step=_onset(record, site, top),
            evidence=evidence | {"weights_beyond": len(beyond)},
            cause="Decay is stronger than the gradient, so the weight shrinks and turns ever faster."
            if shrunk
            else None,
            remedy="Lower weight_decay or the learning rate of these weights' parameter group." if shrunk else None,
        )
    fast = frame[angle > FAST].sort_values("angle", ascending=False)
    if len(fast):
        return _too_fast(fast, evidence)
    return EFFECTIVE_RATE.ok(
        f"{said} (threshold {NORM:g}-fold); weights turn by {turning:.2g} rad per step at most.", evidence
    )


def equilibrium(record: Record) -> list[Finding]:
    """Judge whether growth and decay of the norms of scale-invariant weights balance, once they had time to.

    Args:
        record: record of one run.

    Returns:
        One finding, none where no scale-invariant weight has decay for at least one time constant.
    """
    frame = metrics.summary(record)
    frame = frame[frame["decay"] > 0]
    unknown = frame[frame["balance"].isna()]
    if len(frame) and len(unknown) == len(frame):
        return _without_form(record, unknown)
    frame = frame[frame["exposure"] >= LASTED]
    if not len(frame):
        return []
    low, high = forms.BAND
    slack = 2 * frame["balance_error"].fillna(0.0)
    out = frame[(frame["balance"] > high + slack) | (frame["balance"] < low - slack)]
    off = np.abs(np.log(out["balance"].clip(lower=1e-3)))
    out = out.loc[off.sort_values(ascending=False).index]
    top = (out if len(out) else frame.sort_values("balance", ascending=False)).iloc[0]
    site, angle, expected = str(top.name), float(top["angle"]), float(top["expected"])
    theory = f" against {expected:.2g} in equilibrium" if np.isfinite(expected) else ""
    evidence = _numbers(
        balance=top["balance"],
        error=top["balance_error"],
        angle=angle,
        expected_angle=expected,
        constant=top["constant"],
    )
    said = f"{site}: its norm grows {top['balance']:.2g} times as fast as it decays (equilibrium {low:g} to {high:g}), "
    said += f"and it turns by {angle:.2g} rad per step{theory}"
    if not len(out):
        return EQUILIBRIUM.ok(f"{said}; all {len(frame)} judged weights are within.", evidence)
    left = forms.steps_to_balance(float(top["balance"]), float(top["constant"]))
    when = f"at these settings balance takes {left:.2g} more steps; " if np.isfinite(left) else ""
    return EQUILIBRIUM.found(
        Verdict.NOTE,
        f"{said}; {when}{len(out)} of {len(frame)} scale-invariant weights are out of it.",
        sites=[str(name) for name in out.index],
        evidence=evidence | _numbers(steps_to_balance=left, weights_out=len(out)),
    )


def decay(record: Record) -> list[Finding]:
    """Judge whether decay acts on scale-invariant weights within the run.

    Args:
        record: record of one run.

    Returns:
        One finding, none without scale-invariant weights whose settings are known.
    """
    frame = metrics.summary(record)
    frame = frame.assign(growth=frame["norm_last"] / frame["norm_first"])
    none = frame[frame["decay"] == 0].sort_values("growth", ascending=False)
    weak = frame[(frame["decay"] > 0) & (frame["exposure"] < LASTED)].sort_values("balance", ascending=False)
    weak = weak[weak["balance"] > forms.BAND[1] + 2 * weak["balance_error"].fillna(0.0)]
    if len(none) and none["growth"].iloc[0] > GROWN:
        return _no_decay(none[none["growth"] > GROWN], len(frame))
    if len(weak):
        return _weak_decay(weak, len(frame))
    told = frame[frame["decay"].notna() & (frame["balance"].notna() | (frame["decay"] == 0))]
    if not len(told):
        return []
    least, largest = float(told["growth"].min()), float(told["growth"].max())
    return DECAY.ok(
        f"Norms of {count(len(told), 'scale-invariant weight')} ended at {least:.2g} to {largest:.2g} times what they "
        f"were at the start (threshold {GROWN:g}); decay had {told['exposure'].max():.2g} time constants.",
        _numbers(growth=largest, exposure=told["exposure"].max()),
    )


def gain_decay(record: Record) -> list[Finding]:
    """Judge whether decay acts on gains and biases of normalization layers: a note, for some optimizers need it.

    Args:
        record: record of one run.

    Returns:
        One finding, none where no such parameter was measured.
    """
    frame, sites = metrics.gains(record), metrics.decayed_norms(record)
    if not len(frame):
        return []
    drift = (frame["last_max"] / frame["first_max"]).replace([np.inf, -np.inf], np.nan)
    first, last = frame["first_max"].max(), frame["last_max"].max()
    span = (
        f"the largest |gain| went from {first:.3g} to {last:.3g}" if np.isfinite(last) else "gains are not finite now"
    )
    evidence = _numbers(parameters=len(sites), drift_least=drift.min(), drift_most=drift.max())
    if not sites:
        return GAIN_DECAY.ok(
            f"No decay on gains or biases of {count(len(frame), 'normalization layer')}; {span}.", evidence
        )
    return GAIN_DECAY.found(
        Verdict.NOTE,
        f"Decay acts on {count(len(sites), 'parameter')} of normalization layers (threshold 0); {span}.",
        sites=sites,
        evidence=evidence,
    )


def bias_before_norm(record: Record) -> list[Finding]:
    """Judge whether biases stand right before a normalization that takes them away.

    Args:
        record: record of one run.

    Returns:
        One finding, none where no bias stands there.
    """
    frame = metrics.idle_biases(record)
    idle = frame[frame["share"] < IDLE]
    if not len(idle):
        return []
    site, share = str(idle.index[0]), float(idle["share"].max())
    return BIAS_BEFORE_NORM.found(
        Verdict.NOTE,
        f"The bias has no effect at {count(len(idle), 'layer')}, as {site} before {idle['feeds'].iloc[0]}: its "
        f"gradient is at most {share:.1g} of that of the weight beside it, 0 expected (threshold {IDLE:g}).",
        sites=[str(name) for name in idle.index],
        evidence={"biases": len(idle), "gradient_share": share},
    )


def gain_collapse(record: Record) -> list[Finding]:
    """Judge whether gains of a normalization layer have gone to zero, so that its channels are switched off.

    Args:
        record: record of one run.

    Returns:
        One finding, none where no gain was recorded.
    """
    frame = metrics.gains(record)
    frame = frame[frame["gone"].notna()].sort_values("gone", ascending=False, kind="stable")
    if not len(frame):
        return []
    site, gone = str(frame.index[0]), float(frame["gone"].iloc[0])
    beyond = frame[frame["gone"] > COLLAPSED]
    evidence = {"gone_fraction": gone, "layers_beyond": len(beyond), "layers": len(frame)}
    said = f"{site}: {gone:.0%} of the gains are below {metrics.GONE:g} of the usual one (threshold {COLLAPSED:.0%})"
    if not len(beyond):
        return GAIN_COLLAPSE.ok(f"{said}, the most of {count(len(frame), 'layer')}.", evidence)
    born = float(frame["first_max"].iloc[0]) == 0
    return GAIN_COLLAPSE.found(
        Verdict.WARNING,
        f"{said}; {len(beyond)} of {count(len(frame), 'layer')} beyond it.",
        sites=[str(name) for name in beyond.index],
        evidence=evidence,
        cause="The gains have been 0 from the first sampled step on, and do not move." if born else None,
        remedy="Initialize them with 1 (torch.nn.init.ones_), and let them train (requires_grad)." if born else None,
    )


def _alone(frame: pd.DataFrame) -> pd.Series:
    """Return by what the norm alone has multiplied effective learning rates, beside the schedule."""
    return frame["effective_last"] / frame["effective_first"] * frame["rate_first"] / frame["rate_last"]


def _numbers(**values: float) -> dict[str, float]:
    """Return the numbers that are known."""
    return {name: float(value) for name, value in values.items() if np.isfinite(value)}


def _with_bias(record: Record, facts: pd.Series) -> bool:
    """Tell whether a bias joins the product before a norm that keeps it: only both together are scale-invariant."""
    biases = tables.table(record, "norm", slot="bias")
    bias = f"{facts['module']}/bias"
    kept = facts["norm"] not in ("batch", "instance") and bias in biases
    return bool(kept and tables.late(biases[bias]).median() > 0)


def _breaking(record: Record, facts: Mapping[Hashable, object]) -> tuple[str | None, str | None]:
    """Name what most likely breaks the invariance of a weight before a normalization layer, and what to do."""
    layer = str(facts["feeds"])
    shares = tables.table(record, "eps_weight.q50", slot="input")
    share = float(tables.late(shares[f"{layer}/input"]).median()) if f"{layer}/input" in shares else np.nan
    if share > EPS_SHARE:
        return (
            f"eps is {share:.0%} of the denominator of {layer}, so it divides by a constant; see "
            "propagation.eps-dominates.",
            "Use a smaller eps, or a larger input of that layer.",
        )
    training = tables.table(record, "training", slot="running")
    if f"{layer}/running" in training and tables.late(training[f"{layer}/running"]).median() == 0:
        return f"{layer} is in evaluation mode and divides by stored statistics.", None
    return None, None


def _onset(record: Record, site: str, top: pd.Series) -> int | None:
    """Return from which step on a norm is further from its start than the root of its change."""
    norm = tables.table(record, "norm", slot="*")
    if site not in norm:
        return None
    moved = np.abs(np.log(norm[site].dropna() / top["norm_first"]))
    return tables.onset(moved > 0.5 * abs(np.log(top["change"])))


def _too_fast(fast: pd.DataFrame, evidence: dict[str, float]) -> list[Finding]:
    angle = float(fast["angle"].iloc[0])
    return replace(EFFECTIVE_RATE, threshold=FAST).found(
        Verdict.WARNING,
        f"{fast.index[0]} turns by {angle:.2g} rad per step (threshold {FAST:g}): it forgets its direction in "
        f"{max(angle**-2, 1):.0f} steps; {count(len(fast), 'scale-invariant weight')} beyond it.",
        sites=[str(name) for name in fast.index],
        evidence=evidence | {"weights_beyond": len(fast)},
        cause="The learning rate is too high for the size of these weights.",
        remedy="Lower the learning rate, or the product of learning rate and weight_decay: in equilibrium the angle is "
        "the root of twice it.",
    )


def _without_form(record: Record, frame: pd.DataFrame) -> list[Finding]:
    """Say what is measured where an optimizer's settings do not imply how fast norms decay."""
    facts = metrics.parameters(record).loc[frame.index]
    spread = f"weights turn by {frame['angle'].min():.2g} to {frame['angle'].max():.2g} rad per step"
    evidence = _numbers(angle_least=frame["angle"].min(), angle_most=frame["angle"].max())
    if (facts["rule"] == "adam").all():
        return EQUILIBRIUM.found(
            Verdict.NOTE,
            f"Adam divides its L2 decay by the second moment, so layers have no common equilibrium; {spread}.",
            sites=[str(name) for name in frame.index],
            evidence=evidence,
            cause="weight_decay of torch.optim.Adam joins the gradient.",
            remedy="Use torch.optim.AdamW (or decoupled_weight_decay=True), whose decay acts alike on all layers.",
        )
    names = ", ".join(dict.fromkeys(map(str, facts["optimizer"])))
    return EQUILIBRIUM.undecided(
        f"How {names} applies decay is not known, so only what was measured is reported; {spread}.",
        "Compare the norms of the weights over time; known are torch.optim.SGD, Adam, AdamW and Muon.",
        evidence=evidence,
    )


def _no_decay(none: pd.DataFrame, weights: int) -> list[Finding]:
    top = none.iloc[0]
    alone = _alone(none).iloc[0]
    said = f", which alone multiplies its effective learning rate by {alone:.2g}" if np.isfinite(alone) else ""
    origin = "identity: at 1.5 the effective learning rate of SGD is divided by 2.25"
    return replace(DECAY, threshold=GROWN, threshold_source=origin).found(
        Verdict.NOTE,
        f"{none.index[0]} has no decay and its norm has grown {fold(top['growth'])} in {top['steps']:.0f} steps "
        f"(threshold {GROWN:g}){said}; {len(none)} of {weights} scale-invariant weights.",
        sites=[str(name) for name in none.index],
        evidence=_numbers(growth=top["growth"], weights=len(none)),
        cause="Without decay the norm of a scale-invariant weight can only grow, by the square of each step's length.",
        remedy="Set weight_decay of their parameter group, such that learning rate times weight_decay times steps is "
        "about 1; if the run is short, nothing need be done.",
    )


def _weak_decay(weak: pd.DataFrame, weights: int) -> list[Finding]:
    top = weak.iloc[0]
    hint = float(top["decay"] / top["consumed"]) if top["consumed"] > 0 else np.nan
    said = (
        f"{weak.index[0]}: decay has not acted in {top['steps']:.0f} steps, {top['exposure']:.2g} time constants "
        f"(threshold {LASTED:g}): its norm grows {top['balance']:.2g} times as fast as it decays; {len(weak)} of "
        f"{weights} scale-invariant weights"
    )
    evidence = _numbers(
        balance=top["balance"],
        exposure=top["exposure"],
        decay=top["decay"],
        decay_that_acts=hint,
        weights=len(weak),
    )
    if not hint <= NEAR * float(top["decay"]):  # no setting that is near would change anything
        return DECAY.ok(f"{said}; the run is too short for it to matter.", evidence)
    return DECAY.found(
        Verdict.NOTE,
        f"{said}; within a run of this length a weight_decay near {hint:.2g} would act.",
        sites=[str(name) for name in weak.index],
        evidence=evidence,
        remedy=f"In a longer run nothing need be done. For a run of this length set weight_decay near {hint:.2g} (that "
        "makes the sum of learning rate times decay 1), or lower the learning rate by a schedule.",
    )
