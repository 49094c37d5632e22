"""Noise of normalization layers on held inputs: against the layer resampled by hand, sampling theory, and in a run."""

import numpy as np
import pytest
import torch
from torch import nn

import normscope as ns
from normscope.norms import Affine, Batch, Norm, Running, Whiten, find_norms
from normscope.probes import noise
from tests.checks import bits

LOSS = nn.functional.mse_loss


def problem(model, x):
    return ns.Problem(model, lambda output, target: output.square().mean(), [(x, x)])


def rows(model, x, batch):
    found = noise.measure(problem(model, x), find_norms(model), batch).get("noise", [])
    return {row.site: (dict(zip(row.stats, row.values, strict=True)), row.arrays) for row in found}


def images(n=256, seed=1):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 6, 6, generator=draw) + torch.randn(n, 3, 1, 1, generator=draw)


@pytest.mark.parametrize("batch", [16, 64, 1024])
def test_it_agrees_with_the_disturbance_of_the_layer_alone(batch):
    x = images()
    ((stats, _),) = rows(nn.Sequential(nn.BatchNorm2d(3)), x, batch).values()
    reference = ns.snd(nn.BatchNorm2d(3), x, batch, 100)
    error = np.hypot(stats["snd_error"], reference.standard_error)
    assert abs(stats["snd"] - reference.value) < 4 * error
    assert stats["relative"] == pytest.approx(stats["snd"] / 108**0.5, rel=0.15)  # 3 channels of 36 pixels, rms 1
    assert stats["batch"] == batch


@pytest.mark.parametrize("make", [images, lambda: torch.randn(4096, 4, generator=torch.Generator().manual_seed(3))])
def test_moments_are_as_noisy_as_those_of_drawn_batches(make):
    x, batch, draw = make(), 32, torch.Generator().manual_seed(0)
    norm = nn.BatchNorm1d(4) if x.dim() == 2 else nn.BatchNorm2d(3)
    ((_, arrays),) = rows(nn.Sequential(norm), x, batch).values()
    dims = [0, *range(2, x.dim())]
    drawn = torch.stack([x[torch.randint(len(x), (batch,), generator=draw)] for _ in range(3000)])
    overall = x.var(dims, correction=0)
    means = drawn.mean([d + 1 for d in dims]).std(0) / overall.sqrt()
    center = x.mean(dims).reshape(1, 1, -1, *[1] * (x.dim() - 2))
    variances = (drawn - center).square().mean([d + 1 for d in dims]).std(0) / overall
    np.testing.assert_allclose(arrays["mean_noise"], means, rtol=0.06)
    np.testing.assert_allclose(arrays["var_noise"], variances, rtol=0.06)


def test_independent_values_give_the_closed_forms():
    x = torch.randn(8192, 4, generator=torch.Generator().manual_seed(3))
    ((stats, _),) = rows(nn.Sequential(nn.BatchNorm1d(4)), x, 64).values()
    assert stats["mean_noise"] == pytest.approx(64**-0.5, rel=0.03)
    assert stats["var_noise"] == pytest.approx((2 / 64) ** 0.5, rel=0.05)


def test_layers_that_do_not_cross_the_batch_are_not_run():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4), nn.BatchNorm2d(4))
    assert list(rows(model, images(64), 16)) == ["3/output"]
    assert rows(nn.Sequential(nn.LayerNorm(6)), images(64), 16) == {}


def test_a_single_sample_has_no_companions():
    assert rows(nn.Sequential(nn.BatchNorm2d(3)), images(64), 1) == {}
    assert rows(nn.Sequential(nn.BatchNorm2d(3)), images(1), 16) == {}


def test_rows_of_one_sample_stay_together():
    """A layer that sees [N * T, C] is resampled by whole samples."""

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x):
            return self.norm(x.flatten(2).transpose(1, 2).reshape(-1, 3))

    ((flat, _),), ((whole, _),) = (
        rows(Tokens(), images(), 32).values(),
        rows(nn.Sequential(nn.BatchNorm2d(3)), images(), 32).values(),
    )
    assert flat["snd"] == pytest.approx(whole["snd"], rel=1e-4)
    assert flat["mean_noise"] == pytest.approx(whole["mean_noise"], rel=1e-4)


def test_a_layer_with_more_than_an_input_is_left_out():
    class Conditional(nn.BatchNorm2d):
        def forward(self, x, label):
            return super().forward(x)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = Conditional(3), nn.BatchNorm2d(3)

        def forward(self, x):
            return self.b(self.a(x, 1))

    assert list(rows(Model(), images(64), 16)) == ["b/output"]


def whitened(features, groups):
    area = Batch(groups=groups)
    return Norm(area, Whiten(), Affine(), Running(), num_features=features)


def test_whitening_layers_say_from_how_much_they_whiten():
    x = torch.zeros(16, 12, 5, 5)
    assert noise.whitening(whitened(12, 3), x) == {"whitened": 4, "whitened_from": 400}
    assert noise.whitening(nn.BatchNorm2d(12), x) == {}
    assert noise.whitening(ns.norms.build("layer", 12), x) == {}


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        whitened(4, 1),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(64, 2),
    )


def train(scoped, steps=4, **options):
    model, x = net(), images(64)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)

    def loop():
        for step in range(steps):
            optimizer.zero_grad()
            model(x[step * 8 : step * 8 + 8]).square().mean().backward()
            optimizer.step()

    if not scoped:
        loop()
        return model, None
    with ns.attach(model, optimizer, every=1, problem=problem(model, x), **options) as scope:
        loop()
    return model, scope.record()


def test_a_run_records_noise_and_is_what_it_is_without():
    (plain, _), (model, record) = train(False), train(True)
    assert [bits(t) for t in model.state_dict().values()] == [bits(t) for t in plain.state_dict().values()]
    assert not len(record.events)
    found = record.frame().query("phase == 'noise'")
    assert sorted(found["site"].unique()) == ["/output", "1/output", "3/output"]
    assert set(found.query("stat == 'batch'")["value"]) == {8.0}
    for site in ("1/output", "3/output"):
        assert record.series(site, "relative", phase="noise").index.tolist() == [0, 1, 2, 3]
        assert record.series(site, "relative", phase="noise").between(0.05, 1).all()
    assert (record.series("/output", "square", phase="noise", role="gradient") > 0).all()
    assert record.series("/input", "seen").tolist() == [8] * 3  # the first has none to be compared with
    attributes = record.sites.set_index("site").loc["3/input"]
    assert (attributes["whitened"], attributes["whitened_from"]) == (4, 8 * 16)


def test_each_probe_can_be_left_out():
    _, record = train(True, probes=("moments", "noise-scale"))
    assert set(record.frame().query("phase == 'noise'")["site"]) == {"/output"}
    assert not [b for b in record.blocks if b.site == "/input"]
    _, record = train(True, probes=("noise",))
    assert set(record.frame().query("phase == 'noise'")["site"]) == {"1/output", "3/output"}
