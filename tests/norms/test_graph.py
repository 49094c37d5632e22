"""Graphs, sets of points and manifolds: against numpy formulas and recorded numbers, invariances, errors."""

import numpy as np
import pytest
import torch

from normscope.core.errors import ArgumentError
from normscope.norms.families.graph_manifold import geodesic, power
from normscope.norms.table import build
from tests.norms.keys.key import recorded_once

GRAPH = torch.tensor([0] * 3 + [1] * 5 + [2] * 4)
EDGES = torch.tensor([[0, 1, 1, 2, 4, 5, 9], [1, 0, 2, 1, 5, 4, 10]])


@pytest.fixture
def x():
    return torch.randn(12, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64) + 1


@pytest.fixture
def matrices():
    root = torch.randn(6, 4, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return root @ root.mT / 4


def close(found, expected, rtol=1e-9):
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=rtol, atol=1e-11)


def made(name, size=8, **options):
    torch.manual_seed(0)
    return build(name, size, dtype=torch.float64, **options)


ROWS = ("graph", "graph-instance", "graph-layer", "mean-subtraction", "pair")


@pytest.mark.parametrize("name", ROWS)
def test_graphs_do_not_see_each_other_and_order_does_not_matter(x, name):
    layer = made(name)
    y = layer(x, GRAPH)
    for g in range(3):
        close(y[g == GRAPH], layer(x[g == GRAPH]).detach().numpy())
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    close(layer(x[order], GRAPH[order]), y[order].detach().numpy())


def test_pairs_keep_their_total_distance(x):
    for scale in (1.0, 3.0):
        y = made("pair", scale=scale)(x)
        distances = torch.cdist(y, y).square().sum() / len(x) ** 2
        assert float(distances) == pytest.approx(2 * scale**2, rel=1e-5)


def test_pair_of_another_repository():
    data = recorded_once("pairnorm_dgnrepo")
    close(made("pair", 4)(data["x"]), data["y"].numpy())


def combination(a, mix, eps=1e-5):
    node = (a - a.mean(1, keepdims=True)) / np.sqrt(a.var(1, keepdims=True) + eps)
    near, whole = np.empty_like(a), np.empty_like(a)
    for i in range(len(a)):
        own = a[[i, *EDGES[0][EDGES[1] == i].tolist()]]
        near[i] = (a[i] - own.mean()) / np.sqrt(own.var() + eps)
        part = a[(GRAPH[i] == GRAPH).numpy()]
        whole[i] = (a[i] - part.mean(0)) / np.sqrt(part.var(0) + eps)
    batch = (a - a.mean(0)) / np.sqrt(a.var(0) + eps)
    weights = np.exp(mix) / np.exp(mix).sum(0)
    return sum(w * y for w, y in zip(weights, (node, near, whole, batch), strict=True))


def test_graph_combination(x):
    layer = made("graph-combination")
    with torch.no_grad():
        layer.mix.copy_(torch.randn(4, 8))
    close(layer(x, GRAPH, EDGES), combination(x.numpy(), layer.mix.detach().numpy()))


def test_context_and_attentive_context():
    x = torch.randn(3, 8, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a = x.numpy()
    plain = (a - a.mean(2, keepdims=True)) / np.sqrt(a.var(2, keepdims=True) + 1e-3)
    close(made("context")(x), plain)
    layer = made("attentive-context")
    n = {k: v.numpy() for k, v in layer.state_dict().items()}
    local, share = np.moveaxis(np.einsum("kc,ncl->nkl", n["attention.weight"], a) + n["attention.bias"][:, None], 1, 0)
    w = np.exp(local) / (1 + np.exp(-share))
    w = (w / w.sum(1, keepdims=True))[:, None]
    mean = (w * a).sum(2, keepdims=True)
    var = (w * (a - mean) ** 2).sum(2, keepdims=True)
    close(layer(x), (a - mean) / np.sqrt(var + 1e-3))
    with torch.no_grad():
        layer.attention.weight.zero_()
    close(layer(x), plain)


def root(m, exponent):
    values, vectors = np.linalg.eigh(m)
    return (vectors * values**exponent) @ vectors.T


def karcher(stack):
    mean = stack.mean(0)
    half, inverse = root(mean, 0.5), root(mean, -0.5)
    logs = []
    for m in stack:
        values, vectors = np.linalg.eigh(inverse @ m @ inverse)
        logs.append((vectors * np.log(values)) @ vectors.T)
    values, vectors = np.linalg.eigh(np.mean(logs, 0))
    return half @ ((vectors * np.exp(values)) @ vectors.T) @ half


def test_spd_batch(matrices):
    layer, stack = made("spd-batch", 4), matrices.numpy()
    w = np.diag([1.0, 2.0, 3.0, 4.0]) + 0.3
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(w))
    mean = karcher(stack)
    move = root(w, 0.5) @ root(mean, -0.5)
    close(layer(matrices), move @ stack @ move.T)
    close(layer.running_mean, root(mean, 0.1))
    move = root(w, 0.5) @ root(root(mean, 0.1), -0.5)
    close(layer.eval()(matrices), move @ stack @ move.T)


def test_spd_mean_after_many_steps_is_the_weight(matrices):
    y = made("spd-batch", 4, steps=20)(matrices).detach()
    whitened = [np.linalg.eigh(m) for m in y.numpy()]
    logs = sum((vectors * np.log(values)) @ vectors.T for values, vectors in whitened)
    np.testing.assert_allclose(logs, 0, atol=1e-9)


def test_geodesic(matrices):
    a, b = matrices[:2]
    close(geodesic(a, b, 0.0), a.numpy())
    close(geodesic(a, b, 1.0), b.numpy(), 1e-8)
    close(geodesic(a, b, 0.3), geodesic(b, a, 0.7).numpy(), 1e-8)
    close(power(a, 0.5) @ power(a, 0.5), a.numpy())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: made("graph")(torch.zeros(3, 8, 2).double()), "nodes and channels"),
        (lambda: made("graph")(torch.zeros(3, 8).double(), torch.zeros(2)), "graph has shape"),
        (lambda: made("pair", mode="last"), "mode='last'"),
        (lambda: made("spd-batch")(torch.zeros(3, 8, 8).double()), "not positive definite"),
        (lambda: made("spd-batch")(torch.zeros(3, 4, 4).double()), "expected symmetric matrices"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ArgumentError, match=message):
        call()
