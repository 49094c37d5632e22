"""The laws of a normalization layer, chosen by its declared traits; public, so that you can test a layer of yours."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.gradcheck import GradcheckError
from torch.func import functional_call

from normscope.core.errors import ArgumentError, NormscopeError
from normscope.norms import area, average, layer, operation, part, population, recovery, whiten
from normscope.norms.part import Traits, require
from normscope.norms.row import WORDS, Inputs, image


class LawBroken(NormscopeError, AssertionError):
    """A layer does not do what its traits declare."""


@dataclass(frozen=True)
class Case:
    """A layer under test.

    Attributes:
        factory: makes a new layer, always the same one up to random initial values.
        inputs: arguments of forward, from number of features and generator, in float64.
        num_features: number of channels.
    """

    factory: Callable[[], nn.Module]
    inputs: Inputs = image
    num_features: int = 8

    def layer(self, seed: int = 0) -> Any:
        """Make a layer in float64, in training mode, parameters moved away from their initial values."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made = self.factory().double().train()
            with torch.no_grad():
                for parameter in made.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
        return made

    def arguments(self, seed: int = 0) -> tuple[Any, ...]:
        """Return arguments of forward."""
        return self.inputs(self.num_features, torch.Generator().manual_seed(seed))

    @property
    def traits(self) -> Traits:
        """The declared properties."""
        found: Traits = self.layer().traits
        return found


@dataclass(frozen=True)
class Law:
    """A law: what it says, for which traits it holds, and its test, which raises LawBroken."""

    name: str
    statement: str
    holds: Callable[[Traits], bool]
    test: Callable[[Case], None]


def _always(traits: Traits) -> bool:
    return True


def _independence(traits: Traits) -> bool:
    return not traits.random and traits.condition not in {"graph", "domain"}


