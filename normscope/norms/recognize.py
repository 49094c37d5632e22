"""Recognition: which modules of any PyTorch model normalize, what kind they are and where their parts lie."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from normscope.core.errors import ArgumentError, unknown_name

KINDS = ("batch", "layer", "instance", "group", "rms", "local-response", "other")
CERTAINTIES = ("class", "duck", "declared")

_TORCH: tuple[tuple[type[nn.Module], str], ...] = (
    (_BatchNorm, "batch"),
    (_InstanceNorm, "instance"),
    (nn.GroupNorm, "group"),
    (nn.LayerNorm, "layer"),
    (nn.RMSNorm, "rms"),
    (nn.LocalResponseNorm, "local-response"),
    (nn.CrossMapLRN2d, "local-response"),
)

# What stands before "norm" in a class name, lower case and without underscores.
_WORDS = {
    "batch": "batch",
    "batchre": "batch",
    "layer": "layer",
    "instance": "instance",
    "group": "group",
    "rms": "rms",
    "rootmeansquare": "rms",
    "scale": "rms",
    "l2": "rms",
    "localresponse": "local-response",
    "pair": "other",
    "graph": "other",
    "meansubtraction": "other",
}
# Response normalizations go by their initials; they count as a class called just "Norm" does.
_INITIALS = re.compile(r"[GF]RN(?=(?:[123]d)?$)")
# A class called just "Norm" may also return a vector's norm; so may an L2 norm. These need more evidence than the name.
_VAGUE = ("", "l2")
_NOT_ACTIVATIONS = ("weight", "spectral", "grad", "gradient", "no", "clip", "max")
_PLAIN_SUFFIX = re.compile(r"(?:ali[sz]ation)?(?:[123n]d|1p|gated|act|activation|(?:fp|float|bf)\d\d|[bs]\d[a-d]?)*")
_FOREIGN_SUFFIX = re.compile(
    r"block|head|wrapper|layer|linear|conv|mlp|ffn|attn|attention|embed|loss|model|encoder|decoder|output|free|cell|lstm|gru|^(?:ali[sz])?ed"
)

_GAINS = ("weight", "gamma", "scale", "g", "gain", "a_2")
_BIASES = ("bias", "beta", "b", "shift", "b_2")
_EPSILONS = ("eps", "variance_epsilon", "epsilon", "norm_eps", "layer_norm_eps", "rms_norm_eps", "layernorm_epsilon")
_GROUPS = ("num_groups", "n_groups", "ngroups", "groups")
_OFFSETS = ("unit_offset", "add_unit_offset", "zero_centered_gamma")
_REDUCTIONS = ("mean", "var", "std", "var_mean", "std_mean", "sum", "norm", "vector_norm", "normalize")
_CENTERED = ("layer_norm", "var", "std", "var_mean", "std_mean")
_SQUARES = ("rsqrt", "sqrt", "square", "pow", "norm", "normalize")
_MOVES = ("permute", "transpose", "movedim", "moveaxis", "swapaxes")


@dataclass(frozen=True)
class NormParts:
    """What a normalizing module consists of; names are attributes of the module itself.

    Attributes:
        kind: one of `KINDS`; "rms" includes division by the Euclidean norm, which differs by a constant factor.
        axis: channel axis of the output, 1 for batch, instance, group and local response, -1 for layer and rms, unless
            they normalize axis 1 alone.
        eps: the number added before division, None where the module does not hold it.
        momentum: momentum of the running statistics; None for a cumulative average or without running statistics.
        groups: number of groups, None where there are none.
        has_running: whether running_mean and running_var are kept.
        gain: name of the gain, a parameter or a buffer.
        bias: name of the bias.
        gain_offset: 1.0 where the layer multiplies by 1 + gain, else 0.0.
        certainty: "class" (a class of torch or a subclass), "duck" (name and attributes) or "declared" (by the user).
        normalized_ndim: number of dimensions normalized by kinds "layer" and "rms", the trailing ones, or with axis 1
            that axis alone; else 0.
    """

    kind: str
    axis: int
    eps: float | None = None
    momentum: float | None = None
    groups: int | None = None
    has_running: bool = False
    gain: str | None = None
    bias: str | None = None
    gain_offset: float = 0.0
    certainty: str = "declared"
    normalized_ndim: int = 0

    def __post_init__(self) -> None:
        """Refuse an unknown kind or certainty with an ArgumentError."""
        if self.kind not in KINDS:
            raise unknown_name("kind", self.kind, KINDS)
        if self.certainty not in CERTAINTIES:
            raise unknown_name("certainty", self.certainty, CERTAINTIES)


_DECLARED: WeakKeyDictionary[type[nn.Module], Callable[[nn.Module], NormParts | None]] = WeakKeyDictionary()


def declare_norm(cls: type[nn.Module], parts: NormParts | Callable[[nn.Module], NormParts | None]) -> None:
    """Declare how a class of yours is to be recognized; this precedes every rule and holds for its subclasses too.

    Args:
        cls: the class.
        parts: its parts, or a function from an instance to its parts; a function that returns None says "not a norm".

    Raises:
        ArgumentError: cls is no subclass of nn.Module, or parts neither NormParts nor callable.

    >>> class Whiten(nn.Module):
    ...     gamma = None
    >>> declare_norm(Whiten, NormParts("batch", axis=1))
    >>> recognize(Whiten()).certainty
    'declared'
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise ArgumentError(f"cls={cls!r} is not a subclass of torch.nn.Module; pass the class, not an instance.")
    if isinstance(parts, NormParts):
        fixed = parts
        _DECLARED[cls] = lambda module: fixed
    elif callable(parts):
        _DECLARED[cls] = parts
    else:
        raise ArgumentError(f"parts={parts!r} is neither NormParts nor a function from a module to NormParts or None.")


