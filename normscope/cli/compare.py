"""normscope compare: normalization layers, of the table or the user's own, on the same small work."""

from __future__ import annotations

import argparse
import ast
from dataclasses import replace
from pathlib import Path

import torch

from normscope.cli.factory import found, importable, reference
from normscope.core.errors import ArgumentError
from normscope.core.table import printable
from normscope.metrics.trial import Trial
from normscope.norms.inspection import Inspection, inspect
from normscope.norms.table import zoo
from normscope.scope.compare import SEEDS, compare
from normscope.scope.entries import told
from normscope.workbench.baselines import baselines
from normscope.workbench.protocol import NONE, PROTOCOLS, Make, Norm, Protocol, protocol

_FEATURES = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument(
        "norms",
        nargs="+",
        metavar="NORM",
        help="a name of normscope catalog --norms, with settings as group,groups=8; none; or MODULE:NAME of a layer of "
        "your own that is made from a number of features. The first is what the others are compared with",
    )
    parser.add_argument(
        "--model",
        choices=tuple(item.model for item in PROTOCOLS),
        default="mlp",
        help="mlp and resnet: 5000 MNIST digits; transformer: English text (default: mlp)",
    )
    parser.add_argument("--seeds", type=_positive, default=SEEDS, help=f"seeds 0, 1, ... (default: {SEEDS})")
    parser.add_argument("--steps", type=_positive, help="training steps (default: some hundred, as the model)")
    parser.add_argument(
        "--lr", nargs="+", type=float, metavar="RATE", help="the grid of learning rates (default: three, as the model)"
    )
    parser.add_argument("--jobs", type=_positive, default=1, help="processes (default: 1)")
    parser.add_argument(
        "--against",
        choices=("zoo",),
        help="zoo: put the norms beside recorded runs of common ones on the same work, and train only those given",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="folder of runs, tables, figures and the page (default: runs/compare-MODEL); runs that "
        "it holds are not made again",
    )
    parser.add_argument("--no-check", action="store_true", help="train a layer of your own whatever its check says")


def run(arguments: argparse.Namespace) -> int:
    """Check layers of the user's own, train, print the table and where everything is."""
    out = arguments.out or Path("runs") / f"compare-{arguments.model}"
    wanted = protocol(arguments.model)
    wanted = replace(wanted, steps=arguments.steps or wanted.steps, rates=tuple(arguments.lr or wanted.rates))
    norms = {text: _norm(text) for text in dict.fromkeys(arguments.norms)}
    known = _against(wanted, arguments.seeds, norms) if arguments.against else ()
    with importable():
        inspections = {text: _inspected(norm, wanted) for text, norm in norms.items() if ":" in norm.name}
        for text, inspection in inspections.items():
            print(f"{text}: {inspection!r}\n")
            if not inspection.ok and not arguments.no_check:
                laws = ", ".join(dict.fromkeys(row.law for row in inspection.failures))
                raise ArgumentError(f"{text} fails the check of {laws}; mend it, or compare it so with --no-check.")
        comparison = compare(
            {text: Make(wanted, norm) for text, norm in norms.items()},
            wanted.fit,
            seeds=arguments.seeds,
            learning_rates=wanted.rates,
            out=out,
            jobs=arguments.jobs,
            check=False,
            known=known,
        )
    checks = tuple((text, *told(inspection)) for text, inspection in inspections.items())
    comparison = replace(comparison, checks=checks)
    comparison.write(out)
    comparison.save(out)
    print(comparison.table())
    shown = printable(str(out))
    print(f"\nruns    {shown}\ntables  {shown}/table.tex, table.md, runs.csv\nreport  {shown}/comparison.html")
    return 0


def _norm(text: str) -> Norm:
    """Read NAME or MODULE:NAME with settings behind commas."""
    name, *settings = text.split(",")
    options = []
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not (key.isidentifier() and equals):
            raise ArgumentError(f"norm={text!r}: {setting!r} is not KEY=VALUE, as in group,groups=8.")
        try:
            options.append((key, ast.literal_eval(value)))
        except (ValueError, SyntaxError):
            options.append((key, value))
    if ":" in name:
        _check_reference(name)
    elif name != NONE:
        zoo[name]
    return Norm(name, tuple(options))


def _check_reference(name: str) -> None:
    try:
        reference(name)
    except argparse.ArgumentTypeError as error:
        raise ArgumentError(str(error).replace("factory=", "norm=", 1)) from None


def _inspected(norm: Norm, wanted: Protocol) -> Inspection:
    """Inspect a layer of the user's own with an input as the model's."""
    found(norm.name)
    try:
        norm.layer(_FEATURES)
    except Exception as error:  # whatever the layer raises
        raise ArgumentError(
            f"norm={norm.name!r} cannot be made from a number of features: {type(error).__name__}: {error}. "
            f"It must work in Python as {norm.name.replace(':', '.')}({_FEATURES})."
        ) from error
    return inspect(norm.layer, _FEATURES, shape=wanted.shape)


def _against(wanted: Protocol, seeds: int, norms: dict[str, Norm]) -> tuple[Trial, ...]:
    trials, version = baselines(wanted)
    most = 1 + max(trial.seed for trial in trials)
    if seeds > most:
        raise ArgumentError(f"--seeds {seeds}: the baselines were recorded with {most} seeds; leave it at {most}.")
    if version != torch.__version__:
        print(f"the baselines ran on torch {version}, here it is {torch.__version__}: numbers may differ\n")
    return tuple(trial for trial in trials if trial.seed < seeds and trial.entry not in norms)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not a positive number")
    return number
