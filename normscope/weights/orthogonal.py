"""Methods that make rows (or columns) of the weight orthogonal, exactly or nearly."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from normscope.core.errors import ArgumentError
from normscope.norms.part import divide, positive, require
from normscope.norms.roots import newton, zca
from normscope.weights.borrowed import Borrowed
from normscope.weights.parametrization import Layout, Parametrization, RowMap, gram_deviation
from normscope.weights.spectral import check_iterations

_THIN = 8  # from so many rows a column on the smaller system of the Cayley map is the faster one


class OrthogonalGroups(RowMap):
    """Orthogonal weight normalization: w = s (Z Z^T)^(-1/2) Z with Z = v - mean(v), for each group of output units.

    A group needs fewer units than fan_in, as centering takes one dimension.

    Args:
        layout: of the weight.
        weight: example.
        groups: number of groups; None for the fewest that work.
        scale: s.
    """

    invariance = "tensor"
    tolerance = 1e-3

    def __init__(self, layout: Layout, weight: Tensor, groups: int | None = None, scale: float = 1.414) -> None:
        """Choose the groups."""
        super().__init__(layout)
        positive(scale, "scale", "the weight would vanish")
        outputs, inputs = layout.rows(weight).shape
        self.groups = fewest_groups(outputs, inputs) if groups is None else groups
        if divide(outputs, self.groups) >= inputs:
            raise ArgumentError(
                f"groups={self.groups} makes groups of {outputs // self.groups} units with a fan_in of {inputs}; a "
                "group must have fewer units than fan_in: raise groups, or name='oni' for this layer."
            )
        self.scale = scale

    def map(self, rows: Tensor) -> Tensor:
        """Center rows and orthogonalize those of each group."""
        z = (rows - rows.mean(1, keepdim=True)).reshape(self.groups, -1, rows.shape[1])
        return (self.scale * (zca(z @ z.mT) @ z)).reshape(rows.shape)

    def deviation(self, rows: Tensor) -> Tensor:
        """Rows have mean 0, and within a group they are orthogonal and of length s."""
        groups = rows.reshape(self.groups, -1, rows.shape[1]) / self.scale
        eye = torch.eye(groups.shape[1], dtype=rows.dtype, device=rows.device)
        return torch.maximum((groups @ groups.mT - eye).abs().amax(), rows.mean(1).abs().amax())


def fewest_groups(outputs: int, inputs: int) -> int:
    """Return the smallest number of equal groups of fewer than `inputs` units.

    Args:
        outputs: number of units.
        inputs: fan_in.

    Returns:
        A divisor of `outputs`.

    Raises:
        ArgumentError: a fan_in of 1 has no group.
    """
    found = next((g for g in range(1, outputs + 1) if outputs % g == 0 and outputs // g < inputs), None)
    if found is None:
        raise ArgumentError(f"a fan_in of {inputs} is too small to center and orthogonalize; choose layers with where=")
    return found


class NewtonOrthogonal(RowMap):
    """Orthogonalization by Newton's iteration: w = s B Z with B near (Z Z^T)^(-1/2), all singular values up to s.

    S = Z Z^T + eps I is divided by its Frobenius norm, and `iterations` steps are taken: the more, the nearer to
    orthogonal. With more units than fan_in the columns are orthogonalized instead.

    Args:
        layout: of the weight.
        weight: example.
        iterations: number of steps; None for 5 for a convolution and 4 else.
        scale: s; None for 1.414 for a convolution and 1 else.
        center: subtract each row's mean; None where that keeps the rank, with fewer units than fan_in.
        side: "short", or "rows" even if there are more than fan_in.
        eps: added to the diagonal of S.
    """

    invariance = "tensor"

    def __init__(
        self,
        layout: Layout,
        weight: Tensor,
        iterations: int | None = None,
        scale: float | None = None,
        center: bool | None = None,
        side: str = "short",
        eps: float = 1e-5,
    ) -> None:
        """Hold the settings."""
        super().__init__(layout)
        require(side, "side", ("short", "rows"))
        positive(eps, "eps", "a weight of zeros would be divided by zero")
        rows = layout.rows(weight)
        self.iterations = (5 if layout.conv else 4) if iterations is None else iterations
        check_iterations(self.iterations)
        self.scale = (1.414 if layout.conv else 1.0) if scale is None else scale
        self.center = rows.shape[0] < rows.shape[1] if center is None else center
        self.by_rows = side == "rows" or rows.shape[0] <= rows.shape[1]
        self.eps = eps

    def map(self, rows: Tensor) -> Tensor:
        """Multiply by the inverse root of the Gram matrix, as far as the iteration goes."""
        z = rows - rows.mean(1, keepdim=True) if self.center else rows
        gram = z @ z.mT if self.by_rows else z.mT @ z
        eye = torch.eye(gram.shape[0], dtype=rows.dtype, device=rows.device)
        root = newton(gram + self.eps * eye, self.iterations, scale="frobenius") * self.scale
        return root @ z if self.by_rows else z @ root

    def deviation(self, rows: Tensor) -> Tensor:
        """No singular value is above s, and rows have mean 0 if centered."""
        over = (torch.linalg.matrix_norm(rows, 2) - self.scale).clamp_min(0)
        return torch.maximum(over, rows.mean(1).abs().amax()) if self.center else over


def cayley(x: Tensor) -> Tensor:
    """Return the first k columns of the Cayley map (I - A / 2)^-1 (I + A / 2).

    A = L E^T - E L^T with L the lower triangle of x and E the first k columns of I. A has rank 2k at most: with k much
    below n, Woodbury's formula leaves a system of size 2k instead of n.

    Args:
        x: `(n, k)`, k <= n; what is on and above the diagonal is not used.

    Returns:
        `(n, k)`, with orthonormal columns.
    """
    n, k = x.shape
    low = x.tril(-1)
    if k * _THIN > n:
        wide = nn.functional.pad(low, (0, n - k)) if k < n else low
        # the transpose of I + A / 2 is I - A / 2, already in the order that the solver wants
        plus = torch.add(torch.eye(n, dtype=x.dtype, device=x.device), wide - wide.mT, alpha=0.5)
        solved: Tensor = torch.linalg.solve(plus.mT, plus[:, :k])
        return solved
    e = torch.eye(n, k, dtype=x.dtype, device=x.device)
    left, right = torch.cat([low, -e], 1), torch.cat([e, low], 1)  # A = left right^T
    eye = torch.eye(2 * k, dtype=x.dtype, device=x.device)
    found: Tensor = e + left @ torch.linalg.solve(torch.add(eye, right.mT @ left, alpha=-0.5), right[:k].mT)
    return found


class LieOrthogonal(Borrowed):
    """Orthogonal weights of torch: w = base q(A), A skew, q the exponential, the Cayley map or Householder reflections.

    Raw tensor and base are torch's, so that states fit both; the Cayley map is `cayley`. The weight is orthogonalized
    when applied. `retract` makes the weight in use the base and A zero, which dynamic trivialization does every few
    hundred steps.

    Args:
        layout: of the weight.
        weight: example.
        kind: "matrix_exp", "cayley" or "householder".
        trivialize: keep the orthogonalized weight as a base; False only with householder, which reaches it without one.
    """

    def __init__(self, layout: Layout, weight: Tensor, kind: str, trivialize: bool = True) -> None:
        """Take torch's."""
        require(kind, "kind", ("matrix_exp", "cayley", "householder"))
        if not trivialize and kind != "householder":
            raise ArgumentError(f"trivialize=False: {kind} has no inverse without a base; only householder has.")
        super().__init__(
            layout, weight, parametrizations.orthogonal, orthogonal_map=kind, use_trivialization=trivialize
        )
        self.trivialize, self.cayley = trivialize, kind == "cayley"

    def map(self, rows: Tensor) -> Tensor:
        """Return the matrix in use."""
        if not self.cayley:
            return super().map(rows)
        tall = rows.shape[0] >= rows.shape[1]
        columns: Tensor = self.inner.base @ cayley(rows if tall else rows.mT)
        return columns if tall else columns.mT

    def retract(self, *raw: Tensor) -> tuple[Tensor, ...] | None:
        """Make the weight in use the base."""
        return (self.right_inverse(self.forward(*raw)),) if self.trivialize else None

    def deviation(self, rows: Tensor) -> Tensor:
        """Rows, or columns if they are fewer, are orthonormal."""
        return gram_deviation(rows)


