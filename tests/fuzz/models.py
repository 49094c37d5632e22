"""Random small models: a plan that hypothesis draws and shrinks, and the model that it stands for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from normscope.norms import build as build_norm
from normscope.norms import zoo

C = 4  # channels throughout, so that any part may follow any other
# of the zoo all that take a tensor alone; those of graphs take nodes, others a class or a style besides
ZOO = tuple(
    row.name
    for row in zoo.values()
    if not any(p.default is p.empty for p in row.settings().values())
    and row.name not in ("conditional-batch", "conditional-group", "spd-batch")
)


@dataclass(frozen=True)
class Part:
    """A layer by its name, or a wrapper with what is inside."""

    name: str
    inside: tuple[Part, ...] = ()


@dataclass(frozen=True)
class Plan:
    """A model and its training: everything that is random about it but its numbers."""

    parts: tuple[Part, ...]
    spatial: tuple[int, ...] = ()
    batch: int = 3
    output: str = "tensor"
    optimizer: str = "SGD"
    double: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of an input."""
        return (self.batch, C, *self.spatial)

    def names(self) -> set[str]:
        """Return the names of all parts."""
        waiting, found = list(self.parts), set()
        while waiting:
            part = waiting.pop()
            found.add(part.name)
            waiting += part.inside
        return found


def _of(rank: int, *classes: type[nn.Module]) -> type[nn.Module]:
    """Return the class for inputs of a rank."""
    return classes[rank]


def _linear(plan: Plan, **options: Any) -> nn.Module:
    rank = len(plan.spatial)
    if not rank:
        options.pop("groups", None)
        return nn.Linear(C, C, **options)
    return _of(rank, nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)(C, C, 3, padding=1, **options)


def _transposed(plan: Plan) -> nn.Module:
    rank = len(plan.spatial)
    if not rank:
        return nn.Linear(C, C)
    kind = _of(rank, nn.Linear, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    return kind(C, C, 3, padding=1, groups=2)


def _batch(plan: Plan, **options: Any) -> nn.Module:
    return _of(len(plan.spatial), nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)(C, **options)


def _instance(plan: Plan, **options: Any) -> nn.Module:
    rank = len(plan.spatial)
    if not rank:
        return nn.LayerNorm(C)
    return _of(rank, nn.LayerNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)(C, **options)


LAYERS: dict[str, Callable[[Plan], nn.Module]] = {
    "linear": _linear,
    "linear without bias": lambda plan: _linear(plan, bias=False),
    "grouped": lambda plan: _linear(plan, groups=2),
    "transposed": _transposed,
    "weight norm": lambda plan: parametrizations.weight_norm(_linear(plan)),
    "spectral norm": lambda plan: parametrizations.spectral_norm(_linear(plan)),
    "batch": _batch,
    "batch without affine": lambda plan: _batch(plan, affine=False, momentum=None),
    "batch without running": lambda plan: _batch(plan, track_running_stats=False),
    "instance": _instance,
    "instance running": lambda plan: _instance(plan, affine=True, track_running_stats=True),
    "group": lambda plan: nn.GroupNorm(2, C),
    "layer": lambda plan: nn.LayerNorm((C, *plan.spatial)),
    "rms": lambda plan: nn.RMSNorm((C, *plan.spatial)),
    "local response": lambda plan: nn.LocalResponseNorm(3) if plan.spatial else nn.RMSNorm(C),
    "relu": lambda plan: nn.ReLU(),
    "relu in place": lambda plan: nn.ReLU(inplace=True),
    "gelu": lambda plan: nn.GELU(),
    "tanh": lambda plan: nn.Tanh(),
    "leaky in place": lambda plan: nn.LeakyReLU(0.2, inplace=True),
    "dropout": lambda plan: nn.Dropout(0.3),
    "dropout in place": lambda plan: nn.Dropout(0.3, inplace=True),
    "dropout of channels": lambda plan: nn.Dropout1d(0.3) if len(plan.spatial) == 1 else nn.AlphaDropout(0.3),
    "scale": lambda plan: Scale(),
    "empty": lambda plan: Empty(),
    "flip": lambda plan: Flip(),
    "list": lambda plan: Listed(plan),
}


class Scale(nn.Module):
    """A scalar parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class Empty(nn.Module):
    """A layer that gives nothing, and one that gets nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.keep, self.norm = nn.Linear(C, C), nn.LayerNorm(C)

    def forward(self, x: Tensor) -> Tensor:
        none = self.norm(self.keep(x.movedim(1, -1)[:0]))
        return torch.cat([x, none.movedim(-1, 1)])


class Flip(nn.Module):
    """A view whose memory has another order."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, -1).contiguous().transpose(1, -1)


class Listed(nn.Module):
    """Layers that are reached by another way than a call of their container."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.layers = nn.ModuleList([_linear(plan), _batch(plan)])
        self.gates = nn.ParameterDict({"on": nn.Parameter(torch.ones(1))})

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x * self.gates["on"]


class Wrapper(nn.Module):
    """Runs what is inside."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, x: Tensor) -> Tensor:
        return self.inside(x)


class Turned(Wrapper):
    """Channels last inside."""

    def forward(self, x: Tensor) -> Tensor:
        return self.inside(x.movedim(1, -1)).movedim(-1, 1)


class Residual(Wrapper):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.inside(x.clone())


class AddedInPlace(Wrapper):
    def forward(self, x: Tensor) -> Tensor:
        y = self.inside(x.clone())
        y += x
        return y


class Twice(Wrapper):
    def forward(self, x: Tensor) -> Tensor:
        return self.inside(self.inside(x))


class Alias(Wrapper):
    """The same module under two names."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__(inside)
        self.other = inside

    def forward(self, x: Tensor) -> Tensor:
        return self.other(x.clone()) + self.inside(x.clone())


class Branches(Wrapper):
    def __init__(self, inside: nn.Module) -> None:
        super().__init__(inside)
        self.beside = nn.Sequential(nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        joined = torch.cat([self.inside(x.clone()), self.beside(x)], 1)
        return joined[:, ::2]


class Frozen(Wrapper):
    def __init__(self, inside: nn.Module) -> None:
        super().__init__(inside)
        inside.requires_grad_(False)


class Evaluating(Wrapper):
    """In evaluation mode whatever the model's is."""

    def train(self, mode: bool = True) -> Evaluating:
        super().train(mode)
        self.inside.eval()
        return self


class Checkpointed(Wrapper):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inside, x, use_reentrant=False)


class Double(Wrapper):
    def __init__(self, inside: nn.Module) -> None:
        super().__init__(inside.double())

    def forward(self, x: Tensor) -> Tensor:
        return self.inside(x.double()).to(x.dtype)


class Half(Wrapper):
    def __init__(self, inside: nn.Module) -> None:
        super().__init__(inside.bfloat16())

    def forward(self, x: Tensor) -> Tensor:
        return self.inside(x.bfloat16()).to(x.dtype)


class Idle(Wrapper):
    """Never called."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class Without(Wrapper):
    """Without gradient."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.inside(x.clone())


class Detached(Wrapper):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.inside(x.clone()).detach()


class Decides(Wrapper):
    """No tracer can follow it."""

    def forward(self, x: Tensor) -> Tensor:
        return self.inside(x) if x.numel() >= 0 and bool(x.isfinite().any()) else x


WRAPPERS: dict[str, type[Wrapper]] = {
    "residual": Residual,
    "added in place": AddedInPlace,
    "twice": Twice,
    "alias": Alias,
    "branches": Branches,
    "frozen": Frozen,
    "evaluating": Evaluating,
    "checkpointed": Checkpointed,
    "double": Double,
    "half": Half,
    "idle": Idle,
    "without gradient": Without,
    "detached": Detached,
    "decides": Decides,
    "wrapped": Wrapper,
}
CASTS = ("double", "half")
OUTPUTS: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda y: y,
    "tuple": lambda y: (y, y.mean()),
    "dict": lambda y: {"y": y, "code": y.argmax(1), "none": None},
    "nested": lambda y: ({"a": [y.flatten(1)]}, (y.sum(), "text")),
}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=1e-3),
    "AdamW": lambda p: torch.optim.AdamW(p, 1e-2),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 1e-3),
}


