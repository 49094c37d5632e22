"""Lanczos: an orthonormal basis grown by products with a symmetric matrix, and the matrix in that basis.

A Q_m = Q_m T + beta q_{m+1} e_m^T, with every new vector made orthogonal to all before it by two matrix-vector products
on a basis that is allocated once. T is kept whole, so that a thick restart needs no case of its own.

Sources: lanczos1950; wu2000 (thick restart); daniel1976 (when to orthogonalize twice).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray[Any, np.dtype[Any]]

_CHUNK = 1 << 16  # columns of the basis that a restart turns at once
_NOISE = 2 / 3  # a remainder below round-off to this power, relative to the matrix, is no direction


class Krylov:
    """A growing basis.

    Args:
        multiply: the matrix.
        start: first vector, of any length but zero.
        capacity: most vectors in the basis; one more is held, that which comes next.

    Attributes:
        count: number of basis vectors whose products are known.
        beta: norm of the remainder of the last product; 0 where the basis is invariant.
        norm: the largest norm of a column of T so far, an estimate of that of the matrix from below.
        noise: what residuals cannot fall below: round-off, and remainders that were taken for it.
    """

    def __init__(self, multiply: Callable[[Tensor], Tensor], start: Tensor, capacity: int) -> None:
        """Hold the first vector; see the class."""
        self._multiply, self.capacity = multiply, capacity
        self._basis = start.new_empty(capacity + 1, len(start))
        self._t = np.zeros((capacity + 1, capacity + 1))
        self._basis[0] = start / start.norm()
        self.count, self.beta, self.norm, self.noise = 0, 0.0, 0.0, 0.0
        self.eps = torch.finfo(start.dtype).eps

    @property
    def projected(self) -> Array:
        """T, the matrix in the basis, `[count, count]`."""
        return self._t[: self.count, : self.count]

    def step(self) -> None:
        """Multiply the newest vector and make the remainder the next one, unless the basis is invariant."""
        j, basis, t = self.count, self._basis[: self.count + 1], self._t
        w = self._multiply(basis[j])
        first = int(np.argmax(t[:j, j] != 0)) if t[:j, j].any() else j
        known = torch.as_tensor(t[first:j, j], dtype=w.dtype, device=w.device)
        w = torch.addmv(w, basis[first:j].T, known, alpha=-1)  # what is known to be there goes first, at little cost
        alpha = torch.dot(basis[j], w)
        w.addcmul_(basis[j], alpha, value=-1)
        t[j, j] += float(alpha)
        before = float(w.norm())
        for _ in range(2):
            h = basis @ w
            w = torch.addmv(w, basis.T, h, alpha=-1)
            t[j, j] += float(h[j])
            after = float(w.norm())
            if after > 0.7 * before:
                break
            before = after
        self.count = j + 1
        self.norm = max(self.norm, float(np.hypot(np.linalg.norm(t[: j + 1, j]), after)))
        self.beta = after if after > self.eps**_NOISE * self.norm else 0.0
        self.noise = max(self.noise, self.eps * self.norm, 0.0 if self.beta else after)
        if self.beta:
            torch.div(w, after, out=self._basis[j + 1])
            t[j, j + 1] = t[j + 1, j] = after

    def begin_block(self, vector: Tensor) -> None:
        """Go on from a fresh vector, made orthogonal to the basis; what was coupled to the old remainder is dropped."""
        basis = self._basis[: self.count]
        self._t[self.count, :] = self._t[:, self.count] = 0.0
        for _ in range(3):
            vector = vector / vector.norm()
            vector = torch.addmv(vector, basis.T, basis @ vector, alpha=-1)
        self._basis[self.count] = vector / vector.norm()
        self.beta = 0.0

    def restart(self, rotation: Array, values: Array) -> None:
        """Shrink the basis to Ritz vectors, in place; the next vector stays.

        Args:
            rotation: the Ritz vectors in the basis, `[count, kept]`.
            values: their Ritz values.
        """
        kept = len(values)
        turn = torch.as_tensor(rotation.T.copy(), dtype=self._basis.dtype, device=self._basis.device)
        for columns in torch.split(self._basis, _CHUNK, 1):
            columns[:kept] = turn @ columns[: self.count]
        self._basis[kept] = self._basis[self.count]
        self._t[:] = 0.0
        self._t[range(kept), range(kept)] = values
        self._t[kept, :kept] = self._t[:kept, kept] = self.beta * rotation[-1]
        self.count = kept

    def vectors(self, rotation: Array) -> Tensor:
        """Return vectors given in the basis.

        Args:
            rotation: `[count, k]`.

        Returns:
            `[size, k]`.
        """
        turn = torch.as_tensor(rotation.T.copy(), dtype=self._basis.dtype, device=self._basis.device)
        return (turn @ self._basis[: self.count]).T
