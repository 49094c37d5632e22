"""Style against dense numpy, recorded numbers and the identities that define it."""

from pathlib import Path

import numpy as np
import pytest
import torch

from normscope import applications as apps
from normscope.core.errors import ArgumentError

torch.set_num_threads(1)

ADAIN = Path(__file__).parents[1] / "reference" / "other" / "adain.npz"


def features(n=2, channels=6, places=(9, 8), seed=0, dtype=torch.float64):
    """Correlated features with means."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, channels, *places, generator=generator, dtype=torch.float64)
    mixing = torch.randn(channels, channels, generator=generator, dtype=torch.float64)
    mean = torch.randn(channels, 1, 1, generator=generator, dtype=torch.float64)
    return (torch.einsum("ij,njhw->nihw", mixing, x) + mean).to(dtype)


CONTENT, STYLE = features(), features(places=(7, 11), seed=1)


def test_the_gram_matrix_is_the_sum_over_places():
    f = CONTENT.numpy()
    expected = np.array([[[sum((i[a] * i[b]).ravel()) for b in range(6)] for a in range(6)] for i in f])
    np.testing.assert_allclose(apps.gram(CONTENT), expected, rtol=1e-12)
    np.testing.assert_allclose(apps.gram(CONTENT, average=True), expected / 72, rtol=1e-12)


def test_losses_are_the_published_sums():
    other = features(seed=2)
    difference = apps.gram(CONTENT) - apps.gram(other)
    expected = (difference**2).sum((1, 2)) / (4 * 6**2 * 72**2)
    torch.testing.assert_close(apps.style_loss(CONTENT, other), expected)
    torch.testing.assert_close(apps.content_loss(CONTENT, other), ((CONTENT - other) ** 2).sum((1, 2, 3)) / 2)
    x = CONTENT.clone().requires_grad_()
    apps.style_loss(x, STYLE).sum().backward()
    assert x.grad.abs().max() > 0


def test_adain_is_the_recorded_one():
    with np.load(ADAIN) as file:
        data = {name: torch.from_numpy(file[name]) for name in ("content", "style", "y", "gy", "g_content", "g_style")}
    content, style = data["content"].requires_grad_(), data["style"].requires_grad_()
    y = apps.adain(content, style)
    torch.testing.assert_close(y, data["y"], rtol=0, atol=1e-12)
    gradients = torch.autograd.grad(y, (content, style), data["gy"])
    for found, name in zip(gradients, ("g_content", "g_style"), strict=True):
        torch.testing.assert_close(found, data[name], rtol=0, atol=1e-11)


def test_adain_gives_each_channel_mean_and_deviation_of_the_style():
    y = apps.adain(CONTENT, STYLE, eps=0.0)
    torch.testing.assert_close(y.mean((2, 3)), STYLE.mean((2, 3)))
    torch.testing.assert_close(y.std((2, 3)), STYLE.std((2, 3)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_wct_gives_the_gram_matrix_of_the_style(dtype):
    content, style = CONTENT.to(dtype), STYLE.to(dtype)
    y = apps.wct(content, style)
    assert y.dtype == dtype
    error = apps.gram(y, average=True) - apps.gram(style, average=True)
    assert error.abs().max() < (1e-10 if dtype == torch.float64 else 1e-5)
    errors = [apps.gram_error(f, STYLE).max().item() for f in (CONTENT, apps.adain(CONTENT, STYLE), y.double())]
    assert errors[0] > errors[1] > 1e4 * errors[2]


def test_wct_is_whitening_by_the_symmetric_root_and_coloring():
    from scipy import linalg

    y = apps.wct(CONTENT[:1], STYLE[:1])[0].flatten(1).numpy()
    c, s = (f[0].flatten(1).numpy() for f in (CONTENT, STYLE))
    roots = [linalg.sqrtm(np.cov(f, bias=True)) for f in (c, s)]
    expected = roots[1] @ np.linalg.inv(roots[0]) @ (c - c.mean(1, keepdims=True)) + s.mean(1, keepdims=True)
    np.testing.assert_allclose(y, expected, rtol=1e-8, atol=1e-8)


def test_wct_of_an_image_with_its_own_style_is_that_image_and_needs_no_full_rank():
    torch.testing.assert_close(apps.wct(CONTENT, CONTENT), CONTENT)
    flat = torch.cat((CONTENT, CONTENT[:, :1]), 1)  # a channel twice
    torch.testing.assert_close(apps.wct(flat, flat), flat)


def test_alpha_blends():
    half = apps.wct(CONTENT, STYLE, alpha=0.5)
    torch.testing.assert_close(half, (CONTENT + apps.wct(CONTENT, STYLE)) / 2)
    torch.testing.assert_close(apps.adain(CONTENT, STYLE, alpha=0.0), CONTENT)


REFUSED = {
    "rank": (lambda: apps.gram(torch.ones(2, 3)), r"features of shape \(2, 3\) must be a tensor \(N, C, \*\)"),
    "type": (lambda: apps.adain(3, STYLE), "content of type int must be a tensor"),
    "style": (lambda: apps.wct(CONTENT, torch.ones(3)), r"style of shape \(3,\) must be a tensor"),
    "alpha": (lambda: apps.wct(CONTENT, STYLE, alpha=2), "alpha=2 must be between 0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_named(name):
    call, message = REFUSED[name]
    with pytest.raises(ArgumentError, match=message):
        call()
