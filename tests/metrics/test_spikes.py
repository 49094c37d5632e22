"""Spikes and onsets on records made by hand, where both are known."""

import numpy as np
import pandas as pd
import pytest

from normscope.core.record import Block, Record
from normscope.metrics import onset, spikes

STEPS = 300


def record(loss=None, norm=None, flight=None, lr=None):
    """A record with a loss, a gradient norm and what the flight recorder held of some tensors."""
    n = STEPS
    context = pd.DataFrame({"run": "a", "step": range(n), "skipped": False, "loss": loss, "grad_norm": norm})
    blocks = []
    for site, parts in (flight or {}).items():
        for (role, stat), values in parts.items():
            column = np.asarray(values, np.float32)[:, None]
            blocks.append(Block("a", site, "flight", role, (stat,), np.arange(n), column))
    if lr is not None:
        blocks.append(Block("a", "SGD/group0", "flight", "value", ("lr",), np.arange(n), np.asarray(lr)[:, None]))
    return Record(
        ({"run": "a"},), pd.DataFrame({"site": list(flight or {})}), context, pd.DataFrame(), tuple(blocks), ()
    )


def noisy(seed=0, level=1.0, n=STEPS):
    return level * np.exp(0.1 * np.random.default_rng(seed).standard_normal(n))


def tensors(**changes):
    """Three quiet tensors; changes: name -> {(role, stat): function of the array}."""
    found = {}
    for i, name in enumerate(("a", "b", "c")):
        parts = {
            ("gradient", "norm"): noisy(3 * i),
            ("update", "norm"): noisy(3 * i + 1, 1e-3),
            ("gradient", "rms_t"): noisy(3 * i + 2),
            ("value", "norm"): np.full(STEPS, 5.0),
        }
        for key, change in changes.get(name, {}).items():
            parts[key] = change(parts[key].copy())
        found[f"{name}/weight"] = parts
    return found


def times(factor, start, end=STEPS):
    def change(values):
        values[start:end] *= factor
        return values

    return change


@pytest.mark.parametrize(("value", "length"), [(3.0, 1), (3.0, 20), (np.inf, 1), (np.inf, 5)])
def test_a_jump_is_found_where_it_is(value, length):
    loss = noisy()
    loss[200 : 200 + length] = value
    (spike,) = spikes.spikes(record(loss))
    assert (spike.step, spike.last, spike.of, spike.peak) == (200, 199 + length, "loss", value)
    assert spike.before == pytest.approx(np.exp(np.median(np.log(loss[72:200]))), rel=1e-9)
    assert spike.recovered


@pytest.mark.parametrize("seed", range(20))
def test_noise_and_learning_are_no_spikes(seed):
    falling = np.exp(-np.arange(STEPS) / 60) + 0.05
    assert spikes.spikes(record(noisy(seed))) == ()
    assert spikes.spikes(record(noisy(seed, falling), noisy(seed + 1))) == ()
    assert spikes.spikes(record(norm=noisy(seed))) == ()


def test_a_level_that_stays_is_a_spike_that_did_not_recover():
    loss = noisy()
    loss[220:] *= 1.5
    (spike,) = spikes.spikes(record(loss))
    assert abs(spike.step - 220) <= 4
    assert not spike.recovered


def test_without_a_loss_the_gradient_norm_tells():
    norm = noisy()
    norm[150] = 80.0
    (spike,) = spikes.spikes(record(norm=norm))
    assert (spike.step, spike.of) == (150, "gradient norm")


def test_two_far_apart_are_two_and_near_ones_are_one():
    loss = noisy()
    loss[[100, 110, 200]] = 5.0
    assert [(s.step, s.last) for s in spikes.spikes(record(loss))] == [(100, 110), (200, 200)]


def test_a_loss_below_zero_is_judged_as_it_is():
    loss = -5 + 0.1 * np.random.default_rng(0).standard_normal(STEPS)
    assert spikes.spikes(record(loss)) == ()
    loss[200] = 1.0
    assert [s.step for s in spikes.spikes(record(loss))] == [200]


