"""Averages over the samples of an area, on one process or across ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.autograd import forward_ad

from normscope.core.errors import ArgumentError

# the shortest line of samples for which a kernel over lines is worth a call
_LINE = 16


def samples(z: Tensor) -> tuple[int, ...]:
    """Return the sample axes of `[areas, features, *samples]`."""
    return tuple(range(2, z.ndim))


def rows(stat: Tensor, z: Tensor) -> Tensor:
    """Append axes to a statistic `[areas, features]` so that it broadcasts against `[areas, features, *samples]`."""
    return stat.reshape(stat.shape + (1,) * (z.ndim - stat.ndim))


@dataclass(frozen=True)
class Average:
    """Averages on one process."""

    def over(self, total: Tensor, count: int) -> Tensor:
        """Divide a sum over `count` samples by their number."""
        return total / count

    def count(self, z: Tensor) -> int | Tensor:
        """Return the number of samples of each row."""
        return z.shape[2:].numel()

    def mean(self, z: Tensor) -> Tensor:
        """Average over the samples: `[areas, features]`."""
        return self.over(z.sum(samples(z)), z.shape[2:].numel())

    def moments(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and biased variance, each `[areas, features]`."""
        if by_hand(z):
            return _moments(z)
        mean = z.mean(samples(z))
        return mean, (z - rows(mean, z)).square().mean(samples(z))

    def square(self, z: Tensor) -> Tensor:
        """Return the mean square `[areas, features]`."""
        if not by_hand(z):
            return self.mean(z.square())
        mean, var = self.moments(z)
        return var + mean.square()

    def products(self, z: Tensor) -> Tensor:
        """Average the products of the features: `[areas, features, features]`, from one Gram matrix per example."""
        z = z.flatten(2) if z.is_contiguous() else z
        outer = tuple(range(2, z.ndim - 1))
        x = z.permute(*outer, 0, 1, z.ndim - 1)
        gram = x @ x.mT
        total = gram.sum(tuple(range(len(outer)))) if outer else gram
        return self.over(total, z.shape[2:].numel())

    def largest(self, z: Tensor, k: int) -> Tensor:
        """Return the k largest samples of each row: `[areas, features, k]`."""
        if k == 1:
            return z.amax(samples(z)).unsqueeze(-1)
        return z.flatten(2).topk(k, dim=-1).values


LOCAL = Average()


def by_hand(z: Tensor) -> bool:
    """Tell whether a gradient written by hand may be used: reverse-mode autograd alone sees the tensor."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    unpack: Callable[[Tensor], Any] = forward_ad.unpack_dual
    return unpack(z).tangent is None


def lined(z: Tensor) -> bool:
    """Tell whether torch's kernels for group normalization take a tensor in full precision."""
    return z.device.type == "cpu" and z.dtype in {torch.float32, torch.float64} and z.numel() > 0


def _in_lines(z: Tensor) -> tuple[Tensor, list[int], int] | None:
    """Return z in the order of memory, the axes in that order, and how many of them come before a line of samples.

    None where the samples of a row are not in memory in lines long enough to pay.
    """
    order = sorted(range(z.ndim), key=z.stride, reverse=True)
    ordered = z.permute(order)
    first = max(place for place, axis in enumerate(order) if axis < 2) + 1
    fits = lined(z) and ordered.is_contiguous() and ordered.shape[first:].numel() >= _LINE
    return (ordered, order, first) if fits else None


