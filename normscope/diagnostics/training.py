"""Training: does the loop move the weights it should, at a rate they can follow, from a start that makes sense."""

from __future__ import annotations

import math
from dataclasses import replace

from normscope.core.finding import Finding, Verdict
from normscope.core.record import Record
from normscope.diagnostics.rule import Rule
from normscope.diagnostics.words import count, fold
from normscope.metrics import propagation, run, tables
from normscope.metrics import training as metrics

# origin of each threshold: the `threshold_source` of the rule that uses it
STEP = 0.1  # of a weight that one step moves
GROWN = 2.0  # growth of the norms of the median weight
IDLING = 0.3  # of a run
REST = 0.01  # of a weight that a whole run moves
LEARNED = 0.98  # late loss over the first, above which nothing was learned
LONG = 50  # steps of a run that can be called too slow
ALWAYS = 0.95  # fraction of steps at the bound
SLOW = 1e-3  # of a weight, below which a clipped step is short
MIN_NORMS = 20  # gradient norms before a bound is seen in them
RMS = (0.05, 10.0)  # root mean square of the input
MEAN_SHARE = 0.9  # of the input's mean square: a mean of three standard deviations
OVERCONFIDENT = 2.0  # first loss over that of a uniform guess
VERY_OVERCONFIDENT = 4.0
LOGITS = 3.0  # rms of the output with it
LEFT = 1e-3  # share of a gradient
STUCK = 0.5  # of the entries of a weight
MEMORY = 100.0  # steps that a weight averages over
MINORITY = 0.5  # of the matrices: those who train fewer do so on purpose

LEARNING_RATE = Rule(
    id="training.learning-rate",
    threshold=STEP,
    threshold_source="identity: random steps of a tenth of a weight replace it in 1 / 0.1^2 = 100 steps, and its norm "
    "grows; measured: in healthy runs the median weight moves by at most 0.06 a step and grows less than 1.7-fold, at "
    "30 times their learning rate by 0.15 to 1.4 a step and 2.8-fold or more",
    source="bernstein2020",
    cause="The learning rate is too high for the size of the weights: steps add up to a random walk that inflates "
    "them.",
    remedy="Divide the learning rate by 10, or warm it up (torch.optim.lr_scheduler.LinearLR): a step should move a "
    "weight by 0.1 % to 1 % of its norm.",
)
UNTRAINED = Rule(
    id="training.untrained",
    threshold=0.0,
    threshold_source="identity: a weight that is trained moves",
    source="huang2020",
    cause="The parameter is frozen while layers before it are trained.",
    remedy="Call requires_grad_(True) on it where the layer is meant to learn.",
)
CLIPPING = Rule(
    id="training.clipping",
    threshold=ALWAYS,
    threshold_source="identity: a bound that is meant for outliers acts on few steps; a norm that differs by less than "
    "0.1 % from step to step is the bound itself",
    source="pascanu2013",
    cause="Every gradient is longer than the bound of clip_grad_norm_, so each step has the same length whatever the "
    "loss says, and the learning rate means another thing than it seems.",
    remedy="Raise max_norm above the usual gradient norm (torch.nn.utils.clip_grad_norm_ returns it), by a factor of 2 "
    "or so; if normalized steps are wanted, keep it and tune the learning rate for them.",
)
INPUT_SCALE = Rule(
    id="training.input-scale",
    threshold=RMS[1],
    threshold_source="identity: the curvature of the first layer grows with the mean square of its input, and a mean "
    "of three standard deviations makes its largest eigenvalue ten times the others' sum",
    source="lecun1998",
    cause="The inputs are not standardized, as raw pixels of 0 to 255 or values far from zero are.",
    remedy="Subtract the mean of the training data and divide by their standard deviation before the model, or put a "
    "normalization layer first.",
)
INITIAL_LOSS = Rule(
    id="training.initial-loss",
    threshold=OVERCONFIDENT,
    threshold_source="identity: a cross entropy over C classes is ln C where nothing is preferred; beyond twice that, "
    "wrong classes are",
    source="zhang2019",
    cause="The last layer's weights are too large at the start, as an output layer tied to embeddings of standard "
    "deviation 1 is: outputs are large before anything was learned.",
    remedy="Initialize the last layer with a standard deviation of 0.02, or with zeros; for tied embeddings "
    "torch.nn.init.normal_(embedding.weight, std=0.02), or divide the output by sqrt(width).",
)
UNCLEARED_GRADIENTS = Rule(
    id="training.uncleared-gradients",
    threshold=LEFT,
    threshold_source="identity: after zero_grad nothing is left of the gradient of the step before",
    source="huang2020",
    cause="zero_grad is not called between optimizer steps, so each step uses the sum of all gradients so far.",
    remedy="Call optimizer.zero_grad() before backward of each step.",
)
STUCK_WEIGHTS = Rule(
    id="training.stuck-weights",
    threshold=STUCK,
    threshold_source="identity: a bfloat16 has 8 significant bits, so a step below 1/512 of a weight rounds to nothing",
    source="zamirai2020",
    cause="Weights are kept in half precision, and their steps are smaller than the distance to the next number.",
    remedy="Keep float32 weights and compute under torch.autocast, or use an optimizer with float32 master weights or "
    "stochastic rounding; a higher learning rate moves more of them.",
)
DECAY = Rule(
    id="training.decay",
    threshold=MEMORY,
    threshold_source="identity: a decayed weight is a moving average of its updates over 1 / (eta lambda) steps; what "
    "works in practice averages over an epoch or more, never over 100 steps",
    source="wang2024",
    cause="The product of learning rate and weight_decay is so large that weights forget what they learned within a "
    "few steps, and shrink to the size of those.",
    remedy="Divide weight_decay by the factor stated, such that learning rate times weight_decay times the steps of an "
    "epoch is about 1 or below.",
)


