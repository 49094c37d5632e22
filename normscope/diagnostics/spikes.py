"""Spikes: what made the loss jump, told apart by which tensors moved before it did."""

from __future__ import annotations

import math

from normscope.core.finding import Finding, Verdict
from normscope.core.record import Record
from normscope.core.robust import MIN_HISTORY
from normscope.diagnostics.rule import Evidence, Rule
from normscope.diagnostics.words import count
from normscope.metrics import spikes as metrics
from normscope.metrics import tables
from normscope.metrics.onset import ONSET
from normscope.metrics.spikes import Account

_MEASURED = "measured: spikes made on purpose and healthy runs of perceptrons, CNNs and transformers"
_SHOWN = 3  # tensors named in a message

DATA = Rule(
    id="spikes.data",
    threshold=ONSET,
    threshold_source=_MEASURED,
    source="chowdhery2022",
    cause="A batch unlike the others: wrong labels, values in another unit, a damaged file, one rank or micro-batch "
    "that reads something else. Where it does not come back, the data changed for good, or weights were overwritten "
    "by others of the same norm.",
    remedy="Look at inputs and labels of that step, of each rank and micro-batch; clip gradients by "
    "torch.nn.utils.clip_grad_norm_(parameters, 1.0), and leave such batches out when training goes over them again.",
)
SECOND_MOMENT = Rule(
    id="spikes.second-moment",
    threshold=metrics.STALE,
    threshold_source="wortsman2023stable",
    source="wortsman2023stable",
    cause="Gradients outgrew the second moment, an average over many steps: the optimizer divided by too little and "
    "took a step far too long.",
    remedy="Lower beta_2, as betas=(0.9, 0.95); divide each tensor's learning rate by max(1, RMS_t), as StableAdamW "
    "does; or clip gradients.",
)
ATTENTION = Rule(
    id="spikes.attention",
    threshold=metrics.GREW,
    threshold_source=_MEASURED,
    source="wortsman2023",
    cause="What makes queries and keys grew, and with it the logits of attention, until the softmax looks at one "
    "place.",
    remedy="Normalize queries and keys (torch.nn.RMSNorm over the features of a head), lower the learning rate of "
    "these tensors or give them decay; where a norm is there already, look at its gain.",
)
SCHEDULE = Rule(
    id="spikes.schedule",
    threshold=metrics.RAISED,
    threshold_source=_MEASURED,
    source="wortsman2023",
    cause="The learning rate was raised, and steps became too long for the loss to follow.",
    remedy="Keep the learning rate at what it was, or raise it over more steps; go back to a checkpoint before that "
    "step.",
)
OVERFLOW = Rule(
    id="spikes.overflow",
    threshold=0.0,
    threshold_source="identity: number of gradients that are not finite",
    source="micikevicius2018",
    cause="A number left the range of its type or was divided by zero, while nothing had grown before: in the backward "
    "pass where the loss was finite, else in the forward pass or in the batch itself.",
    remedy="Look at the batch of that step; go back to a checkpoint before it; leave out steps whose gradient norm is "
    "not finite, as torch.amp.GradScaler does; compute that layer in float32 or bfloat16; add an eps to divisions, "
    "logs and roots.",
)
OUTSIDE = Rule(
    id="spikes.outside",
    threshold=metrics.OUTSIDE,
    threshold_source="identity: a step dw changes the norm of a weight by at most its own",
    source="dixit2021",
    cause="Something other than the optimizer wrote the weight between two steps: a checkpoint or an average loaded "
    "into part of the model, a clipping or tying of weights, a faulty device.",
    remedy="Find what writes these weights at that step; if nothing does, go back to a checkpoint before it and test "
    "the memory of the device.",
)
INSTABILITY = Rule(
    id="spikes.instability",
    threshold=ONSET,
    threshold_source=_MEASURED,
    source="cohen2021",
    cause="Some tensors began to move more from step to step before the loss followed: their steps are too long for "
    "the curvature there, or their gain runs away.",
    remedy="Lower the learning rate of the tensors named first, check their parameter group (learning rate, sign of "
    "the decay), and clip gradients.",
)
UNDECIDED = Rule(
    id="spikes.undecided",
    threshold=ONSET,
    threshold_source=_MEASURED,
    source="wortsman2023",
    cause="No tensor had moved before it, and the gradient did not jump with it.",
    remedy="Look at the batch of that step, and at what is done between steps.",
)
RULES = {
    rule.id.partition(".")[2]: rule
    for rule in (DATA, SECOND_MOMENT, ATTENTION, SCHEDULE, OVERFLOW, OUTSIDE, INSTABILITY, UNDECIDED)
}


