"""Normalization of the nodes `(nodes, C)` of one graph or of a batch of graphs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from normscope.core.errors import ArgumentError
from normscope.norms.affine import scale_shift
from normscope.norms.area import Batch
from normscope.norms.families.mixtures_base import ChannelNorm
from normscope.norms.layer import Norm, Normalization, in_float
from normscope.norms.operation import Standardize
from normscope.norms.part import Traits, positive, require
from normscope.norms.population import Running
from normscope.norms.recovery import Affine


def assignment(x: Tensor, graph: Tensor | None) -> tuple[Tensor, int]:
    """Return the graph of each node and the number of graphs.

    Args:
        x: `(nodes, C)`.
        graph: index of the graph of each node `(nodes,)`, None for one graph.

    Returns:
        The indices, and one more than the largest.

    Raises:
        ArgumentError: the shapes do not fit.
    """
    if x.ndim != 2:
        raise ArgumentError(f"x has shape {tuple(x.shape)}; expected nodes and channels, (nodes, C).")
    if graph is None:
        return torch.zeros(len(x), dtype=torch.long, device=x.device), 1
    if graph.shape != x.shape[:1]:
        raise ArgumentError(f"graph has shape {tuple(graph.shape)}; expected an index for each of {len(x)} nodes.")
    return graph.long(), int(graph.max()) + 1 if len(x) else 1


def averaged(x: Tensor, graph: Tensor, graphs: int) -> Tensor:
    """Average over the nodes of each graph: `(graphs, C)`."""
    total = x.new_zeros(graphs, *x.shape[1:]).index_add(0, graph, x)
    count = x.new_zeros(graphs).index_add(0, graph, torch.ones_like(graph, dtype=x.dtype)).clamp_min(1)
    return total / count.reshape(-1, *(1,) * (x.ndim - 1))


class GraphNorm(ChannelNorm):
    """GraphNorm: each channel over the nodes of a graph, with a learned part of the mean.

    s = x - mean_scale mean; y = weight s / sqrt(E[s^2] + eps) + bias.

    Args:
        num_features: number of channels.
        eps: added to E[s^2].
        affine: weight and bias for each channel.
        learned: the part of the mean that is removed is learned; False to remove all of it (instance normalization).
    """

    mean_scale: nn.Parameter | None

    def __init__(self, num_features: int, eps: float = 1e-6, affine: bool = True, learned: bool = True) -> None:
        """Register weight, bias and mean_scale."""
        super().__init__(num_features, eps, affine)
        self.learned = learned
        self.register_parameter("mean_scale", nn.Parameter(torch.ones(num_features)) if learned else None)

    @property
    def traits(self) -> Traits:
        """Nodes of a graph share statistics, graphs do not."""
        return Traits(scale_invariant=True, shift_invariant=not self.learned, ranks=(2,), condition="graph")

    @in_float
    def forward(self, x: Tensor, graph: Tensor | None = None) -> Tensor:
        """Normalize nodes `(nodes, C)` whose graphs have the indices `(nodes,)`."""
        index, graphs = assignment(x, graph)
        mean = averaged(x, index, graphs)
        s = x - (mean if self.mean_scale is None else mean * self.mean_scale)[index]
        square = averaged(s.square(), index, graphs)
        return self.recover(s * (square + self.eps).rsqrt()[index], x)


class GraphLayerNorm(ChannelNorm):
    """Layer normalization of a graph: all channels of all its nodes share mean and variance.

    Args:
        num_features: number of channels.
        eps: added to the variance.
        affine: weight and bias for each channel.
    """

    def __init__(self, num_features: int, eps: float = 1e-5, affine: bool = True) -> None:
        """Register weight and bias."""
        super().__init__(num_features, eps, affine)

    @property
    def traits(self) -> Traits:
        """Nodes of a graph share statistics, graphs do not."""
        return Traits(scale_invariant=True, shift_invariant=True, ranks=(2,), condition="graph")

    @in_float
    def forward(self, x: Tensor, graph: Tensor | None = None) -> Tensor:
        """Normalize nodes `(nodes, C)` whose graphs have the indices `(nodes,)`."""
        index, graphs = assignment(x, graph)
        s = x - averaged(x.mean(1, keepdim=True), index, graphs)[index]
        var = averaged(s.square().mean(1, keepdim=True), index, graphs)
        return self.recover(s * (var + self.eps).rsqrt()[index], x)


class MeanSubtraction(Normalization):
    """Subtract the mean of each graph's nodes.

    Args:
        num_features: number of channels.
    """

    def __init__(self, num_features: int) -> None:
        """Keep the number of channels."""
        super().__init__()
        self.num_features = num_features

    @property
    def traits(self) -> Traits:
        """Nodes of a graph share their mean, graphs do not."""
        return Traits(shift_invariant=True, ranks=(2,), condition="graph")

    @in_float
    def forward(self, x: Tensor, graph: Tensor | None = None) -> Tensor:
        """Center nodes `(nodes, C)` whose graphs have the indices `(nodes,)`."""
        index, graphs = assignment(x, graph)
        return x - averaged(x, index, graphs)[index]


class PairNorm(Normalization):
    """PairNorm: nodes are centered and scaled so that the total distance of all pairs stays constant.

    s = x - mean; "whole": y = scale s / sqrt(eps + mean of |s|^2 over the nodes); "individual": y = scale s / sqrt(eps
    + |s|^2); "center-last": y = scale x / sqrt(eps + |x|^2) - mean, the mean of the input.

    Args:
        num_features: number of channels.
        mode: "whole", "individual" or "center-last".
        scale: size of the result.
        eps: added to squared lengths.
    """

    def __init__(self, num_features: int, mode: str = "whole", scale: float = 1.0, eps: float = 1e-6) -> None:
        """Keep the settings."""
        super().__init__()
        positive(eps, "eps")
        require(mode, "mode", ("whole", "individual", "center-last"))
        self.num_features, self.mode, self.scale, self.eps = num_features, mode, scale, eps

    @property
    def traits(self) -> Traits:
        """Nodes of a graph share statistics, graphs do not."""
        last = self.mode == "center-last"
        return Traits(scale_invariant=not last, shift_invariant=not last, ranks=(2,), condition="graph")

    @in_float
    def forward(self, x: Tensor, graph: Tensor | None = None) -> Tensor:
        """Normalize nodes `(nodes, C)` whose graphs have the indices `(nodes,)`."""
        index, graphs = assignment(x, graph)
        mean = averaged(x, index, graphs)[index]
        s = x if self.mode == "center-last" else x - mean
        length = s.square().sum(1, keepdim=True)
        if self.mode == "whole":
            length = averaged(length, index, graphs)[index]
        y = self.scale * s * (length + self.eps).rsqrt()
        return y - mean if self.mode == "center-last" else y


class DifferentiableGroupNorm(Normalization):
    """Differentiable group normalization: nodes are softly clustered, each cluster is batch normalized.

    y = x + skip sum_g BN_g(s_g x), s = softmax(linear(x)) over the groups.

    Args:
        num_features: number of channels.
        groups: number of clusters.
        skip: weight of the normalized sum.
        eps: added to the variance.
        momentum: weight of the newest batch, None for a plain average.
        affine: weight and bias for each channel and cluster.
    """

    def __init__(
        self,
        num_features: int,
        groups: int = 10,
        skip: float = 0.005,
        eps: float = 1e-5,
        momentum: float | None = 0.3,
        affine: bool = True,
    ) -> None:
        """Make the linear map and the batch normalization of all clusters."""
        super().__init__()
        self.num_features, self.groups, self.skip, self.eps = num_features, groups, skip, eps
        self.momentum, self.affine = momentum, affine
        self.assign = nn.Linear(num_features, groups)
        recovery = Affine() if affine else None
        self.batch = Norm(Batch(), Standardize(eps), recovery, Running(momentum), num_features=groups * num_features)

    @property
    def traits(self) -> Traits:
        """All nodes share statistics; the input itself is part of the output."""
        return Traits(crosses_batch=True, stateful=True, ranks=(2,))

    @in_float
    def forward(self, x: Tensor) -> Tensor:
        """Normalize nodes `(nodes, C)`."""
        assignment(x, None)
        part = self.assign(x).softmax(1)
        clusters = (part.unsqueeze(2) * x.unsqueeze(1)).flatten(1)
        y: Tensor = self.batch(clusters).reshape(len(x), self.groups, -1).sum(1)
        return x + self.skip * y


class GraphCombinationNorm(Normalization):
    """Learned graph normalization: a mixture of normalizations over node, neighborhood, graph and batch.

    y = weight sum_k p_k y_k + bias, p softmax for each channel: y_1 over the channels of a node, y_2 by mean and
    variance of all channels of a node and its neighbors, y_3 each channel over the nodes of a graph, y_4 over all
    nodes.

    Args:
        num_features: number of channels.
        eps: added to the variances.
        momentum: weight of the newest batch, None for a plain average.
        affine: weight and bias for each channel.
    """

    mix: nn.Parameter

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float | None = 0.1, affine: bool = True) -> None:
        """Register weight, bias, the mixture `(4, C)` and the batch normalization."""
        super().__init__()
        positive(eps, "eps")
        self.num_features, self.eps, self.momentum, self.affine = num_features, eps, momentum, affine
        Affine(affine, affine).install(self, num_features)
        self.mix = nn.Parameter(torch.zeros(4, num_features))
        self.batch = Norm(Batch(), Standardize(eps), None, Running(momentum), num_features=num_features)

    @property
    def traits(self) -> Traits:
        """Those of batch normalization."""
        return Traits(
            crosses_batch=True,
            stateful=True,
            shift_invariant=True,
            scale_invariant=True,
            ranks=(2,),
            condition="graph",
        )

    @in_float
    def forward(self, x: Tensor, graph: Tensor | None = None, edges: Tensor | None = None) -> Tensor:
        """Normalize.

        Args:
            x: nodes `(nodes, C)`.
            graph: index of the graph of each node `(nodes,)`, None for one graph.
            edges: from and to `(2, edges)`; without them a node has itself for its only neighbor.

        Returns:
            A tensor of the shape of x.
        """
        index, graphs = assignment(x, graph)
        node = self._scaled(x - x.mean(1, keepdim=True), None)
        s = x - averaged(x, index, graphs)[index]
        whole = s * (averaged(s.square(), index, graphs) + self.eps).rsqrt()[index]
        found = torch.stack([node, self._neighborhood(x, edges), whole, self.batch(x)])
        y = (self.mix.softmax(0).unsqueeze(1) * found).sum(0)
        return Affine(self.affine, self.affine).apply(self, y, x, 1, None)

    def _scaled(self, s: Tensor, var: Tensor | None) -> Tensor:
        spread = s.square().mean(1, keepdim=True) if var is None else var
        return s * (spread + self.eps).rsqrt()

    def _neighborhood(self, x: Tensor, edges: Tensor | None) -> Tensor:
        own = torch.arange(len(x), device=x.device)
        start, end = (own, own) if edges is None else (torch.cat([e.long(), own]) for e in edges)
        mean = averaged(x.mean(1, keepdim=True)[start], end, len(x))
        spread = (x[start] - mean[end]).square().mean(1, keepdim=True)
        return self._scaled(x - mean, averaged(spread, end, len(x)))


class AttentiveContextNorm(ChannelNorm):
    """Attentive context normalization: each channel over a set of points, weighted by how much a point counts.

    w = exp(l) sigmoid(g) / sum, l and g linear in the point; y = (x - E_w[x]) / sqrt(V_w[x] + eps), then scale and
    shift.

    Args:
        num_features: number of channels.
        eps: added to the variance.
        affine: weight and bias for each channel.
    """

    def __init__(self, num_features: int, eps: float = 1e-3, affine: bool = False) -> None:
        """Register weight, bias and the two linear maps."""
        super().__init__(num_features, eps, affine)
        self.attention = nn.Linear(num_features, 2)

    @property
    def traits(self) -> Traits:
        """The attention sees shift and scale."""
        return Traits(ranks=(3, 4, 5))

    def weights(self, x: Tensor) -> Tensor:
        """Return the weight of each point `(N, K)`; those of a set add up to 1."""
        weight, bias = self.attention.weight.expand(len(x), -1, -1), self.attention.bias.unsqueeze(1)
        local, share = torch.baddbmm(bias, weight, x.flatten(2)).unbind(1)
        logits = local + nn.functional.logsigmoid(share)
        found: Tensor = logits.softmax(1)
        return found

    @in_float
    def forward(self, x: Tensor) -> Tensor:
        """Normalize sets of points `(N, C, K)`, or maps `(N, C, *)`."""
        Batch().axis(x, self.num_features)
        z = x.flatten(2) if x.ndim > 2 else x.unsqueeze(2)
        w = self.weights(z).unsqueeze(1)
        mean = (w * z).sum(2)
        factor = ((w * (z - mean.unsqueeze(2)).square()).sum(2) + self.eps).rsqrt()
        return self.recover(scale_shift(z, factor, -mean * factor).reshape(x.shape), x)