def test_onsets_come_in_their_order_with_their_share():
    changed = tensors(
        b={("gradient", "norm"): times(30, 195)},
        c={("update", "norm"): times(30, 190), ("gradient", "norm"): times(30, 200)},
    )
    loss = noisy()
    loss[200:] = 9.0
    found = onset.window(record(loss, flight=changed), 200)
    moved = onset.onsets(found, 200)
    assert list(moved.index) == ["c/weight", "b/weight"]
    assert moved["onset"].tolist() == [190, 195]
    assert moved["of"].tolist() == ["update", "gradient"]
    gradients = {name: parts["gradient", "norm"][195] ** 2 for name, parts in changed.items()}
    assert moved.loc["b/weight", "share"] == pytest.approx(gradients["b/weight"] / sum(gradients.values()), rel=1e-5)


def test_what_has_come_back_before_is_no_onset():
    changed = tensors(a={("gradient", "norm"): times(30, 170, 180)})
    found = onset.window(record(noisy(), flight=changed), 200)
    assert not len(onset.onsets(found, 200))


KINDS = {
    "data": {"a": {("gradient", "norm"): times(30, 200, 201)}},
    "second-moment": {"b": {("gradient", "rms_t"): times(9, 196), ("gradient", "norm"): times(9, 196)}},
    "instability": {"c": {("gradient", "norm"): times(9, 185), ("update", "norm"): times(9, 185)}},
    "outside": {"a": {("value", "norm"): times(3, 198)}},
    "overflow": {"b": {("gradient", "norm"): times(np.inf, 199)}},
    "undecided": {},
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_by_its_sign(kind):
    loss = noisy()
    loss[200] = 9.0
    (account,) = spikes.accounts(record(loss, flight=tensors(**KINDS[kind])))
    assert account.kind == kind
    where = "" if kind in ("data", "undecided") else f"{next(iter(KINDS[kind]))}/weight"
    assert (account.sites[0] if account.sites else "") == where
    since = {"second-moment": 196, "instability": 185, "outside": 198, "overflow": 199}.get(kind, 200)
    assert account.since == since


@pytest.mark.parametrize(("lr", "kind"), [(10.0, "schedule"), (1.2, "instability")])
def test_a_raised_rate_is_the_cause_where_nothing_moved_before(lr, kind):
    loss, rate = noisy(), np.ones(STEPS)
    loss[200] = 9.0
    rate[198:] = lr
    changed = tensors(a={("update", "norm"): times(10, 198)})
    (account,) = spikes.accounts(record(loss, flight=changed, lr=rate))
    assert account.kind == kind
    earlier = tensors(a={("update", "norm"): times(10, 190)})
    (account,) = spikes.accounts(record(loss, flight=earlier, lr=rate))
    assert account.kind == "instability"


def test_queries_and_keys_that_grew_are_attention():
    loss = noisy()
    loss[200] = 9.0
    growth = np.ones(STEPS)
    growth[180:] = 1.05 ** np.arange(STEPS - 180)
    moving = {("update", "norm"): times(30, 181), ("value", "norm"): lambda values: values * growth}
    flight = tensors(a=moving)
    flight = {{"a/weight": "block.q_proj/weight"}.get(site, site): parts for site, parts in flight.items()}
    moves = np.abs(np.diff(flight["block.q_proj/weight"]["value", "norm"], prepend=5.0)) + 1e-3
    flight["block.q_proj/weight"]["update", "norm"] = moves * noisy(7)
    (account,) = spikes.accounts(record(loss, flight=flight))
    assert (account.kind, account.sites) == ("attention", ("block.q_proj/weight",))
    assert account.evidence["weight_growth"] == pytest.approx(1.05**20, rel=0.1)


def test_steps_that_were_not_kept_leave_it_undecided():
    loss = noisy()
    loss[200] = 9.0
    (account,) = spikes.accounts(record(loss))
    assert (account.kind, account.evidence) == ("undecided", {"recorded_steps": 0})


@pytest.mark.parametrize(
    "site", ["q_proj", "attn.to_k", "layers.0.self_attn.k_norm", "block.qkv", "h.0.attn.c_attn", "q"]
)
def test_what_makes_queries_or_keys_is_known_by_name(site):
    assert spikes.QUERY_KEY.search(site)


@pytest.mark.parametrize("site", ["v_proj", "mlp.expand", "block.norm1", "equal", "keynote.out", "head"])
def test_what_does_not_is_not(site):
    assert not spikes.QUERY_KEY.search(site)
