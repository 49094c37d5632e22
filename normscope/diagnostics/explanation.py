"""Explanation: what each finding means, why it happens, how to mend it, and where its threshold comes from."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from normscope.core.errors import ArgumentError
from normscope.core.source import Source, cite
from normscope.diagnostics import (
    DIAGNOSTICS,
    Diagnostic,
    attention,
    conditioning,
    curvature,
    gap,
    id_of,
    mismatch,
    noise,
    optimizer,
    precision,
    propagation,
    run,
    scale,
    spikes,
    structure,
    training,
)
from normscope.diagnostics.rule import Rule

SUBJECTS: Mapping[str, str] = {
    "run": "is the record complete, and did training last",
    "spikes": "jumps of the loss, and which tensors moved first",
    "training": "the loop: which weights it moves, how far, from which start",
    "precision": "what low precision and small gradients take from a step",
    "propagation": "signal and gradient through depth",
    "attention": "logits and entropy of heads, level of the output",
    "conditioning": "covariance spectra of inputs and gradients",
    "curvature": "the Hessian of the loss",
    "scale": "scale invariance, decay, effective learning rates",
    "noise": "randomness of batches and what it does",
    "mismatch": "training against inference statistics",
    "structure": "normalization layers as they stand in the model",
    "optimizer": "parameters, groups and settings as they stand",
}

# what the threshold of each finding is compared with
COMPARED: Mapping[str, str] = {
    "run.no-data": "sampled steps",
    "run.diverged": "last steps whose loss or gradient is not finite",
    "run.probe-failed": "probes that failed",
    "run.unmeasured": "outputs that were not measured",
    "run.compiled": "outputs of compiled modules that were measured",
    "run.skipped-steps": "fraction of skipped steps in the later half of the run",
    "run.no-normalization": "normalization layers",
    "spikes.overflow": "gradients that were not finite at the step where they first were",
    "spikes.outside": "change of a weight's norm beyond the length of its step, over the norm",
    "spikes.schedule": "learning rate over its median before",
    "spikes.attention": "norm of a weight that makes queries or keys over that when it began to move",
    "spikes.second-moment": "RMS_t of a tensor in the steps before",
    "spikes.data": "robust standard deviations of the gradient's logarithm above the steps before",
    "spikes.instability": "robust standard deviations of a tensor's logarithm above the steps before",
    "spikes.undecided": "robust standard deviations of a tensor's logarithm above the steps before",
    "training.uncleared-gradients": "share of a gradient that the step before has left",
    "training.learning-rate": "length of a step over the norm of the median weight",
    "training.untrained": "parameters that an optimizer holds and no step moves",
    "training.clipping": "fraction of steps whose gradient norm is the bound",
    "training.input-scale": "rms of the first weighted layer's input",
    "training.initial-loss": "first loss over that of a uniform guess",
    "training.stuck-weights": "fraction of entries in half precision that a step does not move",
    "training.decay": "steps over which a decayed weight averages its updates",
    "precision.adam-eps": "share of entries whose steps eps shortens by a tenth or more",
    "precision.loss-scale": "loss scale at the end",
    "propagation.signal-exploding": "rms of the output of the last layer over that of the first, or of late over early",
    "propagation.signal-vanishing": "rms of the output, or its spread over inputs, of the first layer over the last",
    "propagation.gradient-exploding": "gradient norm of the first layer over that of the last, or of late over early",
    "propagation.gradient-vanishing": "gradient norm of the last layer over that of the first",
    "propagation.dead-units": "fraction of a layer's units that are zero for every input",
    "propagation.saturated-units": "fraction of values within 1 % of the ends of the range",
    "propagation.non-finite": "channels that hold NaN or infinity",
    "propagation.outlier-channels": "rms of the largest channel over that of the median one",
    "propagation.massive-activations": "largest magnitude at the input of a norm, which is also 1000 times the median",
    "propagation.eps-dominates": "share of eps in variance + eps, in the median channel or token",
    "attention.logits-grow": "largest attention logit of a head",
    "attention.entropy-collapse": "entropy of the median head of a layer over its largest value",
    "attention.output-logits": "log of the sum of the exponentials of the output",
    "conditioning.ill-conditioned-inputs": "largest over median eigenvalue of the second moment of a layer's input",
    "conditioning.ill-conditioned-gradients": "largest over median eigenvalue of the second moment of output gradients",
    "conditioning.curvature-dominated": "largest over median curvature of a layer (eigenvalue of its Fisher matrix)",
    "conditioning.rank-collapse": "effective rank of the input at the first hidden layers over that at the last",
    "curvature.edge-of-stability": "largest eigenvalue of the Hessian over what the learning rate allows",
    "curvature.outliers": "largest eigenvalue of the Hessian over the one that ends the outliers",
    "curvature.trace-dominated": "share of one layer in the trace of the Hessian",
    "curvature.negative": "share of negative eigenvalues in the absolute mass of the spectrum",
    "scale.invariance": "|<weight, gradient>| over the product of norms, in units of a random direction's",
    "scale.effective-rate": "growth or shrinkage of a weight's norm since the start",
    "scale.equilibrium": "growth of a weight's norm over its decay",
    "scale.decay": "time constants of decay that the run has lasted",
    "scale.gain-decay": "weight_decay of the group that holds gains and biases",
    "scale.bias-before-norm": "norm of the bias's gradient over that of the weight beside it",
    "scale.gain-collapse": "fraction of a layer's gains below a hundredth of the usual one",
    "noise.small-batch": "how far an output moves with its batch, relative to its size",
    "noise.whitening-batch": "values for each feature that is whitened",
    "noise.batches-not-random": "variance of batch means over that of random draws",
    "noise.gradient-noise": "factor between the batch size and the one at which noise equals signal",
    "mismatch.running-statistics": "divergence of the batch from the running statistics, in nats",
    "mismatch.train-eval-gap": "held loss with running statistics over that with batch statistics",
    "mismatch.never-updated": "movement of running statistics between sampled steps",
    "mismatch.momentum": "weight of the newest batch in the running statistics",
    "mismatch.updated-twice": "updates of running statistics for each training forward",
    "mismatch.evaluation-mode": "divergence of the batch from the stored statistics, in nats",
    "mismatch.tiny-variance": "fraction of channels with a running variance below eps",
    "mismatch.stored-statistics": "chance of a difference of the metric as large as this",
    "mismatch.target-shift": "chance of a difference of the metric as large as this",
    "mismatch.served-in-training-mode": "chance of a difference of the metric as large as this",
    "mismatch.batch-statistics": "chance of a difference of the metric as large as this",
    "mismatch.norm-cost": "chance of a difference of the metric as large as this, over all norms",
    "mismatch.broken-statistics": "stored numbers that are no statistics",
    "mismatch.frozen-norms": "layers that cannot be switched",
    "structure.forward-fails": "errors of a normalization layer on the example",
    "structure.few-values": "numbers that one mean or variance is taken of",
    "structure.dropout-before-norm": "variance in training over that in inference, at least",
    "structure.never-reached": "layers that no forward pass calls",
    "structure.missing-norm": "places without the layer that all others alike have",
    "structure.shared-norm": "calls of a layer with running statistics in a forward pass",
    "structure.eps": "eps of a normalization layer",
    "structure.mixed-kinds": "kinds of normalization in the model",
    "structure.zero-gains": "largest gain of a layer",
    "structure.frozen-gains": "layers that are frozen but move their running statistics",
    "structure.unsynchronized": "processes that train together",
    "optimizer.missing-parameters": "trainable parameters that no optimizer holds",
    "optimizer.parameter-twice": "groups that hold a parameter",
    "optimizer.eps": "eps of the optimizer, for weights in float16",
    "optimizer.decay-lost": "learning rate times weight decay, for weights in bfloat16",
    "optimizer.gains-stuck": "learning rate over a gain in bfloat16",
}

# what the findings of normscope.gap tell
GAP: Mapping[str, str] = {
    "mismatch.stored-statistics": "a model is better with statistics taken anew of its training data",
    "mismatch.target-shift": "the data that are served differ from those of training, and what gives the loss back",
    "mismatch.served-in-training-mode": "a model is served with the statistics of each batch",
    "mismatch.batch-statistics": "the statistics of each batch are better than those that are stored",
    "mismatch.norm-cost": "one normalization layer by itself costs what others do not",
    "mismatch.broken-statistics": "stored statistics are NaN, infinite, or negative variances",
    "mismatch.frozen-norms": "normalization layers keep no statistics that could be taken anew",
}
# the level of their tests
GAP_LEVEL: Mapping[str, float] = {
    f"mismatch.{name}": 0.01
    for name in ("stored-statistics", "target-shift", "served-in-training-mode", "batch-statistics", "norm-cost")
}

# of findings whose cause or remedy depends on what was found
_CAUSES: Mapping[str, str] = {
    "run.no-data": "The run was too short, or was attached to after it had ended.",
    "mismatch.batch-statistics": "Stored statistics do not describe these batches, each of which describes itself.",
}
_REMEDIES: Mapping[str, str] = {
    "run.no-data": "Call attach before the first optimizer step, and train past a second sampled step (every=).",
    "mismatch.batch-statistics": "Recalibrate on data like these; where they change all the time, use "
    "normscope.applications.adaptation.prediction_time, with batches as large as these.",
    "mismatch.frozen-norms": "Nothing, if it is meant; else put torch.nn.BatchNorm2d in their place first.",
    "noise.gradient-noise": "Far below that batch size a larger batch, or a lower learning rate, saves steps; far "
    "above it a smaller batch saves samples.",
}


@dataclass(frozen=True)
class Explanation:
    """What a finding says, whatever it was found on.

    Attributes:
        id: "subject.name".
        what: what is judged.
        cause: what most likely brings it about.
        remedy: what to do.
        compared: what is compared with the threshold.
        threshold: the number that decides, where there is one.
        origin: where the threshold comes from.
        source: the work that explains the finding.
    """

    id: str
    what: str
    cause: str
    remedy: str
    compared: str
    threshold: float | None
    origin: str
    source: Source


def explain(name: str) -> Explanation:
    """Explain a finding.

    Args:
        name: its id, as "propagation.dead-units"; without the subject where that is unique.

    Returns:
        The explanation.

    Raises:
        ArgumentError: if no finding has this id; it names the closest.

    >>> explain("dead-units").compared
    "fraction of a layer's units that are zero for every input"
    """
    known = explanations()
    alike = [key for key in known if name in (key, key.partition(".")[2])]
    if len(alike) == 1:
        return known[alike[0]]
    meant = alike or _closest(name, known)
    hint = f"did you mean {' or '.join(map(repr, meant))}? " if meant else ""
    raise ArgumentError(f"id={name!r} is unknown; {hint}`normscope findings` lists all {len(known)} with a line each.")


def explanations() -> dict[str, Explanation]:
    """Return the explanations of all findings by id, in the order in which they are judged."""
    modules = (
        run,
        spikes,
        training,
        precision,
        propagation,
        attention,
        conditioning,
        curvature,
        scale,
        noise,
        mismatch,
        structure,
        optimizer,
    )
    rules = {rule.id: rule for module in modules for rule in vars(module).values() if isinstance(rule, Rule)}
    judged = {id_of(judge): _explained(_what(judge), rules[id_of(judge)]) for judge in DIAGNOSTICS}
    compared = {rule.id: rule for rule in vars(gap).values() if isinstance(rule, Rule)}
    every = judged | {name: _explained(f"whether {what}.", compared[name]) for name, what in GAP.items()}
    order = list(SUBJECTS)
    return dict(sorted(every.items(), key=lambda item: order.index(item[0].partition(".")[0])))


def _closest(name: str, known: Iterable[str]) -> list[str]:
    """Return the ids closest to a name, whole or without their subjects."""
    spelled = {part: key for key in known for part in (key, key.partition(".")[2])}
    found = difflib.get_close_matches(name, spelled, n=3)
    return list(dict.fromkeys(spelled[part] for part in found))


def _what(judge: Diagnostic) -> str:
    return (inspect.getdoc(judge) or "").partition("\n\nArgs:")[0].removeprefix("Judge ")


def _explained(told: str, rule: Rule) -> Explanation:
    origin = rule.threshold_source
    return Explanation(
        id=rule.id,
        what=" ".join(told.split()),
        cause=rule.cause or _CAUSES.get(rule.id, ""),
        remedy=rule.remedy or _REMEDIES.get(rule.id, ""),
        compared=COMPARED.get(rule.id, ""),
        threshold=GAP_LEVEL.get(rule.id, 0.0) if rule.threshold is None else rule.threshold,
        origin=origin if ":" in origin else str(cite(origin)),
        source=cite(rule.source),
    )
