"""Illustration: which of the survey's analysis figures shows the effect that a finding is about."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from normscope.core.gallery import reproduction

# finding -> figures, each with what to see there; a finding that no figure really shows has none
ILLUSTRATED: Mapping[str, tuple[tuple[str, str], ...]] = {
    "run.diverged": (("CO-13", "the crosses are runs whose learning rate was too large"),),
    "training.learning-rate": (
        ("CO-13", "loss after 150 steps by learning rate, with and without BatchNorm"),
        ("CO-3", "too long first steps leave weights so large that nothing moves them any more"),
    ),
    "propagation.signal-exploding": (("CO-26", "without normalization each residual block doubles the variance"),),
    "propagation.gradient-exploding": (
        ("CO-17", "through BatchNorm alone gradients grow exponentially on their way to the input"),
    ),
    "conditioning.ill-conditioned-inputs": (
        ("CO-1", "the condition number of a layer's input, layer by layer"),
        ("CO-5", "what centering, scaling and whitening do to it, and what gradient descent pays"),
    ),
    "conditioning.ill-conditioned-gradients": (
        ("CO-2", "the largest eigenvalue of the gradient's second moment, layer by layer"),
    ),
    "conditioning.curvature-dominated": (
        ("CO-4", "the last layer's largest eigenvalue grows with depth unless its input is normalized"),
    ),
    "conditioning.rank-collapse": (("CO-16", "without normalization the rank falls to 1 with depth"),),
    "curvature.edge-of-stability": (
        ("CO-20", "gradient descent on least squares diverges right beyond 2 over the largest eigenvalue"),
    ),
    "curvature.outliers": (
        ("CO-6", "the density of the Hessian's eigenvalues, with outliers far from the bulk"),
        ("CO-7", "how far they stand out, and how much of the gradient they hold"),
    ),
    "curvature.negative": (("CO-6", "the negative side of the Hessian's spectrum, and its smallest eigenvalue"),),
    "scale.invariance": (("SI-1", "the gradient of a scale-invariant weight is orthogonal to it"),),
    "scale.effective-rate": (
        ("SI-2", "norms of scale-invariant weights only grow without decay, so effective rates fall"),
        ("SI-3", "momentum makes them grow much faster"),
    ),
    "scale.equilibrium": (
        ("SI-5", "the norm at which growth and decay balance"),
        ("SI-4", "the angle that weights then turn by at each step"),
    ),
    "scale.decay": (
        ("SI-4", "after the learning rate falls, decay takes thousands of steps to the new balance"),
        ("SI-10", "effective rates of weights with and without decay"),
    ),
    "scale.gain-collapse": (
        ("AP-4", "a penalty drives gains to zero, and channels without gain can be pruned"),
        ("RE-5", "where only gains and biases are trained, many gains go to zero"),
    ),
    "noise.small-batch": (
        ("ST-2", "how far an output moves with its batch, by batch size"),
        ("ST-7", "what that costs between training and inference"),
    ),
    "noise.whitening-batch": (
        ("ST-3", "the disturbance grows with the features that are whitened together"),
        ("ST-4", "whitening in groups lessens it"),
    ),
    "mismatch.train-eval-gap": (("ST-7", "the gap between batch and stored statistics, by batch size"),),
    "mismatch.target-shift": (("ST-10", "batch statistics of the served data undo a shift of contrast or brightness"),),
    "mismatch.batch-statistics": (
        ("ST-10", "accuracy with stored statistics and with those of test batches, by kind of shift"),
    ),
    "mismatch.served-in-training-mode": (
        ("ST-10", "on clean data, small test batches cost accuracy when their statistics are used"),
    ),
    "structure.few-values": (
        ("ST-6", "how far mean and deviation scatter, by the number of values"),
        ("RE-2", "group normalization of two values leaves signs, and nothing is learned"),
    ),
}


@dataclass(frozen=True)
class Illustration:
    """A figure that shows what a finding is about.

    Attributes:
        id: id of the figure, as "SI-5".
        title: its title.
        shows: what to see there, without a full stop.
    """

    id: str
    title: str
    shows: str

    @property
    def command(self) -> str:
        """What shows its claims and the path of its picture."""
        return f"normscope figures {self.id}"


def illustrations(finding: str) -> tuple[Illustration, ...]:
    """Return the figures that show the effect of a finding.

    Args:
        finding: id of a finding.

    Returns:
        The figures, the best first; none where no figure shows it.

    >>> [item.id for item in illustrations("conditioning.rank-collapse")]
    ['CO-16']
    """
    return tuple(Illustration(id, reproduction(id).title, shows) for id, shows in ILLUSTRATED.get(finding, ()))
