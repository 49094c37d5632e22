"""Steps that do not see how a ReLU network's weights are balanced between nodes: Path-SGD."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from normscope.core.errors import ArgumentError
from normscope.gradients.optimizer import BaseOptimizer, Group, Params, rate


def path_scales(model: nn.Module, values: dict[str, Tensor], shape: Sequence[int]) -> dict[str, Tensor]:
    """Return the derivative of the squared path norm by each squared weight.

    The squared path norm, the sum over all paths of the product of their squared weights, is the sum of the outputs of
    the network with squared weights on an input of ones.

    Args:
        model: the network, in evaluation mode: linear layers, convolutions, ReLU and averages.
        values: weights by name.
        shape: shape of one input.

    Returns:
        Scale of each weight by name.

    Source: S113.
    """
    squares = {name: value.detach().square().requires_grad_() for name, value in values.items()}
    first = next(iter(squares.values()))
    with torch.enable_grad():
        total = functional_call(model, squares, (torch.ones(1, *shape, device=first.device, dtype=first.dtype),)).sum()
        scales = torch.autograd.grad(total, list(squares.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(squares, scales, strict=True))


class PathSGD(BaseOptimizer):
    """Path-SGD: the steepest descent with respect to the path norm, by its diagonal.

    w <- w - lr g / k,  k = d(squared path norm) / d(w^2), from `path_scales`

    What the network computes after a step does not depend on how incoming and outgoing weights of a ReLU node are
    balanced. A weight on no path has k = 0 and stays.

    It is the member alpha = 0 of data-dependent path normalization, the one without data. Those with alpha > 0, which
    measure a node by its second moment as well (alpha = 1 is much like batch normalization), are not provided: their
    step could not be checked against the paper.

    Source: S113.
    """

    scales: dict[str, Tensor]

    def __init__(self, params: Params, lr: float = 0.1, *, model: nn.Module, shape: Sequence[int]) -> None:
        """Set up.

        Args:
            params: parameters of the model, or groups of them.
            lr: learning rate.
            model: the model, copied for the path norm; linear layers, convolutions, ReLU and averages.
            shape: shape of one input, without the batch.

        Raises:
            ArgumentError: the model is no such network, as its path norm falls with a weight.
        """
        self.shape = tuple(shape)
        self.names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
        self.model = copy.deepcopy(model).eval()
        super().__init__(params, {"lr": lr})
        self.begin()
        falling = [name for name, scale in self.scales.items() if bool((scale < 0).any())]
        if falling:
            raise ArgumentError(
                f"model={type(model).__name__} has no path norm: it would fall with a weight of {falling[0]}. It "
                "must consist of linear layers, convolutions, ReLU and averages; normalizations of the input are none."
            )

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy needs, the model for the path norm included."""
        own = {name: getattr(self, name) for name in ("shape", "names", "model")}
        return super().__getstate__() | own

    def add_param_group(self, param_group: Group) -> None:
        """Add a parameter group.

        Raises:
            ArgumentError: a parameter is not the model's.
        """
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            if p not in self.names:
                raise ArgumentError(
                    f"params hold a tensor of shape {tuple(p.shape)} that is no parameter of "
                    f"model={type(self.model).__name__}; pass model.parameters()."
                )

    def begin(self) -> None:
        """Measure the scales, of all groups before any of them moves."""
        self.scales = path_scales(self.model, {name: p for p, name in self.names.items()}, self.shape)

    def update(self, group: Group, params: list[Tensor], grads: list[Tensor]) -> None:
        """Update parameters of one group."""
        for p, grad in zip(params, grads, strict=True):
            scale = self.scales[self.names[p]]
            p.sub_(torch.where(scale > 0, grad / scale, 0.0), alpha=rate(group))
