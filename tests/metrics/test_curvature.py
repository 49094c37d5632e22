"""Metrics of curvature, on records written by hand and against dense matrices and iterations."""

import numpy as np
import pytest

from normscope.core.store import Store
from normscope.metrics import curvature
from tests.metrics.records import Network

EMPTY = Store(None, "empty", {}).record()
HELD = {"held_loss": 1.0, "samples": 64.0, "sharpness": 10.0, "sharpness_residual": 0.1, "lr": 0.1}
SPECTRUM = (np.array([-1.0, 0.0, 1.0, 10.0]), np.array([0.2, 0.6, 0.1, 0.1]))


def measured(rows, traces=None, optimizer="SGD", momentum=0.9, facts=None, spectrum=SPECTRUM):
    """A record with snapshots: statistics of the whole model by step, traces of parameters by site."""
    steps = list(rows)
    store = Store(None, "a", {"problem": True})
    store.site("/output", {"module": "", "call": 0, "slot": "output", "class": "model", "order": 0})
    for order, site in enumerate(traces or {"l0/weight": (1.0, 0.1)}):
        module, _, slot = site.rpartition("/")
        known = {"module": module, "call": 0, "slot": slot, "class": "Parameter", "order": order + 1, "shape": [2, 2]}
        store.site(site, known | (facts or {}))
    for step, stats in rows.items():
        stats = HELD | {"lr": 0.1} | stats
        store.step({"step": step, "sampled": True, "batch_size": 64, "loss": 1.0, "loss_scale": None, "grad_norm": 1.0,
                    "skipped": False})  # fmt: skip
        group = {"optimizer": optimizer, "group": 0, "lr": 0.1, "momentum": momentum, "decay": 0.0}
        store.group({"step": step, **group})
        values = np.array(list(stats.values()))
        store.scalars(step, "/output", "batch", "value", tuple(stats), values)
        for name, array in zip(("nodes", "weights"), spectrum, strict=True):
            store.array(step, "/output", "batch", "value", name, array)
        for site, pair in (traces or {}).items():
            store.scalars(step, site, "batch", "value", ("trace", "trace_error"), np.array(pair))
    store.commit()
    assert steps == store.record().steps.tolist()
    return store.record()


def grows(rule, product, momentum, nesterov=False, dampening=0.0):
    """Whether the optimizer itself, on lambda x^2 / 2 with lr lambda = product, moves away from the minimum."""
    x, velocity = 1.0, 0.0
    for _ in range(4000):
        if rule == "SGD":
            velocity = momentum * velocity + (1 - dampening) * x
            step = x + momentum * velocity if nesterov else velocity
        else:
            velocity = momentum * velocity + (1 - momentum) * x
            step = velocity
        x -= product * step
        if abs(x) > 1e6:
            return True
    return False


@pytest.mark.parametrize(
    ("rule", "options"),
    [
        ("SGD", {"momentum": 0.0}),
        ("SGD", {"momentum": 0.9}),
        ("SGD", {"momentum": 0.9, "nesterov": True}),
        ("SGD", {"momentum": 0.5, "dampening": 0.5}),
        ("AdamW", {"momentum": 0.9}),
        ("Adam", {"momentum": 0.5}),
    ],
)
def test_the_edge_is_where_the_iteration_begins_to_grow(rule, options):
    edge = curvature.stability_edge(rule, **options)
    assert not grows(rule, 0.99 * edge, **options)
    assert grows(rule, 1.01 * edge, **options)


@pytest.mark.parametrize(
    ("optimizer", "momentum", "facts", "edge"),
    [
        ("SGD", None, None, 20.0),
        ("SGD", 0.9, None, 38.0),
        ("SGD", 0.9, {"nesterov": True}, 38.0 / 2.8),
        ("SGD", 0.9, {"dampening": 0.5}, 76.0),
        ("AdamW", 0.9, None, 380.0),
        ("AdamW 1", 0.9, None, 380.0),
        ("Muon", 0.9, None, np.nan),
    ],
)
def test_the_edge_follows_the_recorded_settings(optimizer, momentum, facts, edge):
    record = measured({0: {}, 10: {"preconditioned": 19.0}}, None, optimizer, momentum, facts)
    frame = curvature.stability(record)
    assert frame["edge"].tolist() == pytest.approx([edge] * 2, nan_ok=True)
    assert frame["sharpness"].tolist() == [10.0, 19.0]
    assert frame["ratio"].tolist() == pytest.approx([10 / edge, 19 / edge], nan_ok=True)


def test_snapshots_without_an_optimizer_have_no_edge():
    frame = curvature.stability(measured({0: {"lr": np.nan}}))
    assert frame["sharpness"].tolist() == [10.0]
    assert frame["ratio"].isna().all()


def test_outliers_count_where_the_kth_eigenvalue_is_known():
    rows = {
        0: {"k": 10.0, "kth": 2.0, "kth_residual": 0.1},
        1: {"k": 10.0, "kth": 2.0, "kth_residual": 1.0},
        2: {"k": 10.0, "kth": -1.0, "kth_residual": 0.0},
        3: {"k": 1.0, "kth": 10.0, "kth_residual": 0.0},
    }
    assert curvature.outlier_ratio(measured(rows)).tolist() == pytest.approx([5.0, *[np.nan] * 3], nan_ok=True)


def test_negative_mass_is_a_share_of_the_absolute_one():
    assert curvature.negative_mass(measured({0: {}})).tolist() == pytest.approx([0.2 / (0.2 + 0.1 + 1.0)])
    values = np.linalg.eigvalsh(np.diag([-3.0, 1.0, 2.0]))
    record = measured({0: {}}, spectrum=(values, np.full(3, 1 / 3)))
    assert curvature.negative_mass(record).iloc[0] == pytest.approx(0.5)


def test_a_density_integrates_to_one_and_peaks_at_the_nodes():
    grid, values = curvature.density(*SPECTRUM, points=20_000)
    assert np.trapezoid(values, grid) == pytest.approx(1, abs=1e-4)
    variance = 1e-5 * 11
    peak = values[np.argmin(abs(grid - 10.0))]
    assert peak == pytest.approx(0.1 / np.sqrt(2 * np.pi * variance), rel=1e-6)


def test_layers_share_the_trace():
    traces = {"a/weight": (6.0, 0.1), "a/bias": (2.0, 0.2), "b/weight": (-2.0, 0.5)}
    record = measured({0: {}, 10: {"trace": 6.0, "trace_error": 0.4}}, traces)
    frame = curvature.balance(record)
    assert frame["trace"].to_dict() == {"a": 8.0, "b": -2.0}
    assert frame["error"].to_dict() == pytest.approx({"a": 0.3, "b": 0.5})
    assert frame["share"].to_dict() == pytest.approx({"a": 0.8, "b": 0.2})
    assert curvature.layer_traces(record).shape == (2, 2)
    whole = curvature.trace(record)
    assert (whole.value, whole.standard_error) == pytest.approx((6.0, 0.4))


@pytest.mark.parametrize("record", [EMPTY, Network().record()])
def test_without_snapshots_there_is_nothing(record):
    assert len(curvature.snapshots(record)) == len(curvature.stability(record)) == 0
    assert len(curvature.outlier_ratio(record)) == len(curvature.negative_mass(record)) == 0
    assert len(curvature.balance(record)) == len(curvature.layer_traces(record)) == 0
    assert not curvature.trace(record).usable
