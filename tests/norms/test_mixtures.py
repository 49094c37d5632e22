"""Methods that mix statistics: against numpy formulas, recorded numbers of another format, errors."""

import numpy as np
import pytest
import torch

from normscope.core.errors import ArgumentError
from normscope.norms.families.mixtures_switchable import sparsemax, sparsestmax
from normscope.norms.row import image
from normscope.norms.table import build
from tests.norms import references_mixtures as reference
from tests.norms.keys.key import recorded_once


@pytest.fixture
def x():
    return image(8, torch.Generator().manual_seed(3))[0]


def moved(name, **options):
    torch.manual_seed(1)
    layer = build(name, 8, dtype=torch.float64, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


def numbers(layer):
    return {name: value.detach().clone().numpy() for name, value in layer.state_dict().items()}


def close(found, expected):
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-9, atol=1e-10)


def test_mode(x):
    layer = moved("mode", modes=3)
    n = numbers(layer)
    expected, mean, square = reference.mode(x.numpy(), n["gate.weight"], n["gate.bias"], 1e-5, n["weight"], n["bias"])
    close(layer(x), expected)
    close(layer.running_mean, 0.1 * mean)
    close(layer.running_square, 0.1 * square)


def test_one_mode_and_one_component_are_batch_normalization(x):
    expected = build("batch", 8, dtype=torch.float64)(x)
    close(build("mode", 8, modes=1, dtype=torch.float64)(x), expected.detach().numpy())
    close(build("mixture", 8, components=1, dtype=torch.float64)(x), expected.detach().numpy())


def test_mixture_for_the_posteriors_it_found(x):
    layer = build("mixture", 8, components=3, dtype=torch.float64)
    points = x.transpose(0, 1).flatten(1)
    posterior = layer._fit(points - points.mean(1, keepdim=True))
    torch.testing.assert_close(posterior.sum(0), torch.ones(120, dtype=torch.float64))
    close(layer(x), reference.mixture(x.numpy(), posterior.reshape(3, 6, 4, 5).numpy(), 1e-5))


def test_mixture_finds_two_modes():
    g = torch.Generator().manual_seed(0)
    label = torch.arange(8) % 2
    x = torch.randn(8, 4, 5, 5, generator=g, dtype=torch.float64) + 6 * label.reshape(-1, 1, 1, 1)
    layer = build("mixture", 4, affine=False, momentum=1.0, dtype=torch.float64)
    y = layer(x)
    close(layer.running_share, [0.5, 0.5])
    close(layer.running_mean, np.stack([x[label == k].mean((0, 2, 3)).numpy() for k in (0, 1)]))
    assert abs(float(y[label == 0].mean())) < 1e-6
    close(layer.eval()(x), y.detach().numpy())


def test_exemplar(x):
    layer = moved("exemplar")
    n = numbers(layer)
    maps = (n["key.weight"], n["key.bias"], n["ratio.weight"], n["ratio.bias"])
    close(layer(x), reference.exemplar(x.numpy(), *maps, 1e-5, n["weight"], n["bias"]))


