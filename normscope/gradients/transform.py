"""Gradients changed on their way into any optimizer: centralization, adaptive clipping, normalization by block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from normscope.core.errors import ArgumentError
from normscope.gradients.optimizer import Group, alike, check


class Transform(torch.optim.Optimizer):
    """Base of optimizers that hand changed gradients to another one.

    `optimizer` makes the step; its parameter groups and state are this one's, so that schedules, checkpoints and
    readers of groups see one optimizer. Settings of the transform stand in the groups and may differ between them.
    `.grad` holds the original gradients before and after a step, also when a closure is used or the step fails.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, settings: dict[str, Any]) -> None:
        """Set up.

        Args:
            optimizer: makes the steps.
            settings: settings of the transform and their defaults, for each parameter group.
        """
        optimizer.defaults.update(settings)
        self.optimizer = optimizer
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self._share()

    def _share(self) -> None:
        """Make groups, state and defaults those of the inner optimizer."""
        inner = self.optimizer
        self.param_groups, self.state, self.defaults = inner.param_groups, inner.state, inner.defaults

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy needs, the inner optimizer included."""
        return super().__getstate__() | {"optimizer": self.optimizer}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over a copy's parts."""
        super().__setstate__(state)
        self._share()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the inner optimizer, whose groups hold the transform's settings."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state into the inner optimizer."""
        self.optimizer.load_state_dict(state_dict)
        self._share()

    def add_param_group(self, param_group: Group) -> None:
        """Add a parameter group, its settings checked: one out of range is an ArgumentError."""
        for name, value in (self.defaults | param_group).items():
            check(name, value)
        if self.__dict__.get("param_groups") is self.optimizer.param_groups:
            self.optimizer.add_param_group(param_group)
        else:  # while the base class is being initialized, with the groups that the inner optimizer has already
            super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Make one step of the inner optimizer with changed gradients.

        Args:
            closure: evaluates the model again and returns the loss; its gradients are changed as well.

        Returns:
            The closure's loss, None without one.
        """
        originals: dict[Tensor, Tensor] = {}

        def evaluate() -> float:
            self._restore(originals)
            with torch.enable_grad():
                loss = closure() if closure is not None else 0.0
            self._change(originals)
            return loss

        try:
            if closure is not None:
                return self.optimizer.step(evaluate)
            self._change(originals)
            self.optimizer.step()
            return None
        finally:
            self._restore(originals)

    def _change(self, originals: dict[Tensor, Tensor]) -> None:
        for group in self.param_groups:
            for params, grads in alike(group["params"]):
                originals |= zip(params, grads, strict=True)
                for p, changed in zip(params, self.changed(group, params, grads), strict=True):
                    p.grad = changed

    def _restore(self, originals: dict[Tensor, Tensor]) -> None:
        for p, original in originals.items():
            p.grad = original
        originals.clear()

    def changed(self, group: Group, params: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
        """Return the gradients that the inner optimizer gets.

        Args:
            group: the group with its settings.
            params: parameters that have a gradient, of one device and dtype.
            grads: their gradients, to be left as they are.

        Raises:
            NotImplementedError: always; a method says here what it does.
        """
        raise NotImplementedError

    def __repr__(self) -> str:
        """Write the transform around the inner optimizer."""
        return f"{type(self).__name__}({self.optimizer!r})"


def centralize(grad: Tensor, smallest: int = 2) -> Tensor:
    """Return a gradient less the mean of each unit; one of fewer than `smallest` dimensions as it is.

    g - mean of g over all dimensions but the first

    Args:
        grad: gradient, `(C, ...)`.
        smallest: number of dimensions that a gradient must have.

    Returns:
        A tensor of the same shape.

    Source: S110, equation 1.

    >>> centralize(torch.tensor([[1.0, 3.0], [0.0, 4.0]]))
    tensor([[-1.,  1.],
            [-2.,  2.]])
    """
    return grad - grad.mean(tuple(range(1, grad.ndim)), keepdim=True) if grad.ndim >= smallest else grad


class Centralized(Transform):
    """Gradient centralization: each unit's gradient has mean 0.

    As the authors do for SGD, the L2 term is included: an optimizer that adds weight decay d to the gradient gets one
    that gives P(g + d w), with the mean removed by P. With `place="step"`, as they do for Adam, the mean is removed
    from the step that the inner optimizer has made. `conv_only` leaves out tensors of fewer than four dimensions.

    Source: S110.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *, place: str = "gradient", conv_only: bool = False) -> None:
        """Set up.

        Args:
            optimizer: makes the steps.
            place: "gradient" or "step".
            conv_only: whether only convolutions are centralized.
        """
        super().__init__(optimizer, {"place": place, "conv_only": conv_only})

    def changed(self, group: Group, params: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
        """Return centralized gradients."""
        if group["place"] == "step":
            return grads
        smallest = 4 if group["conv_only"] else 2
        decay = -self.decay(group) if group.get("maximize") else self.decay(group)
        if not decay:
            return [centralize(g, smallest) for g in grads]
        return [
            centralize(g.add(p, alpha=decay), smallest).sub_(p, alpha=decay) for p, g in zip(params, grads, strict=True)
        ]

    def decay(self, group: Group) -> float:
        """Return the weight decay that the inner optimizer adds to the gradient, 0 if it decays otherwise."""
        apart = isinstance(self.optimizer, torch.optim.AdamW) or group.get("decoupled_weight_decay")
        return 0.0 if apart else float(group.get("weight_decay", 0.0))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Make one step of the inner optimizer, centralized.

        Args:
            closure: evaluates the model again and returns the loss.

        Returns:
            The closure's loss, None without one.
        """
        chosen = [
            (p, p.clone())
            for group in self.param_groups
            if group["place"] == "step"
            for p in group["params"]
            if p.ndim >= (4 if group["conv_only"] else 2)
        ]
        loss = super().step(closure)
        for p, before in chosen:
            p.copy_(before + centralize(p - before))
        return loss


def clip_units(p: Tensor, grad: Tensor, clipping: float, floor: float = 1e-3) -> Tensor:
    """Return a gradient of which no unit is longer than a share of its weights.

    g <- g clipping max(|w|, floor) / |g| for each unit where |g| is larger than clipping max(|w|, floor)

    Args:
        p: weights; a unit is an index of the first dimension, or the whole of a tensor of one dimension.
        grad: gradient.
        clipping: largest ratio of norms.
        floor: smallest norm of weights, so that those that are zero can move.

    Returns:
        A tensor of the same shape.

    Source: S111, equation 3.
    """
    dims = tuple(range(1, p.ndim)) if p.ndim > 1 else None
    weight = torch.linalg.vector_norm(p, dim=dims, keepdim=True)
    norm = torch.linalg.vector_norm(grad, dim=dims, keepdim=True)
    most = clipping * weight.clamp_min(floor)
    return torch.where(norm > most, grad * (most / norm.clamp_min(1e-6)), grad)


class AdaptiveClipped(Transform):
    """Adaptive gradient clipping, by unit and relative to the weights; see `clip_units`.

    A group with `clipping=None` is left alone; the paper does so with the last linear layer.

    Source: S111.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *, clipping: float | None = 0.01, floor: float = 1e-3) -> None:
        """Set up.

        Args:
            optimizer: makes the steps.
            clipping: largest ratio of a unit's gradient to its weights; None for no clipping.
            floor: smallest norm of weights.
        """
        super().__init__(optimizer, {"clipping": clipping, "floor": floor})

    def changed(self, group: Group, params: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
        """Return clipped gradients."""
        if group["clipping"] is None:
            return grads
        return [clip_units(p, g, group["clipping"], group["floor"]) for p, g in zip(params, grads, strict=True)]


class BlockNormalized(Transform):
    """Each tensor's gradient scaled to length 1, or with `adaptive=True` to the length of its weights.

    g / (|g| + small), times |w|

    Decay that the inner optimizer adds comes on top. A zero gradient stays zero.

    Source: S105.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *, adaptive: bool = False, small: float = 1e-6) -> None:
        """Set up.

        Args:
            optimizer: makes the steps.
            adaptive: multiply by the norm of the weights.
            small: added to the gradient's norm.

        Raises:
            ArgumentError: small is negative.
        """
        if not small >= 0:
            raise ArgumentError(f"small={small!r} must be at least 0; the default is 1e-06.")
        super().__init__(optimizer, {"adaptive": adaptive, "small": small})

    def changed(self, group: Group, params: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
        """Return normalized gradients."""
        norms = list(torch._foreach_norm(grads))
        # what is added keeps 0 / 0 away
        torch._foreach_add_(norms, group["small"] or torch.finfo(norms[0].dtype).tiny)
        units = list(torch._foreach_div(grads, norms))
        if group["adaptive"]:
            torch._foreach_mul_(units, list(torch._foreach_norm(params)))
        return units
