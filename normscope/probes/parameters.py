"""Parameters: size and direction of weights, gradients and updates; the gradient norm of every step."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from normscope.core.site import Site
from normscope.probes import optimizers, ranks
from normscope.probes.normalization import MAX_CHANNELS
from normscope.probes.summary import Row, channel_row

_COARSE = (torch.float16, torch.bfloat16)  # numbers so far apart that a step may not reach the next
DAMPED = 0.9  # sqrt(v) / (sqrt(v) + eps) below which eps shortens a step of Adam
_SAMPLED = 256  # entries of a second moment that are looked at
COPIED = 1 << 25  # bytes of weights copied before a sampled step at most, 32 MB


class _Found(NamedTuple):
    """A state on its device: of the weight or gradient a norm, of both their inner product, of a step `_moved`.

    Of a sharded parameter it is what the ranks' parts add up to, of a norm the square.
    """

    name: str
    role: str
    stat: str
    state: torch.Tensor
    sharded: bool

    @property
    def key(self) -> str:
        """What it is of, as text."""
        return f"{self.name} {self.role} {self.stat}"


class Parameters:
    """Measures the parameters of one or several optimizers around a step.

    Args:
        named: watched parameters by name.
        stepped: the optimizers.
        on_site: called with a site and its attributes when it is first seen.
    """

    def __init__(
        self,
        named: Mapping[str, nn.Parameter],
        stepped: Sequence[torch.optim.Optimizer],
        on_site: Callable[[str, dict[str, object]], None],
    ) -> None:
        """Start with nothing measured; see the class."""
        self._named, self._optimizers, self._on_site = named, tuple(stepped), on_site
        self._names = {id(parameter): name for name, parameter in named.items()}
        self._known: set[str] = set()
        self._copies: dict[int, dict[str, torch.Tensor]] = {}
        self._buffers: dict[int, dict[str, torch.Tensor]] = {}  # of the copies: fresh memory costs more than they do
        self._turn: dict[int, int] = {}
        self._found: list[_Found] = []
        self._held: list[tuple[nn.Parameter, weakref.ref[torch.Tensor], int]] = []
        self._left: tuple[nn.Parameter, torch.Tensor, torch.Tensor] | None = None
        held = (p for o in self._optimizers for group in o.param_groups for p in group["params"])
        self.sharded = any(ranks.is_sharded(p) for p in held)  # whether each rank holds a part of what is trained

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Copy weights, `COPIED` bytes of them at most; those left out have their turn at the next sampled step."""
        mine = self._mine(optimizer)
        again = {name for name, _ in mine}  # an optimizer that steps twice in a step is measured at its last
        self._found = [item for item in self._found if item.name not in again]
        start = self._turn.get(id(optimizer), 0) % max(len(mine), 1)
        buffers = self._buffers.get(id(optimizer), {})
        chosen: dict[str, torch.Tensor] = {}
        room = COPIED
        for name, parameter in mine[start:] + mine[:start]:
            thin = _thinned(parameter)
            size = _copied_bytes(parameter)
            if size > room:
                break
            room -= size
            chosen[name] = _copied(thin, buffers.get(name))
        self._turn[id(optimizer)] = start + len(chosen)
        self._copies[id(optimizer)], self._buffers[id(optimizer)] = chosen, chosen

    def see_held(self) -> None:
        """Remember which parameters have a gradient when the first forward pass of a step begins."""
        held = (p for o in self._optimizers for group in o.param_groups for p in group["params"])
        having = ((p, p.grad) for p in held if id(p) in self._names)
        self._held = [(p, weakref.ref(g), g._version) for p, g in having if g is not None]

    def see_left(self) -> None:
        """Look at a gradient that is as it was before the forward pass, of the smallest parameter that has one.

        At the first gradient of an activation others may have come already: those of parameters used after the last
        module that is watched, as a bias that is added to its output.
        """
        having = [p for p, then, version in self._held if _is_same(p.grad, then(), version)]
        if having:
            least = min(having, key=torch.Tensor.numel)
            gradient = least.grad
            assert gradient is not None  # chosen so
            self._left = (least, gradient, _square(dense_values(gradient)))

    def gradients(
        self, optimizer: torch.optim.Optimizer, scale: torch.Tensor | None, by_row: bool
    ) -> dict[int, torch.Tensor]:
        """Measure weights, as they were before the step, and gradients, divided by the loss scale.

        Args:
            optimizer: the optimizer whose parameters they are.
            scale: loss scale that a fused optimizer undoes itself, None where gradients are as they should be.
            by_row: whether norms and inner products are taken of each row (first index, a filter) of matrices.

        Returns:
            The squared norm of each gradient by the id of its parameter, not divided by the scale.
        """
        kept = self._copies.get(id(optimizer), {})
        squares: dict[int, torch.Tensor] = {}
        for name, parameter in self._mine(optimizer):
            held = ranks.local(parameter)
            copied = name in kept and kept[name].numel() == held.numel()
            weight = kept[name] if copied else held
            rows = by_row and _has_rows(parameter)
            if rows or not copied:  # of a copied weight it follows from what the step moves
                self._add(name, "value", "norm", _row_norms(weight) if rows else norms([weight])[0])
            if parameter.grad is None:
                continue
            gradient = dense_values(parameter.grad)
            rows = rows and gradient.shape == weight.shape
            found = {"square": _row_norms(gradient).square_() if rows else _square(gradient)}
            square = found["square"].sum() if rows else found["square"]
            squares[id(parameter)] = square * self.weight(parameter) if self.sharded else square
            if self._left is not None and self._left[0] is parameter and self._left[1] is parameter.grad:
                found["left"] = self._left[2]  # the same tensor: it was not set to None since
            if gradient.shape == weight.shape:
                found["inner"] = _row_inner(weight, gradient) if rows else _inner(weight, gradient)
            for stat, state in found.items():
                power = 1 if stat == "inner" else 2
                self._add(name, "gradient", stat, state if scale is None else state / scale.to(state.device) ** power)
        return squares

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Measure what the step has changed."""
        before = self._copies.pop(id(optimizer), {})
        for parameter, share in _damped(optimizer):
            if id(parameter) in self._names:
                self._add(self._names[id(parameter)], "update", "damped", share)
        for name, parameter in self._mine(optimizer):
            if name in before:
                now = _thinned(parameter)
                back = before[name].sub_(now)
                stretch = ranks.local(parameter).numel() / max(now.numel(), 1)
                self._add(name, "update", "moved", _moved(now, back, stretch))
                if parameter.dtype in _COARSE and parameter.grad is not None:
                    self._add(name, "update", "still", _still(back, _thinned(parameter.grad)))

    def weight(self, x: torch.Tensor) -> float:
        """Return the part of a tensor's square that this rank adds to a sum over ranks; 1 where nothing is sharded."""
        return ranks.share(x) if self.sharded else 1.0

    def states(self) -> list[_Found]:
        """Return what was measured in this step, on its devices."""
        return self._found

    def rows(self, values: Sequence[np.ndarray | None], vectors: Mapping[str, np.ndarray]) -> list[Row]:
        """Return rows with size and direction of each parameter and role.

        Args:
            values: `states` on the host, None for those that are not known.
            vectors: gains and biases of normalization layers by site, kept whole.

        Returns:
            One row a parameter and role: norm and rms; of a gradient the cosine with its weight; of an update, in units
            of the weight's norm, the length (relative), the part along the weight (radial), and the angle by which it
            turns the weight, in radians; in half precision also the fraction of entries that a gradient did not move
            (still), and under Adam that of entries whose steps eps shortens by a tenth or more (damped). Of one
            gradient the share that the step before has left (left), where it was not cleared.
        """
        states: dict[str, dict[tuple[str, str], np.ndarray]] = {}
        for item, value in zip(self._found, values, strict=True):
            if value is not None:
                norm = np.sqrt(value) if item.sharded and item.stat == "norm" else value
                states.setdefault(item.name, {})[item.role, item.stat] = norm
        arrays: dict[tuple[str, str], dict[str, np.ndarray]] = {}
        scalars: dict[tuple[str, str], dict[str, float]] = {}
        for name, found in states.items():
            site, size = self.site(name), max(self._named[name].numel(), 1)
            for role, (whole, by_row) in _finished(found).items():
                scalars[site, role] = {"norm": whole["norm"], "rms": whole["norm"] / math.sqrt(size)} | whole
                arrays[site, role] = by_row
        for site, vector in vectors.items():
            scalars.setdefault((site, "value"), {})
            arrays[site, "value"] = {"value": vector.reshape(-1)}
        return [channel_row(*key, arrays.get(key, {}), found) for key, found in scalars.items()]

    def discard(self) -> None:
        """Forget what the step has left."""
        self._copies, self._found, self._held, self._left = {}, [], [], None

    def _add(self, name: str, role: str, stat: str, state: torch.Tensor) -> None:
        parameter = self._named[name]
        sharded = ranks.is_sharded(parameter)
        if sharded:
            state = state.square() if stat == "norm" else state
            by_row = state.dim() and stat in ("norm", "square", "inner")
            state = ranks.spread(parameter, state) if by_row else state * ranks.share(parameter)
        self._found.append(_Found(name, role, stat, state, sharded))

    def _mine(self, optimizer: torch.optim.Optimizer) -> list[tuple[str, torch.Tensor]]:
        held = (p for group in optimizer.param_groups for p in group["params"])
        return [(self._names[id(p)], p) for p in held if id(p) in self._names and not is_lazy(p)]

    def site(self, name: str) -> str:
        """Return the site of a parameter, told to `on_site` when it is first asked for."""
        module, _, slot = name.rpartition(".")
        site = str(Site(module, 0, slot))
        if name not in self._known:
            self._known.add(name)
            parameter = self._named[name]
            optimizer, group = optimizers.owner(parameter, self._optimizers)
            attributes: dict[str, object] = {
                "module": module,
                "call": 0,
                "slot": slot,
                "class": "Parameter",
                "shape": list(parameter.shape),
                "dtype": str(parameter.dtype).removeprefix("torch."),
                "trainable": parameter.requires_grad,
                "optimizer": optimizer,
                "group": group,
                **optimizers.rule(parameter, self._optimizers),
            }
            self._on_site(site, attributes)
        return site


