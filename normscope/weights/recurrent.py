"""Square orthogonal and unitary matrices for recurrent layers, each with the parameters of its paper."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parametrizations

from normscope.core.errors import ArgumentError
from normscope.norms.part import require
from normscope.weights.borrowed import borrow
from normscope.weights.orthogonal import cayley
from normscope.weights.parametrization import Drawn, Layout, Parametrization, gram_deviation, require_square


def real_form(u: Tensor) -> Tensor:
    """Return the real matrix of a complex one: it acts on [Re z, Im z] as U acts on z.

    Args:
        u: complex `(n, n)`.

    Returns:
        [[Re U, -Im U], [Im U, Re U]], real `(2n, 2n)`.
    """
    return torch.cat([torch.cat([u.real, -u.imag], 1), torch.cat([u.imag, u.real], 1)])


def complex_form(weight: Tensor) -> Tensor:
    """Return the complex matrix nearest to a real one of even size; inverse of `real_form`."""
    n = weight.shape[0] // 2
    a, b, c, d = weight[:n, :n], weight[:n, n:], weight[n:, :n], weight[n:, n:]
    return torch.complex((a + d) / 2, (c - b) / 2)


def real_deviation(rows: Tensor) -> Tensor:
    """Return how far a real matrix is from one of the real form of a unitary matrix."""
    return torch.maximum((real_form(complex_form(rows)) - rows).abs().amax(), gram_deviation(rows))


def rotate_phases(z: Tensor, theta: Tensor) -> Tensor:
    """Multiply complex rows by exp(i theta)."""
    return z * torch.polar(torch.ones_like(theta), theta)


def reflect(z: Tensor, v: Tensor) -> Tensor:
    """Reflect complex rows: z - 2 (sum_i z_i v_i) conj(v) / |v|^2."""
    return z - 2 * (z @ v)[:, None] * v.conj() / v.abs().square().sum()


class Unitary(Drawn):
    """Unitary evolution: D3 R2 F^-1 D2 P R1 F D1, in real form for a state [Re, Im].

    D are phases, F the unitary Fourier transform, R reflections, P a fixed permutation; D1 acts first on the state.
    """

    permutation: Tensor

    def __init__(self, layout: Layout, weight: Tensor) -> None:
        """Draw the permutation."""
        n = require_square(weight, "unitary", even=True) // 2
        super().__init__(layout)
        self.register_buffer("permutation", torch.randperm(n, device=weight.device))

    def draw(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return phases from U(-pi, pi), and reflections with the bound of Glorot's."""
        n = len(weight) // 2
        bound = math.sqrt(6 / (2 + 2 * n))
        theta = torch.empty(3, n, dtype=weight.dtype, device=weight.device).uniform_(-math.pi, math.pi)
        return theta, weight.new_empty(2, 2 * n).uniform_(-bound, bound)

    def forward(self, theta: Tensor, reflections: Tensor) -> Tensor:
        """Return the weight: the steps, each on the rows of the identity."""
        n = theta.shape[1]
        v = torch.complex(reflections[:, :n], reflections[:, n:])
        z = torch.eye(n, dtype=v.dtype, device=v.device)
        z = torch.fft.fft(rotate_phases(z, theta[0]), norm="ortho")
        z = rotate_phases(reflect(z, v[0])[:, self.permutation], theta[1])
        z = reflect(torch.fft.ifft(z, norm="ortho"), v[1])
        # rows of the identity give the matrix that rows are multiplied by from the right
        return real_form(rotate_phases(z, theta[2]).mT)

    def deviation(self, rows: Tensor) -> Tensor:
        """The real form of a unitary matrix."""
        return real_deviation(rows)


