import dataclasses
import math

import numpy as np
import pandas as pd
import pytest

from normscope import diagnostics
from normscope.core.finding import Verdict
from normscope.core.record import Record, join
from normscope.core.source import cite
from normscope.diagnostics import (
    DIAGNOSTICS,
    attention,
    conditioning,
    curvature,
    diagnose,
    id_of,
    mismatch,
    noise,
    optimizer,
    precision,
    propagation,
    run,
    scale,
    spikes,
    structure,
    training,
)
from tests.metrics.records import Network, at, over_depth

RULES = [
    rule
    for module in (
        attention,
        conditioning,
        curvature,
        mismatch,
        noise,
        optimizer,
        precision,
        propagation,
        run,
        scale,
        spikes,
        structure,
        training,
    )
    for rule in vars(module).values()
    if type(rule).__name__ == "Rule"
]
EMPTY = Record((), pd.DataFrame(), pd.DataFrame(), pd.DataFrame(), (), ())


def pre_norm_transformer():
    """A stream that grows slowly, with massive activations late."""
    network = Network(24, norm="layer", activation=None)
    blocks = {site: {**a, "predecessor": ""} for site, a in network.blocks().items()}
    network.blocks = lambda: blocks
    network.edit(over_depth(24, 1.08, "value"))
    return network.edit(at("l20.linear/output", steps=range(50, 100), **{"max.max": 1e5, "kurtosis.max": 900.0}))


def small_batches():
    network = Network().edit(at("/input", batch=2.0)).edit(at("/running", **{"drift.q50": 0.8, "drift": 3.0}))
    network.batch = 2
    return network


def frozen():
    return Network().edit(at("/running", training=0.0, updates=500.0, change=0.0))


def shared():
    network = Network()
    network.extra_sites["l4.norm#1/output"] = {"class": "BatchNorm1d", "norm": "batch"}
    network.edit(at("l4.norm/running", calls=2.0, **{"drift.q50": 0.6}))
    return network.edit(lambda site, role, step, s: s.update(updates=2.0 * step) if site == "l4.norm/running" else None)


def accumulated():
    network = Network().edit(at("/running", calls=4.0))
    return network.edit(lambda site, role, step, s: s.update(updates=4.0 * step) if "updates" in s else None)


def half_precision():
    network = Network()
    network.contexts = {
        s: {"loss_scale": 2.0**14, "skipped": s < 3, "grad_norm": None if s < 3 else 1.0} for s in range(100)
    }
    return network


@pytest.mark.parametrize(
    "network",
    [
        Network,
        pre_norm_transformer,
        small_batches,
        frozen,
        shared,
        accumulated,
        half_precision,
        lambda: Network(norm=None),
    ],
)
def test_healthy_runs_get_no_warning(network):
    found = diagnose(network().record())
    assert [f for f in found if f.verdict in (Verdict.FAILURE, Verdict.WARNING)] == []
    needs_problem = {"mismatch.train-eval-gap", "noise.gradient-noise", "noise.small-batch"}
    needs_problem |= {"curvature.edge-of-stability"}
    assert {f.id for f in found if f.verdict is Verdict.UNDECIDED} <= needs_problem


def test_findings_come_worst_first_with_the_name_of_the_run():
    network = (
        Network(norm=None, activation="Tanh").edit(over_depth(6, 30.0, "value")).edit(at("/act/output", saturated=0.6))
    )
    found = diagnose(network.record())
    ranks = [f.verdict.rank for f in found]
    assert ranks == sorted(ranks)
    assert {f.run for f in found} == {"a"}
    assert found[0].id == "propagation.signal-exploding"


def test_runs_are_judged_by_themselves():
    good, bad = Network(norm=None).record(), Network(norm=None, run="b").edit(over_depth(6, 30.0, "value")).record()
    found = diagnose(join([good, bad]))
    assert {f.run for f in found} == {"a", "b"}
    assert {f.run for f in found if f.verdict in (Verdict.FAILURE, Verdict.WARNING)} == {"b"}
    alone = [dataclasses.replace(f, run="a") for f in diagnose(Network(norm=None).record())]
    assert [f for f in found if f.run == "a"] == alone