def learning_rate(record: Record) -> list[Finding]:
    """Judge whether steps are far too long or far too short for the weights.

    Args:
        record: record of one run.

    Returns:
        One finding, none where fewer than two updates were measured or no gradient passes.
    """
    rates, losses = metrics.rates(record), metrics.losses(record)
    if rates is None:
        return []
    step = max(value for value in (rates.first, rates.late) if math.isfinite(value))
    evidence = {"step": step, "path": rates.path, "growth": rates.growth, "weights": rates.weights}
    evidence = {name: value for name, value in evidence.items() if math.isfinite(value)}
    learned = losses is None or losses.late < LEARNED * losses.start
    said = f"A step moves the median weight by {step:.2g} of its norm at most"
    if step > STEP and not rates.growth < GROWN:
        return LEARNING_RATE.found(
            Verdict.NOTE if metrics.learned(record) else Verdict.WARNING,
            f"{said} (threshold {STEP:g}), and its norm has grown {fold(rates.growth)} in {rates.steps} steps "
            f"(threshold {GROWN:g}-fold); {rates.fastest} moves fastest."
            if math.isfinite(rates.growth)
            else f"{said} (threshold {STEP:g}), until it is no longer finite; {rates.fastest} moves fastest.",
            sites=[rates.fastest],
            evidence=evidence,
        )
    if rates.path < REST and rates.steps >= LONG and not learned and not propagation.cut_off(record):
        assert losses is not None  # else it counts as learned
        return replace(LEARNING_RATE, threshold=REST, threshold_source=_REST_SOURCE).found(
            Verdict.WARNING,
            f"In {rates.steps} steps no weight has moved by more than {rates.path:.2g} of its norm (threshold {REST:g})"
            f", and the loss is {losses.late:.3g} where it was {losses.start:.3g}.",
            sites=[rates.fastest],
            evidence=evidence | {"loss_start": losses.start, "loss_late": losses.late},
            cause="The learning rate is far too low, or a schedule has brought it near zero.",
            remedy="Multiply the learning rate by 10 until a step moves a weight by 0.1 % to 1 % of its norm; look at "
            "scheduler.get_last_lr().",
        )
    since, share = metrics.idle(record)
    if since is not None and share > IDLING:
        return replace(LEARNING_RATE, threshold=IDLING, threshold_source=_IDLING_SOURCE).found(
            Verdict.WARNING,
            f"From step {since} on, {share:.0%} of the run, the learning rate is below {metrics.IDLE:.0%} of its "
            f"largest value (threshold {IDLING:.0%}): nothing more is learned.",
            step=since,
            evidence=evidence | {"share": share},
            cause="The schedule is shorter than the run: it counts batches where epochs were meant, or was made for "
            "fewer steps.",
            remedy="Give the scheduler the number of steps that it is called for (T_max, total_steps), or call "
            "scheduler.step() once an epoch.",
        )
    return LEARNING_RATE.ok(f"{said} (threshold {STEP:g}).", evidence)


_IDLING_SOURCE = (
    "identity: a cosine is below 1 % of its start in the last 6 % of a run, a line in the last 1 %, a step by 10 every "
    "30 % in the last 10 %"
)
_REST_SOURCE = (
    "measured: healthy runs of 60 steps or more move their weights by 0.4 to 5 times their norms in all, fine-tuned "
    "heads by 0.05"
)


