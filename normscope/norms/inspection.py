"""Inspection: what a layer does that declares nothing: laws that all normalizations keep, and properties found."""

from __future__ import annotations

import copy
import textwrap
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from normscope.core.errors import ArgumentError, brief
from normscope.norms.checks import Case, LawBroken, laws, run, same
from normscope.norms.part import Traits

SHAPES: tuple[tuple[int, ...], ...] = ((6, 8, 4, 5), (6, 8), (6, 5, 8), (6, 8, 5))  # tried in this order
_SYMBOLS = {"pass": "✓", "fail": "✕", "info": "•"}
_ROUGH = 6e-2  # of bfloat16 against float32, relative to the largest entry


class Seen(NamedTuple):
    """One row of an inspection: the law, "pass", "fail" or "info", and what was seen."""

    law: str
    verdict: str
    seen: str


@dataclass(frozen=True, repr=False)
class Inspection:
    """What was seen of a layer; prints as a table.

    Attributes:
        layer: its class.
        shape: shape of the input that it was tried with.
        rows: one a law.
    """

    layer: str
    shape: tuple[int, ...]
    rows: tuple[Seen, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing failed."""
        return not self.failures

    @property
    def failures(self) -> tuple[Seen, ...]:
        """The rows that failed."""
        return tuple(row for row in self.rows if row.verdict == "fail")

    def __repr__(self) -> str:
        """Write the table, a row a law."""
        first = max(len(row.law) for row in self.rows) + 2
        lines = [f"{self.layer}, tried with inputs {' x '.join(map(str, self.shape))}"]
        for row in self.rows:
            begin = f"  {_SYMBOLS[row.verdict]} {row.verdict}  {row.law.ljust(first)}"
            text = " ".join(row.seen.split())
            lines += textwrap.wrap(text, 118, initial_indent=begin, subsequent_indent=" " * len(begin))
        failed = len(self.failures)
        return "\n".join([*lines, f"{failed} failed" if failed else "nothing failed"])


@dataclass(frozen=True)
class _Subject:
    """A layer under inspection, and the input it is tried with."""

    case: Case
    shape: tuple[int, ...]

    @property
    def tokens(self) -> bool:
        return len(self.shape) == 3 and self.shape[2] == self.case.num_features

    def x(self, seed: int = 0) -> Tensor:
        found: Tensor = self.case.arguments(seed)[0]
        return found

    def trained(self) -> nn.Module:
        """Return a layer that has seen a batch, in evaluation mode."""
        module: nn.Module = self.case.layer()
        run(module, self.x(1))
        return module.eval()


def inspect(
    factory: Callable[[int], nn.Module], num_features: int = 8, *, shape: tuple[int, ...] | None = None
) -> Inspection:
    """Try a layer of yours: the laws that every normalization keeps, and the properties that it turns out to have.

    Where the layer has `traits`, the laws that these declare are tested as well, see `normscope.norms.checks`.

    Args:
        factory: makes the layer from a number of features, as its class does.
        num_features: the number it is made with.
        shape: of its input, as (6, 8, 4, 5) for images, (6, 8) for vectors, (6, 5, 8) for tokens with channels last;
            by default the first of `SHAPES` that it takes.

    Returns:
        The inspection; `ok` says whether nothing failed.

    Raises:
        ArgumentError: the factory does not make a module, or the shape has no such number of features.

    >>> inspect(torch.nn.BatchNorm2d).ok
    True
    """
    with torch.random.fork_rng(devices=[]):
        made = factory(num_features)
        if not isinstance(made, nn.Module):
            raise ArgumentError(f"factory={brief(factory)} made {brief(made)}; it must make a torch.nn.Module.")
        if shape is not None and num_features not in shape[1:]:
            raise ArgumentError(
                f"shape={shape!r} has no axis of num_features={num_features}; try (6, {num_features}, 4, 5)."
            )
        return _inspection(factory, type(made).__name__, num_features, shape)


def _inspection(
    factory: Callable[[int], nn.Module], name: str, num_features: int, shape: tuple[int, ...] | None
) -> Inspection:
    shapes = [tuple(num_features if n == 8 else n for n in item) for item in SHAPES] if shape is None else [shape]
    taken: dict[tuple[int, ...], str] = {}
    for item in shapes:
        taken[item] = _refusal(_subject(factory, num_features, item))
    chosen = next((item for item, reason in taken.items() if not reason), shapes[0])
    if taken[chosen]:
        return Inspection(name, chosen, (Seen("runs", "fail", "; ".join(dict.fromkeys(taken.values()))),))
    works = ", ".join(" x ".join(map(str, item)) for item, reason in taken.items() if not reason)
    subject = _subject(factory, num_features, chosen)
    rows = [Seen("runs", "pass", f"takes {works}")]
    for law, look in _LOOKS:
        if law == "second gradient" and any(row.law == "gradient" and row.verdict == "fail" for row in rows):
            continue
        rows += [Seen(law, verdict, seen) for verdict, seen in _tried(look, subject)]
    return Inspection(name, chosen, (*rows, *_declared(subject)))


def _subject(factory: Callable[[int], nn.Module], num_features: int, shape: tuple[int, ...]) -> _Subject:
    def inputs(_features: int, generator: torch.Generator) -> tuple[Tensor]:
        axis = len(shape) - 1 if len(shape) == 3 and shape[2] == num_features else 1
        steps = torch.linspace(0.5, 2, num_features, dtype=torch.float64)
        steps = steps.reshape([-1 if i == axis else 1 for i in range(len(shape))])
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        return (x * steps + steps - 1,)

    return _Subject(Case(partial(factory, num_features), inputs, num_features), shape)


def _refusal(subject: _Subject) -> str:
    """Return why a layer does not take an input, "" where it does."""
    try:
        output = run(subject.case.layer(), subject.x())
    except Exception as error:  # whatever the layer raises
        return f"{' x '.join(map(str, subject.shape))}: {type(error).__name__}: {error}"
    if not isinstance(output, Tensor):
        return f"it returns {brief(output)}, not a tensor"
    return "" if output.shape == subject.shape else f"{subject.shape} gives an output of shape {tuple(output.shape)}"


Look = Callable[[_Subject], Iterable[tuple[str, str]]]


def _tried(look: Look, subject: _Subject) -> list[tuple[str, str]]:
    try:
        return list(look(subject))
    except LawBroken as broken:
        return [("fail", str(broken))]
    except Exception as error:  # whatever the layer raises
        return [("fail", f"raises {type(error).__name__}: {error}")]


def _finite(subject: _Subject) -> Iterator[tuple[str, str]]:
    x = subject.x()
    for mode in ("training", "evaluation"):
        module = subject.case.layer() if mode == "training" else subject.trained()
        if not bool(torch.isfinite(run(module, x)).all()):
            raise LawBroken(f"the output in {mode} is not finite")
    same(
        run(subject.case.layer(), x.mT.contiguous().mT),
        run(subject.case.layer(), x),
        "input that is not contiguous",
        1e-8,
    )
    yield "pass", "finite in training and evaluation, whatever the layout of memory"


def _repeats(subject: _Subject) -> Iterator[tuple[str, str]]:
    x, module = subject.x(), subject.trained()
    if not torch.equal(_drawn(module, x, 1), _drawn(module, x, 2)):
        raise LawBroken("evaluation of the same input twice differs")
    same(run(subject.case.layer(), x), run(subject.case.layer(), x), "training with equal random numbers", 0.0)
    yield "pass", "evaluation gives the same twice, training does with the same seed"
    random = not torch.equal(_drawn(subject.case.layer(), x, 1), _drawn(subject.case.layer(), x, 2))
    if random:
        yield "info", "random in training"


def _drawn(module: nn.Module, x: Tensor, seed: int) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        output: Tensor = module(x)
    return output


def _modes(subject: _Subject) -> Iterator[tuple[str, str]]:
    x, module = subject.x(), subject.case.layer()
    states = [_stored(module)]
    for mode in (True, False):
        run(module.train(mode), x)
        states.append(_stored(module))
    moved = [[name for name in old if not torch.equal(old[name], new[name])] for old, new in pairwise(states)]
    if moved[1]:
        raise LawBroken(f"evaluation changes {', '.join(moved[1])}")
    yield "pass", "evaluation stores nothing"
    yield "info", f"training stores {', '.join(moved[0])}" if moved[0] else "training stores nothing"


def _stored(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.named_buffers()}


def _alone(subject: _Subject) -> Iterator[tuple[str, str]]:
    x = subject.x()
    others = torch.cat([x[:1], 2 * x[1:] + 1])
    module = subject.trained()
    _demand_still(run(module, others)[:1], run(module, x)[:1], "in evaluation an example depends on the others")
    yield "pass", "in evaluation an example does not depend on the others"
    crosses = _differs(run(subject.case.layer(), others)[:1], run(subject.case.layer(), x)[:1])
    yield "info", f"in training an example {'depends' if crosses else 'does not depend'} on the others"


def _causal(subject: _Subject) -> Iterator[tuple[str, str]]:
    if not subject.tokens:
        return
    x = subject.x()
    later = torch.cat([x[:, :1], 2 * x[:, 1:] + 1], 1)
    module = subject.trained()
    _demand_still(run(module, later)[:, :1], run(module, x)[:, :1], "in evaluation a place depends on later ones")
    yield "pass", "in evaluation a place does not depend on later ones"
    if _differs(run(subject.case.layer(), later)[:, :1], run(subject.case.layer(), x)[:, :1]):
        yield "info", "in training a place depends on later ones: a model that predicts the next token sees the future"


def _differs(one: Tensor, other: Tensor) -> bool:
    return float((one - other).detach().abs().max()) > 1e-9


def _demand_still(found: Tensor, expected: Tensor, what: str) -> None:
    if _differs(found, expected):
        raise LawBroken(f"{what}: its output moves by {float((found - expected).detach().abs().max()):.3g} with them")


def _state(subject: _Subject) -> Iterator[tuple[str, str]]:
    x, module = subject.x(), subject.trained()
    other = subject.case.layer(seed=1)
    other.load_state_dict(module.state_dict(), strict=True)
    same(run(other.eval(), x), run(module, x), "evaluation after load_state_dict", 0.0)
    same(run(copy.deepcopy(module), x), run(module, x), "evaluation of a copy", 0.0)
    yield "pass", "state_dict and deepcopy give the same layer again"


def _reaches(subject: _Subject) -> Iterator[tuple[str, str]]:
    module, x = subject.case.layer(), subject.x().requires_grad_()
    output = run(module, x)
    weights = torch.randn(output.shape, dtype=output.dtype, generator=torch.Generator().manual_seed(1))
    if not output.requires_grad:
        raise LawBroken("the output has no gradient: nothing before the layer, nor in it, would train")
    torch.autograd.backward((output * weights).sum())
    missing = [
        name for name, p in module.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())
    ]
    if x.grad is None or not bool(x.grad.any()):
        raise LawBroken("no gradient reaches the input: nothing before the layer would train")
    if not bool(torch.isfinite(x.grad).all()):
        raise LawBroken("the gradient of the input is not finite")
    if missing:
        raise LawBroken(f"no gradient reaches {', '.join(missing)}")
    yield "pass", "a gradient reaches the input and every parameter"


def _derivative(subject: _Subject, second: bool) -> Iterator[tuple[str, str]]:
    module, x = subject.case.layer(), _few(subject.x()).requires_grad_()
    names = [name for name, p in module.named_parameters() if p.requires_grad]
    check, atol = (torch.autograd.gradgradcheck, 1e-4) if second else (torch.autograd.gradcheck, 1e-5)

    def function(value: Tensor, *given: Tensor) -> Tensor:
        # a new copy each time: the output may depend on stored statistics
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            output: Tensor = functional_call(copy.deepcopy(module), dict(zip(names, given, strict=True)), (value,))
        return output

    inputs = (x, *(module.get_parameter(name) for name in names))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of parameters that are not float64
            check(function, inputs, fast_mode=True, atol=atol, rtol=1e-3)
    except RuntimeError as error:  # GradcheckError is one
        wrong = "mismatch" in str(error)
        if second and not wrong:
            yield "info", "backward cannot be differentiated: its curvature cannot be measured"
            return
        which = "second derivative" if second else "gradient"
        raise LawBroken(
            f"the {which} is not that of forward, by finite differences in float64"
            if wrong
            else f"the {which} cannot be taken: {error}"
        ) from error
    yield (
        "pass",
        f"the {'second derivative' if second else 'gradient'} is that of forward (finite differences, float64)",
    )


def _few(x: Tensor) -> Tensor:
    """Keep few numbers: where a derivative is wrong each of them is tried."""
    return x[:4, :, :2, :2].clone() if x.ndim == 4 else x.clone()


def _single(subject: _Subject) -> Iterator[tuple[str, str]]:
    x = subject.x()
    _typed(run(subject.case.layer(), x), torch.float64, "float64 input")
    found = run(subject.case.layer().float(), x.float())
    _typed(found, torch.float32, "float32 input")
    same(found.double(), run(subject.case.layer(), x), "float32 against float64", 2e-3)
    yield "pass", "the output has the type of the input, float32 agrees with float64"


def _half(subject: _Subject) -> Iterator[tuple[str, str]]:
    x = subject.x().bfloat16()
    module = subject.case.layer().bfloat16()
    expected = run(copy.deepcopy(module).float(), x.float())
    found = run(module, x)
    _typed(found, torch.bfloat16, "bfloat16 layer and input")
    same(found.double(), expected.double(), "bfloat16 against float32 of the same numbers", _ROUGH)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = run(subject.case.layer().float(), x)
    same(mixed.double(), run(subject.case.layer().float(), x.float()).double(), "under autocast", _ROUGH)
    yield "pass", "bfloat16, and bfloat16 under autocast, agree with float32"


def _typed(found: Tensor, dtype: torch.dtype, what: str) -> None:
    if found.dtype != dtype:
        raise LawBroken(f"{what} gives an output of {found.dtype}")


def _invariances(subject: _Subject) -> Iterator[tuple[str, str]]:
    x = subject.x() * 1e3  # eps is negligible
    expected = run(subject.case.layer(), x)
    changes = {"a constant added": x + 700.0, "a positive factor": x * 2.0}
    kept = [name for name, changed in changes.items() if not _moves(run(subject.case.layer(), changed), expected)]
    yield (
        "info",
        f"in training unchanged by {' and by '.join(kept)}" if kept else "no invariance to shift or scale found",
    )


def _moves(found: Tensor, expected: Tensor) -> bool:
    return float((found - expected).detach().abs().max()) > 1e-6 * max(float(expected.detach().abs().max()), 1e-6)


def _degenerate(subject: _Subject) -> Iterator[tuple[str, str]]:
    x = subject.x()
    told = []
    for what, value in (
        ("zeros", torch.zeros_like(x)),
        ("constants", x[:1, ...].mean() + 0 * x),
        ("a batch of one", x[:1]),
    ):
        module, given = subject.case.layer(), value.clone().requires_grad_()
        try:
            output = run(module, given)
        except (ValueError, RuntimeError) as error:
            told.append(f"refuses {what}: {error}")
            continue
        torch.autograd.backward(output.sum())
        tensors = (output, *(() if given.grad is None else (given.grad,)), *module.buffers())
        if not all(bool(torch.isfinite(t).all()) for t in tensors if t.is_floating_point()):
            raise LawBroken(f"{what}: output, gradient or stored statistics are not finite")
    yield "pass", "zeros, constants and a batch of one give finite numbers, or are refused"
    for text in told:
        yield "info", text


_LOOKS: tuple[tuple[str, Look], ...] = (
    ("finite", _finite),
    ("repeats", _repeats),
    ("modes", _modes),
    ("alone", _alone),
    ("causal", _causal),
    ("state", _state),
    ("trains", _reaches),
    ("gradient", partial(_derivative, second=False)),
    ("second gradient", partial(_derivative, second=True)),
    ("precision", _single),
    ("bfloat16", _half),
    ("invariance", _invariances),
    ("degenerate", _degenerate),
)


def _declared(subject: _Subject) -> list[Seen]:
    """Test the laws of declared traits, where the layer has some."""
    if not isinstance(getattr(subject.case.layer(), "traits", None), Traits):
        return []
    rows = []
    for law in laws(subject.case):
        try:
            law.test(subject.case)
            rows.append(Seen(f"declared: {law.name}", "pass", law.statement))
        except Exception as error:  # LawBroken, or whatever the layer raises
            rows.append(Seen(f"declared: {law.name}", "fail", f"{law.statement}: {error}"))
    return rows
