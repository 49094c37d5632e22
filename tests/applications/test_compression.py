"""Compression against recorded numbers, and small networks against the masked ones that they must equal."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from normscope import applications as apps
from normscope import norms, workbench
from normscope.core.errors import ArgumentError

torch.set_num_threads(1)

SLIMMING = Path(__file__).parents[1] / "reference" / "other" / "network_slimming.npz"


def recorded():
    with np.load(SLIMMING) as file:
        data = {name: torch.from_numpy(file[name]) for name in file.files if name != "__meta__"}
    model = nn.ModuleDict({"b1": nn.BatchNorm2d(4), "b2": nn.BatchNorm2d(5)}).double()
    model.load_state_dict({name.removeprefix("init_"): v for name, v in data.items() if name[:5] == "init_"})
    return model, data


def test_threshold_masks_and_pruned_norms_are_the_recorded_ones():
    model, data = recorded()
    assert apps.threshold(model, 0.4) == pytest.approx(data["thre"].item(), rel=1e-12)
    pruned = apps.prune(model, 0.4)
    for number, name in enumerate(("b1", "b2")):
        kept = data[f"mask{number}"].bool()
        assert torch.equal(pruned[name].weight != 0, kept)
        for key in ("weight", "bias"):
            assert torch.equal(pruned[name].get_parameter(key), data[f"after_{name}.{key}"])
    assert model["b1"].weight.ne(0).all()


def test_the_subgradient_is_the_recorded_one():
    _, data = recorded()
    norm = nn.BatchNorm1d(4).double()
    norm.weight.data, norm.weight.grad = data["sl_gamma"].clone(), data["sl_grad0"].clone()
    apps.add_sparsity(norm, 0.01)
    torch.testing.assert_close(norm.weight.grad, data["sl_grad1"], rtol=0, atol=1e-15)


def random_parts(model, seed=0):
    """Gains of both signs and sizes, biases and statistics that matter."""
    generator = torch.Generator().manual_seed(seed)
    for norm in (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)):
        norm.weight.data = torch.randn(norm.num_features, generator=generator)
        norm.bias.data = torch.randn(norm.num_features, generator=generator)
        norm.running_mean = torch.randn(norm.num_features, generator=generator)
        norm.running_var = torch.rand(norm.num_features, generator=generator) + 0.5
    return model.double().eval()


def conv_block(i, o, act=nn.ReLU, **kwargs):
    return nn.Conv2d(i, o, 3, padding=1, **kwargs), nn.BatchNorm2d(o), act()


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.c1, self.b1 = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.c2, self.b2 = nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6)
        self.out = nn.Linear(6 * 4, 5)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.b1(self.c1(x))), 2)
        x = F.adaptive_avg_pool2d(F.relu(self.b2(self.c2(x))), 2)
        return self.out(torch.flatten(x, 1))


class Branches(nn.Module):
    """One norm feeds two convolutions; their sum is normed before a third."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(*conv_block(3, 8))
        self.a, self.b = nn.Conv2d(8, 6, 1), nn.Conv2d(8, 6, 3, padding=1)
        self.end = nn.Sequential(nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 2, 1))

    def forward(self, x):
        y = self.stem(x)
        return self.end(self.a(y) + self.b(y))


def mlp():
    return nn.Sequential(
        *(nn.Flatten(), nn.Linear(3 * 100, 20, bias=False), nn.BatchNorm1d(20), nn.ReLU(), nn.Dropout(0.5)),
        *(nn.Linear(20, 16), nn.BatchNorm1d(16), nn.GELU(), nn.Linear(16, 5)),
    )


def shared():
    norm = nn.BatchNorm2d(8)
    return nn.Sequential(nn.Conv2d(3, 8, 1), norm, nn.Conv2d(8, 8, 1), norm, nn.Conv2d(8, 2, 1))


