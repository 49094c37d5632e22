import numpy as np
import pytest

from normscope.core.estimate import Status
from normscope.core.store import Store
from normscope.metrics import noise
from tests.metrics.records import Network, spread

EMPTY = Store(None, "empty", {}).record()


def noisy(network=None, moved=0.2, batch=64.0, **others):
    """Noise of every layer as BatchNorm has it, where mean and variance contribute as for Gaussian values."""
    network = network or Network()
    network.batch = int(batch)
    for i in range(network.layers):
        stats = spread(mean_noise=moved * (2 / 3) ** 0.5, var_noise=2 * moved * (1 / 3) ** 0.5)
        stats |= {"snd": 4 * moved, "snd_error": 0.1, "relative": 0.9 * moved, "batch": batch}
        network.extra[f"l{i}.norm/output", "noise", "value"] = lambda step, stats=stats: stats | others
    return network.edit(
        lambda site, role, step, s: s.update(batch=batch) if site.endswith("/input") and "count" in s else None
    )


def gradient(network, signal=1.0, square=2.0, chunk=32.0, phase="noise", errors=(0.1, 0.1)):
    more = {"signal_error": errors[0], "square_error": errors[1]} if errors else {}
    make = lambda step: {"signal": signal, "square": square, "chunk": chunk, **more}  # noqa: E731
    network.extra["/output", phase, "gradient"] = make
    return network


def stream(network, ratios, samples=64.0):
    values = dict(zip(network.steps, ratios, strict=True))
    sizes = samples if isinstance(samples, dict) else dict.fromkeys(network.steps, samples)
    network.extra["/input", "train", "value"] = lambda step: {"ratio": values[step], "seen": float(sizes[step])}
    return network


def test_closed_forms_are_those_of_simulated_batches():
    rng = np.random.default_rng(0)
    for n in (8, 32, 128):
        x = rng.normal(size=(20000, n))
        mean, var = x.mean(1).std(), x.var(1).std()
        assert noise.expected_relative(n) == pytest.approx(np.hypot(mean, var / 2), rel=0.03)
    z, d, n = rng.normal(size=6), 6, 600
    moved = []
    for _ in range(400):
        x = rng.normal(size=(n, d))
        values, vectors = np.linalg.eigh(np.cov(x.T, bias=True))
        moved.append(vectors @ np.diag(values**-0.5) @ vectors.T @ (z - x.mean(0)))
    real = float((np.std(moved, axis=0) ** 2).sum())
    assert real == pytest.approx((d + z @ z * (d + 1) / 4) / n, rel=0.15)
    assert noise.expected_whitening(d, n) ** 2 * d == pytest.approx((d + d * (d + 1) / 4) / n)


def test_layers_and_what_they_move():
    frame = noise.layers(noisy(moved=0.3, batch=16.0).record())
    assert frame.index.tolist() == [f"l{i}.norm/output" for i in range(6)]
    first = frame.iloc[0]
    assert first["moved"] == pytest.approx(0.3)
    assert first["relative"] == pytest.approx(0.27)
    assert (first["batch"], first["values"], first["training"]) == (16, 64, 1)
    assert frame[["whitened", "whitened_from"]].isna().all().all()


def test_without_held_samples_layers_are_known_by_their_counts():
    frame = noise.layers(Network().record())
    assert frame["moved"].isna().all()
    assert frame["batch"].tolist() == [64] * 6
    assert not len(noise.layers(Network(norm="layer").record()))
    assert not len(noise.layers(EMPTY))


def test_a_layer_without_moments_moves_as_measured():
    network = noisy(**{"mean_noise.q50": np.nan, "var_noise.q50": np.nan})
    assert noise.layers(network.record())["moved"].tolist() == pytest.approx([0.18] * 6)


def test_sampling_is_the_mean_over_steps_with_its_error():
    values = [np.nan, 1.2, 0.8, 1.5, 0.9, 1.1, 0.7, 1.0, 1.3, 0.5]
    found = noise.sampling(stream(Network(), values).record())
    assert found.value == pytest.approx(np.mean(values[1:]))
    assert found.standard_error == pytest.approx(np.std(values[1:], ddof=1) / 3)
    assert (found.n, found.status) == (9, Status.SAMPLED)
    assert noise.sampling(EMPTY).status is Status.NOT_RECORDED
    short = stream(Network(steps=range(0, 40, 10)), values[:4]).record()
    assert noise.sampling(short).status is Status.FEW_SAMPLES
    assert (noise.sizes(short), noise.sizes(EMPTY)) == (1, 0)


def test_the_scale_and_its_error_by_simulation():
    """The error by error propagation is the spread of the ratio."""
    found = noise.scale(gradient(Network(), 1.0, 2.5, 32.0, errors=(0.05, 0.1)).record())
    assert found.estimate.value == pytest.approx(32 * 1.5)
    rng = np.random.default_rng(0)
    ratios = 32 * (rng.normal(2.5, 0.1, 100000) / rng.normal(1.0, 0.05, 100000) - 1)
    assert found.estimate.standard_error == pytest.approx(ratios.std(), rel=0.05)
    assert found.least == pytest.approx(32 * (2.5 / 1.1 - 1))
    assert (found.micro, found.estimate.usable, found.estimate.unit) == (False, True, "samples")


@pytest.mark.parametrize(("signal", "least"), [(0.1, 32 * (2 / 0.3 - 1)), (-0.5, np.inf)])
def test_a_signal_that_cannot_be_told_from_zero_bounds_the_scale(signal, least):
    found = noise.scale(gradient(Network(), signal, 2.0, 32.0).record())
    assert found.estimate.status is Status.FEW_SAMPLES
    assert found.least == pytest.approx(least)


def test_micro_batches_come_first_and_the_late_window_counts():
    network = gradient(gradient(Network(), 1.0, 9.0), 0.0, 0.0, phase="train", errors=None)
    network.extra["/output", "train", "gradient"] = lambda step: {
        "signal": 1.0 if step < 70 else 2.0 + step / 100,
        "square": 50.0 if step < 70 else 6.0,
        "chunk": 8.0,
    }
    found = noise.scale(network.record())
    assert found.micro
    assert found.estimate.value == pytest.approx(8 * (6 / 2.8 - 1))
    assert noise.scale(EMPTY).estimate.status is Status.NOT_RECORDED


def test_other_batch_sizes_follow_the_root_law():
    frame = noise.at_sizes(gradient(noisy(moved=0.2, batch=64.0), 1.0, 2.0, 32.0).record(), (16, 64, 256))
    assert frame.groupby("of", sort=False).size().tolist() == [3] * 4
    layer = frame[frame["of"] == "l0.norm/output"]["noise"]
    assert layer.tolist() == pytest.approx([0.4, 0.2, 0.1])
    steps = frame[frame["of"] == noise.GRADIENT]["noise"]
    assert steps.tolist() == pytest.approx([2**0.5, 0.5**0.5, 0.125**0.5])
    assert list(noise.at_sizes(EMPTY).columns) == ["batch", "noise", "of"]


def test_where_a_layer_cannot_whiten_nothing_is_predicted():
    network = noisy(Network(layers=1), moved=0.2, batch=64.0)
    network.inputs = {"whitened": 32, "whitened_from": 64}
    frame = noise.at_sizes(network.record(), (16, 32, 64))
    assert frame["noise"].isna().tolist() == [True, True, False]