def run(module: nn.Module, *arguments: Any) -> Tensor:
    """Call a layer, always with the same random numbers, and return its output."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        output: Tensor = module(*arguments)
    return output


def _each(change: Callable[[Tensor], Tensor], argument: Any) -> Any:
    """Change every tensor of an argument, inside tuples and lists too."""
    if isinstance(argument, tuple | list):
        return type(argument)(_each(change, part) for part in argument)
    return change(argument) if isinstance(argument, Tensor) else argument


def _cast(arguments: Iterable[Any], dtype: torch.dtype) -> list[Any]:
    return [_each(lambda t: t.to(dtype) if t.is_floating_point() else t, argument) for argument in arguments]


def _first(arguments: Iterable[Any], number: int) -> list[Any]:
    """Keep the first example of what has one for each."""
    return [_each(lambda t: t[:1] if t.shape[:1] == (number,) else t, argument) for argument in arguments]


def same(found: Tensor, expected: Tensor, what: str, rtol: float = 1e-9) -> None:
    """Demand that two tensors agree, relative to the largest entry.

    Args:
        found: one tensor.
        expected: the other one.
        what: what they are, for the message.
        rtol: tolerance.

    Raises:
        LawBroken: they differ in shape or by more.
    """
    if found.shape != expected.shape:
        raise LawBroken(f"{what}: shape {tuple(found.shape)} instead of {tuple(expected.shape)}")
    scale = float(expected.detach().abs().max()) if expected.numel() else 0.0
    error = float((found.detach().to(expected.dtype) - expected.detach()).abs().max()) if expected.numel() else 0.0
    if not error <= rtol * max(scale, 1e-6):
        raise LawBroken(f"{what}: differs by {error:.3g}, largest entry {scale:.3g}, tolerance {rtol:g} relative")


def demand(truth: bool, what: str) -> None:
    """Demand that something holds.

    Args:
        truth: whether it does.
        what: what is wrong if not.

    Raises:
        LawBroken: it does not.
    """
    if not truth:
        raise LawBroken(what)


def _shape(case: Case) -> None:
    x, *rest = case.arguments()
    module = case.layer()
    output = run(module, x, *rest)
    demand(output.shape == x.shape, f"input {tuple(x.shape)} gives output {tuple(output.shape)}")
    demand(bool(torch.isfinite(output).all()), "the output is not finite")
    for memory in (x.mT.contiguous().mT, x.to(memory_format=torch.channels_last) if x.ndim == 4 else x):
        same(run(case.layer(), memory, *rest), output, "a layout of memory that is not contiguous", 1e-8)


def _ranks(case: Case) -> None:
    module = case.layer()
    for rank in module.traits.ranks:
        others = (6, 3, 2, 2)[: rank - 1]
        last = module.traits.channels_last
        shape = (*others, case.num_features) if last else (6, case.num_features, *others[1:])
        x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
        try:
            output = run(case.layer(), x)
        except ArgumentError as error:
            # an area of one entry has no variance
            demand("sample" in str(error), f"{rank} dimensions: {error}")
        else:
            demand(output.shape == x.shape, f"{rank} dimensions: output {tuple(output.shape)}")


def _view(case: Case) -> None:
    x = case.arguments()[0]
    parts = case.layer()
    axis = parts.area.axis(x, parts.num_features)
    z = parts.area.view(x, axis)
    demand(z.ndim == 3, f"the view has {z.ndim} dimensions, not areas, features, samples")
    demand(torch.equal(parts.area.inverse(z, x, axis), x), "the inverse of the view is not the identity")
    demand(torch.equal(parts.area.merge(parts.area.split(x, axis), x, axis), x), "merge does not undo split")


def _postcondition(case: Case) -> None:
    parts, x = case.layer(), case.arguments()[0] * 1e3
    z = parts.area.view(x, parts.area.axis(x, parts.num_features))
    stats = parts.operation.measure(z)
    y = parts.operation.apply(z, stats)
    traits = parts.traits
    if traits.centers:
        demand(float(y.mean(2).abs().max()) < 1e-9, f"the mean is {float(y.mean(2).abs().max()):.3g}, not 0")
    if traits.whitens:
        centered = z - z.mean(2, keepdim=True)
        sigma = centered @ centered.mT / z.shape[2]
        root = stats["matrix"]
        same(y @ y.mT / z.shape[2], root @ sigma @ root.mT, "covariance against W Sigma W^T", 1e-8)
        residual = float(parts.operation.residual(z).max())
        approximate = parts.operation.method == "newton"
        demand(approximate or residual < 1e-6, f"the residual of whitening is {residual:.3g}")
    elif traits.scales:
        freedom = z.shape[2] - 1 if getattr(parts.operation, "unbiased", False) else z.shape[2]
        fraction = getattr(parts.operation, "fraction", 1.0)
        used = y[..., : max(int(z.shape[2] * fraction), 1)] if fraction < 1 else y
        squares = used.square().sum(2) / (freedom if fraction == 1 else used.shape[2])
        same(squares, torch.ones_like(squares), "variance", 1e-3)


def _invariant(case: Case, change: Callable[[Tensor], Tensor], what: str) -> None:
    x, *rest = case.arguments()
    # a large input makes eps negligible
    x = x * 1e3
    same(run(case.layer(), change(x), *rest), run(case.layer(), x, *rest), what, 1e-6)


def _shift(case: Case) -> None:
    _invariant(case, lambda x: x + 700.0, "output after adding a constant")


def _scale(case: Case) -> None:
    _invariant(case, lambda x: x * 2.0, "output after doubling the input")


def _independent(case: Case) -> None:
    x, *rest = case.arguments()
    first = _first(rest, len(x))
    for mode in (True, False):
        module = case.layer().train(mode)
        if mode and module.traits.crosses_batch:
            changed = torch.cat([x[:1], 2 * x[1:] + 1])
            apart = run(case.layer(), changed, *rest)[:1] - run(module, x, *rest)[:1]
            demand(float(apart.detach().abs().max()) > 1e-9, "in training no example depends on another one")
            continue
        if module.traits.crosses_batch and not module.traits.stateful:
            continue
        whole = run(module, x, *rest)
        same(run(case.layer().train(mode), x[:1], *first), whole[:1], f"an example alone, training={mode}", 1e-8)


def _modes(case: Case) -> None:
    x, *rest = case.arguments()
    module = case.layer()
    before = {name: value.clone() for name, value in module.named_buffers()}
    trained = run(module, x, *rest)
    after = {name: value.clone() for name, value in module.named_buffers()}
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    if module.traits.stateful:
        demand(bool(changed), "training stores no statistics")
    module.eval()
    evaluated = run(module, x, *rest)
    still = {name: value for name, value in module.named_buffers()}
    demand(all(torch.equal(after[n], still[n]) for n in after), "evaluation changes buffers")
    if not module.traits.stateful and not module.traits.random:
        same(evaluated, trained, "evaluation against training")


def _state(case: Case) -> None:
    x, *rest = case.arguments()
    module = case.layer()
    run(module, x, *rest)
    other = case.layer(seed=1)
    other.load_state_dict(module.state_dict(), strict=True)
    same(run(other.eval(), x, *rest), run(module.eval(), x, *rest), "evaluation after load_state_dict", 0.0)
    twin = copy.deepcopy(module)
    same(run(twin, x, *rest), run(module, x, *rest), "evaluation of a copy", 0.0)
    shared = {id(t) for t in module.parameters()} & {id(t) for t in twin.parameters()}
    demand(not shared, "a copy shares parameters")


def _repr(case: Case) -> None:
    module = case.layer()
    names: dict[str, Any] = {}
    for home in (area, average, layer, operation, part, population, recovery, whiten):
        names |= vars(home)
    for child in module.modules():
        for thing in (child, *(getattr(child, word, None) for word in WORDS)):
            names |= vars(sys.modules[type(thing).__module__])
    made = eval(repr(module), names)
    demand(repr(made) == repr(module), f"repr {module!r} gives {made!r}")
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (made, module)]
    demand(shapes[0] == shapes[1], f"repr {module!r} gives state {shapes[0]} instead of {shapes[1]}")


def _dtypes(case: Case) -> None:
    arguments = case.arguments()
    expected = run(case.layer(), *arguments)
    single = run(case.layer().float(), *_cast(arguments, torch.float32))
    demand(single.dtype == torch.float32, f"float32 gives {single.dtype}")
    same(single.double(), expected, "float32 against float64", 2e-3)
    x, *rest = _cast(arguments, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = run(case.layer().float(), x.bfloat16(), *rest)
    demand(half.dtype == torch.bfloat16, f"bfloat16 under autocast gives {half.dtype}")
    rounded = run(case.layer().float(), x.bfloat16().float(), *rest)
    # the output alone is rounded: statistics were taken in float32
    same(half.double(), rounded.double(), "bfloat16 under autocast against float32 of the same input", 2e-2)


def _gradient(case: Case) -> None:
    first = case.layer()
    x, *rest = case.arguments()
    x.requires_grad_()
    names = [name for name, p in first.named_parameters() if p.requires_grad]
    parameters = [first.get_parameter(name) for name in names]

    def function(value: Tensor, *given: Tensor) -> Tensor:
        # a new copy each time: the output may depend on stored statistics
        twin = copy.deepcopy(first)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            output: Tensor = functional_call(twin, dict(zip(names, given, strict=True)), (value, *rest))
        return output

    try:
        torch.autograd.gradcheck(function, (x, *parameters), fast_mode=True, atol=1e-5, rtol=1e-3)
        if first.traits.twice_differentiable:
            torch.autograd.gradgradcheck(function, (x, *parameters), fast_mode=True, atol=1e-4, rtol=1e-3)
    except GradcheckError as error:
        raise LawBroken(f"gradient: {error}") from error


def _trains(case: Case) -> None:
    x, *rest = case.arguments()
    module = case.layer()
    x.requires_grad_()
    output = run(module, x, *rest)
    weights = torch.randn(output.shape, dtype=output.dtype, generator=torch.Generator().manual_seed(1))
    torch.autograd.backward((output * weights).sum())
    missing = [name for name, p in module.named_parameters() if p.requires_grad and p.grad is None]
    demand(not missing, f"no gradient reaches {', '.join(missing)}")
    demand(x.grad is not None and bool(torch.isfinite(x.grad).all()), "the gradient of the input is not finite")


def _degenerate(case: Case) -> None:
    x, *rest = case.arguments()
    first = _first(rest, len(x))
    constant = torch.zeros_like(x) + torch.linspace(-1, 2, x.shape[1], dtype=x.dtype).reshape(-1, *(1,) * (x.ndim - 2))
    for what, arguments in (
        ("zeros", (torch.zeros_like(x), *rest)),
        ("constant channels", (constant, *rest)),
        ("a batch of one", (x[:1], *first)),
    ):
        value = arguments[0].clone().requires_grad_()
        module = case.layer()
        try:
            output = run(module, value, *arguments[1:])
        except ArgumentError:
            continue
        torch.autograd.backward(output.sum())
        demand(bool(torch.isfinite(output).all()), f"{what}: the output is not finite")
        demand(value.grad is None or bool(torch.isfinite(value.grad).all()), f"{what}: the gradient is not finite")
        stored = all(bool(torch.isfinite(b).all()) for b in module.buffers() if b.is_floating_point())
        demand(stored, f"{what}: stored statistics are not finite")


LAWS: tuple[Law, ...] = (
    Law("shape", "the output is finite and of the shape of the input, for any layout of memory", _always, _shape),
    Law("ranks", "inputs of every declared number of dimensions work", lambda t: not t.condition, _ranks),
    Law("view", "the view and its inverse are the identity", _always, _view),
    Law("postcondition", "mean, variance and covariance are what the operation promises", _always, _postcondition),
    Law("shift", "adding a constant changes nothing", lambda t: t.shift_invariant, _shift),
    Law("scale", "doubling the input changes nothing", lambda t: t.scale_invariant, _scale),
    Law("independent", "examples depend on each other in training if declared", _independence, _independent),
    Law("modes", "training stores statistics if declared; evaluation stores nothing", _always, _modes),
    Law("state", "state_dict and deepcopy give the same layer again", _always, _state),
    Law("repr", "repr is the constructor call", _always, _repr),
    Law("dtypes", "float32 and autocast agree with float64", lambda t: not t.random, _dtypes),
    Law("trains", "a gradient reaches the input and every parameter", _always, _trains),
    Law("gradient", "first and second derivatives are those of forward", lambda t: t.true_gradient, _gradient),
    Law("degenerate", "zeros, constants and a batch of one give finite values or a clear error", _always, _degenerate),
)


def laws(case: Case) -> list[Law]:
    """Return the laws that hold for a layer by its traits.

    Args:
        case: the layer.

    Returns:
        The laws, in their order.
    """
    module = case.layer()
    composed = isinstance(module, layer.Norm)
    return [law for law in LAWS if law.holds(module.traits) and (composed or law.name not in {"view", "postcondition"})]


def check(
    factory: Callable[[], nn.Module],
    inputs: Inputs = image,
    num_features: int = 8,
    skip: Iterable[str] = (),
) -> list[str]:
    """Test a layer of yours against every law that its traits declare.

    Args:
        factory: makes the layer; it has a property `traits`, as `Normalization` demands.
        inputs: arguments of forward, from number of features and generator, in float64.
        num_features: number of channels of the inputs.
        skip: names of laws to leave out.

    Returns:
        Names of the laws that were tested.

    Raises:
        LawBroken: one of them does not hold.

    >>> from normscope.norms import Affine, Group, Norm, Standardize
    >>> len(check(lambda: Norm(Group(4), Standardize(), Affine(), num_features=8))) > 10
    True
    """
    case, skipped = Case(factory, inputs, num_features), set(skip)
    for name in skipped:
        require(name, "skip", [law.name for law in LAWS])
    tested = [law for law in laws(case) if law.name not in skipped]
    for law in tested:
        try:
            law.test(case)
        except LawBroken as error:
            raise LawBroken(f"{law.name} ({law.statement}): {error}") from error
    return [law.name for law in tested]
