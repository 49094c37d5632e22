"""Inspection: sound layers pass, and each way of being broken is found by the law it breaks and by no other."""

import pytest
import torch
from torch import nn

from normscope.core.errors import ArgumentError
from normscope.norms.checks import LAWS
from normscope.norms.inspection import SHAPES, inspect
from normscope.norms.table import build

torch.set_num_threads(1)


class Sound(nn.Module):
    """Instance normalization with a gain, for images."""

    def __init__(self, n):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n))

    def forward(self, x):
        centered = x - x.mean((2, 3), keepdim=True)
        return self.scaled(x, centered / (centered.square().mean((2, 3), keepdim=True) + 1e-5).sqrt())

    def scaled(self, x, y):
        return y * self.weight.reshape(-1, 1, 1)


class LeaksInEvaluation(Sound):
    def forward(self, x):
        return self.scaled(x, x - x.mean((0, 2, 3), keepdim=True))


class Detached(Sound):
    def forward(self, x):
        return super().forward(x.detach())


class Unused(Sound):
    def scaled(self, x, y):
        return y


class StopsGradient(Sound):
    def forward(self, x):
        return self.scaled(x, x / (x.detach().square().mean((2, 3), keepdim=True) + 1e-5).sqrt())


class AlwaysSingle(Sound):
    def scaled(self, x, y):
        return super().scaled(x, y).float()


class RoughInHalf(Sound):
    def forward(self, x):
        return super().forward(x) if x.dtype != torch.bfloat16 else super().forward(x) * 1.2


class NoEps(Sound):
    def forward(self, x):
        centered = x - x.mean((2, 3), keepdim=True)
        return self.scaled(x, centered / centered.square().mean((2, 3), keepdim=True).sqrt())


class StoresInEvaluation(Sound):
    def __init__(self, n):
        super().__init__(n)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen += 1
        return super().forward(x)


class Forgets(Sound):
    def __init__(self, n):
        super().__init__(n)
        self.count = 0.0

    def forward(self, x):
        self.count = self.count + 1.0 if self.training else self.count
        return super().forward(x) * (1 + self.count)


class RandomInEvaluation(Sound):
    def forward(self, x):
        return super().forward(x) + torch.rand((), dtype=x.dtype)


BROKEN = {
    LeaksInEvaluation: "alone",
    Detached: "trains",
    Unused: "trains",
    StopsGradient: "gradient",
    AlwaysSingle: "precision",
    RoughInHalf: "bfloat16",
    NoEps: "degenerate",
    StoresInEvaluation: "modes",
    Forgets: "state",
    RandomInEvaluation: "repeats",
}


def failed(inspection):
    return {row.law for row in inspection.failures}


@pytest.mark.parametrize(
    "factory",
    [nn.BatchNorm2d, nn.InstanceNorm2d, nn.LayerNorm, lambda n: nn.GroupNorm(2, n), nn.Identity, Sound],
    ids=["batch", "instance", "layer", "group", "identity", "sound"],
)
def test_sound_layers_pass(factory):
    found = inspect(factory)
    assert found.ok, found
    assert "nothing failed" in repr(found)


@pytest.mark.parametrize("factory", BROKEN)
def test_what_is_broken_is_found(factory):
    assert BROKEN[factory] in failed(inspect(factory))


def test_what_is_broken_breaks_no_other_law():
    alone = [factory for factory in BROKEN if factory not in (Detached, AlwaysSingle, Forgets, RandomInEvaluation)]
    assert [failed(inspect(factory)) for factory in alone] == [{BROKEN[factory]} for factory in alone]


def infos(factory, shape=None):
    return " ".join(row.seen for row in inspect(factory, shape=shape).rows if row.verdict == "info")


def test_properties_are_found():
    batch = infos(nn.BatchNorm2d)
    assert "in training an example depends on the others" in batch
    assert "training stores running_mean, running_var" in batch
    assert "unchanged by a constant added and by a positive factor" in batch
    layer = infos(nn.LayerNorm)
    assert "does not depend on the others" in layer
    assert "stores nothing" in layer
    assert "unchanged by a positive factor" in infos(nn.RMSNorm)
    assert "random in training" in infos(lambda n: nn.Dropout())


def test_a_layer_of_tokens_is_asked_whether_it_sees_the_future():
    over_time = inspect(lambda n: Over((1, 2)), shape=(6, 5, 8))
    assert failed(over_time) == {"causal"}
    assert "causal" in {row.law for row in inspect(nn.LayerNorm, shape=(6, 5, 8)).rows}
    assert "causal" not in {row.law for row in inspect(nn.LayerNorm, shape=(6, 8)).rows}


class Over(nn.Module):
    def __init__(self, axes):
        super().__init__()
        self.axes = axes

    def forward(self, x):
        return x / (x.square().mean(self.axes, keepdim=True) + 1e-5).sqrt()


def test_declared_traits_add_their_laws():
    laws = {row.law for row in inspect(lambda n: build("gn", n, groups=2)).rows}
    assert "declared: scale" in laws
    assert laws & {f"declared: {law.name}" for law in LAWS} == {law for law in laws if law.startswith("declared")}


def test_a_shape_that_it_does_not_take_fails_with_what_was_raised():
    found = inspect(nn.BatchNorm2d, shape=(6, 8))
    assert failed(found) == {"runs"}
    assert "expected 4D input" in repr(found)
    none = inspect(lambda n: nn.Linear(3, n))
    assert failed(none) == {"runs"}
    assert all(" x ".join(map(str, shape)) in repr(none) for shape in SHAPES)


def test_the_table_names_law_verdict_and_what_was_seen():
    text = repr(inspect(LeaksInEvaluation))
    assert text.splitlines()[0] == "LeaksInEvaluation, tried with inputs 6 x 8 x 4 x 5"
    assert "✕ fail  alone " in text
    assert "in evaluation an example depends on the others: its output moves by" in text
    assert text.endswith("1 failed")


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    inspect(lambda n: nn.Sequential(nn.Linear(n, n), nn.Dropout()), shape=(6, 8))
    assert torch.equal(torch.get_rng_state(), before)


def test_what_is_no_layer_is_refused():
    with pytest.raises(ArgumentError, match=r"made 3; it must make a torch.nn.Module"):
        inspect(lambda n: 3)
    with pytest.raises(ArgumentError, match=r"shape=\(6, 4\) has no axis of num_features=8; try \(6, 8, 4, 5\)"):
        inspect(nn.Identity, shape=(6, 4))