def data(record: Record) -> list[Finding]:
    """Judge whether a batch made the loss jump: loss and gradient jump together, nothing before."""
    return _found(record, DATA)


def second_moment(record: Record) -> list[Finding]:
    """Judge whether second moments that were too small made the loss jump."""
    return _found(record, SECOND_MOMENT)


def attention(record: Record) -> list[Finding]:
    """Judge whether growing queries and keys made the loss jump."""
    return _found(record, ATTENTION)


def schedule(record: Record) -> list[Finding]:
    """Judge whether a raised learning rate made the loss jump."""
    return _found(record, SCHEDULE)


def overflow(record: Record) -> list[Finding]:
    """Judge whether gradients that were not finite made the loss jump."""
    return _found(record, OVERFLOW)


def outside(record: Record) -> list[Finding]:
    """Judge whether weights that something else wrote made the loss jump."""
    return _found(record, OUTSIDE)


def instability(record: Record) -> list[Finding]:
    """Judge whether tensors that moved more and more made the loss jump."""
    return _found(record, INSTABILITY)


def undecided(record: Record) -> list[Finding]:
    """Judge whether there are spikes, and tell those that nothing explains."""
    accounts = metrics.accounts(record)
    mine = [account for account in accounts if account.kind == "undecided"]
    if not mine:
        return [] if accounts or not _known(record) else UNDECIDED.ok(f"No spike in {count(_known(record), 'step')}.")
    kept = mine[0].evidence.get("recorded_steps") != 0
    said = " ".join((headline(mine[0]), "Nothing that was recorded moved before it." if kept else _LOST))
    unkept = "Attach with probes=None, or with 'flight' among them, from the first step on."
    remedy = UNDECIDED.remedy if kept else unkept
    return UNDECIDED.undecided(said, remedy, evidence=_evidence(mine))


_LOST = "The steps before it are not in the record, so that what moved first is not known."


def _known(record: Record) -> int:
    """Return the number of steps in which a spike would have been seen, 0 where too few are."""
    frame = tables.context(record)
    steps = int(frame["loss"].notna().sum()) or int(frame["grad_norm"].notna().sum())
    return steps if steps > MIN_HISTORY else 0


def _found(record: Record, rule: Rule) -> list[Finding]:
    kind = rule.id.partition(".")[2]
    mine = [account for account in metrics.accounts(record) if account.kind == kind]
    if not mine:
        return []
    first = mine[0]
    more = f" {count(len(mine) - 1, 'more spike')} of this kind." if len(mine) > 1 else ""
    calm = kind == "data" and all(account.spike.recovered for account in mine)
    return rule.found(
        Verdict.NOTE if calm else Verdict.WARNING,
        f"{headline(first)} {story(first)}{more}",
        sites=first.sites,
        step=first.since if kind == "overflow" else first.spike.step,
        evidence=_evidence(mine),
    )