def named(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the model's parameters by dotted name: a tied one under its first name.

    Left out is what cannot be measured: integers (quantized), eight-bit numbers, sparse ones, those without values.
    """
    return {name: p for name, p in model.named_parameters() if is_lazy(p) or _is_measured(p)}


def _is_measured(p: torch.Tensor) -> bool:
    numbers = (p.is_floating_point() and p.dtype.itemsize > 1) or p.is_complex()
    return numbers and p.layout is torch.strided and not p.is_meta


def norms(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the Euclidean norm of each tensor, as scalars on its device; half precision is summed in float32."""
    return [_square(dense_values(tensor)).sqrt_() for tensor in tensors]


@torch.no_grad()
def squared_norm(
    gradients: Iterable[torch.Tensor],
    known: Iterable[torch.Tensor] = (),
    weight: Callable[[torch.Tensor], float] = lambda _: 1.0,
) -> list[torch.Tensor]:
    """Return the squared norm of all gradients together, one scalar a device, without waiting for it.

    Args:
        gradients: parameter gradients, dense or sparse; of a sharded one the part of this rank.
        known: squared norms of further gradients.
        weight: what the square of a gradient is multiplied with.

    Returns:
        One scalar per device that holds a gradient; NaN or infinite as soon as one element is.
    """
    parts: dict[tuple[torch.device, torch.dtype, float], list[torch.Tensor]] = {}
    for gradient in gradients:
        whole = dense_values(gradient)
        parts.setdefault((whole.device, whole.dtype, weight(gradient)), []).append(whole)
    squares: dict[torch.device, list[torch.Tensor]] = {}
    for square in known:
        squares.setdefault(square.device, []).append(square)
    for (device, _, part), same in parts.items():
        norm = torch.stack(torch._foreach_norm(same, 2, sum_dtype(same[0])))
        square = norm.square_().sum()
        squares.setdefault(device, []).append(square if part == 1 else square * part)
    return [found[0] if len(found) == 1 else torch.stack(found).sum() for found in squares.values()]


def _is_same(gradient: torch.Tensor | None, then: torch.Tensor | None, version: int) -> bool:
    return gradient is not None and gradient is then and gradient._version == version


def _square(x: torch.Tensor) -> torch.Tensor:
    if x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64) and x.is_contiguous():
        flat = x.view(-1)
        return torch.dot(flat, flat)  # at memory bandwidth; vector_norm is slower on a CPU
    norm: torch.Tensor = torch.linalg.vector_norm(x, dtype=sum_dtype(x))
    return norm.square_()


