import pytest
import torch

from normscope.core.errors import ArgumentError
from normscope.workbench import classifier, evaluate, mnist, split


@pytest.fixture(scope="module")
def digits():
    (images, labels), test = split(*mnist(), 0)
    return (images[:600], labels[:600]), test


def test_it_learns_digits_and_is_decided_by_its_seed(digits):
    train, test = digits
    model = classifier(train, 0, epochs=4)
    assert not model.training
    assert evaluate(model, [test]) > 0.8
    again = classifier(train, 0, epochs=4)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_small_batches_have_a_small_learning_rate(digits):
    (images, labels), _ = digits
    first = classifier((images[:8], labels[:8]), 0, batch=8, epochs=1, rate=0.8)
    second = classifier((images[:8], labels[:8]), 0, batch=8, epochs=1, rate=0.4)
    start = classifier((images[:8], labels[:8]), 0, batch=8, epochs=1, rate=0.0)
    moved = [model.get_submodule("head").weight - start.get_submodule("head").weight for model in (first, second)]
    torch.testing.assert_close(moved[0], 2 * moved[1], rtol=1e-4, atol=1e-6)


def test_no_epochs_are_refused(digits):
    with pytest.raises(ArgumentError, match="epochs=0 trains nothing; try 8"):
        classifier(digits[0], 0, epochs=0)
