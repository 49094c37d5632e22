"""Methods for several domains: against numpy formulas and each other, errors."""

import numpy as np
import pytest
import torch

from normscope.core.errors import ArgumentError
from normscope.norms.table import build

EPS = 1e-5


@pytest.fixture
def x():
    g = torch.Generator().manual_seed(4)
    return torch.randn(6, 8, 3, 4, generator=g, dtype=torch.float64) * 2 + torch.arange(6).reshape(-1, 1, 1, 1)


LABELS = torch.tensor([0, 1, 1, 0, 1, 0])


def moments(a):
    return a.mean((0, 2, 3)), a.var((0, 2, 3))


def _c(v):
    return np.asarray(v).reshape(1, -1, 1, 1)


def normalized(a, mean, var):
    return (a - _c(mean)) / np.sqrt(_c(var) + EPS)


def close(found, expected):
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-9, atol=1e-11)


def made(name, **options):
    torch.manual_seed(0)
    return build(name, 8, dtype=torch.float64, **options)


def test_mixed_batches_of_domains_are_normalized_apart(x):
    layer, twin = made("domain-specific"), made("domain-specific")
    y = layer(x, LABELS)
    for d in (0, 1):
        close(y[d == LABELS], twin(x[d == LABELS], d).detach().numpy())
    assert [int(b.num_batches_tracked) for b in layer.branches] == [1, 1]
    close(layer.eval()(x, LABELS)[:1], twin.eval()(x[:1], 0).detach().numpy())


@pytest.mark.parametrize("name", ["dual-batch", "mixture-batch"])
def test_clean_examples_are_the_default(x, name):
    layer = made(name)
    layer(x)
    assert [int(b.num_batches_tracked) for b in layer.branches] == [1, 0]


def test_transferable(x):
    layer, a = made("transferable"), x.numpy()
    (ms, vs), (mt, vt) = moments(a[:3]), moments(a[3:])
    p = 1 / (1 + np.abs(ms / np.sqrt(vs * 36 / 35 + EPS) - mt / np.sqrt(vt * 36 / 35 + EPS)))
    expected = np.concatenate([normalized(a[:3], ms, vs), normalized(a[3:], mt, vt)]) * _c(1 + 8 * p / p.sum())
    close(layer(x), expected)
    mean, var = 0.1 * np.stack([ms, mt]), 0.9 + 0.1 * np.stack([vs, vt]) * 36 / 35
    p = 1 / (1 + np.abs(np.subtract(*(mean / np.sqrt(var + EPS)))))
    close(layer.eval()(x), normalized(a, mean[1], var[1]) * _c(1 + 8 * p / p.sum()))


def dial(a, share):
    outputs, stored = [], []
    for own, other in ((a[:3], a[3:]), (a[3:], a[:3])):
        mean = share * own.mean((0, 2, 3)) + (1 - share) * other.mean((0, 2, 3))
        spread = [((part - _c(mean)) ** 2).mean((0, 2, 3)) for part in (own, other)]
        var = share * spread[0] + (1 - share) * spread[1]
        outputs.append(normalized(own, mean, var))
        stored.append((mean, var * 36 / 35))
    return np.concatenate(outputs), stored


@pytest.mark.parametrize(("alpha", "used"), [(0.8, 0.8), (0.2, 0.5), (1.3, 1.0)])
def test_autodial(x, alpha, used):
    layer = made("autodial", momentum=1.0)
    with torch.no_grad():
        layer.alpha.fill_(alpha)
    expected, stored = dial(x.numpy(), used)
    close(layer(x), expected)
    close(layer.eval()(x), normalized(x.numpy(), *stored[1]))
    close(layer(x, 0), normalized(x.numpy(), *stored[0]))


def test_domain_agnostic(x):
    layer = made("domain-agnostic")
    close(layer(x, LABELS), normalized(x.numpy(), *moments(x[LABELS == 0].numpy())))


def optimized(a, labels, w):
    y = np.empty_like(a)
    for n, d in enumerate(labels):
        m, v = moments(a[labels == d])
        mi, vi = a[n].mean((1, 2)), a[n].var((1, 2))
        y[n] = normalized(a[n : n + 1], w[d] * m + (1 - w[d]) * mi, w[d] * v + (1 - w[d]) * vi)[0]
    return y


def test_domain_optimized(x):
    layer = made("domain-optimized", momentum=1.0)
    with torch.no_grad():
        layer.mix.copy_(torch.tensor([0.4, -1.0], dtype=torch.float64))
    w = 1 / (1 + np.exp([-0.4, 1.0]))
    close(layer(x, LABELS), optimized(x.numpy(), LABELS.numpy(), w))
    layer.eval()
    branches = [layer(x, d) for d in (0, 1)]
    close(layer(x), ((branches[0] + branches[1]) / 2).detach().numpy())


def test_gated(x):
    layer, a = made("gated-batch"), x.numpy()
    g = torch.softmax(layer.scores(x), 1).detach().numpy()
    found = [moments(a[LABELS.numpy() == d]) for d in (0, 1)]
    expected = sum(g[:, d].reshape(-1, 1, 1, 1) * normalized(a, *found[d]) for d in (0, 1))
    close(layer(x, LABELS), expected)
    assert layer.eval()(x).shape == x.shape


