"""Adaptation against recorded numbers of public code, closed forms, and digits of another contrast."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from normscope import applications as apps
from normscope import workbench
from normscope.applications.adaptation import MixedNorm
from normscope.core.errors import ArgumentError

torch.set_num_threads(1)

OTHER = Path(__file__).parents[1] / "reference" / "other"


class Mean(nn.Module):
    def forward(self, x):
        return x.mean((2, 3))


def recorded(key):
    """The recorded network conv - norm - ReLU - mean - linear, and the other recorded arrays."""
    with np.load(OTHER / f"{key}.npz") as file:
        data = {name: torch.from_numpy(file[name]) for name in file.files if name != "__meta__"}
    model = nn.Sequential()
    for name, module in (("c", nn.Conv2d(3, 4, 3)), ("bn", nn.BatchNorm2d(4)), ("r", nn.ReLU())):
        model.add_module(name, module)
    model.add_module("m", Mean())
    model.add_module("l", nn.Linear(4, 5))
    model.double().load_state_dict({name.removeprefix("init_"): v for name, v in data.items() if name[:5] == "init_"})
    return model.eval(), data


def exactly(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_prediction_time_statistics_are_the_recorded_ones():
    model, data = recorded("predtime_bn")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    adapted = apps.prediction_time(model)
    exactly(adapted(data["x"]), data["out"])
    exactly(adapted(data["x"]), data["out"])
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("name", "source_samples"), [("bayes_p0.5", 4), ("bayes_p0.8", 16)])
def test_mixed_statistics_are_the_recorded_ones(name, source_samples):
    model, data = recorded("corruption_adapt")
    adapted = apps.prediction_time(model, source_samples)
    exactly(adapted(data["x"]), data[name])
    assert isinstance(adapted.bn, MixedNorm)
    assert "4, source_samples=" in repr(adapted)


def test_much_trust_in_the_stored_statistics_gives_the_model_itself():
    model, data = recorded("corruption_adapt")
    exactly(apps.prediction_time(model, 1e18)(data["x"]), model(data["x"]))
    exactly(model(data["x"]), data["bayes_p1"])


def test_tent_gives_the_recorded_predictions_gains_and_biases():
    model, data = recorded("tent_adam")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tent = apps.Tent(model, lambda parameters: torch.optim.Adam(parameters, lr=0.01))
    for step in (1, 2):
        exactly(tent(data[f"x{step}"]), data[f"out{step}"])
        for name in ("c.weight", "c.bias", "bn.weight", "bn.bias", "l.weight", "l.bias"):
            exactly(tent.model.get_parameter(name).detach(), data[f"s{step}_{name}"])
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    tent.reset()
    exactly(tent(data["x1"]), data["out1"])


def test_an_episodic_tent_forgets_and_more_steps_lower_the_entropy():
    model, data = recorded("tent_adam")
    once = apps.Tent(model, episodic=True)
    with torch.inference_mode():
        assert torch.equal(once(data["x1"]), once(data["x1"]))
    optimizer = lambda parameters: torch.optim.SGD(parameters, 0.5)  # noqa: E731
    entropies = [apps.entropy(apps.Tent(model, optimizer, steps=n)(data["x1"])).mean().item() for n in (1, 5, 20)]
    assert entropies[0] > entropies[1] > entropies[2]


def test_tent_drops_nothing():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    tent = apps.Tent(model, episodic=True).train()
    x = torch.randn(8, 3)
    assert torch.equal(tent(x), tent(x))


def test_entropy_is_that_of_scipy_and_of_uniform_predictions():
    stats = pytest.importorskip("scipy.stats")
    logits = torch.randn(6, 4, dtype=torch.float64)
    exactly(apps.entropy(logits), torch.from_numpy(stats.entropy(logits.softmax(1), axis=1)))
    exactly(apps.entropy(torch.zeros(1, 10, dtype=torch.float64)), torch.tensor([10.0], dtype=torch.float64).log())


def test_adabn_undoes_an_affine_change_of_the_input():
    """Recalibrated on a x + b, a network that begins with a norm gives what it gives on x with its own statistics."""
    torch.manual_seed(0)
    model = (
        nn.Sequential(nn.BatchNorm2d(2, eps=1e-14), nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.ReLU()).double().eval()
    )
    x = torch.randn(16, 2, 4, 4, dtype=torch.float64)
    source = apps.adabn(model, x.split(8), progress=False)
    target = apps.adabn(model, (3 * x - 2).split(8), progress=False)
    torch.testing.assert_close(target(3 * x - 2), source(x), rtol=1e-10, atol=1e-10)
    assert model[0].running_mean.tolist() == [0.0, 0.0]


def test_digits_of_another_contrast_are_read_again_after_adaptation():
    train, test = workbench.split(*workbench.mnist(), seed=0)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(784, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 128), nn.BatchNorm1d(128)
    ).extend([nn.ReLU(), nn.Linear(128, 10)])
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    drawn = workbench.batches(*train, 64, torch.Generator().manual_seed(0))
    for _ in range(250):
        x, y = next(drawn)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    model.eval()
    shifted, labels = 0.4 * test[0] + 1.0, test[1]

    def accuracy(m, x=shifted):
        with torch.no_grad():
            return (torch.cat([m(part) for part in x.split(200)]).argmax(1) == labels).double().mean().item()

    clean, lost = accuracy(model, test[0]), accuracy(model)
    batches = list(shifted.split(200))
    found = {
        "adabn": accuracy(apps.adabn(model, batches, progress=False)),
        "batch": accuracy(apps.prediction_time(model)),
        "mixed": accuracy(apps.prediction_time(model, 16)),
        "tent": accuracy(apps.Tent(model)),
    }
    assert lost < clean - 0.1
    assert min(found.values()) > clean - 0.03, found
    assert found["tent"] >= found["batch"] - 0.01
    uncertain = apps.entropy(torch.cat([apps.prediction_time(model)(part) for part in batches]))
    wrong = torch.cat([apps.prediction_time(model)(part) for part in batches]).argmax(1) != labels
    halves = wrong[uncertain.argsort()].double().chunk(2)
    assert halves[1].mean() > halves[0].mean() + 0.02


def test_statistics_of_batches_tell_domains_apart():
    model, data = recorded("tent_adam")
    found = apps.domain_statistics(model, "bn", [data["x1"], (data["x2"], 0)])
    y = model.bn(model.c(data["x2"]))
    exactly(found[1], torch.cat((y.mean((0, 2, 3)), y.var((0, 2, 3), correction=0))).detach())
    assert found.shape == (2, 8)
    assert "forward" not in vars(model.bn)


PLAIN, NORMED = nn.Sequential(nn.Linear(3, 3)), nn.Sequential(nn.BatchNorm1d(3, affine=False))
REFUSED = {
    "no norm": (lambda: apps.prediction_time(PLAIN), "model=Sequential has no batch norm of torch with stored"),
    "negative": (lambda: apps.prediction_time(NORMED, -1), "source_samples=-1 must be a number of samples, at least 0"),
    "no gain": (lambda: apps.Tent(NORMED), "model=Sequential has no batch norm with gain and bias to adapt"),
    "steps": (lambda: apps.Tent(NORMED, steps=0), "steps=0 must be a number of updates a batch, at least 1"),
    "layer": (lambda: apps.domain_statistics(PLAIN, "1", []), "layer='1' is unknown; .*Options: , 0"),
    "no batch": (lambda: apps.domain_statistics(PLAIN, "0", []), "batches: no batch reached layer='0'; pass at least"),
    "nothing to measure": (lambda: apps.adabn(PLAIN, []), "model has no norm with running statistics"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_named(name):
    call, message = REFUSED[name]
    with pytest.raises(ArgumentError, match=message):
        call()