def recognize(module: nn.Module) -> NormParts | None:
    """Tell whether one module normalizes its input, from class, name, attributes and the source of its forward method.

    Nothing is run. A wrapper around a norm is not a norm, unless it adds the gain that the norm inside lacks.

    Args:
        module: any module.

    Returns:
        The parts, or None for a module that does not normalize.

    >>> parts = recognize(nn.GroupNorm(2, 6))
    >>> parts.kind, parts.groups, parts.gain, parts.certainty
    ('group', 2, 'weight', 'class')
    """
    for cls in type(module).__mro__:
        if cls in _DECLARED:
            declared = _DECLARED[cls](module)
            return declared and replace(declared, certainty="declared")
    for cls, kind in _TORCH:
        if isinstance(module, cls):
            return _parts(module, kind, "class")
    return _duck(module)


def find_norms(model: nn.Module) -> dict[str, NormParts]:
    """Find every normalizing module of a model.

    Args:
        model: any module; it may itself be a norm (path "").

    Returns:
        Dotted path to parts, in module order; a shared module once, a wrapped norm once.

    >>> list(find_norms(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Softmax(-1))))
    ['1']
    """
    found: dict[str, NormParts] = {}
    inside: set[nn.Module] = set()
    for path, module in model.named_modules():
        computed = module in inside or "parametrizations" in path.split(".")
        parts = None if computed else recognize(module)
        if parts is not None:
            found[path] = parts
            inside.update(module.modules())
    return found


def _duck(module: nn.Module) -> NormParts | None:
    """Recognize a norm that is not of a torch class by its name, its attributes and its lack of other content."""
    own = _own(module)
    named = _kind_from_name(class_name(module))
    kind, sure, plain = named or ("batch", False, False)
    running = "running_mean" in own and "running_var" in own
    if not named and not running:  # before any attribute is asked for: a model may warn of its own
        return None
    gain, eps = _first(own, _GAINS), _eps(module)
    if not plain and not (gain and eps is not None):
        return None
    if not _vectors_only(own, alike=sure and eps is not None):
        return None
    inner, others = _below(module)
    if others or len(inner) > 1:
        return None
    if inner:
        return _composite(module, own, inner[0])
    if sure or gain or running or eps is not None:
        return _parts(module, kind, "duck")
    return None


def _composite(module: nn.Module, own: dict[str, Tensor], inner: NormParts) -> NormParts | None:
    """Join a norm that has neither gain nor running statistics with the gain of the module around it."""
    gain = _first(own, _GAINS)
    if gain is None or inner.gain is not None or inner.has_running:
        return None
    offset = _gain_offset(module, gain, _read(type(module)))
    return replace(inner, gain=gain, bias=_first(own, _BIASES), gain_offset=offset, certainty="duck")