def untrained(record: Record) -> list[Finding]:
    """Judge whether every parameter is trained that should be.

    A network whose first layers, or most of whose weights, do not move was frozen on purpose: a note. A weight between
    trained ones was most likely forgotten.

    Args:
        record: record of one run.

    Returns:
        One finding, none where no parameter is known or nothing was trained.
    """
    if tables.at_rest(record) or run.ending(record) is not None:
        return []
    frame = metrics.untrained(record)
    if not len(frame):
        return []
    out = frame[(frame["reason"] != "") & (frame["reason"] != "not move")]
    if not len(out):
        return UNTRAINED.ok(f"All {count(len(frame), 'parameter')} are trained.", {"parameters": len(frame)})
    cut = bool(propagation.cut_off(record))
    left = out[out["matrix"] & out["enclosed"] & (out["reason"] != "no gradient")]
    few = len(out[out["matrix"]]) < MINORITY * max(int(frame["matrix"].sum()), 1)
    kinds = {reason: int((out["reason"] == reason).sum()) for reason in dict.fromkeys(out["reason"])}
    told = ", ".join(f"{n} {_REASONS[reason]}" for reason, n in kinds.items())
    said = f"{count(len(out), 'parameter')} of {len(frame)} {'is' if len(out) == 1 else 'are'} not trained: {told}"
    evidence = {"untrained": len(out), "parameters": len(frame)}
    if len(left) and few:
        site = str(left.index[0])
        return UNTRAINED.found(
            Verdict.WARNING,
            f"{site} is not trained while layers before it are: {_REASONS[left['reason'].iloc[0]]} (threshold 0). In "
            f"all, {said[0].lower()}{said[1:]}.",
            sites=[str(name) for name in left.index],
            evidence=evidence,
        )
    if cut and set(kinds) == {"no gradient"}:
        return []  # which is the matter of propagation.dead-units
    lost = out[(out["reason"] == "no gradient") & out["matrix"] & (out["order"] < metrics.first_trained(frame))]
    if len(lost) and not cut:
        site = str(lost.index[0])
        return UNTRAINED.found(
            Verdict.WARNING,
            f"{site} is held by the optimizer and runs before all that is trained, but no gradient reaches it "
            f"(threshold 0). In all, {said[0].lower()}{said[1:]}.",
            sites=[str(name) for name in lost.index],
            evidence=evidence,
            cause="The graph is cut behind it: detach(), .data, torch.no_grad(), or a step that has no gradient.",
            remedy="Look for detach(), .data, no_grad(), argmax or conversions to numpy behind this layer; if it is "
            "meant to stay as it is, set requires_grad_(False) on it.",
        )
    return UNTRAINED.found(
        Verdict.NOTE,
        f"{said}.",
        sites=[str(name) for name in out.index],
        evidence=evidence,
        cause="Layers are frozen, as in fine-tuning, or not used by the loss.",
        remedy="Nothing, if this is meant; else see requires_grad and the forward pass.",
    )


_REASONS = {
    "frozen": "frozen (requires_grad is False)",
    "no gradient": "reached by no gradient",
}


def clipping(record: Record) -> list[Finding]:
    """Judge whether gradient clipping acts on every step: a note, unless the weights hardly move for it.

    Args:
        record: record of one run.

    Returns:
        One finding, none with fewer than `MIN_NORMS` gradient norms.
    """
    bound, fraction, n = metrics.clipped(record)
    if n < MIN_NORMS:
        return []
    said = f"The gradient norm is {bound:.4g} within 0.1 % at {fraction:.0%} of {n} steps (threshold {ALWAYS:.0%})"
    evidence = {"bound": bound, "fraction": fraction, "steps": n}
    if fraction < ALWAYS:
        return CLIPPING.ok(f"{said}: no bound acts on every step.", evidence)
    rates = metrics.rates(record)
    slow = rates is not None and max(rates.first, rates.late) < SLOW
    moved = f", and a step moves the median weight by {rates.late:.1g} of its norm" if rates and slow else ""
    return CLIPPING.found(
        Verdict.WARNING if slow else Verdict.NOTE,
        f"{said}: every gradient is clipped to this length{moved}.",
        evidence=evidence,
    )


def input_scale(record: Record) -> list[Finding]:
    """Judge whether the inputs of the first weighted layer are of order 1 and centered.

    Args:
        record: record of one run.

    Returns:
        One finding, none where they are unknown, or a normalization layer comes first.
    """
    found = metrics.inputs(record)
    if found is None:
        return []
    said = f"{found.site}: values have an rms of {found.rms:.3g}, and {found.mean_share:.0%} of their mean square is "
    said += "that of their means"
    evidence = {"rms": found.rms, "mean_share": found.mean_share}
    sized = RMS[0] <= found.rms <= RMS[1]
    if sized and found.mean_share <= MEAN_SHARE:
        return INPUT_SCALE.ok(f"{said} (thresholds {RMS[0]:g} to {RMS[1]:g}, {MEAN_SHARE:.0%}).", evidence)
    limit = f"threshold {RMS[found.rms > 1]:g}" if not sized else f"threshold {MEAN_SHARE:.0%}"
    taken = f"; {found.feeds} takes that away again" if found.feeds else ""
    return replace(INPUT_SCALE, threshold=RMS[found.rms > 1] if not sized else MEAN_SHARE).found(
        Verdict.WARNING if found.rms > RMS[1] and not found.feeds else Verdict.NOTE,
        f"{said} ({limit}){taken}.",
        sites=[found.site],
        evidence=evidence,
    )


