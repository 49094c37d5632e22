"""Recoveries with branches: passport-aware normalization, sandwich normalization with statistics for each class."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from normscope.core.errors import ArgumentError
from normscope.norms.area import Batch, Instance
from normscope.norms.families.branches import by_branch
from normscope.norms.families.recoveries_condition import Sandwich
from normscope.norms.layer import Norm, Normalization, in_float
from normscope.norms.operation import Standardize
from normscope.norms.part import Traits, divide
from normscope.norms.population import Running
from normscope.norms.recovery import Affine, scaled


class PassportNorm(Normalization):
    """Passport-aware normalization: a second branch whose scale and shift follow from secret passports.

    Without passports y = BN(x) * weight + bias. With passports (s, k), activations of the layer before,
    y = BN'(x) * f(mean s) + f(mean k), means over examples and space, f(v) = B leaky_relu(A v).

    Args:
        num_features: number of channels.
        eps: added to the variance.
        momentum: weight of the newest batch in the stored statistics.
        affine: weight and bias of the branch without passports.
        reduction: f has num_features / reduction hidden units.
        published: both branches share stored statistics, as in the authors' code; else each has its own.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        reduction: int = 4,
        published: bool = False,
    ) -> None:
        """Register both branches and f."""
        super().__init__()
        self.num_features, self.eps, self.momentum, self.affine = num_features, eps, momentum, affine
        self.reduction, self.published = reduction, published
        Affine(affine, affine).install(self, num_features)
        self.public = self._branch()
        self.secret = self.public if published else self._branch()
        hidden = divide(num_features, reduction)
        inside, outside = nn.Linear(num_features, hidden, bias=False), nn.Linear(hidden, num_features, bias=False)
        self.passport = nn.Sequential(inside, nn.LeakyReLU(), outside)

    def _branch(self) -> Norm:
        return Norm(Batch(), Standardize(self.eps), None, Running(self.momentum), num_features=self.num_features)

    @property
    def traits(self) -> Traits:
        """It takes passports."""
        return Traits(crosses_batch=True, stateful=True, shift_invariant=True, scale_invariant=True, condition="other")

    def scale_and_shift(self, passports: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Return scale and shift `(C,)` of the branch with passports.

        Args:
            passports: activations of the layer before for both passports, each `(M, C, *)`.

        Returns:
            Scale, from the first, and shift, from the second.
        """
        dtype = next(self.passport.parameters()).dtype
        first, second = (Instance().split(p.to(dtype)).mean((0, 2)) for p in passports)
        return self.passport(first), self.passport(second)

    def sign_loss(self, passports: tuple[Tensor, Tensor], signature: Tensor, margin: float = 0.1) -> Tensor:
        """Return the loss that writes a signature into the signs of the scale.

        Args:
            passports: as in `scale_and_shift`.
            signature: 1 or -1 for each channel.
            margin: the scale should exceed it, with that sign.

        Returns:
            0.1 sum relu(margin - signature * scale) + 1e-5 sum scale^2.
        """
        scale, _ = self.scale_and_shift(passports)
        return 0.1 * torch.relu(margin - signature * scale).sum() + 1e-5 * scale.square().sum()

    @in_float
    def forward(self, x: Tensor, passports: tuple[Tensor, Tensor] | None = None, which: Tensor | None = None) -> Tensor:
        """Normalize.

        Args:
            x: `(N, C, *)`.
            passports: activations of the layer before for both passports, or None for the branch without.
            which: `(N,)`, True for the examples that take the branch with passports; all if not given.

        Returns:
            A tensor of the shape of x.
        """
        if passports is None:
            return self._public(x)
        if which is None:
            return self._secret(x, passports)
        return by_branch(x, which.long(), (self._public, lambda z: self._secret(z, passports)))

    def _public(self, x: Tensor) -> Tensor:
        return Affine(self.affine, self.affine).apply(self, self.public(x), x, 1, None)

    def _secret(self, x: Tensor, passports: tuple[Tensor, Tensor]) -> Tensor:
        scale, shift = self.scale_and_shift(passports)
        y: Tensor = self.secret(x)
        return scaled(y, scale, shift, 1)


class SandwichBranchNorm(Normalization):
    """Sandwich normalization with statistics for each class, between them and a class's own affine map a shared one.

    y = class_weight[c] * (weight * z + bias) + class_bias[c], z standardized over the examples of class c.

    Args:
        num_features: number of channels.
        classes: number of classes, for instance clean and adversarial examples.
        eps: added to the variance.
        momentum: weight of the newest batch in the stored statistics.
    """

    def __init__(self, num_features: int, classes: int, eps: float = 1e-5, momentum: float | None = 0.1) -> None:
        """Register the affine maps, and statistics as branches.0, branches.1, ..."""
        super().__init__()
        self.num_features, self.classes, self.eps, self.momentum = num_features, classes, eps, momentum
        self.recovery = Sandwich(classes)
        self.recovery.install(self, num_features)
        self.branches = nn.ModuleList(
            Norm(Batch(), Standardize(eps), None, Running(momentum), num_features=num_features) for _ in range(classes)
        )

    @property
    def traits(self) -> Traits:
        """It takes labels."""
        return Traits(crosses_batch=True, stateful=True, shift_invariant=True, scale_invariant=True, condition="labels")

    @in_float
    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """Normalize.

        Args:
            x: `(N, C, *)`.
            labels: `(N,)`, integers below classes.

        Returns:
            A tensor of the shape of x.

        Raises:
            ArgumentError: there are no labels, or they are no integers.
        """
        if labels is None or labels.is_floating_point():
            raise ArgumentError(f"labels={labels!r}: {self!r} needs integers (N,), one class for each example.")
        y = by_branch(x, labels, list(self.branches))
        return self.recovery.apply(self, y, x, 1, labels)