NETWORKS = {
    "plain": (
        lambda: nn.Sequential(
            *conv_block(3, 8),
            nn.MaxPool2d(2),
            *conv_block(8, 6),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(24, 5),
        ),
        2,
    ),
    "perceptron": (mlp, 2),
    "functional": (Functional, 2),
    "branches": (Branches, 1),
    "residual": (lambda: workbench.residual_cnn(8, (1, 1)), 2),
    "grouped": (
        lambda: nn.Sequential(*conv_block(3, 8), nn.Conv2d(8, 8, 3, groups=8), *conv_block(8, 6), nn.Conv2d(6, 2, 1)),
        1,
    ),
    "sigmoid": (lambda: nn.Sequential(*conv_block(3, 8, nn.Sigmoid), nn.Conv2d(8, 4, 1)), 0),
    "places": (lambda: nn.Sequential(nn.Conv2d(3, 10, 1), nn.BatchNorm2d(10), nn.ReLU(), nn.Linear(10, 4)), 0),
    "flattened late": (
        lambda: nn.Sequential(nn.Conv2d(3, 10, 1), nn.BatchNorm2d(10), nn.Flatten(2), nn.Linear(100, 4)),
        0,
    ),
    "shared norm": (shared, 0),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_shrunk_network_equals_the_masked_one_and_so_does_the_folded_one(name):
    make, cut = NETWORKS[name]
    torch.manual_seed(0)
    model = random_parts(make())
    x = torch.randn(4, 1 if name == "residual" else 3, 10, 10, dtype=torch.float64)
    masked = apps.prune(model, 0.5)
    small = apps.shrink(masked)
    torch.testing.assert_close(small(x), masked(x), rtol=1e-12, atol=1e-12)
    assert (small(x) - model(x)).abs().max() > 1e-3
    sizes = [
        [m.num_features for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        for net in (masked, small)
    ]
    assert sum(a != b for a, b in zip(*sizes, strict=True)) == cut
    torch.testing.assert_close(norms.fold(small)(x), masked(x), rtol=1e-10, atol=1e-10)


def test_the_small_network_has_the_channels_that_were_kept():
    model = random_parts(NETWORKS["plain"][0]())
    keep = apps.compression.keep_above(model, apps.threshold(model, 0.5))
    small = apps.shrink(apps.mask(model, keep))
    first, second = (int(k.sum()) for k in keep.values())
    assert small[0].weight.shape == (first, 3, 3, 3)
    assert small[4].weight.shape == (second, first, 3, 3)
    assert small[9].weight.shape == (5, 4 * second)
    assert (small[0].out_channels, small[4].in_channels, small[9].in_features) == (first, first, 4 * second)
    assert first + second < 14


def test_a_layer_never_goes_whole():
    model = random_parts(NETWORKS["plain"][0]())
    model[1].weight.data *= 1e-6
    keep = apps.compression.keep_above(model, apps.threshold(model, 0.5))
    assert keep["1"].sum() == 1
    gone = apps.mask(model, {"1": torch.zeros(8, dtype=torch.bool)})
    x = torch.randn(2, 3, 10, 10, dtype=torch.float64)
    torch.testing.assert_close(apps.shrink(gone)(x), gone(x))


@pytest.fixture(scope="module")
def slimmed():
    """Perceptrons on digits, trained with and without the penalty, and the digits."""
    train, test = workbench.split(*workbench.mnist(), seed=0)
    found = {}
    for strength in (0.0, 1e-2):
        torch.manual_seed(0)
        model = nn.Sequential(
            *(nn.Flatten(), nn.Linear(784, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 64), nn.BatchNorm1d(64)),
            *(nn.ReLU(), nn.Linear(64, 10)),
        )
        for norm in (model[2], model[5]):
            nn.init.constant_(norm.weight, 0.5)
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        drawn = workbench.batches(*train, 64, torch.Generator().manual_seed(0))
        for _ in range(500):
            x, y = next(drawn)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            apps.add_sparsity(model, strength)
            optimizer.step()
        found[strength] = (model.eval(), train, test)
    return found


def accuracy(model, pair):
    with torch.no_grad():
        return (model(pair[0]).argmax(1) == pair[1]).double().mean().item()


def test_the_penalty_makes_gains_small_and_pruning_harmless(slimmed):
    (plain, _, test), (sparse, *_) = slimmed[0.0], slimmed[1e-2]
    small = [torch.cat([*apps.gains(m).values()]).lt(0.05).double().mean().item() for m in (plain, sparse)]
    assert small[0] < 0.01 < 0.3 < small[1]
    lost = [accuracy(m, test) - accuracy(apps.shrink(apps.prune(m, 0.4)), test) for m in (plain, sparse)]
    assert abs(lost[1]) < 0.02
    assert lost[0] > 0.2


def test_eagle_eye_ranks_by_what_is_left_with_statistics_of_its_own(slimmed):
    model, train, test = slimmed[0.0]
    generator = torch.Generator().manual_seed(0)
    candidates = [
        {path: torch.rand(64, generator=generator) > fraction for path in ("2", "5")} for fraction in (0.6, 0.2, 0.4)
    ]
    data = [train[0][:500], train[0][500:1000]]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ranked = apps.eagle_eye(model, candidates, data, lambda m: accuracy(m, test))
    assert [number for _, number in ranked] == [1, 2, 0]
    for found, number in ranked:
        masked = apps.mask(model, candidates[number])
        assert found > accuracy(masked, test) + 0.01  # its own statistics help
        assert found == accuracy(norms.recalibrate(masked, data, progress=False), test)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x):
        return self.norm(x) if x.sum() > 0 else x


NORM = nn.Sequential(nn.BatchNorm1d(3))
REFUSED = {
    "no gains": (lambda: apps.prune(nn.Linear(2, 2), 0.5), "model=Linear has no batch norm of torch with gains"),
    "fraction": (lambda: apps.prune(NORM, 1.0), r"fraction=1\.0 must be at least 0 and below 1"),
    "no gradient": (lambda: apps.add_sparsity(NORM), r"0\.weight has no gradient; call add_sparsity between backward"),
    "path": (
        lambda: apps.mask(NORM, {"1": torch.ones(3).bool()}),
        "keep: '1' with .* fits no batch norm; .* by path: 0",
    ),
    "size": (lambda: apps.mask(NORM, {"0": torch.ones(2).bool()}), r"keep: '0' with \(2,\) of torch.bool fits no"),
    "numbers": (lambda: apps.mask(NORM, {"0": torch.ones(3)}), "of torch.float32 fits no batch norm; it takes bool"),
    "trace": (lambda: apps.shrink(Untraceable()), r"Untraceable cannot be traced by torch\.fx \(TraceError: "),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_named(name):
    call, message = REFUSED[name]
    with pytest.raises(ArgumentError, match=message):
        call()