def headline(account: Account) -> str:
    """Say how far the loss jumped, and whether it came back.

    Args:
        account: the account of the spike.

    Returns:
        The sentence.
    """
    spike = account.spike
    if not spike.found:
        value = f"{spike.peak:.3g}" if spike.peak == spike.peak else "not recorded"
        return f"No spike: at step {spike.step} the {spike.of} was {value}; in the steps before, {spike.before:.3g}."
    broke = "" if math.isfinite(spike.peak) else f"was not finite from step {spike.highest} on"
    if broke and spike.highest == spike.step:
        before = "" if spike.before != spike.before else f"; before, it was {spike.before:.3g}"
        return f"The {spike.of} {broke}{before}."
    back = f"was back after {count(spike.last - spike.step + 1, 'step')}" if spike.recovered else "did not come back"
    if spike.highest == spike.step:
        return f"The {spike.of} jumped at step {spike.step} from {spike.before:.3g} to {spike.peak:.3g} and {back}."
    reached = broke or f"reached {spike.peak:.3g} at step {spike.highest}, and {back}"
    return f"The {spike.of} began to jump at step {spike.step}, from {spike.before:.3g}, and {reached}."


def story(account: Account) -> str:
    """Say in one sentence what came before a spike.

    Args:
        account: the account of the spike.

    Returns:
        The sentence.
    """
    e, ahead = account.evidence, account.spike.step - account.since
    when = f"at step {account.since}" + (f", {count(ahead, 'step')} before" if ahead else "")
    names = _named(account.sites)
    if account.kind == "data":
        size = f"up to {_times(e['gradient_growth'])} their usual size"
        return f"With it the gradients of {count(float(e['moved']), 'tensor')} were {size}; nothing had moved before."
    if account.kind == "second-moment":
        return f"RMS_t reached {e['rms_t']:.3g} (threshold {metrics.STALE:g}) {when}, first at {names}."
    if account.kind == "attention":
        logits = f" The largest logit went from {e['logit_before']:.3g} to {e['logit']:.3g}." if "logit" in e else ""
        grew = f"had grown to {_times(e['weight_growth'])} their size, beyond {metrics.GREW:g} {when}"
        return f"The weights of {names} {grew}.{logits}"
    if account.kind == "schedule":
        where = "" if e["groups"] == e["of_groups"] else f" of {e['groups']} of {e['of_groups']} groups"
        first = f"; first to move: {names}" if names else ""
        raised = f"had been raised to {_times(e['rate_growth'])} what it was, from {_since(account)} on"
        return f"The learning rate{where} {raised}{first}."
    if account.kind == "overflow":
        if account.since == account.spike.step:
            return "The loss itself was not finite: it broke in the forward pass, or the inputs were not."
        return f"{count(float(e['not_finite']), 'gradient')} of {e['of_tensors']} broke {when}: {names}."
    if account.kind == "outside":
        more = f"the norm of the first by {float(e['changed']):.0%} more than its step allows"
        return f"Something other than the optimizer changed {names} {when}: {more}."
    if account.kind == "instability":
        return f"{count(float(e['moved']), 'tensor')} moved before it, the first {when}: {names}."
    return "Nothing that was recorded moved before it." if e.get("recorded_steps") != 0 else _LOST


def _times(factor: float | int | str) -> str:
    value = float(factor)
    return f"{value:,.0f} times" if value >= 100 else f"{value:.3g} times"


def _since(account: Account) -> str:
    ahead = account.spike.step - account.since
    return f"step {account.since}" + (f", {count(ahead, 'step')} before," if ahead else "")


def _named(sites: tuple[str, ...]) -> str:
    more = f" and {len(sites) - _SHOWN} more" if len(sites) > _SHOWN else ""
    return ", ".join(site.replace("/", ".") for site in sites[:_SHOWN]) + more


def _evidence(accounts: list[Account]) -> Evidence:
    first = accounts[0]
    spike = first.spike
    known = {"before": spike.before, "peak": spike.peak, "since": first.since, "spikes": len(accounts)}
    return {**known, **first.evidence, "steps_of_spikes": [float(account.spike.step) for account in accounts]}