def test_each_diagnostic_finds_under_its_own_name_at_most_once():
    records = [Network().record(), frozen().record(), Network(norm=None, activation="Sigmoid").record()]
    for diagnostic in DIAGNOSTICS:
        for record in records:
            assert [f.id for f in diagnostic(record)] in ([], [id_of(diagnostic)])
    assert len({id_of(d) for d in DIAGNOSTICS}) == len(DIAGNOSTICS) == len(RULES)
    assert {rule.id for rule in RULES} == {id_of(d) for d in DIAGNOSTICS}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.id)
def test_every_rule_names_sources_that_exist(rule):
    assert cite(rule.source).title
    prefix = rule.threshold_source.partition(":")[0]
    assert prefix in ("identity", "measured") or cite(rule.threshold_source)


def test_findings_say_what_to_do():
    edits = (over_depth(6, 30.0, "value"), at("/running", recomputed=1.0), at("/input", **{"eps_weight.q50": 0.9}))
    for edit in edits:
        for found in diagnose(Network().edit(edit).record()):
            assert found.message.endswith(".")
            assert found.threshold_source
            assert cite(found.source)
            if found.verdict in (Verdict.FAILURE, Verdict.WARNING):
                assert found.cause
                assert found.remedy
                assert any(character.isdigit() for character in found.message)
            if found.verdict is Verdict.UNDECIDED:
                assert found.remedy


def test_a_diagnostic_that_raises_does_not_hide_the_others(monkeypatch):
    def dead_units(record):
        raise ZeroDivisionError("oops")

    dead_units.__module__ = propagation.__name__
    kept = tuple(dead_units if d is propagation.dead_units else d for d in DIAGNOSTICS)
    monkeypatch.setattr(diagnostics, "DIAGNOSTICS", kept)
    found = {f.id: f for f in diagnose(Network().record())}
    assert found["propagation.dead-units"].verdict is Verdict.UNDECIDED
    assert "ZeroDivisionError: oops" in found["propagation.dead-units"].message
    assert found["run.no-data"].verdict is Verdict.OK


def test_an_empty_record_says_one_thing():
    found = diagnose(EMPTY)
    assert [(f.id, f.verdict) for f in found if f.verdict is not Verdict.OK] == [("run.no-data", Verdict.UNDECIDED)]


def nothing_known():
    """A record whose sites say nothing and whose context has no columns."""
    record = Network().record()
    return dataclasses.replace(record, sites=record.sites[["run", "site"]], context=record.context[["run", "step"]])


@pytest.mark.parametrize(
    "record",
    [
        lambda: Network(steps=[]).record(),
        lambda: Network(steps=[0]).record(),
        lambda: Network(steps=[0, 10]).record(),
        nothing_known,
        lambda: dataclasses.replace(Network().record(), channels=(), events=pd.DataFrame()),
        lambda: dataclasses.replace(Network().record(), blocks=()),
        lambda: dataclasses.replace(Network().record(), sites=pd.DataFrame(columns=["run", "site"])),
        lambda: Network().edit(lambda site, role, step, s: s.update(dict.fromkeys(s, math.nan))).record(),
        lambda: Network().edit(lambda site, role, step, s: s.update(dict.fromkeys(s, math.inf))).record(),
        lambda: Network().edit(lambda site, role, step, s: s.update(dict.fromkeys(s, 0.0))).record(),
        lambda: Network().edit(lambda site, role, step, s: s.clear() if step % 20 else None).record(),
        lambda: Network().edit(lambda site, role, step, s: [s.pop(k) for k in [*s][step % 3 :: 3]]).record(),
    ],
)
def test_no_record_makes_a_diagnostic_raise(record):
    found = diagnose(record())
    assert [f.message for f in found if "failed on this record" in f.message] == []


def test_random_holes_never_raise():
    random = np.random.default_rng(0)
    for _ in range(10):
        keep = random.random()
        edit = lambda site, role, step, s, keep=keep: [s.pop(k) for k in [*s] if random.random() > keep]  # noqa: E731
        network = Network(layers=3, norm=random.choice(["batch", "layer"])).edit(edit)
        assert [f.message for f in diagnose(network.record()) if "failed on this record" in f.message] == []