def _below(module: nn.Module) -> tuple[list[NormParts], bool]:
    """Return the norms inside a module and whether anything else inside has parameters."""
    inner: list[NormParts] = []
    others = False
    for name, child in module.named_children():
        if name == "parametrizations":  # its tensors are the module's own
            continue
        norms = find_norms(child)
        inner += norms.values()
        held = {id(p) for path in norms for p in child.get_submodule(path).parameters()}
        others = others or any(id(p) not in held for p in child.parameters())
    return inner, others


def class_name(module: nn.Module) -> str:
    """Return the name of a module's class; where scripting or fully_shard has made one, of that it was made from."""
    kind = type(module)
    if any(base.__name__ == "FSDPModule" for base in kind.__bases__):
        kind = kind.__bases__[-1]
    return str(getattr(module, "original_name", kind.__name__))


def _kind_from_name(name: str) -> tuple[str, bool, bool] | None:
    """Read a class name: the kind, whether the name is evidence enough, whether nothing unknown follows "Norm"."""
    before, norm, after = _INITIALS.sub("Norm", name).lower().replace("_", "").rpartition("norm")
    if not norm:
        return None
    plain = _PLAIN_SUFFIX.fullmatch(after) is not None
    if before.endswith(_NOT_ACTIVATIONS) or (not plain and _FOREIGN_SUFFIX.search(after)):
        return None
    word = next((word for word in _WORDS if before.endswith(word)), "")
    if not word and not plain:
        return None
    return _WORDS.get(word, "other"), word not in _VAGUE, plain


def _parts(module: nn.Module, kind: str, certainty: str) -> NormParts:
    """Collect the parts of a module that is known to normalize."""
    own, reading = _own(module), _read(type(module))
    gain, bias = _first(own, _GAINS), _first(own, _BIASES)
    if kind == "layer" and certainty == "duck" and not _subtracts_mean(reading, bias):
        kind = "rms"
    running = "running_mean" in own and "running_var" in own
    dims = _normalized_ndim(module, reading) if kind in {"layer", "rms"} else 0
    first = kind not in {"layer", "rms", "other"} or (
        dims < 2 and _channels_first(module, own.get(gain or ""), reading)
    )
    return NormParts(
        kind=kind,
        axis=1 if first else -1,
        eps=_eps(module),
        momentum=_number(module, ("momentum",)) if running else None,
        groups=_groups(module) if kind == "group" else None,
        has_running=running,
        gain=gain,
        bias=bias,
        gain_offset=_gain_offset(module, gain, reading),
        certainty=certainty,
        normalized_ndim=dims,
    )


