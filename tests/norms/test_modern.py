"""Methods of later years: formulas in numpy, initial values, error messages."""

import math

import numpy as np
import pytest
import torch
from scipy.special import erf

from normscope.core.errors import ArgumentError
from normscope.norms.table import build

torch.set_num_threads(1)


def close(found, expected, rtol=1e-10):
    expected = torch.as_tensor(np.asarray(expected))
    atol = rtol * float(expected.abs().max())
    torch.testing.assert_close(found.detach().reshape(expected.shape), expected, rtol=0, atol=atol)


def made(name, num_features=8, **options):
    torch.manual_seed(0)
    layer = build(name, num_features, **options).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer, {name: value.detach().numpy() for name, value in layer.named_parameters()}


def tokens(seed=1):
    return torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 + 1


def images(seed=1):
    return torch.randn(4, 8, 3, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 + 1


def layer_normalized(x, eps):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)


def rms_normalized(x, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)


def silu(v):
    return v / (1 + np.exp(-v))


@pytest.mark.parametrize("learn_eps", [False, True])
@pytest.mark.parametrize("threshold", [False, True])
def test_filter_response(threshold, learn_eps):
    layer, p = made("frn", threshold=threshold, learn_eps=learn_eps)
    x = images().numpy()
    eps = np.abs(p["offset"])[:, None, None] if learn_eps else 1e-6
    y = x / np.sqrt((x**2).mean((2, 3), keepdims=True) + eps)
    y = y * p["weight"][:, None, None] + p["bias"][:, None, None]
    close(layer(images()), np.maximum(y, p["tau"][:, None, None]) if threshold else y)


@pytest.mark.parametrize("kind", ["rms", "layer", "length"])
def test_queries_and_keys(kind):
    layer, p = made("qk", heads=2, kind=kind)
    z = tokens().numpy().reshape(4, 6, 2, 4)
    expected = {
        "rms": lambda: rms_normalized(z, 1e-6) * p["weight"],
        "layer": lambda: layer_normalized(z, 1e-6) * p["weight"] + p["bias"],
        "length": lambda: z / np.linalg.norm(z, axis=-1, keepdims=True) * p["weight"],
    }[kind]()
    close(layer(tokens()), expected.reshape(4, 6, 8))


def test_lengths_of_queries_and_keys_start_at_the_usual_size_of_logits():
    q = build("qk", 8, heads=2, kind="length").double()(tokens())
    lengths = q.reshape(4, 6, 2, 4).square().sum(-1)
    close(lengths, torch.full_like(lengths, math.sqrt(4)), 1e-6)


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_heads(kind):
    layer, p = made("per-head-group", heads=2, kind=kind)
    z = tokens().numpy().reshape(4, 6, 2, 4)
    y = (rms_normalized if kind == "rms" else layer_normalized)(z, 1e-5).reshape(4, 6, 8)
    close(layer(tokens()), y * p["weight"] + p.get("bias", 0))


def test_heads_are_torch_groups_of_each_token():
    x = tokens()
    expected = torch.nn.functional.group_norm(x.reshape(24, 8), 4)
    close(build("per-head-group", 8, heads=4).double()(x), expected.reshape(x.shape))


def test_scale():
    x = tokens().numpy()
    expected = math.sqrt(8) * x / np.linalg.norm(x, axis=-1, keepdims=True)
    close(build("scalenorm", 8).double()(tokens()), expected, 1e-7)
    layer, p = made("scalenorm")
    close(layer(tokens()), expected / math.sqrt(8) * p["weight"])
    assert torch.equal(layer(torch.zeros(1, 2, 8).double()), torch.zeros(1, 2, 8).double())


def test_deep():
    layer, p = made("deepnorm", depth=18)
    x, branch = tokens(), tokens(2)
    y = layer_normalized(36**0.25 * x.numpy() + branch.numpy(), 1e-5)
    close(layer(x, branch), y * p["norm.weight"] + p["norm.bias"])
    assert layer.gain == pytest.approx(144**-0.25)
    assert build("deepnorm", 8, alpha=2.0).factor == 2.0


def test_a_branch_between_two_normalizations():
    branch = torch.nn.Linear(8, 8).double()
    for name, normalize, eps in (("sandwich-ln", layer_normalized, 1e-5), ("peri-ln", rms_normalized, 1e-6)):
        layer, p = made(name, branch=branch)
        x = tokens().numpy()
        z = normalize(x, eps) * p["before.weight"] + p.get("before.bias", 0)
        z = z @ p["branch.weight"].T + p["branch.bias"]
        close(layer(tokens()), x + normalize(z, eps) * p["after.weight"] + p.get("after.bias", 0))


def test_a_branch_with_arguments_of_its_own():
    class Sum(torch.nn.Module):
        def forward(self, x, y):
            return x + y

    x = tokens()
    layer = build("peri-ln", 8, branch=Sum()).double()
    close(layer(x, -x * 0), x + layer.after(layer.before(x)).detach())


