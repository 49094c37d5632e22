"""Attached on an accelerator: the same training, nothing waits for the device but the transfer of a sampled step."""

import warnings

import pytest
import torch
from torch import nn

import normscope as ns

HAVE = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
DEVICES = [
    pytest.param(name, marks=pytest.mark.skipif(not there, reason=f"this machine has no {name} device"))
    for name, there in HAVE.items()
]


def spy(original, calls):
    def call(self, *args, **kwargs):
        calls.append(original.__name__)
        return original(self, *args, **kwargs)

    return call


def train(device, attached, steps=7, waits=None, **settings):
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10), nn.LayerNorm(10)
    model = nn.Sequential(*layers).to(device)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    data = torch.randn(steps, 16, 3, 8, 8).to(device)
    scope = ns.attach(model, optimizer, every=3, **settings) if attached else None
    for step, x in enumerate(data):
        with pytest.MonkeyPatch.context() as patch:
            if waits is not None and step % 3:
                for name in ("item", "cpu", "tolist", "__bool__", "__float__"):
                    patch.setattr(torch.Tensor, name, spy(getattr(torch.Tensor, name), waits))
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    if scope is not None:
        scope.close()
    return [value.cpu() for value in model.state_dict().values()], scope


@pytest.mark.parametrize("device", DEVICES)
def test_training_is_the_same_and_recorded(device):
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            plain, _ = train(device, False)
            watched, scope = train(device, True)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))
    record = scope.record()
    assert record.runs[0]["device"].startswith(device)
    assert record.steps.tolist() == [0, 3, 6]
    seen = {(block.site, block.role) for block in record.blocks}
    assert {("0/output", "gradient"), ("1/running", "value"), ("4/weight", "update"), ("4/input", "value")} <= seen


@pytest.mark.parametrize("device", [*DEVICES, "cpu"])
def test_statistics_are_those_of_a_processor(device):
    _, here = train(device, True, steps=1)
    _, there = train("cpu", True, steps=1)
    for site in ("0/output", "4/output"):
        for role in ("value", "gradient"):
            one, two = (s.record().series(site, "rms", role=role).to_numpy() for s in (here, there))
            assert one == pytest.approx(two, rel=1e-3)


@pytest.mark.parametrize("device", [*DEVICES, "cpu"])
def test_a_step_that_is_not_sampled_waits_for_nothing(device):
    waits = []
    train(device, True, waits=waits, probes=("moments", "parameters", "normalization"))
    assert waits == []


@pytest.mark.parametrize("device", [DEVICES[0]])
def test_cuda_itself_sees_no_synchronization_in_between(device):
    def synchronizing(attached, steps):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                train(device, attached, steps)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(warning.message) for warning in caught)

    ours = [synchronizing(True, steps) - synchronizing(False, steps) for steps in (1, 3)]
    assert ours[0] == ours[1]  # of the sampled step and of closing; the two steps more have none
