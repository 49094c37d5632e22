"""Hooks: the only file that registers one. Forward hooks on modules, tensor hooks on outputs, step hooks on optimizers.

Full backward hooks are not used: they make outputs views, which breaks in-place operations after a normalization
layer. A hook returns None, raises nothing, and does nothing in a copy or a pickle of the module that it is on.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from types import FrameType, MappingProxyType
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from normscope.core.silence import is_silent

_NO_MODES = nullcontext()
_FAKE = torch._C._TorchDispatchModeKey.FAKE


class Watcher(Protocol):
    """What the hooks report to."""

    active: bool

    def on_pass(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], training: bool) -> None:
        """Hear that the model's own forward begins, in training or in evaluation mode."""

    def on_forward(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: object
    ) -> None:
        """Hear that a module returned."""

    def before_step(self, optimizer: torch.optim.Optimizer, has_closure: bool) -> None:
        """Hear that an optimizer is about to step."""

    def after_step(self, optimizer: torch.optim.Optimizer, has_closure: bool) -> None:
        """Hear that an optimizer has stepped."""


def _nothing(*_args: object, **_kwargs: object) -> None:
    """Stand in for a hook in a copy of the module."""


def _restore_nothing() -> Callable[..., None]:
    return _nothing


class _Hook:
    """A hook that copies and pickles as one that does nothing, so that a copied model does not report into the run."""

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple[()]]:
        return _restore_nothing, ()

    def __deepcopy__(self, memo: dict[int, object]) -> Callable[..., None]:
        return _nothing


class _PassHook(_Hook):
    def __init__(self, watcher: Watcher, root: nn.Module) -> None:
        self.watcher, self.root = watcher, root

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] = MappingProxyType({})
    ) -> None:
        if torch.compiler.is_compiling():  # first: a compiler that traces sees an empty hook and guards nothing
            return
        if module is self.root and not is_silent(self.watcher) and not _transformed():
            with _outside_modes():
                self.watcher.on_pass(args, kwargs, module.training)


class _ForwardHook(_Hook):
    def __init__(self, watcher: Watcher, name: str, module: nn.Module) -> None:
        self.watcher, self.name, self.module = watcher, name, module

    def __call__(self, module: nn.Module, args: tuple[Any, ...], *rest: Any) -> None:
        if torch.compiler.is_compiling():
            return
        if self.watcher.active and module is self.module and not is_silent(self.watcher) and not _transformed():
            *kwargs, output = rest  # tools that move hooks between modules lose their with_kwargs mark
            with _outside_modes():
                self.watcher.on_forward(self.name, module, args, kwargs[0] if kwargs else {}, output)


class _Calls:
    """Calls of an optimizer's `step` inside one another, as where it calls that of its base class: one step."""

    def __init__(self) -> None:
        self._running: list[FrameType] = []  # of torch's wrapper around `step`, outermost first

    def begins(self, frame: FrameType) -> bool:
        """Tell whether a call is no part of another; one that ended with an error is none any more."""
        if self._running:
            outside, callers = frame.f_back, set()
            while outside is not None:
                callers.add(outside)
                outside = outside.f_back
            self._running = [known for known in self._running if known in callers]
        self._running.append(frame)
        return len(self._running) == 1

    def ends(self, frame: FrameType) -> bool:
        """Tell whether the outermost call has ended."""
        if not self._running or self._running[0] is not frame:
            return False
        self._running = []
        return True


class _StepHook(_Hook):
    def __init__(
        self,
        report: Callable[[torch.optim.Optimizer, bool], None],
        counts: Callable[[FrameType], bool],
    ) -> None:
        self.report, self.counts = report, counts

    def __call__(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if not torch.compiler.is_compiling() and self.counts(sys._getframe(1)):
            closure = args[1] if len(args) > 1 else kwargs.get("closure")  # args[0] is the optimizer
            with _outside_modes():
                self.report(optimizer, closure is not None)


class _GradientHook:
    """Reports once: a second backward through the same graph (Hessian products, penalties) is another quantity."""

    def __init__(self, report: Callable[[torch.Tensor], None]) -> None:
        self.report: Callable[[torch.Tensor], None] = report

    def __call__(self, gradient: torch.Tensor) -> None:
        report, self.report = self.report, _nothing
        if not _transformed():
            with _outside_modes():
                report(gradient.detach())


def _outside_modes() -> AbstractContextManager[object]:
    """Hide what is measured from modes that watch the user's operations, as selective checkpointing does."""
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        stack = ExitStack()
        stack.enter_context(_disable_current_modes())
        stack.enter_context(torch._C.DisableTorchFunction())
        return stack
    return _NO_MODES


def _transformed() -> bool:
    """Tell whether a compiler, a tracer, functorch, a fake mode or the toolkit itself runs: nothing is to be read."""
    return (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or (torch._C._len_torch_dispatch_stack() > 0 and torch._C._get_dispatch_mode(_FAKE) is not None)
    )


def compiled() -> bool:
    """Tell whether torch.compile has compiled anything in this process."""
    known = sys.modules.get("torch._dynamo.utils")  # not imported here: it takes a second
    return known is not None and known.counters["frames"]["ok"] > 0


def in_backward() -> bool:
    """Tell whether the call comes from inside a backward pass: activation checkpointing recomputes a forward."""
    return int(torch._C._current_graph_task_id()) != -1


def on_gradient(tensor: torch.Tensor, report: Callable[[torch.Tensor], None]) -> None:
    """Report the gradient of an activation when it is known; a leaf is left alone, its hook would outlive the step."""
    if tensor.requires_grad and not tensor.is_leaf:
        tensor.register_hook(_GradientHook(report))  # type: ignore[no-untyped-call]


class Hooks:
    """The registered hooks of one attachment; `remove` takes every one of them off again.

    Args:
        watcher: what they report to.
        root: the model; its forward begins a pass.
        modules: (name, module) of those watched.
        optimizers: the optimizers whose steps are heard.
    """

    def __init__(
        self,
        watcher: Watcher,
        root: nn.Module,
        modules: Iterable[tuple[str, nn.Module]],
        optimizers: Iterable[torch.optim.Optimizer],
    ) -> None:
        """Register them, or none if one cannot be; see the class."""
        self._handles: list[Any] = []
        try:
            self._handles.append(root.register_forward_pre_hook(_PassHook(watcher, root), with_kwargs=True))
            for name, module in modules:
                hook = _ForwardHook(watcher, name, module)
                self._handles.append(module.register_forward_hook(hook, with_kwargs=True))
            for optimizer in optimizers:
                calls = _Calls()
                self._handles.append(optimizer.register_step_pre_hook(_StepHook(watcher.before_step, calls.begins)))
                self._handles.append(optimizer.register_step_post_hook(_StepHook(watcher.after_step, calls.ends)))
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Remove every hook; a second call does nothing."""
        while self._handles:
            self._handles.pop().remove()


class _HeldHook(_Hook):
    def __init__(self, name: str, report: Callable[[str, Any], None], inputs: bool) -> None:
        self.name, self.report, self.inputs = name, report, inputs

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        self.report(self.name, args if self.inputs else output)


@contextmanager
def listening(
    modules: Mapping[str, nn.Module], report: Callable[[str, Any], None], *, inputs: bool = False
) -> Iterator[None]:
    """Report (name, output) of each forward of some modules while the context lasts.

    Args:
        modules: the modules by name.
        report: what to call.
        inputs: report the tuple of positional arguments instead of the output.

    Yields:
        Nothing.
    """
    handles = [module.register_forward_hook(_HeldHook(name, report, inputs)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
