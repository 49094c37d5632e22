"""What each normalization has to compute: passes over memory, multiplications in products, functions of each entry."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """Arithmetic of one forward and one backward pass, for each entry of the input.

    Attributes:
        what: the steps, in words.
        forward: tensors of the input's size that forward reads or writes, what is small or in cache not counted.
        backward: the same of backward.
        columns: multiplications and additions in matrix products, forward and backward together.
        functions: transcendental functions and selections, by name of torch.
        sums: how many of the tensors are only summed up; those that a product reads are not.
    """

    what: str
    forward: int
    backward: int
    columns: int = 0
    functions: tuple[str, ...] = ()
    sums: int = 3


def whitening(size: int, what: str = "", forward: int = 3, backward: int = 5) -> Work:
    """Return the work of whitening `size` features together: five products, two of them forward.

    Covariance and W x; g x^T, W^T g and D x.
    """
    return Work(f"whiten {size} features{what}", forward, backward, 5 * size, sums=0)


MAP = Work("y = f(x); gx = f'(x) g", 2, 3, sums=0)
STORED = Work("moments for later; y = a x + b, a and b constant; gx = a g", 3, 3, sums=1)
CENTER = Work("mean; x - mean; gx = g - mean g", 3, 3, sums=2)
MOMENTS = Work("moments; y = a x + b; sums of g and g x; gx = a g + c x + d", 3, 5)
SPREAD = Work("mean; spread about it or extremes; y = a x + b; backward as for moments", 4, 5, sums=4)
TWICE = Work("moments and y = a x + b, one after the other, twice", 6, 10, sums=6)

# rows that are neither in here nor in the tables below are MOMENTS
OTHERS = {
    MAP: "layer-scale pop-art",
    STORED: "precise-batch detached-layer",
    CENTER: "mean-only-batch mean-subtraction adversarial-statistics",
    SPREAD: "l1-batch lp-batch range-batch local-contrast divisive",
    TWICE: "batch-channel domain-invariant power sandwich-layer peri-layer",
}
WORK = {name: work for work, names in OTHERS.items() for name in names.split()} | {
    "dynamic-tanh": Work("y = a tanh(b x) + c", 2, 3, functions=("tanh",), sums=0),
    "dynamic-erf": Work("y = a erf(b x + c) + d; backward needs the density", 2, 3, functions=("erf", "exp"), sums=0),
    "gated-rms": Work("x silu(gate); moments; y = a x", 4, 7, functions=("exp",)),
    "local-response": Work("sum of squares of 5 channels; a power", 3, 4, functions=("log", "exp"), sums=0),
    "generalized-batch": Work("a quantile, the mean beyond it, y = a x + b", 4, 5, functions=("kthvalue",)),
    "clipped-layer": Work("two quantiles; moments of the clipped", 4, 5, functions=("kthvalue", "kthvalue")),
    "dynamic-layer": Work("moments; mean of tanh(W x)", 4, 6, 3 * 64, ("tanh",)),
    "evonorm": Work("moments; x / max(a, v x + b); sums; gradient", 3, 5),
    "mixture": Work("center; 3 steps of EM of 2 components; mixture of two maps", 8, 5, 3 * 8 + 12),
    "attentive-semantic": Work("16 regions; moments of each; mixture of 16 maps", 4, 5, 18 * 16),
    "attentive-context": Work("attention of each position; weighted moments", 4, 7, 6),
    "centering": Work("mean for later; W (x - c); W^T g; g x^T", 3, 4, 3 * 64, sums=1),
    "factor-centering": Work("mean for later; W (x - c); W^T g; g x^T", 3, 4, 3 * 64, sums=1),
    "mean-normalized-sgd": Work("mean for later; W x; W^T g; g x^T", 3, 4, 3 * 64, sums=1),
    "natural-neural-network": Work("covariance for later; V U (x - c); the gradients", 4, 4, 4 * 64, sums=0),
    "generalized-whitened": Work("covariance for later; V U (x - c); moments; the gradients", 7, 9, 4 * 64),
    "linear-transformations": Work("A f(Bx) + S x; the gradients", 5, 8, 9 * 64, ("tanh",), sums=0),
    "fine-grained-batch": Work("two partial sums; moments of each; their sum", 8, 8, 3 * 64),
    "isotropic-batch": Work("covariance for later; y = a x", 3, 2, 64, sums=0),
    "recurrent-batch-input": Work("W x; moments", 5, 7, 3 * 64),
    "dynamic-instance": Work("moments; a 3 x 3 convolution of the example", 5, 8, 3 * 9 * 64),
    "adaptive-convolution": Work("moments of windows; a 3 x 3 convolution of the example", 8, 12, 3 * 9 * 64),
    "iterative": whitening(64),
    "population-estimation": whitening(64),
    "input-whitening": Work("covariance for later; W (x - c); W^T g", 3, 2, 3 * 64, sums=0),
    "whitening-coloring": whitening(64, ", color them"),
    "network-deconvolution": whitening(64),
    "channel-equilibrium": whitening(64, ", mix with x"),
    "concept-whitening": whitening(64, ", turn them"),
    "invariance-exploiting": whitening(64, " after division by a local mean square", 4, 7),
    "decorrelated-batch": whitening(16),
    "batch-whitening-variants": whitening(16),
    "shuffled-decorrelated": whitening(16, " in random order"),
    "switchable-whitening": whitening(16, ", by batch and instance together"),
    "groupwise-whitening-coloring": Work("mean; mix 16 features; the gradients", 3, 5, 3 * 16, sums=1),
    "domain-whitening": whitening(4),
    "group-whitening": whitening(32),
    # in seconds the slowest row; its convolutions are those of any network
    "spatially-adaptive": Work("moments; y = a x + b, a and b from convolutions", 5, 9, 3 * 9 * (2 * 128 + 6)),
}


def work(name: str) -> Work:
    """Return the arithmetic of a row of the zoo."""
    return WORK.get(name, MOMENTS)
