"""What all optimizers here share: torch's conventions, checked settings, and the plain steps of SGD and Adam."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from normscope.core.errors import ArgumentError, unknown_name

Group = dict[str, Any]
Params = Iterable[Any]

# setting -> smallest value, whether that itself is allowed, upper bound (not allowed itself)
RANGES: dict[str, tuple[float, bool, float]] = {
    "lr": (0.0, True, math.inf),
    "momentum": (0.0, True, 1.0),
    "betas": (0.0, True, 1.0),
    "weight_decay": (0.0, True, math.inf),
    "eps": (0.0, True, math.inf),
    "trust_coefficient": (0.0, False, math.inf),
    "delta": (0.0, True, math.inf),
    "decay_ratio": (0.0, True, math.inf),
    "max_norm": (0.0, False, math.inf),
    "clipping": (0.0, False, math.inf),
    "orthogonality": (0.0, True, math.inf),
    "iterations": (1, True, math.inf),
    "retraction": (1, True, math.inf),
    "curvature": (0.0, True, math.inf),
    "radius": (0.0, False, math.inf),
}


# setting -> values that it can have besides None
CHOICES: dict[str, tuple[str, ...]] = {"manifold": ("oblique", "sphere", "stiefel"), "place": ("gradient", "step")}


class BaseOptimizer(torch.optim.Optimizer):
    """Base of the optimizers: closures, parameter groups, hooks and states are torch's; `.grad` is never written.

    Parameters without a gradient are left alone. A sparse or complex gradient is an ArgumentError.
    """

    def add_param_group(self, param_group: Group) -> None:
        """Add a parameter group, its settings checked: one out of range is an ArgumentError."""
        for name, value in (self.defaults | param_group).items():
            check(name, value)
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Make one step.

        Args:
            closure: evaluates the model again and returns the loss.

        Returns:
            The closure's loss, None without one.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.begin()
        for group in self.param_groups:
            for params, grads in alike(group["params"]):
                self.update(group, params, grads)
        return loss

    def begin(self) -> None:
        """Do what comes before the first group; nothing unless a method needs it."""

    def update(self, group: Group, params: list[Tensor], grads: list[Tensor]) -> None:
        """Update parameters of one group, device and dtype.

        Args:
            group: the group with its settings.
            params: parameters that have a gradient.
            grads: their gradients, to be left as they are.

        Raises:
            NotImplementedError: always; a method says here what it does.
        """
        raise NotImplementedError

    def kept(self, params: list[Tensor], name: str, like: list[Tensor] | None = None) -> list[Tensor]:
        """Return a stored tensor of each parameter, zeros of its shape (or that of `like`) at first."""
        shapes = params if like is None else like
        states = [self.state[p] for p in params]
        for state, shape in zip(states, shapes, strict=True):
            if name not in state:
                state[name] = torch.zeros_like(shape)
        return [state[name] for state in states]

    def counted(self, params: list[Tensor]) -> list[int]:
        """Count one more step of each parameter and return the counts."""
        for p in params:
            self.state[p]["step"] = self.state[p].get("step", 0) + 1
        return [self.state[p]["step"] for p in params]

    def accumulated(
        self, params: list[Tensor], steps: list[Tensor], momentum: float, *, fresh: bool = False
    ) -> list[Tensor]:
        """Update and return the momentum buffers, b <- momentum b + step; the steps themselves without momentum.

        Args:
            params: parameters.
            steps: step of each.
            momentum: weight of the earlier steps.
            fresh: nobody else holds the steps, so that they may become the buffers: one pass instead of two.

        Returns:
            The buffers, not to be written over by the caller.
        """
        if momentum == 0:
            return steps
        buffers = self.kept(params, "momentum_buffer")
        if fresh:
            torch._foreach_add_(steps, buffers, alpha=momentum)
        else:
            steps = list(torch._foreach_add(steps, buffers, alpha=momentum))
        for p, buffer in zip(params, steps, strict=True):
            self.state[p]["momentum_buffer"] = buffer
        return steps

    def moments(
        self, params: list[Tensor], grads: list[Tensor], betas: tuple[float, float]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Update and return Adam's averages of the gradient and of its square."""
        first, second = self.kept(params, "exp_avg"), self.kept(params, "exp_avg_sq")
        torch._foreach_lerp_(first, grads, 1 - betas[0])
        torch._foreach_lerp_(second, torch._foreach_mul(grads, grads), 1 - betas[1])
        return first, second

    def sgd(self, group: Group, params: list[Tensor], grads: list[Tensor]) -> None:
        """Step as `torch.optim.SGD` does: for parameters that a method leaves to it."""
        if params:
            steps = self.accumulated(params, decayed(group, params, grads), group["momentum"])
            torch._foreach_add_(params, steps, alpha=-rate(group))

    def adam(self, group: Group, params: list[Tensor], grads: list[Tensor]) -> None:
        """Step as `torch.optim.Adam` does: for parameters that a method leaves to it."""
        if params:
            counts, betas = self.counted(params), group["betas"]
            first, second = self.moments(params, decayed(group, params, grads), betas)
            roots = denominators(second, counts, betas[1], group["eps"])
            scales = [-rate(group) * scale for scale in corrections(counts, betas)]
            torch._foreach_addcdiv_(params, first, roots, scales)


