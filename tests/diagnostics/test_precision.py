"""What Adam's eps, the loss scale and half precision take from a step, against the optimizer's own state."""

import math

import pytest
import torch
from torch import nn

import normscope as ns
from normscope.core.finding import Verdict
from normscope.diagnostics import precision, training
from normscope.metrics import training as metrics
from tests.metrics.records import Network


@pytest.fixture(autouse=True)
def fixed():
    torch.manual_seed(0)


def trained(make, *, model=None, steps=6, target=None, dtype=torch.float32):
    """Train on fixed labels, or on noise, and return model, optimizer and record."""
    model = (nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)) if model is None else model).to(dtype)
    optimizer = make(model.parameters())
    with ns.attach(model, optimizer, every=1, probes="parameters") as scope:
        for _ in range(steps):
            x = torch.randn(16, 6, dtype=dtype)
            loss = nn.functional.cross_entropy(
                model(x).float(), torch.randint(3, (16,)) if target is None else target(x)
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scope.step(loss=loss)
    return model, optimizer, scope.record()


def shortened(optimizer, parameter):
    """The share of entries with a gradient whose step is below 0.9 of what it is without eps, in float64."""
    state, group = optimizer.state[parameter], optimizer.param_groups[0]
    second = state.get("max_exp_avg_sq", state["exp_avg_sq"]).double()
    root = (second / (1 - group["betas"][1] ** float(state["step"]))).sqrt()
    used = second > 0
    return ((root / (root + group["eps"]) < 0.9) & used).sum().item() / used.sum().item()


@pytest.mark.parametrize(
    "settings",
    [{}, {"eps": 1e-2}, {"eps": 3e-2, "amsgrad": True}, {"eps": 1e-2, "betas": (0.9, 0.5), "foreach": False}],
)
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_share_of_entries_that_eps_shortens(kind, settings):
    model, optimizer, record = trained(lambda p: kind(p, **settings))
    for name, parameter in model.named_parameters():
        site = "/".join(name.rsplit(".", 1))
        found = record.series(site, "damped", role="update").iloc[-1]
        assert found == pytest.approx(shortened(optimizer, parameter), abs=1e-6), site


def test_entries_that_never_had_a_gradient_do_not_count():
    model = nn.Embedding(9, 4)
    optimizer = torch.optim.AdamW(model.parameters(), eps=1e-12)
    with ns.attach(model, optimizer, every=1, probes="parameters") as scope:
        model(torch.tensor([1, 2])).square().sum().backward()
        optimizer.step()
    assert scope.record().series("/weight", "damped", role="update").tolist() == [0.0]


def test_other_optimizers_have_no_such_share():
    _, _, record = trained(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9))
    assert "damped" not in record.stats
    assert precision.adam_eps(record) == []


@pytest.mark.parametrize(("eps", "verdict"), [(1e-8, Verdict.OK), (1.0, Verdict.WARNING)])
def test_eps(eps, verdict):
    _, _, record = trained(lambda p: torch.optim.AdamW(p, eps=eps))
    (found,) = precision.adam_eps(record)
    assert found.verdict is verdict
    assert set(metrics.damped(record).index) == {f"{n}/{p}" for n in "012" for p in ("weight", "bias")}


def test_gradients_that_fade_because_the_task_is_learned_are_a_note():
    network = Network(norm=None)
    network.extra_sites["l0.linear/weight"] = {"class": "Parameter", "shape": [8, 8]}
    network.extra["l0.linear/weight", "train", "update"] = lambda step: {"damped": 0.9}
    (found,) = precision.adam_eps(network.record())
    assert (found.verdict, found.site) == (Verdict.WARNING, "l0.linear/weight")
    network.contexts = {step: {"loss": 2.0 * 0.9**step} for step in range(100)}
    (found,) = precision.adam_eps(network.record())
    assert found.verdict is Verdict.NOTE


def scaled(history):
    network = Network()
    network.contexts = {step: {"loss_scale": scale} for step, scale in enumerate(history)}
    return network.record()


@pytest.mark.parametrize(
    ("history", "verdict", "words"),
    [
        ([2.0 ** max(16 - step, 13) for step in range(91)], Verdict.OK, "lowered 3 times, 0% of the later half's"),
        ([2.0 ** (16 - step // 3) for step in range(91)], Verdict.WARNING, "it is still sinking"),
        ([2.0 ** max(16 - step, -3) for step in range(91)], Verdict.WARNING, "it has not come back"),
        ([2.0 ** (16 - step % 6 // 5) for step in range(91)], Verdict.NOTE, "more often than one step in 20"),
        ([2.0**16] * 91, Verdict.OK, "went from 65536 to 65536"),
    ],
)
def test_history_of_the_loss_scale(history, verdict, words):
    (found,) = precision.loss_scale(scaled(history))
    assert found.verdict is verdict
    assert words in found.message


def test_the_step_at_which_the_scale_falls_below_1():
    (found,) = precision.loss_scale(scaled([2.0 ** max(16 - step, -3) for step in range(91)]))
    assert found.step == 17
    assert found.evidence["halved"] == 19


def test_without_a_scaler_nothing_is_said():
    assert precision.loss_scale(Network().record()) == []
    assert precision.loss_scale(scaled([1.0] * 5 + [math.nan] * 86)) == []


def test_gains_that_do_not_move_in_half_precision_are_counted():
    _, _, record = trained(lambda p: torch.optim.AdamW(p, lr=1e-4), dtype=torch.bfloat16)
    (found,) = training.stuck_weights(record)
    assert found.verdict is Verdict.WARNING
    assert found.evidence["gains_beyond"] == 1
    assert found.message.endswith("1 of them gains of normalization layers.")
    assert record.series("1/weight", "still", role="update").tolist() == [1.0] * 6
