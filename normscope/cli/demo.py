"""normscope demo: a small network on real data, attached, and the page that explains its run."""

from __future__ import annotations

import argparse
import ast
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from normscope import workbench
from normscope.cli.folder import free, listed
from normscope.core.errors import ArgumentError
from normscope.core.finding import Finding, Verdict
from normscope.core.table import findings_table
from normscope.linalg.problem import Problem
from normscope.norms.conversion import convert
from normscope.scope.attach import attach
from normscope.workbench.breaks import BREAKS, Break

BATCH = {"cnn": 64, "transformer": 16}
HELD = {"cnn": 256, "transformer": 32}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument(
        "--model",
        choices=tuple(BATCH),
        default="cnn",
        help="cnn: residual, BatchNorm, 5000 MNIST digits; transformer: LayerNorm, English text (default: cnn)",
    )
    parser.add_argument(
        "--norm", metavar="NAME", help="replace the model's norms first; normscope catalog --norms lists the names"
    )
    parser.add_argument(
        "--norm-option",
        metavar="KEY=VALUE",
        action="append",
        type=_option,
        default=[],
        help="a setting of that normalization, as groups=4; can be repeated",
    )
    parser.add_argument(
        "--break",
        dest="defect",
        metavar="NAME",
        choices=tuple(BREAKS),
        help=f"break the run on purpose and see the report find it: {', '.join(BREAKS)}",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and batches (default: 0)")
    parser.add_argument("--steps", type=_positive, default=300, help="training steps (default: 300)")
    parser.add_argument("--out", type=Path, help="folder of the run, new (default: runs/demo-MODEL, then -2, -3, ...)")


def run(arguments: argparse.Namespace) -> int:
    """Train, attached; print the findings and where the run and its page are."""
    if arguments.norm_option and not arguments.norm:
        raise ArgumentError("--norm-option is given without --norm NAME, whose setting it would be.")
    defect = BREAKS.get(arguments.defect)
    if defect is not None and arguments.model not in defect.models:
        fitting = ", ".join(name for name, other in BREAKS.items() if arguments.model in other.models)
        raise ArgumentError(
            f"--break {arguments.defect} needs --model {' or '.join(defect.models)}; --model {arguments.model} can be "
            f"broken by {fitting}."
        )
    name = "-".join(filter(None, ("demo", arguments.model, arguments.norm, arguments.defect)))
    out = arguments.out or free(Path("runs") / name)
    torch.manual_seed(arguments.seed)
    generator = torch.Generator().manual_seed(arguments.seed)
    change = partial(_converted, to=arguments.norm, options=dict(arguments.norm_option))
    model, optimizer, batches, held = _SETUPS[arguments.model](generator, change)
    if defect is not None:
        print(f"broken on purpose: {defect.text}")
        batches = defect.change(model, optimizer, batches)
    problem = Problem(model, workbench.cross_entropy, [held])
    with attach(model, optimizer, run=out, problem=problem) as scope:
        workbench.fit(
            model,
            optimizer,
            batches,
            workbench.cross_entropy,
            steps=arguments.steps,
            on_step=lambda step, loss: scope.step(loss=loss),
        )
    findings = scope.findings()
    print(findings_table(findings, shutil.get_terminal_size().columns))
    if defect is not None:
        print(f"\n{_outcome(defect, findings)}")
    page = scope.report()
    print(f"\n{listed(run=out, report=page)}")
    return 0


def _outcome(defect: Break, findings: Sequence[Finding]) -> str:
    """Say where in the report the defect stands."""
    shown = [finding for finding in findings if finding.verdict is not Verdict.OK]
    for place, finding in enumerate(shown, start=1):
        if finding.id in defect.findings and finding.verdict is not Verdict.UNDECIDED:
            return f"found  {defect.text}: {finding.id}, number {place} of {len(shown)}"
    return f"not found  {defect.text}: {' or '.join(defect.findings)} did not come up; try more --steps"


Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]
Change = Callable[[nn.Module], nn.Module]
Setup = tuple[nn.Module, torch.optim.Optimizer, Batches, tuple[torch.Tensor, torch.Tensor]]


def _converted(model: nn.Module, to: str | None, options: dict[str, Any]) -> nn.Module:
    return model if to is None else convert(model, to, **options)


def _cnn(generator: torch.Generator, change: Change) -> Setup:
    images, labels = workbench.mnist()
    train, test = workbench.split(images, labels, seed=0)
    model = change(workbench.residual_cnn())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    held = (test[0][: HELD["cnn"]], test[1][: HELD["cnn"]])
    return model, optimizer, workbench.batches(*train, BATCH["cnn"], generator), held


def _transformer(generator: torch.Generator, change: Change) -> Setup:
    tokens, vocabulary = workbench.text()
    cut = len(tokens) * 9 // 10
    model = change(workbench.transformer(len(vocabulary)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    held = next(workbench.windows(tokens[cut:], HELD["transformer"], 64, torch.Generator().manual_seed(1)))
    return model, optimizer, workbench.windows(tokens[:cut], BATCH["transformer"], 64, generator), held


_SETUPS = {"cnn": _cnn, "transformer": _transformer}


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not a positive number")
    return number


def _option(text: str) -> tuple[str, Any]:
    """Read KEY=VALUE; a value that is no Python literal is a string."""
    key, equals, value = text.partition("=")
    if not (key.isidentifier() and equals):
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE, as groups=4")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value
