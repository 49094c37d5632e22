"""Methods that torch.nn.utils.parametrizations has, taken from there."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from normscope.weights.parametrization import Layout, RowMap


def borrow(weight: Tensor, register: Any, **options: Any) -> nn.Module:
    """Return the module with which a function of torch.nn.utils.parametrizations parametrizes a weight.

    Args:
        weight: example.
        register: the function.
        **options: of the function.

    Returns:
        The module.
    """
    holder = nn.Module()
    holder.weight = nn.Parameter(weight.detach().clone())
    register(holder, "weight", **options)
    return cast(Any, holder).parametrizations.weight[0]  # type: ignore[no-any-return]


class Borrowed(RowMap):
    """Base of methods that are torch's, of the matrix `(out, fan_in)`: torch's module is held as `inner`."""

    def __init__(self, layout: Layout, weight: Tensor, register: Any, **options: Any) -> None:
        """Take torch's module.

        Args:
            layout: of the weight.
            weight: example.
            register: function of torch.nn.utils.parametrizations.
            **options: of the function.
        """
        super().__init__(layout)
        self.inner: Any = borrow(layout.rows(weight.detach()), register, **options)

    def map(self, rows: Tensor) -> Tensor:
        """Return the matrix in use."""
        return cast(Tensor, self.inner.forward(rows))

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return the raw tensor for a weight, as torch does."""
        raw: Tensor = self.inner.right_inverse(self.layout.rows(weight))
        return self.layout.back(raw, weight.shape).contiguous()