class Parseval(Parametrization):
    """Parseval weights: `retract` moves the raw weight towards a tight frame, W <- (1 + b) W - b W W^T W.

    The weight in use is W, for a convolution divided by the root of the number of its taps, which makes the operator on
    the whole map tight.

    Args:
        layout: of the weight.
        weight: example.
        beta: b.
        divided: whether convolutions are divided.
    """

    tolerance = 0.1

    def __init__(self, layout: Layout, weight: Tensor, beta: float = 3e-4, divided: bool = True) -> None:
        """Hold the settings."""
        super().__init__(layout)
        positive(beta, "beta", "the weight would never move")
        self.beta, self.size = beta, layout.kernel**0.5 if divided else 1.0

    def forward(self, raw: Tensor) -> Tensor:
        """Return the weight in use."""
        return raw if self.size == 1 else raw / self.size

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return the raw weight."""
        return weight if self.size == 1 else weight * self.size

    def retract(self, *raw: Tensor) -> tuple[Tensor, ...]:
        """Take one step of the retraction."""
        rows = self.layout.rows(raw[0])
        moved = (1 + self.beta) * rows - self.beta * (rows @ rows.mT @ rows)
        return (self.layout.back(moved, raw[0].shape),)

    def deviation(self, rows: Tensor) -> Tensor:
        """Rows, or columns if they are fewer, are orthonormal before the division."""
        return gram_deviation(rows * self.size)


class BoundedSingularValues(Parametrization):
    """Singular value bounding: `retract` clips the singular values of W to [1 / (1 + eps), 1 + eps].

    Published once an epoch. Applied, the weight is made orthogonal, as published for the start.

    Args:
        layout: of the weight.
        weight: example.
        eps: how far singular values may go.
        orthogonalize: make the weight orthogonal when applied; False clips its singular values.
    """

    def __init__(self, layout: Layout, weight: Tensor, eps: float = 0.05, orthogonalize: bool = True) -> None:
        """Hold the bounds."""
        super().__init__(layout)
        positive(eps, "eps", "the weight could not move")
        self.bounds, self.orthogonalize = (1 / (1 + eps), 1 + eps), orthogonalize
        self.applied = False

    def forward(self, raw: Tensor) -> Tensor:
        """Return the weight as it is."""
        return raw

    def _clipped(self, weight: Tensor, low: float, high: float) -> Tensor:
        u, s, vh = torch.linalg.svd(self.layout.rows(weight), full_matrices=False)
        return self.layout.back((u * s.clamp(low, high)) @ vh, weight.shape)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return the nearest weight within the bounds; the first time an orthogonal one."""
        first, self.applied = not self.applied, True
        return self._clipped(weight, *((1.0, 1.0) if first and self.orthogonalize else self.bounds))

    def retract(self, *raw: Tensor) -> tuple[Tensor, ...]:
        """Clip the singular values."""
        return (self._clipped(raw[0], *self.bounds),)

    def deviation(self, rows: Tensor) -> Tensor:
        """No singular value is out of bounds."""
        s = torch.linalg.svdvals(rows)
        return torch.maximum(self.bounds[0] - s.amin(), s.amax() - self.bounds[1]).clamp_min(0)