def _of_lines(z: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return mean and biased variance from those of the lines in memory, None where there are no such lines.

    torch's group normalization takes both of a line in one pass, as accurately as two.
    """
    if (found := _in_lines(z)) is None:
        return None
    ordered, order, first = found
    lines, length = ordered.shape[:first].numel(), ordered.shape[first:].numel()
    _, mean, inverse = torch.native_group_norm(
        ordered.reshape(1, lines, length), None, None, 1, lines, length, lines, 0.0
    )
    back = [order[:first].index(axis) for axis in sorted(order[:first])]
    mean, var = (
        v.reshape(ordered.shape[:first]).permute(back).reshape(*z.shape[:2], -1)
        for v in (mean, inverse.square().reciprocal())
    )
    center = mean.mean(2)
    return center, (var + (mean - center.unsqueeze(2)).square_()).mean(2)


class _Moments(torch.autograd.Function):
    """Mean and biased variance over the samples; their gradient is one pass, a z + b for each row.

    torch.var_mean over several axes takes many times as long.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> tuple[Tensor, Tensor]:
        found = _of_lines(z)
        if found is None:
            mean = z.mean(samples(z))
            found = mean, (z - rows(mean, z)).square_().mean(samples(z))
        ctx.save_for_backward(z, found[0])
        return found

    @staticmethod
    def backward(ctx: Any, grad_mean: Tensor, grad_var: Tensor) -> Tensor:
        z, mean = ctx.saved_tensors
        count = z.shape[2:].numel()
        slope = grad_var * (2 / count)
        return torch.addcmul(rows(grad_mean / count - slope * mean, z), z, rows(slope, z))


_moments: Callable[[Tensor], tuple[Tensor, Tensor]] = _Moments.apply


@dataclass(frozen=True)
class Across(Average):
    """Averages over all ranks of a process group, weighted by their numbers of samples; differentiable.

    Attributes:
        group: the process group, None for the default one.
    """

    group: Any = None

    def __post_init__(self) -> None:
        """Refuse to start without a process group.

        Raises:
            ArgumentError: torch.distributed is not initialized.
        """
        if not (dist.is_available() and dist.is_initialized()):
            raise ArgumentError(
                "process_group was given, but torch.distributed is not initialized; call init_process_group first."
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> Across:
        """Share the process group, which cannot be copied."""
        return self

    def over(self, total: Tensor, count: int) -> Tensor:
        """Sum over the ranks and divide by the number of samples on all of them."""
        sizes = torch.tensor([float(count)], dtype=total.dtype, device=total.device)
        summed: Tensor = _all_reduce(torch.cat([total.flatten(), sizes]), self.group)
        return (summed[:-1] / summed[-1]).reshape(total.shape)

    def count(self, z: Tensor) -> int | Tensor:
        """Return the number of samples of each row on all ranks."""
        number = torch.tensor(float(z.shape[2:].numel()), dtype=z.dtype, device=z.device)
        dist.all_reduce(number, group=self.group)
        return number

    def moments(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and biased variance about the mean of all ranks."""
        mean = self.mean(z)
        return mean, self.mean((z - rows(mean, z)).square())

    def square(self, z: Tensor) -> Tensor:
        """Return the mean square over all ranks."""
        return self.mean(z.square())

    def largest(self, z: Tensor, k: int) -> Tensor:
        """Return the k largest samples of each row among all ranks."""
        have = z.shape[2:].numel()
        mine = super().largest(z, min(k, have))
        if have < k:
            # every rank sends as many; what fills up is too small to be chosen
            mine = torch.nn.functional.pad(mine, (0, k - have), value=torch.finfo(z.dtype).min)
        world = dist.get_world_size(self.group)
        selected = torch.nn.functional.one_hot(torch.tensor(dist.get_rank(self.group)), world)
        place = selected.to(mine).reshape(-1, 1, 1, 1) * mine
        everyone: Tensor = _all_reduce(place, self.group)
        return everyone.movedim(0, 2).flatten(2).topk(k, dim=-1).values


class _AllReduce(torch.autograd.Function):
    """Sum over ranks; the gradient is the sum of the gradients over ranks, to any order."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: Any) -> Tensor:
        ctx.group = group
        summed = value.contiguous().clone()
        dist.all_reduce(summed, group=group)
        return summed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _all_reduce(grad, ctx.group), None


_all_reduce: Callable[..., Tensor] = _AllReduce.apply
