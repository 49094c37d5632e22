"""AP-1: the statistics of a batch tell its domain."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure as Canvas
from sklearn.manifold import TSNE
from sklearn.metrics import silhouette_score
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn

from analyses import style
from analyses.claim import Claim, at_least, by_seed
from normscope import applications, workbench

ID = "AP-1"
TITLE = "The statistics of a batch tell its domain"
SOURCES = ("li2016",)
CAPTION = (
    "Each point is a batch of 64 digits: mean and log variance of all 100 units of a layer, in the plane by "
    "t-SNE. The domains are clean and shifted digits; the perceptron (784-100-100-10) was trained on clean ones "
    "and knows no domain. Batches of a domain lie together in the shallow layer and in the deep one, which is why "
    "adapting these statistics adapts the network."
)
COLUMNS = ("layer", "domain", "x", "y", "silhouette", "neighbor")

DOMAINS = ("clean", "contrast", "noise", "blur")
_LAYERS = {"shallow": "layer1.linear", "deep": "layer2.linear"}


@dataclass(frozen=True)
class Setting:
    """What is trained and drawn: examples, passes over the data, batches of each domain, examples of a batch."""

    examples: int = 4000
    epochs: int = 4
    batches: int = 40
    batch: int = 64


def setting(fast: bool) -> Setting:
    """Return the setting."""
    return Setting(examples=1000, batches=15, batch=32) if fast else Setting()


def run(setting: Setting, seed: int) -> pd.DataFrame:
    """Take the statistics of batches of each domain; `silhouette` and `neighbor` are of all batches in a layer."""
    train, _ = workbench.digits(seed, setting.examples)
    model = workbench.classifier(train, seed, epochs=setting.epochs)
    generator = torch.Generator().manual_seed(seed)
    domains = {name: train[0] if name == "clean" else workbench.corrupt(train[0], name, seed=seed) for name in DOMAINS}
    drawn = {
        name: [
            images[torch.randperm(len(images), generator=generator)[: setting.batch]] for _ in range(setting.batches)
        ]
        for name, images in domains.items()
    }
    labels = np.repeat(DOMAINS, setting.batches)
    parts = []
    for name, path in _LAYERS.items():
        points = _statistics(model, path, drawn)
        plane = TSNE(perplexity=20, random_state=seed, init="pca").fit_transform(points)
        columns = {"layer": name, "domain": labels, "x": plane[:, 0], "y": plane[:, 1]}
        parts.append(
            pd.DataFrame({**columns, "silhouette": silhouette_score(points, labels), "neighbor": _own(points, labels)})
        )
    return pd.concat(parts, ignore_index=True)[list(COLUMNS)]


def _statistics(model: nn.Module, path: str, drawn: dict[str, list[Tensor]]) -> np.ndarray:
    """Return mean and log variance of a layer's units for each batch, standardized over all batches."""
    found = torch.cat([applications.domain_statistics(model, path, batches) for batches in drawn.values()])
    mean, var = found.chunk(2, dim=1)
    points = torch.cat((mean, (var + 1e-8).log()), dim=1)
    return ((points - points.mean(0)) / points.std(0)).double().numpy()


def _own(points: np.ndarray, labels: np.ndarray) -> float:
    """Return the share of points whose nearest other point has their label."""
    near = KNeighborsClassifier(1).fit(points, labels).kneighbors(return_distance=False)
    return float((labels[near[:, 0]] == labels).mean())


def claims(frame: pd.DataFrame) -> tuple[Claim, ...]:
    """Judge that domains lie apart in both layers."""
    return tuple(
        claim
        for layer in _LAYERS
        for claim in (
            at_least(
                f"Batch statistics of the {layer} layer form a cluster for each domain.",
                "li2016, figure 1",
                "silhouette of the domains in the space of the statistics",
                by_seed(frame[frame["layer"] == layer], lambda part: part["silhouette"].iloc[0]),
                0.1,
            ),
            at_least(
                f"In the {layer} layer the nearest batch is of the same domain.",
                "li2016, figure 1",
                "share of batches whose nearest neighbor is of their domain",
                by_seed(frame[frame["layer"] == layer], lambda part: part["neighbor"].iloc[0]),
                0.9,
                reason="clean and noisy batches overlap: noise moves no mean and raises variances by 1.4 only",
            ),
        )
    )


def draw(frame: pd.DataFrame, canvas: Canvas) -> None:
    """Draw the batches of the first seed in the plane."""
    shown = frame[frame["seed"] == frame["seed"].min()]
    for ax, layer in zip(style.panels(canvas, columns=2, height=3.1), _LAYERS, strict=True):
        part = shown[shown["layer"] == layer]
        for index, domain in enumerate(DOMAINS):
            own = part[part["domain"] == domain]
            marker = style.MARKERS[index]
            ax.plot(own["x"], own["y"], marker, color=style.color(index), label=domain, alpha=0.75, markeredgewidth=0)
        ax.set(xticks=[], yticks=[])
        ax.legend(ncols=4, loc="upper center", bbox_to_anchor=(0.5, 0.0), handletextpad=0.1, columnspacing=0.8)
        style.label(ax, f"{layer} layer, silhouette {part['silhouette'].iloc[0]:.2f}", "", "")