@pytest.mark.parametrize("batch", [True, False])
@pytest.mark.parametrize(
    ("gates", "blocks"),
    [
        ([-1, -1, -1], [[i] for i in range(8)]),
        ([1, 1, 1], [list(range(8))]),
        ([-1, 1, 1], [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ([1, -1, -1], [[0, 4], [1, 5], [2, 6], [3, 7]]),
    ],
)
def test_dynamic(x, gates, blocks, batch):
    layer = build("dynamic", 8, dtype=torch.float64)
    with torch.no_grad():
        layer.channel_gate.copy_(torch.tensor(gates))
        layer.batch_gate.fill_(1 if batch else -1)
    close(layer(x), reference.dynamic(x.numpy(), blocks, 1e-5, batch=batch))


def test_invariance_exploiting(x):
    layer = build("invariance-exploiting", 8, affine=False, dtype=torch.float64)
    close(layer(x), reference.invariant(x.numpy(), 1e-5))


def test_task_of_context_and_target():
    data = recorded_once("tasknorm_i")
    layer = build("task", 4, dtype=torch.float64)
    for name in ("weight", "bias", "a", "b"):
        layer.state_dict()[name].copy_(data[f"param_{name}"])
    close(layer(data["x_context"]), data["y_context"].numpy())
    close(layer.running_mean, data["ctx_context_batch_mean"].flatten().numpy())
    close(layer.running_var, data["ctx_context_batch_var"].flatten().numpy())
    close(layer.eval()(data["x_target"]), data["y_target"].numpy())


def test_switchable_of_layer_and_batch_without_instances():
    x = torch.randn(7, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    layer = build("switchable", 8, kinds=("layer", "batch"), dtype=torch.float64)
    mean = (x.mean(1, keepdim=True) + x.mean(0, keepdim=True)) / 2
    var = (x.var(1, keepdim=True) + x.var(0, keepdim=True)) / 2
    close(layer(x), ((x - mean) / (var + 1e-5).sqrt()).numpy())


def test_sparsestmax_grows_from_sparsemax_to_one_hot():
    z = torch.tensor([0.9, 0.7, 0.6], dtype=torch.float64)
    assert torch.equal(sparsestmax(z, 0.0), sparsemax(z))
    close(sparsemax(z), [0.5, 0.3, 0.2])
    for radius in (0.3, 0.6):
        p = sparsestmax(z, radius)
        assert float(p.sum()) == pytest.approx(1)
        assert float(p.min()) >= 0
        assert float((p - 1 / 3).norm()) == pytest.approx(radius)
    assert sparsestmax(z, 0.82).tolist() == [1, 0, 0]


def test_a_one_hot_mixture_stays(x):
    layer = build("sparse-switchable", 8, dtype=torch.float64)
    with torch.no_grad():
        layer.mean_weight.copy_(torch.tensor([3.0, 1.0, 1.0]))
    first = layer(x)
    with torch.no_grad():
        layer.mean_weight.copy_(torch.tensor([1.0, 3.0, 1.0]))
    close(layer(x), first.detach().numpy())
    assert int(layer.mean_fixed) == 1


def test_five_kinds_differ_from_the_published_weights(x):
    layers = [moved("switchable-whitening", kinds=5, groups=2, published=p) for p in (True, False)]
    outputs = [layer(x) for layer in layers]
    assert not torch.allclose(*outputs)
    with torch.no_grad():
        for layer in layers:
            layer.var_weight.fill_(1)
    close(layers[0](x), layers[1](x).detach().numpy())


def test_clipped_gate(x):
    layer = build("batch-instance", 8, dtype=torch.float64)
    with torch.no_grad():
        layer.gate.fill_(1.7)
    layer.clip()
    assert layer.gate.tolist() == [1.0] * 8
    close(layer(x), build("batch", 8, dtype=torch.float64)(x).detach().numpy())


@pytest.mark.parametrize(
    ("kind", "formula"),
    [
        ("b1", lambda x, batch, rms: x / np.maximum(batch, (x + 1) * rms)),
        ("b2", lambda x, batch, rms: x / np.maximum(batch, rms - x)),
    ],
)
def test_evonorm_of_the_batch(x, kind, formula):
    a = x.numpy()
    batch = np.sqrt(a.var((0, 2, 3), keepdims=True) + 1e-5)
    rms = np.sqrt((a**2).mean((2, 3), keepdims=True) + 1e-5)
    close(build("evonorm", 8, kind=kind, dtype=torch.float64)(x), formula(a, batch, rms))


@pytest.mark.parametrize("kind", ["s1", "s2"])
def test_evonorm_of_groups(x, kind):
    g = x.numpy().reshape(6, 4, -1)
    square = g.var(2) if kind == "s1" else (g**2).mean(2)
    scale = np.sqrt(square + 1e-5).repeat(2, 1).reshape(6, 8, 1, 1)
    expected = x.numpy() / (1 + np.exp(-x.numpy())) / scale
    close(build("evonorm", 8, kind=kind, groups=4, dtype=torch.float64)(x), expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: build("switchable", 8, kinds=("batch",)), "at least two"),
        (lambda: build("switchable", 8, kinds=("batch", "layers")), "did you mean 'layer'"),
        (lambda: build("evonorm", 8, kind="b3"), "kind='b3'"),
        (lambda: build("mode", 8, modes=0), "modes=0"),
        (lambda: build("task", 8, own="batch"), "own='batch'"),
        (lambda: build("switchable", 8)(torch.zeros(4, 8)), "1 samples"),
        (lambda: build("mode", 8)(torch.zeros(4, 7, 2)), "num_features=8"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ArgumentError, match=message):
        call()