class Isometric(Parametrization):
    """Isometric weights: a convolution starts as the identity (Dirac) and a penalty keeps it near an isometry.

    The weight in use is the raw weight; the penalty is `regularizer("isometric")`, the activation `ShiftedReLU`.

    Args:
        layout: of the weight.
        weight: example.
        initialize: start from the identity; False keeps the weight.
    """

    def __init__(self, layout: Layout, weight: Tensor, initialize: bool = True) -> None:
        """Hold the settings."""
        super().__init__(layout)
        self.initialize = initialize and weight.ndim > 2 and set(weight.shape[2:]) != {7}
        self.applied = False

    def forward(self, raw: Tensor) -> Tensor:
        """Return the weight as it is."""
        return raw

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return the weight; the first time the identity, for a kernel that is not 7 x 7."""
        first, self.applied = not self.applied, True
        if first and self.initialize:
            return nn.init.dirac_(torch.empty_like(weight), self.layout.groups)
        return weight

    @torch.no_grad()
    def in_manifold(self, weight: Tensor, tol: float | None = None) -> bool:
        """Tell whether the kernel's correlation with itself is the identity, on the side with fewer channels.

        Args:
            weight: the kernel.
            tol: the largest entry that may be left; None for `tolerance`.

        Returns:
            True for an isometry.
        """
        errors = [self_correlation_error(k).abs().amax() for k in self.layout.kernels(weight)]
        return bool(torch.stack(errors).amax() <= (self.tolerance if tol is None else tol))


def self_correlation_error(kernel: Tensor, stride: int = 1, padding: int | None = None) -> Tensor:
    """Return conv(K, K) - I0: how far a convolution is from an isometry, on the side with fewer channels.

    Args:
        kernel: `(out, in, *)`; transposed if there are more outputs than inputs.
        stride: of the correlation.
        padding: of the correlation; None for the kernel's size - 1.

    Returns:
        `(c, c, *)`, I0 being the identity at the middle tap.
    """
    k = kernel.transpose(0, 1) if kernel.shape[0] > kernel.shape[1] else kernel
    return correlation(k, stride, padding)


def correlation(kernel: Tensor, stride: int = 1, padding: int | None = None) -> Tensor:
    """Return conv(K, K) - I0 over the outputs of a kernel; see `self_correlation_error`."""
    spatial = kernel.ndim - 2
    convolve = (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)[spatial - 1]
    pad = [size - 1 for size in kernel.shape[2:]] if padding is None else [padding] * spatial
    found = convolve(kernel, kernel, stride=[stride] * spatial, padding=pad)
    target = torch.zeros_like(found)
    middle = sum(size // 2 * stride for size, stride in zip(found.shape[2:], target[0, 0].stride(), strict=True))
    target.flatten(2)[..., middle] = torch.eye(len(found), dtype=found.dtype, device=found.device)
    return found - target
