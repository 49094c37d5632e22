"""Problem: a model with a loss and held data, for what needs more than the training steps themselves."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import islice
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves, tree_map

from normscope.core.errors import ArgumentError, brief, unknown_name
from normscope.linalg import gradient
from normscope.linalg.operator import Operator
from normscope.linalg.protect import generator_state, random_states, restored

Forward = Callable[[nn.Module, Any], tuple[Any, Any]]

HELD = 8  # batches held of a loader or an iterator
MODES = ("train", "eval")
REDUCTIONS = ("mean", "sum")


@dataclass(frozen=True)
class Evaluated:
    """What one batch gave: output, target, the scalar loss, number of samples; and the function that is the loss."""

    output: Any
    target: Any
    loss: Tensor
    samples: int
    criterion: Callable[[Any, Any], Tensor]


class Problem:
    """A model, a loss and batches: L(theta), the function whose curvature is asked for.

    With n_b samples in batch b and the loss l_b that it gives,
    L = sum_b n_b l_b / sum_b n_b for a loss that averages over samples ("mean"), L = sum_b l_b for one that adds
    ("sum"). n_b is the length of the output's first axis; where the output is a scalar, that of the batch's first
    tensor. Under torch.distributed each rank holds its share of the batches and the sums run over all ranks.

    Mode "train" lets normalization use the statistics of the batch, "eval" those it keeps. In both, modules that drop
    at random are evaluated; `repr` says which number of them. The model, its buffers, modes, gradients and every random
    state stay as they are. Fused attention has no second derivative: it runs in its plain form here.

    Args:
        model: the model; a compiled or data-parallel one is unwrapped.
        loss: `loss(output, target)`, a scalar tensor.
        batches: batches `(input, target)`. One batch in a list keeps its graph for all products; several are run anew
            for each. Of a loader or an iterator the first `held` are held.
        parameters: a glob over parameter names, or several; every trainable parameter by default.
        mode: "train" or "eval".
        dtype: compute on a copy of the model in this type, as torch.float64; the model's own by default. A loss that
            refers to the model by itself does not see the copy.
        forward: `(model, batch) -> (output, target)` for batches of any other form.
        reduction: how the loss joins the samples of a batch, "mean" or "sum".
        held: how many batches of a loader are held; None reads all of them anew for each product.
        distributed: False for the data of this rank alone.

    Raises:
        ArgumentError: if an argument cannot work.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Any, Any], Tensor],
        batches: Iterable[Any],
        *,
        parameters: str | Sequence[str] | None = None,
        mode: str = "train",
        dtype: torch.dtype | None = None,
        forward: Forward | None = None,
        reduction: str = "mean",
        held: int | None = HELD,
        distributed: bool = True,
    ) -> None:
        """Check and hold the parts; see the class."""
        if not isinstance(model, nn.Module):
            raise ArgumentError(f"model={brief(model)} must be a torch.nn.Module.")
        if not callable(loss):
            raise ArgumentError(f"loss={brief(loss)} must be callable as loss(output, target).")
        if mode not in MODES:
            raise unknown_name("mode", mode, MODES, "It says which statistics normalization uses.")
        if reduction not in REDUCTIONS:
            raise unknown_name("reduction", reduction, REDUCTIONS, "It says how the loss joins the samples.")
        if dtype not in (None, torch.float32, torch.float64):
            raise ArgumentError(f"dtype={dtype!r} must be torch.float32, torch.float64 or None, the model's own.")
        self.model, self.loss, self.mode, self.dtype = model, loss, mode, dtype
        self.forward: Forward = forward or forward_pair
        self.reduction, self.distributed = reduction, distributed
        self._inner = _unwrapped(model)
        self._patterns = (parameters,) if isinstance(parameters, str) else parameters
        self._selected()
        self.batches = checked_batches(model, batches, held)
        self._dropping = sum(drops(module) for module in self._inner.modules())
        self._unused: tuple[str, ...] | None = None
        self._hessian: Operator | None = None

    # ---- what users ask --------------------------------------------------------------------------------------------

    @property
    def size(self) -> int:
        """Number of parameters: those selected and trainable that the loss uses; the first call evaluates it."""
        return sum(self._selected()[name].numel() for name in self.names)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parameters in a flat vector, in its order."""
        unused = self.unused
        return tuple(name for name in self._selected() if name not in unused)

    @property
    def unused(self) -> tuple[str, ...]:
        """Names of selected parameters that the loss does not use: they are left out."""
        if self._unused is None:
            self.operator()
        return self._unused or ()

    def operator(self, kind: str = "hessian", *, seed: int = 0, draws: int = 1) -> Operator:
        """Return a curvature matrix at the present parameters as an operator.

        Args:
            kind: "hessian", "ggn", "fisher" (empirical) or "mc-fisher"; see `normscope.linalg.curvature`.
            seed: of the targets that "mc-fisher" draws.
            draws: how many of them for each sample.

        Returns:
            The operator, valid until the parameters change.
        """
        made = Operator(self, kind, seed=seed, draws=draws)
        self._unused = made.unused
        return made

    def hvp(self, vector: Tensor) -> Tensor:
        """Return Hessian times vector.

        Args:
            vector: flat, `[size]`, in the order of `names`.

        Returns:
            A flat vector of the same shape. If the parameters have changed since the first call this is an
            ArgumentError: `refresh()` begins anew.
        """
        if self._hessian is None:
            self._hessian = self.operator()
        return self._hessian.matvec(vector)

    def gradient(self) -> Tensor:
        """Return the gradient of L at the present parameters, flat, `[size]`."""
        return self.operator().gradient

    def refresh(self) -> None:
        """Forget the graph that `hvp` keeps, so that the next call sees the present parameters."""
        self._hessian = None

    def take(self, count: int) -> list[Any]:
        """Return the first batches.

        Args:
            count: how many at most.

        Returns:
            The batches.
        """
        with random_states(self.model), generator_state(self.batches):
            return list(islice(self.batches, count))

    def on(self, batches: Sequence[Any], dtype: torch.dtype | None = None) -> Problem:
        """Return the same problem on other batches, those of this rank alone.

        Args:
            batches: the batches.
            dtype: type to compute in; that of this problem by default.

        Returns:
            A problem that shares model and loss.
        """
        made = copy.copy(self)
        made.batches, made.distributed, made.dtype = list(batches), False, dtype or self.dtype
        made._unused = made._hessian = None
        return made

    def alone(self) -> Problem:
        """Return the same problem of this rank alone, on the module behind the wrapper of data parallelism."""
        made = copy.copy(self)
        made.model, made.distributed = self._inner, False
        made._unused = made._hessian = None
        return made

    def __repr__(self) -> str:
        """Say what the problem holds, and how it differs from the training loss."""
        selected = sum(0 if is_lazy(p) else p.numel() for p in self._selected().values())
        trainable = sum(p.numel() for p in self._inner.parameters() if p.requires_grad and not is_lazy(p))
        share = f"{selected:,} of " if selected < trainable else ""
        streamed = not isinstance(self.batches, (list, tuple))
        parts = [f"{type(self._inner).__name__}, {share}{trainable:,} parameters"]
        parts += [f"batches from {type(self.batches).__name__}" if streamed else f"{len(self.batches)} batches"]  # type: ignore[arg-type]
        parts += ["evaluation mode"] * (self.mode == "eval")
        parts += [str(self.dtype)] * (self.dtype is not None)
        parts += ["summed loss"] * (self.reduction == "sum")
        parts += [f"dropout evaluated in {self._dropping} modules"] * bool(self._dropping)
        parts += [f"not used by the loss: {', '.join(self._unused or ())}"] * bool(self._unused)
        return f"Problem({', '.join(parts)})"

    # ---- what operators ask ----------------------------------------------------------------------------------------

    def materialize(self) -> tuple[nn.Module, dict[str, nn.Parameter]]:
        """Return the model to run, a copy where another dtype is asked for, and its selected parameters by name."""
        selected = self._selected()
        if not selected:
            raise ArgumentError(f"model={type(self._inner).__name__} has no trainable parameters.")
        if lazy := [name for name, p in selected.items() if is_lazy(p)]:
            raise ArgumentError(f"parameters: {', '.join(lazy)} have no shape yet; run the model once before.")
        if self.dtype is None:
            return self._inner, selected
        model = copy.deepcopy(self._inner).to(self.dtype)
        named = dict(model.named_parameters())
        return model, {name: named[name] for name in selected}

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the selected trainable parameters of the user's model, by name."""
        return self._selected()

    @contextmanager
    def running(self, model: nn.Module) -> Iterator[Callable[..., Evaluated]]:
        """Set the model up and give back everything at the end.

        Args:
            model: the model or its copy.

        Yields:
            A function that evaluates a batch with gradient; with parameters by name, at these.
        """
        with ExitStack() as stack:
            stack.enter_context(restored(model))
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            for module in model.modules():  # not train(): an overridden one may merge weights or freeze layers
                module.training = self.mode == "train" and not drops(module)
            yield _Call(self, model).evaluate

    def each(self) -> Iterator[Any]:
        """Give the batches, in the dtype asked for; to be run through inside `running`."""
        empty = True
        with generator_state(self.batches):
            for batch in self.batches:
                empty = False
                yield batch if self.dtype is None else tree_map(self._cast, batch)
        if empty:
            raise ArgumentError(
                f"batches: {type(self.batches).__name__} gave no batch; pass a loader that can be read again and again."
            )

    def weight(self, samples: int) -> float:
        """Return the weight of a batch in the sum over batches."""
        return float(samples) if self.reduction == "mean" else 1.0

    def _cast(self, leaf: object) -> object:
        return leaf.to(self.dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    def _selected(self) -> dict[str, nn.Parameter]:
        named = dict(self._inner.named_parameters())
        trainable = {name: p for name, p in named.items() if p.requires_grad}
        if self._patterns is None:
            return trainable
        for pattern in self._patterns:
            if not any(fnmatchcase(name, pattern) for name in trainable):
                frozen = any(fnmatchcase(name, pattern) for name in named)
                hint = "It matches frozen parameters only." if frozen else "A glob is matched against whole names."
                raise unknown_name("parameters", pattern, trainable, hint)
        return {n: p for n, p in trainable.items() if any(fnmatchcase(n, pattern) for pattern in self._patterns)}


class _Call(nn.Module):
    """Forward and loss as one module, so that its buffers can be exchanged for copies."""

    def __init__(self, problem: Problem, model: nn.Module) -> None:
        super().__init__()
        self.model, self.problem = model, problem
        loss = problem.loss
        self.loss = copy.deepcopy(loss).to(problem.dtype) if isinstance(loss, nn.Module) and problem.dtype else loss

    def forward(self, batch: Any) -> Evaluated:
        output, target = self.problem.forward(self.model, batch)
        return Evaluated(
            output, target, gradient.checked_loss(self.loss(output, target)), _samples(output, batch), self.loss
        )

    def evaluate(self, batch: Any, parameters: Mapping[str, Tensor] = MappingProxyType({})) -> Evaluated:
        """Run on copies of the buffers: writing the old values back would break a graph that is kept."""
        taken = {f"model.{name}": buffer.detach().clone() for name, buffer in self.model.named_buffers()}
        taken |= {f"model.{name}": value for name, value in parameters.items()}
        found: Evaluated = functional_call(self, taken, (batch,))
        return found


def _samples(output: object, batch: object) -> int:
    for value in (output, batch):
        leaves = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and leaf.dim() > 0]
        if leaves:
            return len(leaves[0])
    return 1


