"""Inverse square roots of covariance matrices, differentiable twice and finite for repeated eigenvalues."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]  # torch exports it without saying so

from normscope.core.errors import ArgumentError


def symmetric(m: Tensor) -> Tensor:
    """Return the symmetric part of matrices `[..., d, d]`."""
    return (m + m.mT) / 2


def zca(sigma: Tensor) -> Tensor:
    """Return Sigma^(-1/2) = U L^(-1/2) U^T.

    The gradient solves a Lyapunov equation in the root, which needs no differences of eigenvalues, so that repeated
    eigenvalues are no special case.

    Args:
        sigma: positive definite matrices `[..., d, d]`.

    Returns:
        The symmetric inverse roots, of the same shape.
    """
    return _inverse_root(symmetric(sigma))[0]


def pca(sigma: Tensor) -> Tensor:
    """Return L^(-1/2) U^T, rows by falling eigenvalue, the largest entry of each row positive.

    A basis of a repeated eigenvalue is arbitrary: the gradient treats it as fixed, so it stays finite.

    Args:
        sigma: positive definite matrices `[..., d, d]`.

    Returns:
        Whitening matrices of the same shape.
    """
    values, vectors = _eigh(symmetric(sigma))
    values, vectors = values.flip(-1), vectors.flip(-1)
    largest = vectors.detach().abs().argmax(-2, keepdim=True)
    sign = torch.where(vectors.detach().gather(-2, largest) < 0, -1.0, 1.0).to(vectors.dtype)
    root: Tensor = ((vectors * sign) * values.unsqueeze(-2).rsqrt()).mT
    return root


def cholesky(sigma: Tensor) -> Tensor:
    """Return the inverse of the lower Cholesky factor.

    Args:
        sigma: positive definite matrices `[..., d, d]`.

    Returns:
        Lower triangular whitening matrices of the same shape.

    Raises:
        ArgumentError: a matrix is not positive definite.
    """
    try:
        lower = torch.linalg.cholesky(symmetric(sigma))
    except LinAlgError as error:
        raise ArgumentError(
            "the covariance is not positive definite (too few samples for the features, or NaN in the input); "
            "raise eps, use smaller groups or a larger batch."
        ) from error
    eye = torch.eye(sigma.shape[-1], dtype=sigma.dtype, device=sigma.device)
    root: Tensor = torch.linalg.solve_triangular(lower, eye.expand_as(lower), upper=False)
    return root


def newton(sigma: Tensor, iterations: int = 5, *, coupled: bool = True, scale: str = "trace") -> Tensor:
    """Approximate Sigma^(-1/2) by Newton's iteration on Sigma / scale.

    Coupled (Newton-Schulz): Y = S, Z = I; T = (3I - ZY) / 2, Y <- YT, Z <- TZ: stable for any number of iterations.
    Uncoupled, as published with T = 5: P <- (3P - P^3 S) / 2: the same numbers until it diverges past convergence.

    Args:
        sigma: positive definite matrices `[..., d, d]`.
        iterations: T.
        coupled: which form.
        scale: "trace" or "frobenius", what Sigma is divided by so that the iteration converges.

    Returns:
        Whitening matrices of the same shape; see `residual` for how far they whiten.
    """
    size = sigma.diagonal(dim1=-2, dim2=-1).sum(-1) if scale == "trace" else frobenius(sigma)
    size = size.clamp_min(torch.finfo(sigma.dtype).tiny ** 0.5)[..., None, None]
    eye = torch.eye(sigma.shape[-1], dtype=sigma.dtype, device=sigma.device)
    s = (sigma / size).reshape(-1, *sigma.shape[-2:])
    root = _coupled(s, eye, iterations) if coupled else _uncoupled(s, eye, iterations)
    return root.reshape(sigma.shape) * size.rsqrt()


def _coupled(y: Tensor, eye: Tensor, iterations: int) -> Tensor:
    z, three = eye.expand_as(y), (1.5 * eye).expand_as(y)
    for step in range(iterations):
        # z is the identity at first; y is not needed at the end
        t = torch.baddbmm(three, z, y, alpha=-0.5) if step else three - 0.5 * y
        z = torch.bmm(t, z) if step else t
        y = torch.bmm(y, t) if step < iterations - 1 else y
    return z


def _uncoupled(s: Tensor, eye: Tensor, iterations: int) -> Tensor:
    p = eye.expand_as(s)
    for _ in range(iterations):
        p = torch.baddbmm(1.5 * p, torch.bmm(torch.bmm(p, p), p), s, alpha=-0.5)
    return p


def frobenius(m: Tensor) -> Tensor:
    """Return the Frobenius norm of matrices `[..., d, d]`, with a finite gradient at zero."""
    tiny = torch.finfo(m.dtype).tiny
    return m.square().sum((-2, -1)).clamp_min(tiny).sqrt()


def residual(sigma: Tensor, root: Tensor) -> Tensor:
    """Return how far a matrix is from whitening: the Frobenius norm of W Sigma W^T - I.

    Args:
        sigma: covariances `[..., d, d]`.
        root: whitening matrices of the same shape.

    Returns:
        `[...]`.
    """
    eye = torch.eye(sigma.shape[-1], dtype=sigma.dtype, device=sigma.device)
    distance: Tensor = torch.linalg.matrix_norm(root @ sigma @ root.mT - eye)
    return distance


def _checked_eigh(sigma: Tensor) -> tuple[Tensor, Tensor]:
    try:
        values, vectors = torch.linalg.eigh(sigma)
    except LinAlgError as error:
        raise ArgumentError("the covariance has no eigenvalues: the input holds NaN or infinity.") from error
    # an eigenvalue below round-off of the largest is noise, possibly negative
    limits = torch.finfo(values.dtype)
    return torch.maximum(values, limits.eps * values[..., -1:] + limits.tiny), vectors


class _InverseRoot(torch.autograd.Function):
    """W = Sigma^(-1/2), with its eigenvalues and eigenvectors as constants."""

    @staticmethod
    def forward(ctx: Any, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        values, vectors = _checked_eigh(sigma)
        values = values.rsqrt()
        root = (vectors * values.unsqueeze(-2)) @ vectors.mT
        ctx.save_for_backward(root, values, vectors)
        ctx.mark_non_differentiable(values, vectors)
        return root, values, vectors

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> Tensor:
        root, values, vectors = ctx.saved_tensors
        squared = root @ root
        solution: Tensor = _lyapunov(root, squared @ symmetric(grad) @ squared, values, vectors)
        return -solution


class _Lyapunov(torch.autograd.Function):
    """X that solves W X + X W = G for symmetric W and G, by the eigenvalues and eigenvectors of W."""

    @staticmethod
    def forward(ctx: Any, root: Tensor, right: Tensor, values: Tensor, vectors: Tensor) -> Tensor:
        inner = (vectors.mT @ right @ vectors) / (values.unsqueeze(-1) + values.unsqueeze(-2))
        solution: Tensor = vectors @ inner @ vectors.mT
        ctx.save_for_backward(root, values, vectors, solution)
        return solution

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        root, values, vectors, solution = ctx.saved_tensors
        right: Tensor = _lyapunov(root, symmetric(grad), values, vectors)
        return -symmetric(right @ solution + solution @ right), right, None, None


class _Eigh(torch.autograd.Function):
    """Eigenvalues and eigenvectors whose gradient leaves out the rotations within a repeated eigenvalue."""

    @staticmethod
    def forward(ctx: Any, sigma: Tensor) -> tuple[Tensor, Tensor]:
        values, vectors = _checked_eigh(sigma)
        ctx.save_for_backward(values, vectors)
        return values, vectors

    @staticmethod
    def backward(ctx: Any, grad_values: Tensor, grad_vectors: Tensor) -> Tensor:
        values, vectors = ctx.saved_tensors
        gap = values.unsqueeze(-2) - values.unsqueeze(-1)
        limit = torch.finfo(values.dtype).eps * values.shape[-1] * values.amax(-1)[..., None, None]
        apart = gap.abs() > limit
        inverse = torch.where(apart, torch.where(apart, gap, 1.0).reciprocal(), 0.0)
        inner = torch.diag_embed(grad_values) + inverse * (vectors.mT @ grad_vectors)
        return symmetric(vectors @ inner @ vectors.mT)


_inverse_root: Callable[..., tuple[Tensor, Tensor, Tensor]] = _InverseRoot.apply
_lyapunov: Callable[..., Tensor] = _Lyapunov.apply
_eigh: Callable[..., tuple[Tensor, Tensor]] = _Eigh.apply
