"""Conversion: swap the norms of any model and keep what means the same before and after."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable, Iterator
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch import distributed as dist

from normscope.core.errors import ArgumentError
from normscope.norms.layer import Norm, Normalization
from normscope.norms.part import require
from normscope.norms.recognize import NormParts, find_norms, recognize
from normscope.norms.table import build, zoo

Where = str | type[nn.Module] | tuple[type[nn.Module], ...] | Callable[[str, nn.Module], bool] | None

_FEATURES = ("num_features", "num_channels", "normalized_shape", "n_channels", "dim", "hidden_size")
# dimensions of an input that a class of torch takes
_RANKS: Final = (
    ((nn.BatchNorm1d, nn.InstanceNorm1d), {2, 3}),
    ((nn.BatchNorm2d, nn.InstanceNorm2d), {4}),
    ((nn.BatchNorm3d, nn.InstanceNorm3d), {5}),
)


def convert(
    model: nn.Module,
    to: str | Callable[..., nn.Module] = "group",
    where: Where = None,
    *,
    channels: str | None = None,
    **options: Any,
) -> nn.Module:
    """Replace the norms of a model, in place; what means the same before and after is kept.

    Kept are gain and bias wherever both layers have one for each channel (also the zero with which some residual
    branches start), running statistics from batch norm to a norm over the same area, eps, momentum and groups from a
    norm to one of the same kind, whether parameters are trained, dtype, device and mode. A shared layer stays shared.
    Where a single norm cannot be converted, nothing is.

    Args:
        model: any module; if it is itself a norm, the return value replaces it.
        to: a name of `zoo`, or a function from the number of features (and the options) to a layer.
        where: which norms: a pattern of paths as "layer3.*", a class or several, a function of path and module; None
            for all.
        channels: "first" or "last", where channels lie in the inputs of these norms; by default as the norm says,
            last for LayerNorm and RMSNorm.
        **options: settings of the method, as `build` takes them.

    Returns:
        The model.

    Raises:
        ArgumentError: there is no such norm, or some cannot be converted; the message names them and why.

    >>> convert(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)), to="group", groups=4)[1]
    Norm(Group(groups=4), Standardize(), recovery=Affine(), num_features=8)
    """
    if channels is not None:
        require(channels, "channels", ("first", "last"))
    if isinstance(to, str):
        zoo[to]
    replacements: dict[nn.Module, nn.Module] = {}
    failures: dict[str, list[str]] = {}
    for path, parts in _selected(model, where).items():
        module = model.get_submodule(path)
        try:
            replacements[module] = _replacement(model, path, parts, to, channels, dict(options))
        except ArgumentError as error:
            failures.setdefault(str(error), []).append(path or "(the model itself)")
    if failures:
        reasons = " ".join(f"{_listed(paths)}: {reason}" for reason, paths in failures.items())
        raise ArgumentError(
            f"to={to!r} cannot replace some norms, so none was replaced. {reasons} Choose others with where=..."
        )
    return swap(model, replacements)


def swap(model: nn.Module, replacements: dict[nn.Module, nn.Module]) -> nn.Module:
    """Put new modules in the place of old ones, wherever those stand.

    Args:
        model: changed in place.
        replacements: old to new.

    Returns:
        The model, or its own replacement.
    """
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in replacements:
                parent._modules[name] = replacements[child]
    return replacements.get(model, model)


def _selected(model: nn.Module, where: Where) -> dict[str, NormParts]:
    """Find the norms that are meant; none is an error that lists those there are."""
    found = find_norms(model)
    if not found:
        raise ArgumentError("model has no norm that is recognized; declare_norm(cls, NormParts(...)) teaches a class.")
    aliases: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        aliases.setdefault(module, []).append(path)
    chosen = {
        path: parts
        for path, parts in found.items()
        if any(meant(where, alias, model.get_submodule(path)) for alias in aliases[model.get_submodule(path)])
    }
    if not chosen:
        raise ArgumentError(f"where={where!r} matches none of the {len(found)} norms: {_listed(list(found))}.")
    return chosen


def meant(where: Where, path: str, module: nn.Module) -> bool:
    """Tell whether `where` names a module: a pattern of paths, classes, a function of path and module; None is all."""
    if where is None:
        return True
    if isinstance(where, str):
        return fnmatch.fnmatchcase(path, where)
    if isinstance(where, type | tuple):
        return isinstance(module, where)
    return where(path, module)


def _listed(paths: list[str], limit: int = 8) -> str:
    more = f" and {len(paths) - limit} more" if len(paths) > limit else ""
    return ", ".join(map(repr, paths[:limit])) + more


def _replacement(
    model: nn.Module,
    path: str,
    parts: NormParts,
    to: str | Callable[..., nn.Module],
    channels: str | None,
    options: dict[str, Any],
) -> nn.Module:
    """Make the new layer for an old one and hand over what it keeps."""
    module = model.get_submodule(path)
    _refuse_content(module)
    features = _features(module, parts)
    channels = channels or ("first" if parts.axis == 1 else "last")
    if isinstance(to, str):
        new = _built(to, features, channels, parts, options)
        _check_rank(module, new)
    else:
        new = to(features if len(features) > 1 else features[0], **options)
    like = _example(model, path)
    if like is not None:
        new.to(device=options.get("device", like.device), dtype=options.get("dtype", like.dtype))
    _keep_average(module, new)
    with torch.no_grad():
        _keep_affine(module, parts, new)
        _keep_statistics(module, parts, new)
    return new.train(module.training)


def _refuse_content(module: nn.Module) -> None:
    """Refuse a norm with an activation, a linear map or the like inside, which would be lost."""
    if hasattr(module, "out_features"):
        raise ArgumentError(f"{type(module).__name__} is also a linear layer, which would be lost.")
    if isinstance(module, Normalization):
        return
    lost = [
        f"{name} ({type(child).__name__})"
        for name, child in module.named_children()
        if name != "parametrizations" and not isinstance(child, nn.Identity) and recognize(child) is None
    ]
    if lost:
        raise ArgumentError(f"{type(module).__name__} also contains {', '.join(lost)}, which would be lost.")


def _features(module: nn.Module, parts: NormParts) -> tuple[int, ...]:
    """Return the number of channels, or the several trailing dimensions of a layer norm."""
    shape = getattr(module, "normalized_shape", None)
    if isinstance(shape, tuple | list) and len(shape) > 1:
        return tuple(map(int, shape))
    for name in (parts.gain, "running_mean", parts.bias):
        tensor = getattr(module, name, None) if name else None
        if isinstance(tensor, Tensor) and not isinstance(tensor, nn.UninitializedParameter) and tensor.numel() > 1:
            return (tensor.numel(),)
    for name in _FEATURES:
        value = getattr(module, name, None)
        value = value[0] if isinstance(value, tuple | list) and len(value) == 1 else value
        if isinstance(value, int) and value > 0:
            return (value,)
    raise ArgumentError(f"the number of features of {type(module).__name__} is unknown: it has no gain and says none.")


def _built(to: str, features: tuple[int, ...], channels: str, parts: NormParts, options: dict[str, Any]) -> nn.Module:
    """Build a method of the table for channels on the given axis."""
    if len(features) > 1 and zoo[to].name not in {"layer", "rms"}:
        raise ArgumentError(f"it shares statistics over the trailing axes {features}; only 'layer' and 'rms' do.")
    count = features if len(features) > 1 else features[0]
    for name, value in _kept_settings(parts, build(to, count, **options)).items():
        options.setdefault(name, value)
    if "channels" in zoo[to].settings() and len(features) == 1:
        options.setdefault("channels", channels)
    return _laid(build(to, count, **options), features, channels, to)


def _kept_settings(parts: NormParts, new: nn.Module) -> dict[str, Any]:
    """Return the settings of an old norm that mean the same for the new one, given one with the method's defaults."""
    kept: dict[str, Any] = {}
    if parts.gain is None and parts.bias is None and parts.kind not in {"local-response", "other"}:
        kept["affine"] = False
    same = recognize(new)
    if parts.eps is not None and (parts.kind == _kind(new) or (same and same.kind == parts.kind)):
        kept["eps"] = parts.eps
    if same and same.kind == parts.kind and parts.groups is not None:
        kept["groups"] = parts.groups
    if same and same.kind == parts.kind and parts.has_running:
        kept["momentum"] = parts.momentum
    return kept