def _inner(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the inner product of two tensors of one shape, as real vectors."""
    a, b = a.detach(), b.detach()
    if a.device.type == "cpu" and a.dtype == b.dtype and a.dtype in (torch.float32, torch.float64):
        return torch.dot(a.reshape(-1), b.reshape(-1))
    wide = sum_dtype(a) or a.dtype
    product = a.to(wide) * b.to(wide).conj()
    return (product.real if product.is_complex() else product).sum()


def _has_rows(x: torch.Tensor) -> bool:
    small = x.numel() * x.element_size() <= COPIED  # products of rows take a temporary of this size
    return x.dim() > 1 and 0 < len(x) <= MAX_CHANNELS and x.numel() > 0 and small and not x.is_complex()


def _row_norms(x: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = torch.linalg.vector_norm(x.detach().flatten(1), dim=1, dtype=sum_dtype(x))
    return found


def _row_inner(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    wide = sum_dtype(a) or a.dtype
    return (a.detach().to(wide) * b.to(wide)).flatten(1).sum(1)


def _moved(now: torch.Tensor, back: torch.Tensor, stretch: float) -> torch.Tensor:
    """Return |back|^2, <now, back> and |now|^2 of a weight and the way back to what it was, [3]."""
    return torch.stack((_square(back), _inner(now, back), _square(now))) * stretch


def _still(back: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Return how many entries have a gradient and were not moved, and how many have one, [2]."""
    pushed = gradient != 0
    return torch.stack((((back == 0) & pushed).sum(), pushed.sum()))


@torch.no_grad()
def _damped(optimizer: torch.optim.Optimizer) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield each parameter of Adam with [entries whose steps eps shortens to less than `DAMPED`, entries].

    Adam divides by sqrt(v / (1 - beta_2^t)) + eps; v is the second moment, or its maximum so far. Entries without a
    gradient so far do not count; a sample of the others is looked at.
    """
    for group in optimizer.param_groups if optimizers.is_adam(optimizer) else ():
        held = [(p, optimizer.state.get(p, {})) for p in group["params"]]
        having = [(p, s) for p, s in held if isinstance(s.get("exp_avg_sq"), torch.Tensor) and p.numel()]
        for device in dict.fromkeys(s["exp_avg_sq"].device for _, s in having):
            here = [(p, s) for p, s in having if s["exp_avg_sq"].device == device]
            moments = [ranks.local(s.get("max_exp_avg_sq", s["exp_avg_sq"])).reshape(-1) for _, s in here]
            samples = [v[:: -(-v.numel() // _SAMPLED) | 1] for v in moments]
            second = torch.cat([sample.to(torch.float32) for sample in samples])
            step = torch.as_tensor(here[0][1]["step"], dtype=torch.float32, device=device)
            root = (second / (1 - group["betas"][1] ** step)).sqrt_()
            flags = torch.stack((root < DAMPED * (root + group["eps"]), torch.ones_like(root, dtype=torch.bool)))
            counts = (flags & (second > 0)).cumsum(1, dtype=torch.float32)
            ends = np.cumsum([0, *map(len, samples)]).tolist()
            found = torch.diff(torch.cat((counts.new_zeros(2, 1), counts), 1)[:, ends], dim=1)
            yield from zip((p for p, _ in here), found.unbind(1), strict=True)


@np.errstate(all="ignore")  # a diverged run holds infinities, a bias of zeros has no direction
def _finished(
    found: Mapping[tuple[str, str], np.ndarray],
) -> dict[str, tuple[dict[str, float], dict[str, np.ndarray]]]:
    """Return scalars and arrays by row of each role, from the states of one parameter."""
    result: dict[str, tuple[dict[str, float], dict[str, np.ndarray]]] = {}
    moved, norm, square = (found.get(key) for key in (("update", "moved"), ("value", "norm"), ("gradient", "square")))
    if norm is not None:
        result["value"] = ({"norm": float(np.sqrt((norm**2).sum()))}, {"row_norm": norm} if norm.ndim else {})
    elif moved is not None:
        result["value"] = ({"norm": float(np.sqrt(moved[2] + 2 * moved[1] + moved[0]))}, {})
    if square is not None:
        result["gradient"] = (
            {"norm": float(np.sqrt(square.sum()))},
            {"row_norm": np.sqrt(square)} if square.ndim else {},
        )
    left = found.get(("gradient", "left"))
    if left is not None:
        result["gradient"][0]["left"] = float(np.sqrt(left / square.sum())) if square is not None else math.nan
    inner = found.get(("gradient", "inner"))
    if inner is not None:
        (value, by_row), (gradient, rows) = result["value"], result["gradient"]
        gradient["cosine"] = float(inner.sum() / np.float64(value["norm"] * gradient["norm"]))
        if inner.ndim:
            sizes = by_row["row_norm"] * rows["row_norm"]
            rows["row_cosine"] = np.where(sizes == 0, 0.0, inner / sizes)
    if moved is not None:
        result["update"] = (_update(*moved), {})
        for stat in ("still", "damped"):
            if (share := found.get(("update", stat))) is not None:
                result["update"][0][stat] = float(share[0] / share[1])
    return result


def _update(square: float, cross: float, after: float) -> dict[str, float]:
    """Return size and direction of an update dw = w' - w from |dw|^2, -<w', dw> and |w'|^2.

    The angle is atan2(tangential part, 1 + radial part): exact for tiny angles, where the arc cosine has no digits.
    """
    before = after + 2 * cross + square
    relative, radial = np.sqrt(square / before), -(cross + square) / before
    tangential = np.sqrt(np.maximum(relative**2 - radial**2, 0.0))
    return {
        "norm": float(np.sqrt(square)),
        "relative": float(relative),
        "radial": float(radial),
        "angle": float(np.arctan2(tangential, 1 + radial)),
    }


def _copied(x: torch.Tensor, buffer: torch.Tensor | None) -> torch.Tensor:
    if buffer is None or (buffer.shape, buffer.dtype, buffer.device) != (x.shape, x.dtype, x.device):
        return x.clone()
    return buffer.copy_(x)


def _thinned(x: torch.Tensor) -> torch.Tensor:
    """Return a parameter, or every k-th of its elements where it alone is larger than what may be copied."""
    x = ranks.local(x)
    stride = -(-x.numel() * x.element_size() // COPIED)
    return x.reshape(-1)[::stride] if stride > 1 else x


def _copied_bytes(x: torch.Tensor) -> int:
    """Return what the copy of a parameter takes; of a sharded one on every rank the same, that of an equal part."""
    parts = round(ranks.share(x) * ranks.world()) if ranks.is_sharded(x) else 1
    held = -(-x.numel() // parts)
    stride = max(1, -(-held * x.element_size() // COPIED))
    return -(-held // stride) * x.element_size()


def dense_values(x: torch.Tensor) -> torch.Tensor:
    """Return what this process holds of a tensor, without its history; of a sparse one the values."""
    x = ranks.local(x)
    if x.is_sparse:
        return x.coalesce().values()
    return x


def sum_dtype(x: torch.Tensor) -> torch.dtype | None:
    """Return the type in which the values of a tensor are summed, None for its own."""
    return torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else None
