"""PyHessian as an independent engine: run on a copy, as it changes the mode and the gradients of what it is given."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from normscope.core.errors import ArgumentError
from normscope.linalg.operator import Operator


class _Plain(nn.Module):
    """A copy of the model as PyHessian takes it: pairs in, output out, its mode its own, products counted."""

    def __init__(self, operator: Operator, batches: list[Any]) -> None:
        super().__init__()
        with operator.problem.running(operator.model):
            self.model = copy.deepcopy(operator.model)  # in the modes that the problem asks for
        for name, p in self.model.named_parameters():
            p.requires_grad_(name in operator.names)
            p.grad = None
        self.resets, self.batches = 0, batches

    def eval(self) -> _Plain:
        return self

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.resets += 1
        super().zero_grad(set_to_none)

    def forward(self, inputs: Tensor) -> Any:
        return self.model(inputs)


def eigenvalues(operator: Operator, k: int, tol: float, seed: int) -> tuple[Tensor, Tensor, int]:
    """Return eigenvalues of largest absolute value by power iteration with deflation.

    Args:
        operator: a Hessian.
        k: how many.
        tol: where an iteration stops, the relative change of the eigenvalue.
        seed: of the start vectors.

    Returns:
        Values `[k]`, vectors `[size, k]`, and the number of products.
    """
    with _hessian(operator, seed) as (engine, plain):
        values, parts = engine.eigenvalues(maxIter=1000, tol=tol, top_n=k)
    vectors = torch.stack([torch.cat([part.reshape(-1) for part in vector]) for vector in parts], 1)
    order = sorted(range(k), key=lambda i: -abs(values[i]))
    return torch.tensor([values[i] for i in order], dtype=torch.float64), vectors[:, order], _products(plain)


def trace_samples(operator: Operator, n: int, seed: int) -> list[float]:
    """Return samples v^T H v for random signs v.

    Args:
        operator: a Hessian.
        n: how many.
        seed: of the signs.

    Returns:
        The samples.
    """
    with _hessian(operator, seed) as (engine, _):
        return [float(x) for x in engine.trace(maxIter=n, tol=float("-inf"))]  # it would stop at chance agreement


def _products(plain: _Plain) -> int:
    return plain.resets // (1 if len(plain.batches) == 1 else 1 + 2 * len(plain.batches))


@contextmanager
def _hessian(operator: Operator, seed: int) -> Iterator[tuple[Any, _Plain]]:
    """Give PyHessian's object; it draws from torch's own generator, whose state is given back."""
    from pyhessian import hessian

    problem = operator.problem
    batches = list(problem.each())
    pairs = all(isinstance(b, (tuple, list)) and all(isinstance(x, Tensor) for x in b) for b in batches)
    plain_forward = problem.forward.__name__ == "forward_pair"
    if operator.kind != "hessian" or not pairs or not plain_forward or problem.reduction != "mean":
        raise ArgumentError(
            "engine='pyhessian' works for operator='hessian', a mean loss and batches (input, target) of tensors; "
            f"got operator={operator.kind!r}, reduction={problem.reduction!r}. Use engine='normscope'."
        )
    plain = _Plain(operator, batches)
    data = {"data": batches[0]} if len(batches) == 1 else {"dataloader": batches}
    with problem.running(operator.model), sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a reference cycle, which ends with the copy
        torch.manual_seed(seed)
        yield hessian(plain, problem.loss, cuda=False, **data), plain
    for p in plain.parameters():
        p.grad = None
