"""ST-9: the noise of batch statistics as a measure of uncertainty."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pandas as pd
import torch
from matplotlib.figure import Figure as Canvas

from analyses import style
from analyses.claim import Claim, at_least, at_most, by_seed
from analyses.stochasticity.network import logits
from normscope import norms, workbench

ID = "ST-9"
TITLE = "Batch statistics as a measure of uncertainty"
SOURCES = ("S146",)
CAPTION = (
    "Monte Carlo BatchNorm: T = 32 predictions of the test digits, each with the statistics of one batch of "
    "training data, by perceptrons (784-100-100-10) trained with batches of B. (a) The predicted probability of "
    "the class varies more between passes where the prediction is wrong. (b) The negative log likelihood of the "
    "averaged prediction beside that with stored statistics."
)
COLUMNS = (
    "batch",
    "spread_right",
    "spread_wrong",
    "nll_stored",
    "nll_averaged",
    "acc_stored",
    "acc_averaged",
)


@dataclass(frozen=True)
class Setting:
    """What is trained and how often it predicts: examples, batch sizes, passes over the data, T."""

    examples: int = 4000
    batches: tuple[int, ...] = (16, 32, 64, 128, 256)
    epochs: int = 8
    passes: int = 32


def setting(fast: bool) -> Setting:
    """Return the setting."""
    return Setting(examples=1000, batches=(16, 64), epochs=4, passes=12) if fast else Setting()


def run(setting: Setting, seed: int) -> pd.DataFrame:
    """Predict with the statistics of random training batches."""
    train, (images, labels) = workbench.digits(seed, setting.examples)
    rows = []
    for batch in setting.batches:
        model = workbench.classifier(train, seed, batch=batch, epochs=setting.epochs)
        stored = logits(model, images).softmax(-1)
        generator = torch.Generator().manual_seed(seed)
        passes = []
        sampled = copy.deepcopy(model)
        for _ in range(setting.passes):
            index = torch.randperm(len(train[0]), generator=generator)[:batch]
            # recalibrated over one batch, a layer stores that batch's mean and variance
            norms.recalibrate(sampled, [train[0][index]], progress=False)
            passes.append(logits(sampled, images).softmax(-1))
        probability = torch.stack(passes)
        averaged = probability.mean(0)
        predicted = averaged.argmax(-1)
        spread = probability.std(0).gather(1, predicted[:, None]).squeeze(1)
        right = predicted == labels
        rows.append((
            batch,
            float(spread[right].mean()),
            float(spread[~right].mean()),
            *(float(torch.nn.functional.nll_loss(p.log(), labels)) for p in (stored, averaged)),
            *(float((p.argmax(-1) == labels).double().mean()) for p in (stored, averaged)),
        ))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def claims(frame: pd.DataFrame) -> tuple[Claim, ...]:
    """Judge that the spread tells wrong from right, and that averaging helps."""
    return (
        at_least(
            "The spread over passes is larger where the prediction is wrong.",
            "S146, section 4",
            "smallest ratio of mean spread, wrong over right, over all batch sizes",
            by_seed(frame, lambda part: float((part["spread_wrong"] / part["spread_right"]).min())),
            2.0,
        ),
        at_most(
            "The averaged prediction has the better likelihood.",
            "S146, section 4",
            "mean over batch sizes of NLL averaged less NLL with stored statistics (nats)",
            by_seed(frame, lambda part: float((part["nll_averaged"] - part["nll_stored"]).mean())),
            0.0,
            reason="with batches of 16 averaging costs likelihood, so noisy are they; from 32 on it gains little",
        ),
        at_most(
            "Averaging costs no accuracy.",
            "S146, section 4",
            "mean over batch sizes of accuracy with stored statistics less accuracy averaged",
            by_seed(frame, lambda part: float((part["acc_stored"] - part["acc_averaged"]).mean())),
            0.005,
            reason="with batches of 16 the statistics are too noisy",
        ),
    )


def draw(frame: pd.DataFrame, canvas: Canvas) -> None:
    """Draw the spread of right and wrong predictions, and both likelihoods."""
    spread, likelihood = style.panels(canvas, columns=2)
    style.curve(spread, frame, "batch", "spread_wrong", name="wrong", index=1, points=True)
    style.curve(spread, frame, "batch", "spread_right", name="right", index=0, points=True)
    spread.set_yscale("log")
    spread.minorticks_off()
    spread.set_yticks([0.02, 0.05, 0.1, 0.2, 0.3], ["0.02", "0.05", "0.1", "0.2", "0.3"])
    style.curve(likelihood, frame, "batch", "nll_stored", name="stored statistics", index=0, points=True)
    style.curve(likelihood, frame, "batch", "nll_averaged", name="average of 32 batches", index=1, points=True)
    for ax in (spread, likelihood):
        ax.set_xscale("log", base=2)
        ticks = sorted(frame["batch"].unique())
        ax.set_xticks(ticks, [str(tick) for tick in ticks])
        ax.legend()
    style.label(spread, "spread", "batch size $B$", "std of the class's probability")
    style.label(likelihood, "likelihood", "batch size $B$", "NLL on test data (nats)")