def test_layer_scale():
    close(build("layerscale", 8).double()(tokens()), 1e-5 * tokens(), 1e-6)
    layer, p = made("layerscale")
    close(layer(images()), images().numpy() * p["weight"][:, None, None])


@pytest.mark.parametrize("name", ["dyt", "derf"])
def test_saturating(name):
    layer, p = made(name)
    value = p["alpha"] * tokens().numpy() + p.get("offset", 0)
    close(layer(tokens()), (np.tanh if name == "dyt" else erf)(value) * p["weight"] + p["bias"])
    assert float(build(name, 8).alpha.detach()) == 0.5


def test_global_response():
    layer, p = made("grn")
    x = images().numpy()
    norms = np.sqrt((x**2).sum((2, 3), keepdims=True))
    expected = x + p["weight"][:, None, None] * x * norms / (norms.mean(1, keepdims=True) + 1e-6)
    close(layer(images()), expected + p["bias"][:, None, None])
    close(layer(images().movedim(1, -1)).movedim(-1, 1), expected + p["bias"][:, None, None])
    assert torch.equal(build("grn", 8).double()(images()), images())


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_adaptive_layer(kind):
    layer, p = made("adaln", style=5, kind=kind)
    v = torch.randn(4, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    h = silu(v.numpy())
    scale, shift = (h @ p[f"{n}.weight"].T + p[f"{n}.bias"] for n in ("to_scale", "to_shift"))
    y = (layer_normalized if kind == "layer" else rms_normalized)(tokens().numpy(), 1e-6)
    close(layer(tokens(), v), y * scale[:, None] + shift[:, None])
    plain = build("adaln", 8, style=5, kind=kind).double()(tokens(), v)
    close(plain, y)


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_gated(before, groups):
    layer, p = made("gated-rms", groups=groups, before=before)
    x, gate = tokens().numpy(), silu(tokens(2).numpy())
    z = (x if before else x * gate).reshape(4, 6, groups, -1)
    y = rms_normalized(z, 1e-5).reshape(4, 6, 8) * p["weight"]
    close(layer(tokens(), tokens(2)), y * gate if before else y)
    close(layer(tokens()), rms_normalized(x.reshape(4, 6, groups, -1), 1e-5).reshape(4, 6, 8) * p["weight"])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: build("qk", 8, heads=3), ["groups=3", "num_features=8"]),
        (lambda: build("qk", 8, heads=2)(torch.zeros(2, 3, 6)), ["(2, 3, 6)", "8"]),
        (lambda: build("qk", 8, kind="lenght"), ["lenght", "length"]),
        (lambda: build("gated-rms", 8, groups=3), ["groups=3", "num_features=8"]),
        (lambda: build("peri-ln", 8, kind="batch"), ["batch", "rms"]),
        (lambda: build("frn", 8, eps=0.0), ["eps=0.0"]),
        (lambda: build("deepnorm", 8, depth=0), ["depth=0"]),
    ],
)
def test_errors_name_argument_value_and_options(call, words):
    with pytest.raises(ArgumentError) as caught:
        call()
    for word in words:
        assert word in str(caught.value)


def test_simple_rms_has_no_parameters():
    layer, p = made("srms")
    assert not p
    close(layer(tokens()), rms_normalized(tokens().numpy(), 1e-6))


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_depth_scaled(kind):
    layer, p = made("lns", depth=9, kind=kind)
    x = tokens().numpy()
    y = rms_normalized(x, 1e-5) if kind == "rms" else layer_normalized(x, 1e-5)
    close(layer(tokens()), (y * p["weight"] + p.get("bias", 0)) / 3)


def test_self_rescaled():
    layer, p = made("seednorm")
    x = tokens().numpy()
    gain = np.tanh(x @ p["direction"])[..., None] * p["rescale"] + p["weight"]
    close(layer(tokens()), rms_normalized(x, 1e-6) * gain)
    close(build("seednorm", 8).double()(tokens()), rms_normalized(x, 1e-6))


def test_hypersphere():
    layer, p = made("ngpt", init=0.1)
    h, branch = (t / np.linalg.norm(t, axis=-1, keepdims=True) for t in (tokens().numpy(), tokens(2).numpy()))
    y = h + np.abs(p["weight"] * 0.1 * np.sqrt(8)) * (branch - h)
    close(layer(tokens(), tokens(2)), y / np.linalg.norm(y, axis=-1, keepdims=True))
    close(layer(tokens()), h)
    start = build("ngpt", 8).double()
    y = h + 0.05 * (branch - h)
    close(start(tokens(), tokens(2)), y / np.linalg.norm(y, axis=-1, keepdims=True), 1e-7)


def test_depth_is_counted_from_one():
    with pytest.raises(ArgumentError, match=r"depth=0 must be above 0: layers are counted from 1"):
        build("depth-scaled", 8, depth=0)