_STATISTICS = {"running_mean", "running_var", "running_square", "running_std"}


def _kind(new: nn.Module) -> str:
    """Return "batch" for every layer whose stored statistics are those of batch norm, else the kind recognized."""
    parts = recognize(new)
    stored = {name for name, _ in new.named_buffers(recurse=False) if name.startswith("running_")}
    if isinstance(new, Normalization) and new.traits.crosses_batch and "running_mean" in stored <= _STATISTICS:
        return "batch"
    return "" if parts is None else parts.kind


def _laid(new: nn.Module, features: tuple[int, ...], channels: str, to: str) -> nn.Module:
    """Turn a layer to the layout of its input."""
    if len(features) > 1 or not isinstance(new, Normalization):
        return new
    if type(new) is Norm and "channels" in {field.name for field in dataclasses.fields(new.area)}:
        area = dataclasses.replace(new.area, channels=channels)  # type: ignore[call-arg]  # of areas that have it
        turned = Norm(area, new.operation, new.recovery, new.population, num_features=new.num_features)
        turned.average = new.average
        return turned
    last = new.traits.channels_last
    if last != (channels == "last") and not hasattr(new, "channels"):
        places = ("on the last axis", "on axis 1")
        here, there = places if channels == "last" else places[::-1]
        raise ArgumentError(
            f"its channels lie {here}, but {to!r} expects them {there}; "
            f"pass channels={'last' if last else 'first'!r} if its inputs have them there."
        )
    return new


