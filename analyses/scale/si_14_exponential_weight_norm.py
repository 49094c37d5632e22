"""SI-14: writing the length of a weight as an exponential makes networks sparse."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.figure import Figure as Canvas

from analyses import style
from analyses.claim import Claim, at_most, by_seed, equal, untestable

ID = "SI-14"
TITLE = "Exponential weight normalization prefers few nodes"
SOURCES = ("S145",)
CAPTION = (
    "A linear classifier of ten nodes with three weights each, exponential loss on 12 separable examples: gradient "
    "descent on the weights (none), or on length and direction of w = e^α v/‖v‖ (exponential). (a) Number of nodes "
    "that count, (Σ‖w_u‖)² / Σ‖w_u‖², as the loss falls. (b) At the end, norm of each node against the norm of its "
    "gradient: proportional without normalization, dashed; with the exponential one few nodes have grown, and the "
    "others stay behind."
)
COLUMNS = ("part", "method", "at", "node", "value", "gradient")

COUNT, LAST, CHECK = "count", "last", "check"
PLAIN, EXPONENTIAL = "none", "exponential"


@dataclass(frozen=True)
class Setting:
    """What is trained: nodes, weights of each, examples, learning rate of the largest node, last log(1/loss)."""

    nodes: int = 10
    width: int = 3
    examples: int = 12
    rate: float = 0.02
    until: float = 100.0
    steps: int = 200000


def setting(fast: bool) -> Setting:
    """Return the setting."""
    return Setting(rate=0.05, until=10.0) if fast else Setting()


def run(setting: Setting, seed: int) -> pd.DataFrame:
    """Train by both methods from equal weights; dividing steps by the loss changes the time they take, not the path."""
    generator = np.random.default_rng(seed)
    labels = generator.choice([-1.0, 1.0], setting.examples)
    features = generator.standard_normal((setting.examples, setting.nodes, setting.width)) * labels[:, None, None]
    start = 0.3 * generator.standard_normal((setting.nodes, setting.width))
    rows: list[tuple[str, str, float, int, float, float]] = []
    for method in (PLAIN, EXPONENTIAL):
        w, next_mark = start.copy(), 1.0
        for _ in range(setting.steps):
            loss, gradient = _loss(features, w)
            sizes = np.linalg.norm(w, axis=1)
            rate = setting.rate if method == PLAIN else setting.rate / sizes.max() ** 2
            if loss >= next_mark:
                rows.append((COUNT, method, next_mark, -1, sizes.sum() ** 2 / (sizes**2).sum(), np.nan))
                next_mark *= 10**0.25
            if loss > setting.until:
                break
            w = _step(w, gradient, rate, method)
        slopes = np.linalg.norm(gradient, axis=1)
        rows += [
            (LAST, method, loss, node, sizes[node] / sizes.max(), slopes[node] / slopes.max())
            for node in range(setting.nodes)
        ]
    rows.append((CHECK, EXPONENTIAL, np.nan, -1, _adaptive(features, start), np.nan))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _loss(features: np.ndarray, w: np.ndarray) -> tuple[float, np.ndarray]:
    """Return log(1/L) of L = mean of exp(-margin), and the gradient of L over L."""
    margins = np.einsum("nup,up->n", features, w)
    least = margins.min()
    shares = np.exp(least - margins)
    log_inverse = least - np.log(shares.mean())
    return float(log_inverse), -np.einsum("n,nup->up", shares / shares.sum(), features)


def _step(w: np.ndarray, gradient: np.ndarray, rate: float, method: str) -> np.ndarray:
    """Descend on the weights, or on the logarithm α of the length and on the direction v, kept at length 1."""
    if method == PLAIN:
        plain: np.ndarray = w - rate * gradient
        return plain
    size = np.linalg.norm(w, axis=1, keepdims=True)
    direction = w / size
    radial = (direction * gradient).sum(1, keepdims=True)
    turned = direction - rate * size * (gradient - radial * direction)
    new: np.ndarray = size * np.exp(-rate * size * radial) * turned / np.linalg.norm(turned, axis=1, keepdims=True)
    return new


def _adaptive(features: np.ndarray, w: np.ndarray) -> float:
    """Return how far a short step of the exponential method is from a plain one with the learning rate ‖w_u‖²."""
    _, gradient = _loss(features, w)
    rate = 1e-6
    moved = _step(w, gradient, rate, EXPONENTIAL) - w
    plain = -rate * np.linalg.norm(w, axis=1, keepdims=True) ** 2 * gradient
    return float(np.linalg.norm(moved - plain) / np.linalg.norm(plain))


def claims(frame: pd.DataFrame) -> tuple[Claim, ...]:
    """Judge the equivalence, the relations between norms and gradients, and sparsity."""
    last = frame[frame["part"] == LAST]
    plain, exponential = (last[last["method"] == method] for method in (PLAIN, EXPONENTIAL))

    def spread(rows: pd.DataFrame) -> float:
        product = (rows["value"] * rows["gradient"])[rows["value"] > 0.1]
        return float(product.max() / product.min())

    counts = frame[frame["part"] == COUNT]
    final = counts[counts["at"] == counts["at"].max()].pivot(index="seed", columns="method", values="value")
    return (
        at_most(
            "Exponential weight normalization is plain descent with the learning rate ‖w_u‖² for each node.",
            "S145, adaptive rate of each node",
            "‖step - plain step‖ / ‖plain step‖, rate 10⁻⁶",
            by_seed(frame[frame["part"] == CHECK], lambda rows: rows["value"].iloc[0]),
            1e-4,
        ),
        equal(
            "Without normalization the norms of nodes become proportional to their gradients.",
            "S145, asymptotic relations",
            "slope of log ‖w_u‖ over log ‖∇_u L‖, last step",
            by_seed(plain, lambda rows: np.polyfit(np.log(rows["gradient"]), np.log(rows["value"]), 1)[0]),
            1.0,
            tolerance=0.05,
        ),
        untestable(
            "Norm times gradient becomes equal over the nodes that grow without bound.",
            "S145, asymptotic relations",
            "largest over smallest ‖w_u‖ ‖∇_u L‖, nodes of norm above a tenth of the largest, last step",
            by_seed(exponential, spread),
            1.0,
            reason="the relation is approached as the logarithm of log(1/L), more slowly than this run lasts",
        ),
        at_most(
            "Exponential weight normalization leaves fewer nodes that count.",
            "S145, asymptotic relations",
            "(Σ‖w_u‖)² / Σ‖w_u‖², exponential over none, last step",
            list(final[EXPONENTIAL] / final[PLAIN]),
            0.9,
        ),
    )


def draw(frame: pd.DataFrame, canvas: Canvas) -> None:
    """Draw the number of nodes, and norms against gradients."""
    counts, relation = style.panels(canvas, columns=2)
    for index, method in enumerate((PLAIN, EXPONENTIAL)):
        own = frame[frame["method"] == method]
        style.curve(counts, own[own["part"] == COUNT], "at", "value", name=method, index=index, points=True)
        last = own[own["part"] == LAST]
        relation.plot(
            last["gradient"], last["value"], style.MARKERS[index], color=style.color(index), label=method, alpha=0.8
        )
    line = np.array([0.1, 1.0])
    style.theory(relation, line, line, name="proportional")
    counts.set_xscale("log")
    relation.set(xscale="log", yscale="log")
    for ax in (counts, relation):
        ax.legend()
    style.label(counts, "nodes that count", r"$\log(1/L)$", r"$(\sum\|w_u\|)^2/\sum\|w_u\|^2$")
    style.label(
        relation,
        "the ten nodes of each seed, last step",
        r"$\|\nabla_u L\|$ over the largest",
        r"$\|w_u\|$ over the largest",
    )
