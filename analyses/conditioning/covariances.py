"""Spectra of layers' inputs and gradients through training, for CO-1 and CO-2."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import pandas as pd
import torch
from torch import nn

import normscope as ns
from analyses.conditioning.network import digits, perceptron
from normscope import workbench

NORMS: Final = {"none": None, "BatchNorm": nn.BatchNorm1d}


@dataclass(frozen=True)
class Training:
    """Width and number of hidden layers, images, learning rate, and the steps after which the network is examined."""

    width: int = 64
    depth: int = 20
    images: int = 1024
    lr: float = 0.1
    looks: tuple[int, ...] = (0, 100)


def examined(training: Training, seed: int) -> pd.DataFrame:
    """Train with the full batch, with and without BatchNorm, and examine the linear layers.

    Args:
        training: what is trained.
        seed: of data and weights.

    Returns:
        A frame with columns network, step, loss, layer (from 1, the last is the head), factor ("input" or "gradient"),
        largest (λmax of the second moment) and median (λ at 50 %).
    """
    (images, labels), _ = digits(seed)
    batch = images[: training.images], labels[: training.images]
    sizes = (784, *[training.width] * training.depth, 10)
    parts = []
    for network, norm in NORMS.items():
        model = perceptron(sizes, norm, seed)
        optimizer = torch.optim.SGD(model.parameters(), lr=training.lr)
        done = 0
        for look in training.looks:
            if look > done:
                workbench.fit(
                    model,
                    optimizer,
                    [batch] * (look - done),
                    workbench.cross_entropy,
                    steps=look - done,
                    progress=False,
                )
                done = look
            parts.append(_look(model, batch).assign(network=network, step=look))
    return pd.concat(parts, ignore_index=True)


def _look(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> pd.DataFrame:
    record = ns.examine(model, workbench.cross_entropy, [batch], layers=nn.Linear, probes="covariance", progress=False)
    found = record.frame()
    found = found[found["stat"].isin(("moment.max", "moment.p50")) & found["site"].str.contains("input|output")]
    wide = found.astype({"site": str, "role": str}).pivot_table(
        index=["site", "role"], columns="stat", values="value", observed=True, sort=False
    )
    wide = wide.rename(columns={"moment.max": "largest", "moment.p50": "median"}).reset_index()
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    wide["layer"] = [names.index(site.partition("/")[0]) + 1 for site in wide["site"]]
    wide["factor"] = wide["role"].map({"value": "input", "gradient": "gradient"})
    with torch.no_grad():
        wide["loss"] = float(workbench.cross_entropy(model(batch[0]), batch[1]))
    return wide[["loss", "layer", "factor", "largest", "median"]]