def _check_rank(module: nn.Module, new: nn.Module) -> None:
    """Refuse a method that does not take inputs of the rank that the old layer takes."""
    if not isinstance(new, Normalization):
        return
    for classes, ranks in _RANKS:
        if isinstance(module, classes) and not ranks & set(new.traits.ranks):
            raise ArgumentError(
                f"{type(module).__name__} takes inputs of {_or(ranks)} dimensions, the new layer only of "
                f"{_or(set(new.traits.ranks))}."
            )


def _or(numbers: set[int]) -> str:
    return " or ".join(map(str, sorted(numbers)))


def _example(model: nn.Module, path: str) -> Tensor | None:
    """Return a tensor whose type and device the new layer takes: of the old layer, else of what is around it."""
    names = path.split(".") if path else []
    around = (model.get_submodule(".".join(names[:n])) for n in range(len(names), -1, -1))
    return next((t for source in around for t in _tensors(source) if t.is_floating_point()), None)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _keep_affine(module: nn.Module, parts: NormParts, new: nn.Module) -> None:
    """Copy gain and bias where both layers have one for each channel."""
    target = recognize(new)
    if target is None:
        return
    source = _vector(module, parts.gain)
    gain = _vector(new, target.gain)
    if target.gain and gain is None:  # a matrix: no affine map of each channel
        return
    if gain is not None and source is not None and gain.numel() == source.numel():
        gain.copy_((source + parts.gain_offset - target.gain_offset).reshape(gain.shape))
        gain.requires_grad_(source.requires_grad)
    shift, moved = _vector(module, parts.bias), _vector(new, target.bias)
    if shift is not None and moved is not None and moved.numel() == shift.numel():
        moved.copy_(shift.reshape(moved.shape))
        moved.requires_grad_(shift.requires_grad)


def _vector(module: nn.Module, name: str | None) -> Tensor | None:
    tensor = getattr(module, name, None) if name else None
    if not isinstance(tensor, Tensor):
        return None
    if isinstance(module, Normalization):
        return tensor if tensor.ndim == 1 or getattr(getattr(module, "recovery", None), "shape", None) else None
    return tensor


def _keep_statistics(module: nn.Module, parts: NormParts, new: nn.Module) -> None:
    """Copy running statistics to a norm that stores the same ones, all of them or none."""
    mean, var = getattr(module, "running_mean", None), getattr(module, "running_var", None)
    if parts.kind != _kind(new) or not isinstance(mean, Tensor) or not isinstance(var, Tensor):
        return
    known = {"mean": mean, "var": var, "square": var + mean.square(), "std": (var + (parts.eps or 0.0)).sqrt()}
    stored = {name: b for name, b in new.named_buffers(recurse=False) if name.startswith("running_")}
    if not stored.keys() <= _STATISTICS or any(b.numel() != mean.numel() for b in stored.values()):
        return
    for name, buffer in stored.items():
        buffer.copy_(known[name.removeprefix("running_")].reshape(buffer.shape))
    counts = getattr(module, "num_batches_tracked", None), getattr(new, "num_batches_tracked", None)
    if isinstance(counts[0], Tensor) and isinstance(counts[1], Tensor):
        counts[1].copy_(counts[0])


def _keep_average(module: nn.Module, new: nn.Module) -> None:
    """Go on taking batch statistics over all ranks where the old layer did."""
    if not isinstance(new, Normalization) or not new.traits.crosses_batch:
        return
    if isinstance(module, Normalization):
        new.average = module.average
    elif isinstance(module, nn.SyncBatchNorm) and dist.is_available() and dist.is_initialized():
        new.synchronize(module.process_group or "world")
