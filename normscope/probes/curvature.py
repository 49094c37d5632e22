"""Curvature: a few products with the Hessian of the loss on a held batch, and the loss along the gradient.

One Lanczos run from a random vector gives the largest and the smallest eigenvalues with their residuals, the spectrum
as nodes and weights, and the top eigenvectors; a few vectors of random signs give the trace of each parameter.

What it may cost: a product is taken for `COST` gradients of as many samples. The first and the last snapshot of a run
are always taken, others only where they cost at most `SHARE` of the gradients of training so far; as they lie ever
further apart, all of these together stay below `SHARE` / 0.6. A snapshot grows with the run from `LEAST` steps of
Lanczos to `MOST`, and is kept small in a large model, where the vectors held would take too much memory: at most `KEPT`
numbers; one that could not hold `LEAST` vectors is not measured.

Sources: cohen2021 (sharpness), cohen2022 (the preconditioned Hessian of Adam), ghorbani2019 (spectrum, energy),
santurkar2018 (loss along the gradient).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from normscope.core.errors import ArgumentError, Unmeasurable
from normscope.core.site import Site
from normscope.linalg.lanczos import Array, Krylov
from normscope.linalg.operator import Operator
from normscope.linalg.problem import Problem
from normscope.linalg.progress import bar
from normscope.linalg.trace import probed
from normscope.probes import layout, optimizers
from normscope.probes.summary import Row

SITE = str(Site("", 0, "output"))
SAMPLES = 16  # held samples that are run at most, or as many as a batch of training
SHARE = 1 / 8
COST = 2.5
LEAST, MOST = 10, 40
KEPT = 1 << 28
CLASSES = 10  # K, where the task has no classes or more
STEPS = (0.5, 1.0, 2.0, 4.0)  # learning rates that are gone along the gradient
_TRACE, _SCALED = 3, 2  # steps of Lanczos for one vector of signs, and for one step with the preconditioned matrix


class Work(NamedTuple):
    """What a snapshot may cost.

    Attributes:
        batch: samples in a forward pass of training.
        trained: samples in all forward passes so far.
        ends: whether this is the first snapshot of the run, or the last, which are taken in any case.
    """

    batch: int
    trained: int
    ends: bool

    def steps(self, parameters: int, samples: int) -> int:
        """Return how many steps of Lanczos fit, 0 where so few do that the snapshot is passed over.

        Args:
            parameters: number of parameters.
            samples: held samples that are run.

        Returns:
            0, or a number from `LEAST` to `MOST`.

        Raises:
            Unmeasurable: if the model is too large.
        """
        most = min(MOST, KEPT // max(parameters, 1))
        if most < LEAST:
            raise Unmeasurable(
                f"{parameters:,} parameters, of which {LEAST} vectors would have to be held; take "
                "normscope.eigenpairs(problem, k=1) by itself, or a Problem with parameters= of some layers."
            )
        fits = int(SHARE * self.trained / (COST * samples * (1 + 1 / _TRACE + 1 / _SCALED)))
        return min(most, max(LEAST, fits)) if self.ends or fits >= LEAST else 0


def measure(problem: Problem, stepped: Sequence[torch.optim.Optimizer], work: Work) -> dict[str, list[Row]]:
    """Measure the curvature of the loss on the first held batch, at the present weights.

    Args:
        problem: model, loss and batches.
        stepped: the optimizers of the run, none for a model at rest.
        work: what it may cost.

    Returns:
        Rows of phase "batch": one of the whole model, one with the trace at each parameter; none where it would cost
        too much. Where the loss is not finite, that alone.

    Raises:
        Unmeasurable: if the loss has no second derivative, is random, or the model is too large.
    """
    first = problem.take(1)[0]
    size = layout.batch_size((first,), {})
    samples = min(size, max(SAMPLES, work.batch)) or 1
    batch = layout.cut(first, size, 0, samples) if 1 < samples < size else first
    if batch is None:  # its samples cannot be told apart
        samples, batch = size, first
    named = problem.parameters()
    steps = work.steps(sum(p.numel() for p in named.values()), samples)
    if not steps:
        return {}
    exact = all(p.dtype in (torch.float32, torch.float64) for p in named.values())
    small = problem.on([batch], None if exact else torch.float32)
    try:
        return {"batch": _rows(small, stepped, steps, float(samples))}
    except (ArgumentError, RuntimeError) as error:  # the model's own operations, or memory
        raise Unmeasurable(str(error)) from error


def preconditioner(named: Mapping[str, Tensor], stepped: Sequence[torch.optim.Optimizer]) -> tuple[float, Any]:
    """Return how the optimizers scale the gradient: a step without momentum is -lr P^-1 g.

    For SGD P = 1; for Adam and AdamW P = (1 - beta_1^t) (sqrt(v / (1 - beta_2^t)) + eps) with the second moment v
    after t steps (its maximum for AMSGrad). Where groups have different learning rates, P also holds the largest over
    that of the parameter's group.

    Args:
        named: parameters by name.
        stepped: the optimizers.

    Returns:
        The largest learning rate, and 1 / P: one tensor or number a parameter, None where P = 1; NaN and None for
        optimizers whose rule is unknown, or that are none or several.
    """
    held = [next(optimizers.holding(p, stepped), None) for p in named.values()]
    rules = {optimizers.rule(p, stepped)["rule"] for p, owner in zip(named.values(), held, strict=True) if owner}
    groups = [owner[0].param_groups[owner[1]] if owner else {"lr": 0.0} for owner in held]
    rates = [optimizers.known(group["lr"]) or 0.0 for group in groups]
    top = max(rates, default=0.0)
    if len(rules) != 1 or not rules <= {"sgd", "adam"} or not top > 0:
        return math.nan, None
    if rules == {"sgd"}:
        return top, None if min(rates) == top else [rate / top for rate in rates]
    scales = []
    for p, owner, group, rate in zip(named.values(), held, groups, rates, strict=True):
        state = owner[0].state.get(p, {}) if owner else {}
        if owner and "exp_avg_sq" not in state:  # it has not stepped yet
            return math.nan, None
        scales.append(_adam(state, group) * (rate / top) if owner else 0.0)
    return top, scales


def _adam(state: Mapping[str, Any], group: Mapping[str, Any]) -> Tensor:
    beta1, beta2 = (float(beta) for beta in group["betas"])
    t, second = float(state["step"]), state.get("max_exp_avg_sq", state["exp_avg_sq"])
    scale: Tensor = 1.0 / ((1 - beta1**t) * ((second / (1 - beta2**t)).sqrt() + group["eps"]))
    return scale


def _rows(problem: Problem, stepped: Sequence[torch.optim.Optimizer], steps: int, samples: float) -> list[Row]:
    classes, loss = _look(problem)
    if not math.isfinite(loss):
        return [_row({"held_loss": loss, "samples": samples}, {})]
    operator, generator = problem.operator(), torch.Generator().manual_seed(0)
    g = operator.gradient
    found = {"held_loss": loss, "samples": samples, "gradient_norm": float(g.norm())}
    krylov = _lanczos(operator.matvec, operator.normal(generator), min(steps, operator.size))
    found |= _extremes(krylov, g, min(classes, max(1, krylov.count // 2)))
    nodes, vectors = np.linalg.eigh(krylov.projected)
    named = problem.parameters()
    rate, scales = preconditioner({name: named[name] for name in operator.names}, stepped)
    if scales is not None:
        found |= _scaled(operator, scales, max(2, steps // _SCALED), generator)
    if rate > 0:
        found |= {"lr": rate} | _line(problem, operator, g, rate)
    traces = _traces(operator, max(2, steps // _TRACE), generator, found)
    found["products"] = float(operator.matvecs)
    return [_row(found, {"nodes": nodes, "weights": np.square(vectors[0])}), *traces]


def _row(scalars: Mapping[str, float], arrays: Mapping[str, Array]) -> Row:
    known = {name: value for name, value in scalars.items() if not math.isnan(value) or name == "held_loss"}
    return Row(SITE, "value", tuple(known), np.array(list(known.values())), arrays)


def _look(problem: Problem) -> tuple[int, float]:
    """Return K and the loss: K is the number of classes, where targets are integers, but at most `CLASSES`."""
    model, _ = problem.materialize()
    with problem.running(model) as evaluate:
        found = evaluate(next(iter(problem.each())))
    output, target = found.output, found.target
    labels = isinstance(target, Tensor) and not (target.is_floating_point() or target.is_complex())
    classes = output.shape[1] if labels and isinstance(output, Tensor) and output.dim() > 1 else CLASSES
    return min(max(int(classes), 2), CLASSES), float(found.loss.detach())


def _lanczos(multiply: Callable[[Tensor], Tensor], start: Tensor, steps: int) -> Krylov:
    krylov = Krylov(multiply, start, steps)
    krylov.step()
    while krylov.count < steps and krylov.beta:
        krylov.step()
    return krylov


def _extremes(krylov: Krylov, g: Tensor, k: int) -> dict[str, float]:
    """Return both ends of the spectrum and the share of the gradient in the top k Ritz vectors."""
    values, vectors = np.linalg.eigh(krylov.projected)
    residuals = np.maximum(krylov.beta * np.abs(vectors[-1]), krylov.noise)
    k = min(k, len(values))
    top = krylov.vectors(vectors[:, ::-1][:, :k])
    square = float(g.double().square().sum())
    found = {"sharpness": values[-1], "sharpness_residual": residuals[-1]}
    found |= {"smallest": values[0], "smallest_residual": residuals[0]}
    found |= {"k": k, "kth": values[-k], "kth_residual": residuals[-k]}
    found["energy"] = float((top.T @ g).double().square().sum()) / square if square > 0 else math.nan
    return {name: float(value) for name, value in found.items()}


def _scaled(operator: Operator, scales: Sequence[Any], steps: int, generator: torch.Generator) -> dict[str, float]:
    """Return the largest eigenvalue of P^-1 H, which is that of P^-1/2 H P^-1/2, with its residual."""
    roots = [
        (s if isinstance(s, Tensor) else part.new_tensor(s)).to(part).sqrt().expand(part.shape).reshape(-1)
        for s, part in zip(scales, operator.split(operator.gradient), strict=True)
    ]
    root = torch.cat(roots)

    def multiply(v: Tensor) -> Tensor:
        return root * operator.matvec(root * v)

    start = operator.normal(generator) * (root > 0) + 10 * _unit(root * operator.gradient) * operator.size**0.5
    if not bool(start.any()):
        return {}
    krylov = _lanczos(multiply, start, min(steps, operator.size))
    values, vectors = np.linalg.eigh(krylov.projected)
    residual = max(float(krylov.beta * abs(vectors[-1, -1])), krylov.noise)
    return {"preconditioned": float(values[-1]), "preconditioned_residual": residual}


def _unit(vector: Tensor) -> Tensor:
    norm = vector.norm()
    return vector / norm if bool(norm > 0) else vector


def _line(problem: Problem, operator: Operator, g: Tensor, rate: float) -> dict[str, float]:
    """Go along -g by some learning rates and return what loss and gradient do, on the same batch."""
    params = dict(operator.model.named_parameters())
    parts = dict(zip(operator.names, operator.split(g), strict=True))
    losses, changes = [], []
    with problem.running(operator.model) as evaluate:
        batch = next(iter(problem.each()))
        for factor in STEPS:
            moved = {n: (params[n].detach() - factor * rate * part).requires_grad_() for n, part in parts.items()}
            loss = evaluate(batch, moved).loss
            if not loss.requires_grad:
                return {}
            after = torch.autograd.grad(loss, list(moved.values()), allow_unused=True, materialize_grads=True)
            losses.append(float(loss.detach()))
            changes.append(float((torch.cat([part.reshape(-1) for part in after]) - g).norm()))
    found = {"loss_low": min(losses), "loss_high": max(losses), "change_low": min(changes), "change_high": max(changes)}
    length = float(g.norm()) * rate
    ratios = [change / (factor * length) for change, factor in zip(changes, STEPS, strict=True)] if length > 0 else []
    return found | {"smoothness": max(ratios, default=math.nan)}


def _traces(operator: Operator, n: int, generator: torch.Generator, found: dict[str, float]) -> list[Row]:
    """Return the trace of each parameter's block as rows, and add that of the whole to what was found."""
    samples = np.zeros((n, len(operator.names)))
    with bar(n, "trace", False) as tick:
        for i, (v, product) in enumerate(probed(operator, n, generator, tick)):
            samples[i] = [float(part.sum(dtype=torch.float64)) for part in operator.split(v * product)]
    errors = samples.std(0, ddof=1) / n**0.5
    found |= {"trace": float(samples.sum(1).mean()), "trace_error": float(samples.sum(1).std(ddof=1)) / n**0.5}
    rows = []
    for name, value, error in zip(operator.names, samples.mean(0), errors, strict=True):
        module, _, slot = name.rpartition(".")
        values = np.array([value, error])
        rows.append(Row(str(Site(module, 0, slot)), "value", ("trace", "trace_error"), values, {}))
    return rows