def check(name: str, value: Any) -> None:
    """Refuse a setting that is out of range.

    Args:
        name: name of the setting; unknown ones pass.
        value: its value; None passes, of several each is checked.

    Raises:
        ArgumentError: it is no number in the range, or not among the choices.
    """
    if name in CHOICES and value is not None:
        _choose(name, value)
    if name not in RANGES or value is None:
        return
    low, closed, high = RANGES[name]
    if name == "betas" and (not isinstance(value, (tuple, list)) or len(value) != 2):
        raise ArgumentError(f"betas={value!r} must be two numbers; try betas=(0.9, 0.999).")
    for number in value if name == "betas" else (value,):
        if not (number >= low if closed else number > low) or not number < high:
            bounds = f"{'at least' if closed else 'above'} {low:g}" + (
                f" and below {high:g}" if high < math.inf else ""
            )
            raise ArgumentError(f"{name}={value!r} must be {bounds}.")


def _choose(name: str, value: Any) -> None:
    if value not in CHOICES[name]:
        raise unknown_name(name, value, CHOICES[name])


def alike(params: Iterable[Tensor]) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Return the parameters that have a gradient, with it; those of one device and dtype together.

    Args:
        params: parameters.

    Returns:
        Parameters and their gradients for each device and dtype.

    Raises:
        ArgumentError: a gradient is sparse or complex.
    """
    found: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
    for p in params:
        grad = p.grad
        if grad is None:
            continue
        if grad.layout is not torch.strided or grad.is_complex():
            kind = "complex" if grad.is_complex() else "sparse"
            raise ArgumentError(
                f"a parameter of shape {tuple(p.shape)} has a {kind} gradient, whose norm over a layer is not defined "
                "here; give it to an optimizer of its own, as torch.optim.SGD (sparse=False makes nn.Embedding dense)."
            )
        held, grads = found.setdefault((p.device, p.dtype), ([], []))
        held.append(p)
        grads.append(grad)
    return list(found.values())


def rate(group: Group) -> float:
    """Return a group's learning rate as a number."""
    return float(group["lr"])


def decayed(group: Group, params: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """Return g + weight_decay w, the gradient of the loss with an L2 term; new tensors only where there is decay."""
    decay = group["weight_decay"]
    return list(torch._foreach_add(grads, params, alpha=decay)) if decay else grads


def denominators(second: list[Tensor], counts: Sequence[int], beta: float, eps: float) -> list[Tensor]:
    """Return sqrt(v) + eps sqrt(1 - beta^t) of each second moment v: sqrt(v^) + eps, without the correction."""
    roots = list(torch._foreach_sqrt(second))
    torch._foreach_add_(roots, [eps * math.sqrt(1 - beta**t) for t in counts])
    return roots


def corrections(counts: Sequence[int], betas: tuple[float, float]) -> list[float]:
    """Return what makes m / `denominators` Adam's corrected direction, sqrt(1 - beta_2^t) / (1 - beta_1^t)."""
    return [math.sqrt(1 - betas[1] ** t) / (1 - betas[0] ** t) for t in counts]


def shares(
    params: list[Tensor], grads: list[Tensor], chosen: bool
) -> tuple[list[tuple[Tensor, Tensor]], list[Tensor], list[Tensor]]:
    """Divide parameters into those with units, which have two or more dimensions, and the rest.

    Args:
        params: parameters.
        grads: their gradients.
        chosen: whether the group's units are to be treated as such at all.

    Returns:
        Pairs of parameter and gradient with units; the other parameters; their gradients.
    """
    pairs = list(zip(params, grads, strict=True))
    units = [(p, g) for p, g in pairs if chosen and p.ndim > 1]
    rest = [(p, g) for p, g in pairs if not (chosen and p.ndim > 1)]
    return units, [p for p, _ in rest], [g for _, g in rest]


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Return the inner product of each unit (index of the first dimension), `(C, 1, ...)`."""
    return (a * b).sum(tuple(range(1, a.ndim)), keepdim=True)


def length(a: Tensor) -> Tensor:
    """Return the norm of each unit (index of the first dimension), `(C, 1, ...)`."""
    norm: Tensor = torch.linalg.vector_norm(a, dim=tuple(range(1, a.ndim)), keepdim=True)
    return norm
