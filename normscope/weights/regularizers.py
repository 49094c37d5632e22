"""The table of penalties: a row for each, and `regularizer`, which makes one that is called on a model."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from normscope.core.errors import ArgumentError
from normscope.core.named import Named
from normscope.norms.conversion import Where, meant
from normscope.norms.part import require
from normscope.weights import features, penalties
from normscope.weights.parametrization import Layout
from normscope.weights.table import LAYERS


@dataclass(frozen=True)
class Penalty:
    """One published penalty.

    Attributes:
        name: the catalog's name after the colon, or a name of ours.
        source: key of the bibliography.
        value: the penalty of one weight, by keyword options.
        of: "matrix" `(out, fan_in)`, "kernel" as it lies, or "features".
        strength: the published factor; 1 where it varies.
        aliases: other names.
        keys: recorded numbers that it reproduces.
    """

    name: str
    source: str
    value: Callable[..., Tensor]
    of: str
    strength: float = 1.0
    aliases: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()


PENALTIES: Final = (
    Penalty("soft-orthogonality", "S101", penalties.soft, "matrix", aliases=("so",)),
    Penalty("double-soft-orthogonality", "S101", penalties.double_soft, "matrix", aliases=("dso",)),
    Penalty("mutual-coherence", "S101", penalties.coherence, "matrix", aliases=("mc",)),
    Penalty(
        "soft-double-mutual-srip",
        "S101",
        penalties.restricted_isometry,
        "matrix",
        aliases=("srip", "spectral-restricted-isometry"),
        keys=("ortho_srip_svhn",),
    ),
    Penalty(
        "orthogonal-convolution",
        "S098",
        penalties.orthogonal_convolution,
        "kernel",
        0.1,
        ("ocnn",),
        ("ocnn_orth_dist",),
    ),
    Penalty("isometric", "S099", penalties.isometric, "kernel", 1e-4, ("isonet",), ("isonet",)),
    Penalty("biggan-orthogonal", "S103", penalties.biggan, "matrix", 1e-4, ("biggan",), ("biggan_ortho",)),
    Penalty("parseval", "S102", penalties.parseval, "matrix", 3e-4),
    Penalty("spectral", "yoshida2017", penalties.spectral, "matrix", 0.01, ("spectral-norm",)),
    Penalty(
        "instance-selective-whitening",
        "S166",
        features.instance_whitening,
        "features",
        0.6,
        ("isw", "instance-whitening"),
        ("isw_loss",),
    ),
    Penalty("bn-statistics-matching", "S170", features.statistics_matching, "features", 1.0, ("bnm",)),
)

regularizers: Final = Named(
    PENALTIES,
    "penalties: name, what it is of, published strength, source",
    lambda row: f"{row.of:<10}{row.strength:<8g}{row.source}",
)


class Regularizer:
    """A penalty with its settings: called on a model it gives the total, `per_layer` the value of each layer.

    What it returns has a gradient and is to be added to the loss. It sees the weight in use, also of parametrized
    layers. A weight that several layers share counts once; groups of a convolution count for themselves where the
    penalty is of kernels.
    """

    def __init__(self, row: Penalty, where: Where, strength: float, options: dict[str, Any]) -> None:
        """Hold the settings; use `regularizer`."""
        self.row, self.where, self.strength, self.options = row, where, strength, options

    def __repr__(self) -> str:
        """Write the call that makes it."""
        shown = "".join(f", {name}={value!r}" for name, value in self.options.items())
        return f"regularizer({self.row.name!r}, where={self.where!r}, strength={self.strength!r}{shown})"

    def __call__(self, model: nn.Module) -> Tensor:
        """Return the sum over layers.

        Args:
            model: any module.

        Returns:
            A scalar, with a gradient.
        """
        return torch.stack(list(self.per_layer(model).values())).sum()

    def per_layer(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the penalty of each layer, times the strength.

        Args:
            model: any module.

        Returns:
            Path to scalar, with a gradient.

        Raises:
            ArgumentError: no layer is meant.
        """
        found: dict[str, Tensor] = {}
        seen: set[int] = set()
        for path, module in model.named_modules():
            if not isinstance(module, LAYERS) or not self._wanted(path, module):
                continue
            raw = module._parameters.get(_weight(module))
            if raw is not None and id(raw) in seen:  # a parametrized weight is in nobody's _parameters
                continue
            seen.add(id(raw))
            found[path] = self.strength * self._value(module)
        if not found:
            raise ArgumentError(f"where={self.where!r} matches no linear layer, convolution or recurrent cell.")
        return found

    def _wanted(self, path: str, module: nn.Module) -> bool:
        if not meant(self.where, path, module):
            return False
        # as published: not the first convolution on color images, none with a 7 x 7 kernel
        skipped = isinstance(module, _ConvNd) and (module.in_channels == 3 or set(module.kernel_size) == {7})
        return self.row.name != "isometric" or (isinstance(module, _ConvNd) and not skipped)

    def _value(self, module: nn.Module) -> Tensor:
        weight: Tensor = getattr(module, _weight(module))
        if self.row.of == "matrix":
            return self.row.value(Layout.of(module).rows(weight), **self.options)
        stride = module.stride[0] if isinstance(module, _ConvNd) else 1
        options = {"stride": stride, **self.options}
        return torch.stack([self.row.value(k, **options) for k in Layout.of(module).kernels(weight)]).sum()


class FeatureRegularizer(Regularizer):
    """A penalty on features: called on what it is of, as `(x)` or `(norm, x)`, or on a mapping of these by name."""

    def __call__(self, *inputs: Any) -> Tensor:
        """Return the penalty, or the sum over a mapping from names to inputs."""
        if len(inputs) == 1 and isinstance(inputs[0], dict):
            return torch.stack(list(self.per_layer(inputs[0]).values())).sum()
        return self.strength * self.row.value(*inputs, **self.options)

    def per_layer(self, inputs: Any) -> dict[str, Tensor]:
        """Return the penalty of each entry of a mapping from names to features, or to tuples of inputs."""
        return {name: self(*(item if isinstance(item, tuple) else (item,))) for name, item in inputs.items()}


def _weight(module: nn.Module) -> str:
    return "weight_hh" if isinstance(module, nn.RNNCellBase) else "weight"


def regularizer(name: str, where: Where = None, *, strength: float | None = None, **options: Any) -> Regularizer:
    """Make a penalty, to be added to the loss.

    Args:
        name: a name of `regularizers`.
        where: which layers: a pattern of paths, a class or several, a function of path and module; None for linear
            layers, convolutions and recurrent cells.
        strength: factor; None for the published one.
        **options: settings of the penalty.

    Returns:
        The penalty: `penalty(model)` is the total, `penalty.per_layer(model)` one value a layer; one on features is
        called on these.

    Raises:
        ArgumentError: strength is no positive number. An unknown name or option is one as well, with the closest.

    >>> layer = nn.Linear(2, 2)
    >>> nn.init.zeros_(layer.weight)[0].tolist(), float(regularizer("so")(layer).detach())
    ([0.0, 0.0], 2.0)
    """
    row = regularizers[name]
    known = [k for k, p in inspect.signature(row.value).parameters.items() if p.kind is p.KEYWORD_ONLY]
    for option in options:
        require(option, "option", known)
    if "generator" in known:
        options.setdefault("generator", torch.Generator().manual_seed(0))
    factor = row.strength if strength is None else strength
    if not factor > 0:
        raise ArgumentError(f"strength={strength!r} must be above 0; the published one is {row.strength:g}.")
    return (FeatureRegularizer if row.of == "features" else Regularizer)(row, where, factor, options)
