"""CO-24: normalization methods as maps onto spheres, the growth of weights, and what an attack makes of it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import pandas as pd
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure as Canvas
from torch import Tensor, nn

from analyses import style
from analyses.claim import Claim, at_least, at_most, by_seed
from analyses.conditioning.network import digits
from normscope import norms, weights, workbench

ID = "CO-24"
TITLE = "Normalization maps onto spheres, so weights grow; and a normalized network is attacked"
SOURCES = ("S115", "S239")
CAPTION = (
    "Perceptrons 784-64-64-64-10 without hidden biases on MNIST-4000, SGD, η = 0.1, no decay. BatchNorm (each channel "
    "over the batch), LayerNorm (each sample) and weight normalization (each row of weights) put vectors on spheres, "
    "so gradients are tangent and (a) the norm of the hidden weights (of v with weight normalization) never falls. (b) "
    "Test accuracy under an attack by one signed gradient step of length ε on every pixel (deviation 1)."
)
COLUMNS = ("network", "quantity", "at", "value")

NONE, BATCH, LAYER, WEIGHT = "none", "BatchNorm", "LayerNorm", "weight normalization"
NETWORKS = (NONE, BATCH, LAYER, WEIGHT)


@dataclass(frozen=True)
class Setting:
    """Network, training, lengths of the attack."""

    sizes: tuple[int, ...] = (784, 64, 64, 64, 10)
    lr: float = 0.1
    batch: int = 128
    steps: int = 500
    every: int = 10
    lengths: tuple[float, ...] = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4)


def setting(fast: bool) -> Setting:
    """Return the setting."""
    return Setting(sizes=(784, 32, 32, 10), steps=100) if fast else Setting()


def run(setting: Setting, seed: int) -> pd.DataFrame:
    """Train the networks; norms by step, how far from spheres, and accuracy under attack."""
    train, test = digits(seed)
    rows: list[tuple[str, str, float, float]] = []
    for network in NETWORKS:
        torch.manual_seed(seed)
        model = _network(setting, network)
        optimizer = torch.optim.SGD(model.parameters(), lr=setting.lr)
        batches = workbench.batches(*train, setting.batch, torch.Generator().manual_seed(seed))
        sizes = [_squared(model)]
        for step in range(setting.steps):
            if step % setting.every == 0:
                rows.append((network, "norm", step, (sizes[-1] / sizes[0]) ** 0.5))
            workbench.fit(model, optimizer, batches, workbench.cross_entropy, steps=1, progress=False)
            sizes.append(_squared(model))
        least = min(after / before - 1 for before, after in pairwise(sizes))
        rows.append((network, "least growth", 0.0, least))
        rows.append((network, "off sphere", 0.0, _off_sphere(model, network, train[0][:512])))
        model.eval()
        rows += [(network, "accuracy", length, _attacked(model, test, length)) for length in setting.lengths]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _network(setting: Setting, network: str) -> nn.Sequential:
    def norm(features: int) -> nn.Module:
        return norms.build("bn" if network == BATCH else "ln", features, eps=1e-12)

    model = workbench.mlp(setting.sizes, norm if network in (BATCH, LAYER) else None, bias=False)
    if network == WEIGHT:
        for layer in list(model.children())[1:-1]:
            weights.apply(layer, "weight-normalization")
    return model


def _directions(model: nn.Module) -> list[Tensor]:
    """Return the hidden weights that are trained, of weight normalization v."""
    names = (".linear.weight", ".linear.parametrizations.weight.original1")
    return [weight.detach() for name, weight in model.named_parameters() if name.endswith(names)]


def _squared(model: nn.Module) -> float:
    return sum(float(weight.double().square().sum()) for weight in _directions(model))


def _off_sphere(model: nn.Sequential, network: str, images: Tensor) -> float:
    """Return the largest relative distance of what is normalized from its sphere, before scales and shifts."""
    if network == NONE:
        return float("nan")
    if network == WEIGHT:
        rows = _directions(model)[0]
        return float((F.normalize(rows, dim=1).norm(dim=1) - 1).abs().max())
    layer = model.get_submodule("layer1")
    with torch.no_grad():
        z = layer.get_submodule("linear")(images.flatten(1))
        axis = 0 if network == BATCH else 1
        norm = norms.build("bn" if network == BATCH else "ln", z.shape[1], eps=1e-12, affine=False)
        away = norm(z).norm(dim=axis) / z.shape[axis] ** 0.5 - 1
    return float(away.abs().max())


def _attacked(model: nn.Module, test: tuple[Tensor, Tensor], length: float) -> float:
    inputs = test[0].clone().requires_grad_()
    (slope,) = torch.autograd.grad(workbench.cross_entropy(model(inputs), test[1]), inputs)
    with torch.no_grad():
        return float(workbench.accuracy(model(inputs + length * slope.sign()), test[1]))


def claims(frame: pd.DataFrame) -> tuple[Claim, ...]:
    """Judge spheres, growth, and vulnerability."""

    def of(network: str, quantity: str, at: float = 0.0) -> list[float]:
        part = frame[(frame["network"] == network) & (frame["quantity"] == quantity) & (frame["at"] == at)]
        return by_seed(part, lambda seeds: seeds["value"].iloc[0])

    normalized = frame[frame["network"] != NONE]
    length = 0.1
    return (
        at_most(
            "BatchNorm, LayerNorm and weight normalization put vectors on spheres.",
            "S115, section 3",
            "largest relative distance from the sphere over methods",
            by_seed(normalized[normalized["quantity"] == "off sphere"], lambda part: part["value"].max()),
            1e-4,
        ),
        at_least(
            "So the norm of the weights grows at every step.",
            "S115, section 5",
            "smallest relative growth of ‖w‖² in a step, over methods, float32",
            by_seed(normalized[normalized["quantity"] == "least growth"], lambda part: part["value"].min()),
            -1e-6,
        ),
        at_least(
            "The network with BatchNorm is more vulnerable to an attack than the one without.",
            "S239, section 3",
            f"test accuracy under the attack with ε = {length}, none less BatchNorm",
            [a - b for a, b in zip(of(NONE, "accuracy", length), of(BATCH, "accuracy", length), strict=True)],
            0.05,
            reason="On these digits and at this depth the two are attacked about equally.",
        ),
        at_least(
            "Without an attack the network with BatchNorm is at least as good.",
            "S239, section 3",
            "test accuracy, BatchNorm less none",
            [a - b for a, b in zip(of(BATCH, "accuracy"), of(NONE, "accuracy"), strict=True)],
            0.0,
            reason="The difference is within the noise of 1000 test images.",
        ),
    )


def draw(frame: pd.DataFrame, canvas: Canvas) -> None:
    """Draw norms by step and accuracy by the length of the attack."""
    norm, accuracy = style.panels(canvas, columns=2)
    for index, network in enumerate(NETWORKS):
        part = frame[frame["network"] == network]
        style.curve(norm, part[part["quantity"] == "norm"], "at", "value", name=network, index=index)
        attacked = part[part["quantity"] == "accuracy"]
        style.curve(accuracy, attacked, "at", "value", name=network, index=index, points=True)
    accuracy.set_ylim(0, 1.02)
    norm.legend()
    accuracy.legend()
    style.label(norm, "hidden weights", "step $t$", r"$\|w_t\|\,/\,\|w_0\|$")
    style.label(accuracy, "under attack", r"length $\varepsilon$ of the attack", "test accuracy")
