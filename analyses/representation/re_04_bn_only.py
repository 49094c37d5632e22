"""RE-4: training BatchNorm and only BatchNorm."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
from matplotlib.figure import Figure as Canvas

from analyses import style
from analyses.claim import Claim, at_least, by_seed
from analyses.representation.bn_only import ALL, BN_ONLY, HEAD, TWO, small_digits, trained
from normscope import workbench

ID = "RE-4"
TITLE = "Training BatchNorm and only BatchNorm"
SOURCES = ("S154",)
CAPTION = (
    "Residual networks of 16 channels (digits of 7 x 7 pixels, 20 passes over 1500), all weights as initialized "
    "but those named. (a) γ and β alone learn the digits, the better the deeper the network, though convolutions "
    "and head are random; as many weights of the convolutions, drawn at random, learn far less. (b) Beside the "
    "head alone and all weights, for the deepest network."
)
COLUMNS = ("way", "depth", "parameters", "train", "test")


@dataclass(frozen=True)
class Setting:
    """What is trained: depths in blocks, channels, examples, passes over the data."""

    depths: tuple[int, ...] = (1, 2, 4, 8)
    channels: int = 16
    examples: int = 1500
    epochs: int = 20


def setting(fast: bool) -> Setting:
    """Return the setting."""
    return Setting(depths=(1, 2), examples=500, epochs=6) if fast else Setting()


def run(setting: Setting, seed: int) -> pd.DataFrame:
    """Train in each way, in those beside γ and β and two weights for the largest depth only."""
    train, test = small_digits(seed, setting.examples)
    runs = [(way, depth) for depth in setting.depths for way in (BN_ONLY, TWO)]
    runs += [(way, setting.depths[-1]) for way in (HEAD, ALL)]
    rows = []
    for way, depth in runs:
        model = trained(way, depth, train, seed, channels=setting.channels, epochs=setting.epochs)
        count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        if way == TWO:
            count = 2 * sum(parameter.shape[0] for parameter in model.parameters() if parameter.requires_grad)
        rows.append((way, depth, count, *(workbench.evaluate(model, [pair]) for pair in (train, test))))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def claims(frame: pd.DataFrame) -> tuple[Claim, ...]:
    """Judge that γ and β suffice for much, and more than as many other weights."""

    def accuracy(way: str, place: int) -> list[float]:
        return by_seed(frame[frame["way"] == way], lambda part: part["test"].iloc[place])

    def advantage(part: pd.DataFrame) -> float:
        over = [part[part["way"] == way].set_index("depth")["test"] for way in (BN_ONLY, TWO)]
        return float((over[0] - over[1]).min())

    return (
        at_least(
            "Networks of which only γ and β are trained do far better than chance.",
            "S154, section 4",
            "test accuracy of the deepest network",
            accuracy(BN_ONLY, -1),
            0.5,
        ),
        at_least(
            "As many weights elsewhere do far worse.",
            "S154, section 4",
            "smallest difference of test accuracy to two random weights a channel, over all depths",
            by_seed(frame, advantage),
            0.1,
            reason="At the smallest depth one seed has 0.08: there the two have few weights to train.",
        ),
        at_least(
            "Deeper networks gain from it.",
            "S154, section 4",
            "test accuracy of the deepest less that of the shallowest network, only γ and β",
            [deep - flat for deep, flat in zip(accuracy(BN_ONLY, -1), accuracy(BN_ONLY, 0), strict=True)],
            0.1,
        ),
        at_least(
            "It does not reach the training of all weights.",
            "S154, section 4",
            "test accuracy of all less that of only γ and β, deepest network",
            [full - own for full, own in zip(accuracy(ALL, -1), accuracy(BN_ONLY, -1), strict=True)],
            0.0,
        ),
    )


def draw(frame: pd.DataFrame, canvas: Canvas) -> None:
    """Draw accuracy by depth, and all ways for the deepest network."""
    depths, bars = style.panels(canvas, columns=2)
    for index, way in enumerate((BN_ONLY, TWO)):
        part = frame[frame["way"] == way]
        style.curve(depths, part, "depth", "test", name=way, index=index, points=True)
    style.rule(depths, 0.1, "chance")
    depths.set_xscale("log", base=2)
    ticks = sorted(frame["depth"].unique())
    depths.set_xticks(ticks, [str(tick) for tick in ticks])
    depths.set_ylim(0, 1)
    depths.legend()
    deepest = frame[frame["depth"] == frame["depth"].max()]
    ways = (TWO, HEAD, BN_ONLY, ALL)
    for place, way in enumerate(ways):
        values = deepest.loc[deepest["way"] == way, "test"]
        count = int(deepest.loc[deepest["way"] == way, "parameters"].iloc[0])
        color = style.color({BN_ONLY: 0, TWO: 1}.get(way, 5))
        bars.barh(place, values.median(), 0.6, color=color)
        bars.plot([values.min(), values.max()], [place, place], color="black", linewidth=1)
        bars.text(0.02, place, f"{count:,}".replace(",", " "), color="white", va="center", fontsize=8)
    bars.set_yticks(range(len(ways)), ways)
    bars.set_xlim(0, 1)
    style.label(depths, "by depth", "residual blocks", "test accuracy")
    style.label(bars, "deepest, number of trained", "test accuracy", "")