def test_adversarial_statistics(x):
    layer = made("adversarial-statistics", bound=0.3)
    close(layer(x), x.numpy())
    target = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    losses = []
    for _ in range(4):
        loss = (layer(x) - target).square().mean()
        losses.append(float(loss.detach()))
        loss.backward()
        layer.attack(0.1)
    assert losses == sorted(losses)
    assert losses[-1] > losses[0]
    assert float((layer.scale - 1).abs().max().detach()) <= 0.3 + 1e-12
    layer.reset()
    close(layer(x), x.numpy())


def test_domain_invariant(x):
    a = x.numpy()
    z = (a - a.mean((2, 3), keepdims=True)) / np.sqrt(a.var((2, 3), keepdims=True) + EPS)
    close(made("domain-invariant")(x), z / np.sqrt((z**2).sum(1, keepdims=True) + EPS))


def test_separable(x):
    layer, a = made("separable-batch"), x.numpy()
    with torch.no_grad():
        layer.weight.copy_(torch.randn(2, 8))
        layer.bias.copy_(torch.randn(2, 8))
    n = {k: v.numpy() for k, v in layer.state_dict().items()}
    logits = a.mean((2, 3)) @ n["attention.weight"].T + n["attention.bias"]
    part = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    weight, bias = ((part @ n[k])[:, :, None, None] for k in ("weight", "bias"))
    close(layer(x), normalized(a, *moments(a)) * weight + bias)


@pytest.mark.parametrize("size", [2, 4, 6, 8])
def test_each_width_is_a_batch_normalization_of_its_own(x, size):
    layer, twin = made("switchable-width-batch"), build("batch", size, dtype=torch.float64)
    close(layer(x[:, :size]), twin(x[:, :size]).detach().numpy())
    other = 8 if size < 8 else 2
    close(layer.eval()(x[:, :other]), (x[:, :other] / np.sqrt(1 + EPS)).numpy())
    close(layer(x[:, :size]), twin.eval()(x[:, :size]).detach().numpy())


def test_fine_grained(x):
    layer, a = made("fine-grained-batch"), x.numpy()
    mixing = layer.mixing.detach().numpy()
    sums = [np.einsum("oc,nchw->nohw", mixing[p], a[:, 4 * p : 4 * p + 4]) for p in (0, 1)]
    weight = layer.normalization.weight.detach().numpy().reshape(2, 8)
    close(layer(x), sum(normalized(s, *moments(s)) * _c(w) for s, w in zip(sums, weight, strict=True)))


def test_meta(x):
    layer = made("meta")
    mean, var = layer.infer(x)
    pool = x.mean((2, 3))
    close(mean, layer.mu(pool).mean(0).detach().numpy())
    close(layer(x), normalized(x.numpy(), mean.detach(), var.detach()))
    close(layer.eval()(x[:2]), normalized(x[:2].numpy(), mean.detach(), var.detach()))
    assert float(layer.divergence(x, x).detach()) == pytest.approx(0)
    assert float(layer.divergence(x[:3], x[3:]).detach()) > 0


def test_pop_art_keeps_its_outputs():
    g = torch.Generator().manual_seed(0)
    x, targets = (torch.randn(50, 8, generator=g, dtype=torch.float64) for _ in range(2))
    layer = made("pop-art", momentum=0.5)
    for scale in (1.0, 1000.0, 0.01):
        before = layer(x)
        mean, square = layer.running_mean.clone(), layer.running_square.clone()
        layer.update(targets * scale + 3)
        close(layer(x), before.detach().numpy())
        close(layer.running_mean, (mean + (targets * scale + 3).mean(0)) / 2)
        close(layer.running_square, (square + (targets * scale + 3).square().mean(0)) / 2)
    layer = made("pop-art", momentum=1.0)
    layer.update(targets)
    close(layer.normalize(targets).std(0, correction=0), np.ones(8))


def test_pop_art_leaves_missing_tasks():
    layer = made("pop-art")
    targets = torch.randn(5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    targets[:, 2] = float("nan")
    layer.update(targets)
    assert float(layer.running_mean[2]) == 0
    assert bool((layer.running_mean[:2] != 0).all())


@pytest.mark.parametrize(("name", "share"), [("cross", 0.5), ("unsupervised-batch", 0.0)])
def test_borrowed_statistics(x, name, share):
    other = x.flip(0)[:4] * 3
    layer, a, b = made(name), x.numpy(), other.numpy()
    (m, v), (mo, vo) = moments(a), moments(b)
    mean = share * m + (1 - share) * mo
    var = share * (v + (m - mean) ** 2) + (1 - share) * (vo + (mo - mean) ** 2)
    close(layer(x, other), normalized(a, mean, var))
    close(layer.running_mean, 0.1 * mean)
    close(made(name)(x), normalized(a, m, v))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: made("domain-specific")(torch.zeros(4, 8, 2).double()), "domain=None"),
        (lambda: made("domain-specific")(torch.zeros(4, 8, 2).double(), 2), "from 0 to 1"),
        (lambda: made("domain-specific")(torch.zeros(4, 8, 2).double(), torch.zeros(3).long()), "3 labels"),
        (lambda: made("transferable")(torch.zeros(3, 8, 2).double()), "must be even"),
        (lambda: made("switchable-width-batch")(torch.zeros(3, 5, 2).double()), "widths="),
        (lambda: made("cross", share=2), "share=2"),
        (lambda: made("fine-grained-batch", parts=3), "divisors"),
        (lambda: made("pop-art").update(torch.zeros(3, 5)), "targets has shape"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ArgumentError, match=message):
        call()
