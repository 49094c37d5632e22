"""Operator: a curvature matrix of a problem that multiplies vectors; it is never formed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from normscope.core.errors import ArgumentError, unknown_name
from normscope.linalg import curvature, gradient, ranks
from normscope.linalg.protect import without_hooks

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator

    from normscope.linalg.problem import Evaluated, Problem

_NO_SECOND = ("derivative for", "once_differentiable", "double backward", "not implemented for")
_STRIDE = 1_000_003  # between the seeds of ranks, so that no two batches draw the same targets


class Operator:
    """A symmetric matrix `[size, size]` over the parameters of a problem, at the point where it was made.

    One held batch: its graph is kept, a product costs two to two and a half gradients. Several: each is run anew, about
    one gradient more, shared by all columns of `matmat`.

    Args:
        problem: the problem.
        kind: "hessian", "ggn", "fisher" or "mc-fisher".
        seed: of the targets that "mc-fisher" draws.
        draws: how many of them for each sample.

    Raises:
        ArgumentError: for an unknown kind, and for a loss that is random or not finite.

    Attributes:
        names: names of the parameters, in the order of a flat vector.
        unused: names of selected parameters that the loss does not use; they are left out.
        loss: L at this point.
        gradient: its gradient, flat.
        matvecs: number of products so far.
    """

    def __init__(self, problem: Problem, kind: str = "hessian", *, seed: int = 0, draws: int = 1) -> None:
        """Take the gradient, and for one held batch its graph; see the class."""
        if kind not in curvature.KINDS:
            raise unknown_name("operator", kind, curvature.KINDS)
        if isinstance(draws, bool) or not isinstance(draws, int) or draws < 1:
            raise ArgumentError(f"draws={draws!r} must be a number of targets for each sample, at least 1.")
        self.problem, self.kind, self._seed, self._draws = problem, kind, seed, draws
        self.model, named = problem.materialize()
        found = gradient.take(problem, self.model, named)
        self.names: tuple[str, ...] = tuple(found.parts)
        self.unused = tuple(name for name in named if name not in found.parts)
        self.loss, self._total, self._slopes = found.loss, found.total, found.parts
        self._params = [named[name] for name in self.names]
        self._chosen: Sequence[int] = range(len(self.names))
        self._every = self.names
        self._state = self._versions()
        self.matvecs = 0
        self._unchecked = True
        self._kept: tuple[float, curvature.Product] | None = None
        if isinstance(problem.batches, (list, tuple)) and len(problem.batches) == 1:
            with problem.running(self.model) as evaluate, _explained():
                self._kept = next(iter(self._products(evaluate)))

    @property
    def size(self) -> int:
        """Length of a flat vector."""
        return sum(p.numel() for p in self._parts)

    @property
    def dtype(self) -> torch.dtype:
        """Type of a flat vector."""
        return self._params[0].dtype

    @property
    def device(self) -> torch.device:
        """Device of a flat vector."""
        return self._params[0].device

    @property
    def gradient(self) -> Tensor:
        """Gradient of L, flat."""
        return torch.cat([self._slopes[name].reshape(-1) for name in self.names])

    def split(self, vector: Tensor) -> list[Tensor]:
        """Return the parts of a flat vector, in the shapes of the parameters, without a copy."""
        pieces = torch.split(vector, [p.numel() for p in self._parts])
        return [piece.view(p.shape) for piece, p in zip(pieces, self._parts, strict=True)]

    def matvec(self, vector: Tensor) -> Tensor:
        """Return matrix times vector.

        Args:
            vector: flat, `[size]`.

        Returns:
            A flat vector of the same shape.
        """
        self._check(vector, 1)
        return self._rows([vector])[0]

    def matmat(self, matrix: Tensor) -> Tensor:
        """Return matrix times matrix.

        Args:
            matrix: `[size, k]`, the vectors in columns.

        Returns:
            The same shape.
        """
        self._check(matrix, 2)
        return torch.stack(self._rows(list(matrix.unbind(1))), 1) if matrix.shape[1] else matrix.clone()

    def block(self, parameters: str | Sequence[str]) -> Operator:
        """Return the diagonal block of some parameters, as those of a layer; it shares the graph.

        Args:
            parameters: a glob over parameter names, or several.

        Returns:
            An operator on vectors of their size; a glob that matches nothing is an ArgumentError.
        """
        patterns = (parameters,) if isinstance(parameters, str) else parameters
        self._check_patterns(patterns)
        part = object.__new__(Operator)
        part.__dict__.update(self.__dict__)
        chosen = [i for i, name in zip(self._chosen, self.names, strict=True) if _matches(name, patterns)]
        part.names = tuple(name for name in self.names if _matches(name, patterns))
        part._chosen, part.matvecs = chosen, 0
        return part

    def normal(self, generator: torch.Generator) -> Tensor:
        """Draw a vector of independent standard normal entries; the same on every device and every rank.

        Args:
            generator: on the CPU.

        Returns:
            `[size]`.
        """
        return torch.randn(self.size, generator=generator, dtype=self.dtype).to(self.device)

    def signs(self, generator: torch.Generator) -> Tensor:
        """Draw a vector of independent random signs (Rademacher).

        Args:
            generator: on the CPU.

        Returns:
            `[size]`.
        """
        bits = torch.randint(0, 2, (self.size,), generator=generator, dtype=torch.int8)
        return (2 * bits - 1).to(self.dtype).to(self.device)

    def linear_operator(self) -> LinearOperator:
        """Return a `scipy.sparse.linalg.LinearOperator` of the same matrix, as for eigsh."""
        from scipy.sparse.linalg import LinearOperator

        def multiply(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
            tensor = torch.as_tensor(array).to(self.device, self.dtype)
            found = self.matmat(tensor) if tensor.dim() == 2 else self.matvec(tensor.reshape(-1))
            return found.cpu().numpy()

        dtype = torch.empty(0, dtype=self.dtype).numpy().dtype
        return LinearOperator(
            (self.size, self.size), matvec=multiply, rmatvec=multiply, matmat=multiply, rmatmat=multiply, dtype=dtype
        )

    def __repr__(self) -> str:
        """Say which matrix it is."""
        return f"Operator({self.kind}, {self.size:,} parameters, {self.problem!r})"

    # ---- products --------------------------------------------------------------------------------------------------

    @property
    def _parts(self) -> list[torch.nn.Parameter]:
        return [self._params[i] for i in self._chosen]

    def _rows(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """Multiply flat vectors; all pass through a batch before the next one is run."""
        self._check_fresh()
        self.matvecs += len(vectors)
        parts = [self.split(vector) for vector in vectors]
        with _explained(), without_hooks(self._params), torch.inference_mode(False):
            if self._kept is not None:
                weight, multiply = self._kept
                share = weight / self._total
                out = [_scaled(_flat(multiply(part, self._chosen, True)), share) for part in parts]
            else:
                out = self._streamed(parts)
        for row in out:
            ranks.add(row, self.problem.distributed)
        return out

    def _streamed(self, vectors: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        out: list[Tensor] = []
        with self.problem.running(self.model) as evaluate:
            for weight, multiply in self._products(evaluate):
                first = not out
                for number, vector in enumerate(vectors):
                    found = multiply(vector, self._chosen, number < len(vectors) - 1)
                    if first:
                        out.append(_scaled(_flat(found), weight / self._total))
                        continue
                    for sums, piece in zip(self.split(out[number]), found, strict=True):
                        sums.add_(piece, alpha=weight / self._total)
        return out

    def _products(self, evaluate: Callable[[Any], Evaluated]) -> Iterator[tuple[float, curvature.Product]]:
        for number, batch in enumerate(self.problem.each()):
            found = evaluate(batch)
            draw = torch.Generator().manual_seed(self._seed + number + _STRIDE * ranks.rank(self.problem.distributed))
            made = curvature.product(self.kind, self.problem, found, self._params, draw, self._draws, self._unchecked)
            self._unchecked = False
            yield self.problem.weight(found.samples), made

    def _check(self, tensor: object, axes: int) -> None:
        shape = f"[{self.size}]" if axes == 1 else f"[{self.size}, k]"
        if not isinstance(tensor, Tensor) or tensor.dim() != axes or len(tensor) != self.size:
            found = f"shape {list(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ArgumentError(f"vector: got {found}; it must be a tensor {shape}, one entry for each parameter.")
        if (tensor.dtype, tensor.device) != (self.dtype, self.device):
            raise ArgumentError(
                f"vector: got {tensor.dtype} on {tensor.device}; it must be {self.dtype} on {self.device}, as the "
                "parameters are; see dtype= of Problem."
            )

    def _check_patterns(self, patterns: Sequence[str]) -> None:
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in self.names):
                raise unknown_name("parameters", pattern, self.names, "A glob is matched against whole names.")

    def _versions(self) -> list[tuple[int, int]]:
        live = self.problem.parameters()
        return [(live[name]._version, live[name].data_ptr()) if name in live else (-1, -1) for name in self._every]

    def _check_fresh(self) -> None:
        changed = [n for n, a, b in zip(self._every, self._state, self._versions(), strict=True) if a != b]
        if changed:
            shown = ", ".join(changed[:3]) + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")
            raise ArgumentError(
                f"the operator is stale: {shown} changed since it was made, as optimizer.step() does. Make a new one "
                "by problem.operator(), or call problem.refresh() before problem.hvp()."
            )


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _flat(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.reshape(-1) for part in parts])


def _scaled(vector: Tensor, factor: float) -> Tensor:
    return vector if factor == 1.0 else vector.mul_(factor)


@contextmanager
def _explained() -> Iterator[None]:
    """Say what to do about an operation without a second derivative."""
    try:
        yield
    except RuntimeError as error:  # NotImplementedError is one
        if any(words in str(error) for words in _NO_SECOND):
            raise ArgumentError(f"model: an operation has no second derivative ({error}). {curvature.PLAIN}") from error
        raise
