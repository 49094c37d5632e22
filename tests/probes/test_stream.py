"""Whether batches are random draws: near 1 where they are, far from 1 on streams that are not."""

import numpy as np
import pytest
import torch

from normscope.probes.stream import FEATURES, Stream, features

N, CLASSES, STEPS = 32, 8, 80


def population(tokens):
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(4096) % CLASSES
    if tokens:
        words = torch.randint(0, 500, (4096, 20), generator=draw)
        own = (labels[:, None] * 61 + torch.randint(0, 8, (4096, 20), generator=draw)) % 500
        return torch.where(torch.rand(4096, 20, generator=draw) < 0.5, words, own), labels
    centers = torch.randn(CLASSES, 1, 8, 8, generator=draw)
    return torch.randn(4096, 1, 8, 8, generator=draw) + 0.7 * centers[labels], labels


def draws(kind, x, labels):
    draw = torch.Generator().manual_seed(1)
    order = torch.argsort(labels, stable=True)
    for step in range(STEPS):
        if kind == "random":
            index = torch.randint(len(x), (N,), generator=draw)
        elif kind == "sorted":
            index = order[step * N : (step + 1) * N]
        elif kind == "duplicated":
            index = torch.randint(len(x), (N // 8,), generator=draw).repeat(8)
        elif kind == "two views":
            index = torch.randint(len(x), (N // 2,), generator=draw).repeat(2)
        else:  # two domains in turn: another contrast, another vocabulary
            batch = x[torch.randint(len(x), (N,), generator=draw)]
            yield batch if step % 2 else batch * 0.5 + 0.5 if batch.is_floating_point() else batch % 30
            continue
        yield x[index]


def ratio(batches):
    stream, found = Stream(), []
    for x in batches:
        stream.see_batch(x)
        rows = stream.rows([state.double().numpy() for state in stream.states()])
        stream.discard()
        found += [dict(zip(row.stats, row.values, strict=True))["ratio"] for row in rows]
    return (float(np.mean(found)), float(np.std(found) / len(found) ** 0.5)) if found else (np.nan, np.nan)


@pytest.mark.parametrize("tokens", [False, True])
def test_random_draws_give_one(tokens):
    value, error = ratio(draws("random", *population(tokens)))
    assert abs(value - 1) < 4 * error
    assert error < 0.1


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("kind", ["sorted", "domains"])
def test_sorted_batches_are_far_from_one(kind, tokens):
    value, error = ratio(draws(kind, *population(tokens)))
    assert value > 3
    assert value - 2 * error > 1


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize(("kind", "copies"), [("duplicated", 8), ("two views", 2)])
def test_copies_are_counted(kind, copies, tokens):
    """Means vary as those of N / copies samples; the spread within batches has as many degrees of freedom."""
    value, error = ratio(draws(kind, *population(tokens)))
    within = (N / (N - 1)) * (1 - copies / N)
    assert abs(value - copies / within) < 4 * error
    assert error < 0.1 * value


def test_equal_batches_give_zero():
    x, _ = population(False)
    assert ratio([x[:N]] * 5)[0] == pytest.approx(0, abs=1e-9)


def test_the_mean_over_earlier_batches_is_exact():
    """The ratio against numpy on all batches at once."""
    x = torch.randn(6, 16, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    stream = Stream()
    for t, batch in enumerate(x.numpy()):
        state = np.stack((np.full(3, 16.0), batch.mean(0), 16 * batch.var(0)))
        found = stream.compared(state)["ratio"]
        if t:
            before = x[:t].mean((0, 1)).numpy()
            expected = ((batch.mean(0) - before) ** 2).sum() / ((1 + 1 / t) * batch.var(0, ddof=1).sum() / 16)
            assert found == pytest.approx(expected, rel=1e-12)


def test_features_of_images_and_tokens():
    image = torch.arange(2 * 3 * 64.0).reshape(2, 3, 8, 8)
    found = features(image)
    assert found.shape == (2, FEATURES)
    assert found[0, :2].tolist() == [1.5, 5.5]  # means of four neighbors each
    tokens = torch.tensor([[0, 1, 1, FEATURES + 1], [2, 2, 2, 2]])
    assert features(tokens)[:, :3].tolist() == [[0.25, 0.75, 0], [0, 0, 1]]
    assert features(torch.randn(4, 3)).shape == (4, 3)


@pytest.mark.parametrize(
    "x", [torch.zeros(1, 4), torch.zeros(0, 4), torch.tensor(1.0), torch.zeros(3, 2, dtype=torch.bool)], ids=str
)
def test_what_has_no_features(x):
    assert features(x) is None


def test_constant_input_and_other_widths_are_not_compared():
    assert np.isnan(ratio([torch.ones(4, 3)] * 3)[0])
    found = Stream()
    for width in (3, 3, 5):
        state = np.stack((np.full(width, 8.0), np.zeros(width), np.ones(width)))
        last = found.compared(state)["ratio"]
    assert np.isnan(last)
