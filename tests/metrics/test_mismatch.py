import numpy as np
import pytest

from normscope.core.estimate import Status
from normscope.metrics import mismatch
from tests.metrics.records import Network, at


@pytest.mark.parametrize(("samples", "momentum"), [(32, 0.1), (64, 0.5), (64, 0.01), (128, 1.0)])
def test_the_expected_drift_is_what_a_simulation_of_running_statistics_shows(samples, momentum):
    random = np.random.default_rng(0)
    channels, updates = 400, int(8 / momentum)
    mean, var = np.zeros(channels), np.ones(channels)
    for _ in range(updates + 1):
        x = random.normal(size=(samples, channels))
        batch_mean, batch_var = x.mean(0), x.var(0, ddof=1)
        kl = 0.5 * (np.log(var / batch_var) + (batch_var + (batch_mean - mean) ** 2) / var - 1)
        mean, var = mean + momentum * (batch_mean - mean), var + momentum * (batch_var - var)
    error = kl.std() / channels**0.5
    assert abs(kl.mean() - mismatch.expected_drift(samples, momentum)) < 4 * error + 3 / samples**2


def test_layers_with_running_statistics_and_their_settings():
    network = Network(layers=2, momentum=0.05)
    network.extra_sites["l0.norm#1/output"] = {"class": "BatchNorm1d", "norm": "batch"}
    layers = mismatch.running_layers(network.record())
    first = layers.loc["l0.norm/running"]
    assert (first["momentum"], first["batch"], first["updates"], first["steps"]) == (0.05, 64, 91, 91)
    assert first["initial"] == pytest.approx(0.95**91)
    assert layers["shared"].tolist() == [True, False]
    assert layers["expected"].tolist() == pytest.approx([mismatch.expected_drift(64, 0.05)] * 2)


def test_a_cumulative_average_has_forgotten_its_initial_value():
    layers = mismatch.running_layers(Network(momentum=None).record())
    assert layers["momentum"].isna().all()
    assert (layers["initial"] == 0).all()
    assert layers["expected"].iloc[0] == pytest.approx(mismatch.expected_drift(64, 1 / 91))


def test_counters_that_are_missing_are_replaced_by_steps():
    layers = mismatch.running_layers(Network().edit(at("/running", updates=np.nan)).record())
    assert layers["updates"].tolist() == [91] * 6
    edit = lambda site, role, step, stats: stats.pop("batch", None)  # noqa: E731
    assert mismatch.running_layers(Network().edit(edit).record())["batch"].tolist() == [64] * 6


def test_drift_leaves_out_the_start():
    record = Network().edit(at("/running", steps=range(0, 50), **{"drift.q50": 5.0})).record()
    frame = mismatch.drift(record)
    assert frame["value"].tolist() == pytest.approx([1 / 64] * 6)
    assert frame["expected"].tolist() == pytest.approx([mismatch.expected_drift(64, 0.1)] * 6)


@pytest.mark.parametrize(
    ("edit", "value", "since"),
    [
        (at("/running", updates=5.0), 1.0, 10),
        (at("/running", updates=np.nan, change=0.0), 1.0, 10),
        (at("/running", steps=range(50, 100), updates=41.0), 5 / 9, 50),
        (at("/running", steps=[40], updates=31.0), 0.0, -1),
        (at("/running", updates=5.0, training=0.0), 0.0, -1),
    ],
)
def test_stillness_is_counted_from_the_end(edit, value, since):
    frame = mismatch.stillness(Network(layers=1).edit(edit).record())
    assert frame["value"].tolist() == pytest.approx([value])
    assert frame["since"].tolist() == [since]


def test_updates_per_forward():
    twice = lambda site, role, step, s: s.update(updates=2.0 * step) if "updates" in s else None  # noqa: E731
    assert mismatch.extra_updates(Network().record())["value"].tolist() == pytest.approx([1] * 6)
    assert mismatch.extra_updates(Network().edit(twice).record())["value"].tolist() == pytest.approx([2] * 6)
    both = Network().edit(twice).edit(at("/running", calls=2.0))
    assert mismatch.extra_updates(both.record())["value"].tolist() == pytest.approx([1] * 6)
    varying = Network().edit(twice).edit(at("/running", steps=[20], calls=3.0))
    assert mismatch.extra_updates(varying.record())["value"].isna().all()


def test_a_teacher_that_never_trains_is_not_silent():
    student = mismatch.extra_updates(Network().edit(at("/running", silent=1.0)).record())
    assert student["silent_steps"].tolist() == [10] * 6
    teacher = mismatch.extra_updates(Network().edit(at("/running", silent=1.0, calls=0.0, training=np.nan)).record())
    assert teacher["silent_steps"].tolist() == [0] * 6


def test_variances_below_eps():
    network = Network(layers=1)
    network.arrays["l0.norm/running", "value", "var"] = lambda step: np.array([1e-9, 1e-6, 4.0, 1.0])
    frame = mismatch.small_variance(network.record())
    assert frame["value"].tolist() == [0.5]
    assert frame["n"].tolist() == [4]
    assert frame["gain"].tolist() == pytest.approx([1 / (1e-5 + 1e-9) ** 0.5], rel=1e-5)


def test_gap_and_losses_are_the_last():
    network = Network(layers=1)
    for phase, loss in (("batch", 1.0), ("population", 2.0)):
        more = {"gap": 0.4} if phase == "population" else {}
        network.extra["/output", phase, "value"] = lambda step, a=loss, b=more: {"loss": a + step, "n": 128.0, **b}
    record = network.record()
    assert mismatch.losses(record) == (91.0, 92.0)
    gap = mismatch.gap(record)
    assert (gap.value, gap.n) == (pytest.approx(0.4), 128)
    assert mismatch.gap(Network().record()).status is Status.NOT_RECORDED
    assert np.isnan(mismatch.losses(Network().record())).all()