class Net(nn.Module):
    """A first linear layer that is always trained, the parts, and the output in its form."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.first = _linear(plan)
        self.body = nn.Sequential(*(_module(plan, part) for part in plan.parts))
        self.form = OUTPUTS[plan.output]

    def forward(self, x: Tensor) -> Any:
        return self.form(self.body(self.first(x)))


def _module(plan: Plan, part: Part) -> nn.Module:
    if part.name in WRAPPERS:
        return WRAPPERS[part.name](nn.Sequential(*(_module(plan, inner) for inner in part.inside)))
    if part.name in LAYERS:
        return LAYERS[part.name](plan)
    layer = build_norm(part.name, C)
    return Turned(layer) if plan.spatial and layer.traits.channels_last else layer


def make(plan: Plan) -> nn.Module:
    """Build the model that a plan stands for; its numbers come from torch's own generator."""
    model = Net(plan).train()
    return model.double() if plan.double else model


def parts(layers: tuple[str, ...], wrappers: tuple[str, ...]) -> st.SearchStrategy[Part]:
    """Return what draws a part: a layer, or a wrapper around one to three parts."""
    leaf = st.sampled_from(layers).map(Part)

    def wrapped(inner: st.SearchStrategy[Part]) -> st.SearchStrategy[Part]:
        inside = st.lists(inner, min_size=1, max_size=3).map(tuple)
        return st.builds(Part, st.sampled_from(wrappers), inside)

    return st.recursive(leaf, wrapped, max_leaves=5)


def plans(layers: tuple[str, ...] = (*LAYERS, *ZOO), wrappers: tuple[str, ...] = tuple(WRAPPERS)) -> Any:
    """Return what draws a plan of some layers and wrappers."""
    drawn = st.lists(parts(layers, wrappers), min_size=1, max_size=4).map(tuple)
    spatial = st.sampled_from([(), (), (1,), (5,), (1, 1), (3, 4), (2, 3, 2)])
    return st.builds(
        Plan,
        drawn,
        spatial,
        st.sampled_from([3, 1, 2, 4]),
        st.sampled_from(list(OUTPUTS)),
        st.sampled_from(list(OPTIMIZERS)),
        st.booleans(),
    )