def forward_pair(model: nn.Module, batch: Any) -> tuple[Any, Any]:
    """Run a model on a batch `(input, target)`; any other form is an ArgumentError."""
    try:
        if isinstance(batch, (Tensor, Mapping)):  # these unpack, to rows and to keys
            raise TypeError
        inputs, target = batch
    except (TypeError, ValueError):
        raise ArgumentError(
            f"batches: a batch of type {type(batch).__name__} is not a pair (input, target); "
            "pass forward=lambda model, batch: (output, target)."
        ) from None
    return model(inputs), target


def _unwrapped(model: nn.Module) -> nn.Module:
    """Return the module behind the wrappers of torch.compile and of data parallelism."""
    inner = getattr(model, "_orig_mod", None)
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        inner = model.module
    return _unwrapped(inner) if isinstance(inner, nn.Module) else model


def drops(module: nn.Module) -> bool:
    """Tell whether a module itself drops at random: a rate that is named so, or a forward method that says so."""
    kind = type(module).__name__.lower()
    dropper = "drop" in kind or "stochasticdepth" in kind
    rates = [value for name, value in vars(module).items() if "drop" in name.lower() or (dropper and name == "p")]
    rated = any(isinstance(rate, (int, float)) and not isinstance(rate, bool) and 0 < rate <= 1 for rate in rates)
    return rated or (not dropper and _drops_in_forward(type(module)))  # type: ignore[arg-type]  # classes can be hashed