def _own(module: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that a module itself holds; of a parametrized one the original, so nothing is computed."""
    own: dict[str, Tensor] = dict(module.named_buffers(recurse=False, remove_duplicate=False))
    own |= module.named_parameters(recurse=False, remove_duplicate=False)
    if is_parametrized(module):
        for name, originals in module.get_submodule("parametrizations").named_children():
            own[name] = next(chain(originals.parameters(recurse=False), originals.buffers(recurse=False)))
    return own


def _first(own: dict[str, Tensor], names: tuple[str, ...]) -> str | None:
    return next((name for name in names if name in own), None)


def _number(module: nn.Module, names: tuple[str, ...]) -> float | None:
    values = (getattr(module, name, None) for name in names)
    return next((float(v) for v in values if isinstance(v, int | float)), None)


def _eps(module: nn.Module) -> float | None:
    return _number(module, _EPSILONS)


def _groups(module: nn.Module) -> int | None:
    number = _number(module, _GROUPS)
    return None if number is None else int(number)


def _vectors_only(own: dict[str, Tensor], *, alike: bool) -> bool:
    """Tell whether no parameter is a matrix: each is a vector up to unit dimensions, or, if allowed, all are alike."""
    shapes = {tuple(t.shape) for t in own.values() if isinstance(t, nn.Parameter) and not is_lazy(t)}
    matrices = [shape for shape in shapes if sum(n > 1 for n in shape) > 1]
    return not matrices or (alike and len(shapes) == 1)


def _normalized_ndim(module: nn.Module, reading: _Reading | None) -> int:
    shape = getattr(module, "normalized_shape", None)
    if isinstance(shape, tuple | list):
        return len(shape)
    # Graph networks: mode "graph" takes the statistics over the nodes as well as over the channels.
    if getattr(module, "mode", None) == "graph":
        return 2
    return reading.span if reading else 1


def _channels_first(module: nn.Module, gain: Tensor | None, reading: _Reading | None) -> bool:
    """Tell whether a norm over channels has them on axis 1: by data format, gain shape, class name or source."""
    layout = getattr(module, "data_format", None)
    if isinstance(layout, str):
        return "first" in layout.lower()
    if gain is not None and gain.ndim > 1 and gain.shape[-1] == 1 and gain.numel() > 1:
        return True
    if re.search(r"norm(?:act)?[123]d", class_name(module).lower()):
        return True
    return reading is not None and reading.channels_first


def _gain_offset(module: nn.Module, gain: str | None, reading: _Reading | None) -> float:
    """Return 1.0 where the module multiplies by 1 + gain: by an attribute that says so, by source, else by name."""
    if gain is None:
        return 0.0
    declared = [bool(getattr(module, name)) for name in _OFFSETS if hasattr(module, name)]
    if declared:
        return float(declared[0])
    if reading is not None:
        return float(gain in reading.plus_one)
    return float(re.search(r"gemma(?!3n|4)|norm1p$", class_name(module).lower()) is not None)


def _subtracts_mean(reading: _Reading | None, bias: str | None) -> bool:
    """Tell a layer norm from an RMS norm that is called layer norm, as T5 does; without source the bias decides."""
    if reading is None:
        return bias is not None
    return reading.centers or not reading.squares


@dataclass(frozen=True)
class _Reading:
    """What the source of a forward method says."""

    plus_one: frozenset[str]  # attributes of self that 1 is added to
    centers: bool  # whether something is subtracted, or a centered statistic is called
    squares: bool  # whether a square or a root is written out
    channels_first: bool  # whether dimension 1 (or 2 and 3) is reduced, or moved to the end and back
    span: int  # number of dimensions in the longest reduction


def _read(cls: type[nn.Module]) -> _Reading | None:
    """Read the source of a forward method that is not torch's own, with the methods of self that it calls."""
    nodes = list(_nodes(cls, inspect.getattr_static(cls, "forward", None)))
    for name in {_called(node) for node in nodes if _is_self(getattr(getattr(node, "func", None), "value", None))}:
        nodes += _nodes(cls, inspect.getattr_static(cls, name, None))
    if not nodes:
        return None
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    names = [_called(call) for call in calls]
    reductions = [_dims(call) for call in calls if _called(call) in _REDUCTIONS]
    dims = {dim for reduction in reductions for dim in reduction}
    if any(name.endswith(("layer_norm", "rms_norm")) for name in names):
        dims.add(-1)
    moved = sum(name in _MOVES for name in names) >= 2
    operators = [node for node in nodes if isinstance(node, ast.BinOp)]
    return _Reading(
        plus_one=frozenset(attribute for node in operators for attribute in _plus_one(node)),
        centers=any(isinstance(node.op, ast.Sub) for node in operators) or any(name in _CENTERED for name in names),
        squares=any(name in _SQUARES for name in names),
        channels_first=moved or (-1 not in dims and (1 in dims or {2, 3} <= dims)),
        span=max([1, *map(len, reductions)]),
    )


def _nodes(cls: type[nn.Module], function: object) -> Iterator[ast.AST]:
    """Yield the syntax of a function; nothing for torch's own and where there is no source."""
    function = getattr(function, "__func__", function)
    if not inspect.isfunction(function) or str(function.__module__).startswith("torch."):
        return
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return
    yield from ast.walk(tree)


def _is_self(node: object) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


def _called(node: ast.AST) -> str:
    function = getattr(node, "func", None)
    return str(getattr(function, "attr", getattr(function, "id", "")))


def _dims(call: ast.Call) -> tuple[int, ...]:
    """Return the dimensions that a reduction names literally."""
    named = [word.value for word in call.keywords if word.arg in {"dim", "axis"}]
    for node in named or call.args[::-1]:
        try:
            value = ast.literal_eval(node)
        except ValueError:
            continue
        if isinstance(value, int) and not isinstance(value, bool):
            return (value,)
        if isinstance(value, tuple | list):
            return tuple(value)
    return (1,) if _called(call) == "normalize" else ()


def _plus_one(node: ast.BinOp) -> Iterator[str]:
    """Yield the attributes of self in the other term of a sum with the constant 1."""
    for one, other in ((node.left, node.right), (node.right, node.left)):
        if isinstance(node.op, ast.Add) and isinstance(one, ast.Constant) and one.value == 1:
            yield from (n.attr for n in ast.walk(other) if isinstance(n, ast.Attribute) and _is_self(n.value))
