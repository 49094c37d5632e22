"""The table of methods: a row for each, and `build`, which makes a layer from its name."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import nn

from normscope.core.errors import ArgumentError
from normscope.core.named import Named
from normscope.norms.families import (
    areas,
    domain,
    graph,
    mixtures,
    modern,
    operations,
    populations,
    recoveries,
    robust,
    whitening,
)
from normscope.norms.layer import Normalization
from normscope.norms.part import require
from normscope.norms.row import Row

ROWS: tuple[Row, ...] = (
    *areas.ROWS,
    *operations.ROWS,
    *whitening.ROWS,
    *recoveries.ROWS,
    *mixtures.ROWS,
    *robust.ROWS,
    *domain.ROWS,
    *graph.ROWS,
    *populations.ROWS,
    *modern.ROWS,
)

COMMON = ("eps", "momentum", "affine", "groups")
_DEFAULT: Final[Any] = object()

zoo: Final = Named(
    ROWS,
    "normalizations: name, area x operation x recovery x population",
    lambda row: " x ".join(row.words().values()),
)


def build(
    name: str,
    num_features: int | tuple[int, ...],
    *,
    eps: Any = _DEFAULT,
    momentum: Any = _DEFAULT,
    affine: Any = _DEFAULT,
    groups: Any = _DEFAULT,
    process_group: Any = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> nn.Module:
    """Build a normalization by name.

    eps, momentum, affine and groups are accepted for every method, so that one call fits all; a method that has no such
    setting leaves it aside. momentum is the weight of the newest batch, for every method.

    Args:
        name: a name of the survey's catalog after the colon, or an alias as "bn"; see `zoo`.
        num_features: number of channels; for "layer" and "rms" also a shape of trailing dimensions.
        eps: added before division; the method's own default if not given.
        momentum: weight of the newest batch in stored statistics.
        affine: whether each channel has a scale and a shift.
        groups: number of groups of channels.
        process_group: take statistics that cross the batch over all its ranks; "world" for the default group.
        device: of parameters and buffers.
        dtype: of parameters and buffers.
        **options: further settings of the method.

    Returns:
        The layer; an unknown name or option is an ArgumentError with the closest ones.

    Raises:
        ArgumentError: the method needs an option that is missing.

    >>> build("bn", 64, momentum=0.01)
    Norm(Batch(), Standardize(), recovery=Affine(), population=Running(momentum=0.01), num_features=64)
    """
    row = zoo[name]
    known = row.settings()
    for option in options:
        require(option, "option", dict.fromkeys([*COMMON, *known]))
    common = {"eps": eps, "momentum": momentum, "affine": affine, "groups": groups}
    given = options | {key: value for key, value in common.items() if value is not _DEFAULT and key in known}
    missing = [key for key, p in known.items() if p.default is p.empty and key not in given]
    if missing:
        raise ArgumentError(f"name={name!r} needs {', '.join(missing)}; call build({name!r}, ..., {missing[0]}=...).")
    with torch.device(device) if device is not None else torch.device(torch.get_default_device()):
        layer = row.make(num_features, **given)
    if dtype is not None:
        layer.to(dtype=dtype)
    if process_group is not None and isinstance(layer, Normalization):
        layer.synchronize(process_group)
    return layer
