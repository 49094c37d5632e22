import pytest
import torch

from normscope.core.errors import ArgumentError
from normscope.workbench import CORRUPTIONS, corrupt


@pytest.fixture
def images():
    return torch.randn(3, 1, 9, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_each_corruption_is_its_formula(images):
    torch.testing.assert_close(corrupt(images, "contrast", 0.25), 0.75 * images)
    torch.testing.assert_close(corrupt(images, "brightness", 0.5), images + 0.5)
    inner = images[:, :, 2:7, 2:7].mean((2, 3))
    torch.testing.assert_close(corrupt(images, "blur", 2)[:, :, 4, 4], inner)
    inverted = corrupt(images, "invert")
    torch.testing.assert_close(inverted + images, torch.full_like(images, float(images.min() + images.max())))
    assert float((corrupt(images, "noise", 2.0) - images).std()) == pytest.approx(2.0, rel=0.2)


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_a_corruption_keeps_shape_and_input_and_is_decided_by_its_seed(images, kind):
    before = images.clone()
    state = torch.get_rng_state()
    first = corrupt(images, kind, seed=1)
    assert first.shape == images.shape
    assert first.dtype == images.dtype
    assert not torch.equal(first, images)
    assert torch.equal(images, before)
    assert torch.equal(first, corrupt(images, kind, seed=1))
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(corrupt(images, kind, 0.0), images)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("blurr",), r"kind='blurr' is unknown; did you mean 'blur'"),
        (("noise", -1.0), r"strength=-1.0 must be at least 0; that of 'noise' is 1.3 by default"),
    ],
)
def test_what_cannot_work_is_named(images, arguments, message):
    with pytest.raises(ArgumentError, match=message):
        corrupt(images, *arguments)