class LieUnitary(Parametrization):
    """Unitary matrices from their Lie algebra: U = q(sum_j p_j T_j) base, in real form for a state [Re, Im].

    T_j is the basis of u(n): sqrt(2) i E_kk, E_kl - E_lk and i (E_kl + E_lk); p is an n x n matrix, its lower triangle
    for the real part. q(S) is the exponential or the Cayley map (I - S / 2)^-1 (I + S / 2). `retract` makes U the base
    and p zero: with the Cayley map, a step of gradient descent on p and `retract` after it are the published step of
    full-capacity unitary layers, X <- (I + lr A / 2)^-1 (I - lr A / 2) X with A = G X^H - X G^H.

    Args:
        layout: of the weight.
        weight: example, `(2n, 2n)`; its nearest unitary matrix becomes the base.
        kind: "matrix_exp" or "cayley".
    """

    def __init__(self, layout: Layout, weight: Tensor, kind: str = "matrix_exp") -> None:
        """Register the base."""
        require(kind, "kind", ("matrix_exp", "cayley"))
        require_square(weight, "unitary-lie-algebra", even=True)
        super().__init__(layout)
        self.kind = kind
        self.register_buffer("base", torch.eye(len(weight), dtype=weight.dtype, device=weight.device))

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Make the nearest unitary matrix the base, and return zeros."""
        u, _, vh = torch.linalg.svd(complex_form(weight.detach()))
        self.base = real_form(u @ vh)
        return weight.new_zeros(len(weight) // 2, len(weight) // 2)

    def forward(self, raw: Tensor) -> Tensor:
        """Return the weight in use."""
        low, high = raw.tril(-1), raw.triu(1)
        s = torch.complex(low - low.mT, high + high.mT + math.sqrt(2) * raw.diagonal().diag())
        if self.kind == "matrix_exp":
            u = torch.matrix_exp(s)
        else:
            eye = torch.eye(len(s), dtype=s.dtype, device=s.device)
            u = torch.linalg.solve(eye - s / 2, eye + s / 2)
        return real_form(u) @ self.base

    def retract(self, *raw: Tensor) -> tuple[Tensor, ...]:
        """Make the weight in use the base."""
        return (self.right_inverse(self.forward(*raw)),)

    def deviation(self, rows: Tensor) -> Tensor:
        """The real form of a unitary matrix."""
        return real_deviation(rows)


class ScaledCayley(Drawn):
    """Scaled Cayley transform: W = (I + A)^-1 (I - A) D, A skew-symmetric, D a fixed diagonal of 1 and -1.

    Args:
        layout: of the weight.
        weight: example, square.
        negatives: how many entries of D are -1; None for half of them.
    """

    def __init__(self, layout: Layout, weight: Tensor, negatives: int | None = None) -> None:
        """Register D."""
        n = require_square(weight, "scaled-cayley")
        super().__init__(layout)
        count = n // 2 if negatives is None else negatives
        if not 0 <= count <= n:
            raise ArgumentError(f"negatives={negatives!r} must be from 0 to {n}, or None for {n // 2}.")
        signs = torch.ones(n, dtype=weight.dtype, device=weight.device)
        signs[n - count :] = -1
        self.register_buffer("signs", signs)

    def draw(self, weight: Tensor) -> Tensor:
        """Return A in 2 x 2 blocks, s = -sqrt((1 - cos t) / (1 + cos t)) with t from U(0, pi / 2)."""
        raw = torch.zeros_like(weight)
        even = torch.arange(0, len(weight) - 1, 2, device=weight.device)
        t = torch.empty(len(even), dtype=weight.dtype, device=weight.device).uniform_(0, math.pi / 2)
        raw[even + 1, even] = ((1 - t.cos()) / (1 + t.cos())).sqrt()
        return raw

    def forward(self, raw: Tensor) -> Tensor:
        """Return the weight in use."""
        low = raw.tril(-1)
        a = low - low.mT
        eye = torch.eye(len(a), dtype=a.dtype, device=a.device)
        weight: Tensor = torch.linalg.solve(eye + a, eye - a) * self.signs
        return weight

    def deviation(self, rows: Tensor) -> Tensor:
        """An orthogonal matrix."""
        return gram_deviation(rows)


class SoftOrthogonal(Parametrization):
    """Factorized orthogonality: W = U diag(s) V^T with s = 2 m sigmoid(p) + 1 - m in [1 - m, 1 + m].

    U and V are orthogonal by the Cayley map about a base, which `retract` moves along.

    Args:
        layout: of the weight.
        weight: example.
        margin: m, from 0 for orthogonal to 1.
    """

    def __init__(self, layout: Layout, weight: Tensor, margin: float = 0.1) -> None:
        """Take torch's orthogonal factors."""
        super().__init__(layout)
        if not 0 <= margin <= 1:
            raise ArgumentError(f"margin={margin!r} must be from 0 to 1.")
        self.margin, self.shape = margin, weight.shape
        u, _, vh = torch.linalg.svd(layout.rows(weight.detach()), full_matrices=False)
        self.left: Any = borrow(u.contiguous(), parametrizations.orthogonal, orthogonal_map="cayley")
        self.right: Any = borrow(vh.mT.contiguous(), parametrizations.orthogonal, orthogonal_map="cayley")

    def right_inverse(self, weight: Tensor) -> tuple[Any, Any, Any]:
        """Take the factors as bases, and the singular values as far as the margin lets them."""
        u, s, vh = torch.linalg.svd(self.layout.rows(weight), full_matrices=False)
        share = (s - 1 + self.margin) / (2 * self.margin or 1.0)
        p = share.clamp(0.01, 0.99).logit() if self.margin else torch.zeros_like(s)
        factors = (self.left, u), (self.right, vh.mT)
        left, right = (module.right_inverse(factor.contiguous()) for module, factor in factors)
        return left, p, right

    def forward(self, left: Tensor, p: Tensor, right: Tensor) -> Tensor:
        """Return the weight in use."""
        s = 2 * self.margin * p.sigmoid() + 1 - self.margin
        rows = (self.left.base @ (cayley(left) * s)) @ (self.right.base @ cayley(right)).mT
        return self.layout.back(rows, self.shape)

    def retract(self, *raw: Tensor) -> tuple[Tensor, ...]:
        """Make the factors in use the bases; p stays."""
        left, right = (m.right_inverse(m.base @ cayley(r)) for m, r in ((self.left, raw[0]), (self.right, raw[2])))
        return left, raw[1], right

    def deviation(self, rows: Tensor) -> Tensor:
        """Singular values are within the margin."""
        over: Tensor = ((torch.linalg.svdvals(rows) - 1).abs().amax() - self.margin).clamp_min(0)
        return over