def initial_loss(record: Record) -> list[Finding]:
    """Judge whether training starts from outputs that prefer nothing.

    Args:
        record: record of one run.

    Returns:
        One finding, none where the first loss or the number of outputs is unknown, or where it is 1.
    """
    losses, (site, classes, rms) = metrics.losses(record), metrics.outputs(record)
    if losses is None or classes < 2 or not math.isfinite(rms) or tables.at_rest(record):
        return []
    guess = math.log(classes)
    said = f"The first loss is {losses.first:.3g}, and outputs have an rms of {rms:.2g}"
    evidence = {"first_loss": losses.first, "uniform": guess, "rms": rms, "outputs": classes}
    if losses.first <= OVERCONFIDENT * guess or rms <= LOGITS:
        return INITIAL_LOSS.ok(f"{said}.", evidence)
    bad = losses.first > VERY_OVERCONFIDENT * guess
    limit = VERY_OVERCONFIDENT if bad else OVERCONFIDENT
    return replace(INITIAL_LOSS, threshold=limit).found(
        Verdict.WARNING if bad else Verdict.NOTE,
        f"{said} at {site}; if it is a cross entropy, {guess:.3g} is that of a uniform guess over {classes} classes "
        f"(threshold {limit:g} times that).",
        sites=[site],
        step=0,
        evidence=evidence,
    )


def uncleared_gradients(record: Record) -> list[Finding]:
    """Judge whether gradients are cleared between steps.

    Args:
        record: record of one run.

    Returns:
        One finding, none where nothing was seen before a backward pass.
    """
    left = metrics.left_over(record)
    if tables.at_rest(record) or len(left) < metrics.START:
        return []
    uncleared = left > LEFT
    share = float(left.median())
    said = f"Before backward, {share:.2g} of the gradient of the step before is left (threshold {LEFT:g})"
    evidence = {"share": share, "steps": len(left)}
    if not uncleared.mean() > ALWAYS:
        return UNCLEARED_GRADIENTS.ok(f"{said}.", evidence)
    return UNCLEARED_GRADIENTS.found(
        Verdict.FAILURE,
        f"{said}, at {count(int(uncleared.sum()), 'sampled step')}: gradients add up from step to step.",
        step=int(left.index[0]),
        evidence=evidence,
    )


def stuck_weights(record: Record) -> list[Finding]:
    """Judge whether weights in half precision move when they are pushed.

    Args:
        record: record of one run.

    Returns:
        One finding, none where no weight is in half precision.
    """
    still = metrics.still(record)
    if not len(still):
        return []
    site, fraction = str(still.index[0]), float(still.iloc[0])
    beyond = still[still > STUCK]
    said = f"{site}: {fraction:.0%} of the entries that have a gradient are not moved by a step (threshold {STUCK:.0%})"
    gains = len(beyond.index.intersection(metrics.gain_sites(record)))
    evidence = {"still": fraction, "beyond": len(beyond), "gains_beyond": gains, "parameters": len(still)}
    if not len(beyond):
        return STUCK_WEIGHTS.ok(f"{said}.", evidence)
    return STUCK_WEIGHTS.found(
        Verdict.WARNING,
        f"{said}; so at {len(beyond)} of {count(len(still), 'parameter')} in half precision"
        f"{f', {gains} of them gains of normalization layers' if gains else ''}.",
        sites=[str(name) for name in beyond.index],
        evidence=evidence,
    )


def decay(record: Record) -> list[Finding]:
    """Judge whether decay is so strong that weights forget.

    Args:
        record: record of one run.

    Returns:
        One finding, none where no decay of a known form acts.
    """
    memory = metrics.memory(record)
    if not len(memory):
        return []
    site, least = str(memory.index[0]), float(memory.iloc[0])
    beyond = memory[memory < MEMORY]
    said = f"{site}: its decay makes a weight an average over {least:.3g} steps (threshold {MEMORY:g})"
    evidence = {"steps": least, "weights_beyond": len(beyond), "weights": len(memory)}
    if not len(beyond):
        return DECAY.ok(f"{said}, the fewest of {count(len(memory), 'weight')}.", evidence)
    return DECAY.found(
        Verdict.WARNING,
        f"{said}; so at {len(beyond)} of {count(len(memory), 'weight')}.",
        sites=[str(name) for name in beyond.index],
        evidence=evidence,
        remedy=f"Divide weight_decay by {10 * MEMORY / least:.1g} or more, such that learning rate times weight_decay "
        "times the steps of an epoch is about 1 or below.",
    )