@functools.cache
def _drops_in_forward(kind: type[nn.Module]) -> bool:
    """Tell whether a line of the forward method drops in training."""
    try:
        lines = inspect.getsource(kind.forward).splitlines()
    except (OSError, TypeError, AttributeError):  # defined where there is no file
        return False
    return any("self.training" in line and "drop" in line.lower() for line in lines)


def checked_batches(model: nn.Module, batches: object, held: int | None, argument: str = "batches") -> Iterable[Any]:
    """Refuse what cannot be batches, and hold the first of a loader or an iterator.

    Args:
        model: its random states stay as they are.
        batches: a list of batches, which is returned, a loader or an iterator.
        held: how many batches are held at most; None reads a loader anew each time.
        argument: what the user calls the batches.

    Returns:
        The batches.

    Raises:
        ArgumentError: they cannot be batches, or there is none.
    """
    if not isinstance(batches, Iterable):
        raise ArgumentError(
            f"{argument}={batches!r} must be a sequence of batches (input, target), or a loader of them."
        )
    if isinstance(batches, Tensor) or (isinstance(batches, tuple) and _is_batch(batches)):
        raise ArgumentError(f"{argument}: got a single batch; pass a list of batches, as [(inputs, targets)].")
    if held is not None and (isinstance(held, bool) or not isinstance(held, int) or held < 1):
        raise ArgumentError(f"held={held!r} must be a number of batches, at least 1, or None to read all anew.")
    if isinstance(batches, (list, tuple)):
        found: Iterable[Any] = batches
    elif held is None:
        if isinstance(batches, Iterator):
            raise ArgumentError(
                f"{argument}: a {type(batches).__name__} gives its batches only once and held=None reads them for "
                "each product; pass a list or a loader, or a number of batches to hold."
            )
        return batches
    else:
        with random_states(model), generator_state(batches):  # a shuffling loader draws from generators
            found = list(islice(batches, held))
    if not found:
        raise ArgumentError(f"{argument}={batches!r} is empty; pass at least one held batch (input, target).")
    return found


def _is_batch(batches: tuple[object, ...]) -> bool:
    return bool(batches) and all(isinstance(item, Tensor) for item in batches)
