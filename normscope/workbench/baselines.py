"""Baselines: runs of known normalizations under the protocols, recorded, so that a newcomer alone need be trained.

Recorded by `python -m normscope.workbench.baselines mlp resnet --out runs/baselines`, which trains every entry of
`ENTRIES` as `normscope compare` does, keeps what is done in the folder, and writes `recorded/MODEL.json` beside this
file. Throughput is left out: it is comparable only within a run of the command.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from normscope.core.errors import ArgumentError
from normscope.metrics.trial import Trial, from_dict, write_json
from normscope.scope.compare import compare
from normscope.workbench.protocol import Make, Norm, Protocol, protocol

ENTRIES: Mapping[str, tuple[str, ...]] = {
    "mlp": ("batch", "none", "layer", "group", "rms", "l1-batch", "batch-renorm", "dynamic-tanh"),
    "resnet": ("batch", "none", "layer", "group"),
}
SEEDS = 3
_DIGITS = 5


def baselines(wanted: Protocol) -> tuple[tuple[Trial, ...], str]:
    """Read the recorded runs of a protocol.

    Args:
        wanted: the protocol of the runs that they will stand beside.

    Returns:
        The trials, and the version of torch that they ran on.

    Raises:
        ArgumentError: none were recorded, or of another protocol.
    """
    file = resources.files("normscope.workbench").joinpath(f"recorded/{wanted.model}.json")
    if not file.is_file():
        raise ArgumentError(
            f"model={wanted.model!r} has no recorded baselines; there are some of {', '.join(ENTRIES)}."
        )
    stored = json.loads(file.read_text(encoding="utf-8"))
    facts = json.loads(json.dumps(wanted.facts()))
    old = stored["protocol"]
    changed = [f"{name} {facts[name]} instead of {old[name]}" for name in old if facts[name] != old[name]]
    if changed:
        raise ArgumentError(
            f"the baselines of {wanted.model!r} were recorded with another protocol ({'; '.join(changed)}): leave "
            "these options at their defaults, or name the normalizations to train them beside yours."
        )
    return tuple(from_dict(item) for item in stored["trials"]), str(stored["torch"])


def recorded(wanted: Protocol, trials: Sequence[Trial]) -> dict[str, Any]:
    """Return the trials of a protocol as they are stored: rounded, without what only this machine says."""
    kept = []
    for trial in trials:
        measured = {name: value for name, value in trial.measured.items() if name != "throughput"}
        kept.append(replace(trial, measured=measured, setting={}).as_dict())
    return {"protocol": wanted.facts(), "torch": torch.__version__, "trials": _rounded(kept)}


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value


def main() -> None:
    """Train what is missing and write the records."""
    parser = argparse.ArgumentParser(prog="python -m normscope.workbench.baselines", description=__doc__)
    parser.add_argument("models", nargs="+", choices=tuple(ENTRIES))
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for model in arguments.models:
        wanted = protocol(model)
        makers = {name: Make(wanted, Norm(name)) for name in ENTRIES[model]}
        found = compare(makers, wanted.fit, seeds=SEEDS, learning_rates=wanted.rates, out=arguments.out / model)
        write_json(Path(__file__).parent / "recorded" / f"{model}.json", recorded(wanted, found.trials))


if __name__ == "__main__":
    main()
