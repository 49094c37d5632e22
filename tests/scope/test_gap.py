"""Gap: on real digits a corrupted norm ranks first, a shift is told from it, remedies hold; the model stays as is."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import normscope as ns
from normscope import workbench
from normscope.core.errors import ArgumentError
from normscope.metrics.gap import BATCH, GIVEN, RUNNING, TARGET, TRAINING
from tests.scope.test_examine import everything, used

BATCH_SIZE = 100


def batches(pair, change=lambda x: x):
    return list(zip(change(pair[0]).split(BATCH_SIZE), pair[1].split(BATCH_SIZE), strict=True))


def block(inputs, outputs):
    return nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)


@pytest.fixture(scope="module")
def digits():
    return workbench.split(*workbench.mnist(), seed=0)


@pytest.fixture(scope="module")
def trained(digits):
    """A small network, trained to rest and recalibrated, so that its statistics are right."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(
        *block(1, 8), *block(8, 16), *block(16, 32), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)
    drawn = workbench.batches(*digits[0], 64, torch.Generator().manual_seed(0))
    for _ in range(300):
        x, y = next(drawn)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        schedule.step()
    torch.set_num_threads(threads)
    return ns.norms.recalibrate(model, batches(digits[0]), progress=False).eval()


def corrupted(model, path):
    made = copy.deepcopy(model)
    norm = made.get_submodule(path)
    norm.running_mean += 2 * norm.running_var.sqrt()
    norm.running_var *= 4
    return made


def rows(found):
    return found.table.set_index("statistics")


def verdicts(found):
    return {f.id.removeprefix("mismatch."): f.verdict.value for f in found.findings}


def accuracy(model, data):
    with torch.no_grad():
        return float(torch.cat([model(x).argmax(1) == y for x, y in data]).double().mean())


@pytest.mark.parametrize("path", ["1", "4", "7"])
def test_the_norm_with_corrupted_statistics_ranks_first_and_recalibration_recovers(digits, trained, path):
    train, test = batches(digits[0])[:32], batches(digits[1])
    bad, clean = corrupted(trained, path), accuracy(trained, test)
    found = ns.gap(bad, train, test)
    assert found.norms["norm"][0] == path
    assert found.norms["recovered"][0] > found.norms["chance"][0]
    table = rows(found)
    assert table.loc[RUNNING, "metric"] == pytest.approx(accuracy(bad, test))
    assert table.loc[RUNNING, "metric"] < clean - 0.2
    assert table.loc[TRAINING, "metric"] == pytest.approx(clean, abs=0.003)
    assert found.norms["metric"][0] == pytest.approx(clean, abs=0.01)
    told = verdicts(found)
    assert told["stored-statistics"] == told["norm-cost"] == "failure"
    assert told["target-shift"] == "ok"
    assert accuracy(ns.norms.recalibrate(bad, train, progress=False), test) == table.loc[TRAINING, "metric"]


@pytest.mark.parametrize("change", [lambda x: 0.6 * x, lambda x: x + 1.0], ids=["contrast", "brightness"])
def test_a_shift_of_the_target_is_told_from_stale_statistics(digits, trained, change):
    train, test = batches(digits[0]), batches(digits[1], change)
    found = ns.gap(trained, train, test)
    table, clean = rows(found), accuracy(trained, batches(digits[1]))
    assert table.loc[[RUNNING, TRAINING], "metric"].max() < clean - 0.05
    assert table.loc[[BATCH, TARGET], "recovered"].min() > 0.5 * (clean - table.loc[RUNNING, "metric"])
    told = verdicts(found)
    assert told["target-shift"] in ("warning", "failure")
    assert told["stored-statistics"] == "ok"
    norms = found.norms.set_index("norm")
    assert norms.loc["1", "kl"] > 0.1 > norms.loc["1", "kl_train"]
    adapted = ns.norms.recalibrate(copy.deepcopy(trained), test, progress=False)
    assert accuracy(adapted, test) == table.loc[TARGET, "metric"]


def test_a_clean_model_gets_no_remedy(digits, trained):
    found = ns.gap(trained, *map(batches, digits))
    assert set(verdicts(found).values()) == {"ok"}
    assert not any(finding.remedy for finding in found.findings)
    assert found.norms["kl"].max() < 0.02


def test_one_norm_alone_is_what_recalibrate_does_with_only(digits, trained):
    test, bad = batches(digits[1]), corrupted(trained, "4")
    found = ns.gap(bad, None, test).norms.set_index("norm")
    alone = ns.norms.recalibrate(copy.deepcopy(bad), test, only="4", progress=False)
    assert found.loc["4", "metric"] == accuracy(alone, test)
    x = bad[:4](torch.cat([x for x, _ in test])).double()
    mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3))
    r_mean, r_var = bad[4].running_mean.double(), bad[4].running_var.double()
    kl = 0.5 * ((r_var / var).log() + (var + (mean - r_mean).square()) / r_var - 1)
    assert found.loc["4", "kl"] == pytest.approx(kl.quantile(0.5).item(), rel=1e-3)
    assert found.loc["4", "kl_max"] == pytest.approx(kl.max().item(), rel=1e-3)


def per_batch(model, data):
    """What users' metrics look like: it sets the mode, and changes it back at the end."""
    model.eval()
    losses = [float(F.cross_entropy(model(x), y)) for x, y in data]
    model.train()
    return sum(losses) / len(losses)


def test_a_metric_of_one_number_gets_its_error_from_batches_and_cannot_undo_the_mode(digits, trained):
    train, test = map(batches, digits)
    bad = corrupted(trained, "4")
    found = ns.gap(bad, train, test, metric=per_batch, higher_is_better=False, max_batches=7)
    table = rows(found)
    by_batch = copy.deepcopy(bad)
    for norm in (by_batch[1], by_batch[4], by_batch[7]):
        norm.train()
    values = {
        row: [F.cross_entropy(model(x), y).item() for x, y in test[:7]]
        for row, model in ((RUNNING, bad), (BATCH, by_batch))
    }
    for row, losses in values.items():
        assert table.loc[row, "metric"] == pytest.approx(np.mean(losses), rel=1e-5)
        assert table.loc[row, "standard_error"] == pytest.approx(np.std(losses, ddof=1) / 7**0.5, rel=1e-4)
    difference = np.subtract(values[RUNNING], values[BATCH])
    assert table.loc[BATCH, "recovered"] == pytest.approx(difference.mean(), rel=1e-4)
    assert table.loc[BATCH, "recovered_error"] == pytest.approx(np.std(difference, ddof=1) / 7**0.5, rel=1e-4)
    assert set(table["over"]) == {"batches"}
    assert set(table["n"]) == {7}
    assert found.measured.metric == "per_batch"


def test_many_batches_are_put_into_eight_groups():
    data = [(torch.randn(4, 6), torch.zeros(4, dtype=torch.long)) for _ in range(20)]
    table = rows(ns.gap(used(), data, metric=lambda model, some: float(len(some))))
    assert table.loc[RUNNING, ["metric", "n", "over"]].tolist() == [20.0, 7, "groups of 3 batches"]


def test_a_model_in_training_mode_is_measured_as_it_was_too():
    model = used()
    x = torch.randn(512, 6)
    model.train()[1].running_mean += 5.0
    with torch.no_grad():
        y = model(x).argmax(1)  # with dropout
    found = ns.gap(model, [(x, y)])
    assert rows(found).index[0] == GIVEN
    finding = next(f for f in found.findings if f.id == "mismatch.served-in-training-mode")
    assert "1 of 1 norm and 1 dropout module in training mode" in finding.message


def test_detectors_go_through_the_callables():
    """Batches of lists, targets as boxes, a metric of one number an image, and a forward of its own."""
    model = used().eval()
    images = [[torch.randn(6) for _ in range(8)] for _ in range(3)]

    def forward(model, batch):
        return model(torch.stack(batch)), None

    def errors(model, data):
        return [float(box.square().sum()) for batch in data for box in forward(model, batch)[0]]

    found = ns.gap(model, images, metric=errors, forward=forward, higher_is_better=False)
    assert found.measured.samples == 24
    assert set(found.table["n"]) == {24}
    assert found.norms["recovered"].notna().all()


def test_the_share_of_places_is_the_accuracy_of_dense_predictions():
    model = nn.Sequential(nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3)).eval()
    x, y = torch.randn(6, 1, 4, 4), torch.randint(3, (6, 4, 4))
    right = (model(x).argmax(1) == y).double().mean((1, 2))
    table = rows(ns.gap(model, [(x, y)]))
    assert table.loc[RUNNING, "metric"] == pytest.approx(right.mean().item())
    assert table.loc[RUNNING, "standard_error"] == pytest.approx(right.std().item() / 6**0.5)


# ---- harmless --------------------------------------------------------------------------------------------------------

DATA = [(torch.randn(16, 6), torch.randint(3, (16,))) for _ in range(3)]


def noisy(model, data):
    torch.rand(1), np.random.rand()
    model.eval()
    return [float(model(x).mean() + torch.rand(())) for x, _ in data]


def failing(model, data):
    model.train()
    model(data[0][0])
    raise ZeroDivisionError("on purpose")


@pytest.mark.parametrize("metric", [None, noisy])
def test_the_model_is_bit_for_bit_what_it_was(metric):
    model = used()
    before = everything(model)
    ns.gap(model, DATA, DATA, metric=metric)
    assert everything(model) == before


def test_the_model_is_what_it_was_after_an_error_of_the_metric():
    model = used()
    before = everything(model)
    with pytest.raises(ZeroDivisionError, match="on purpose"):
        ns.gap(model, DATA, metric=failing)
    assert everything(model) == before


def test_a_forward_of_the_instance_stays():
    model = used()
    norm, calls = model[1], []
    plain = norm.forward
    norm.forward = lambda x: calls.append(None) or plain(x)
    own = norm.forward
    ns.gap(model, DATA)
    assert norm.forward is own
    assert calls


def test_all_passes_see_the_same_random_numbers():
    table = rows(ns.gap(used().eval(), DATA, metric=lambda model, data: torch.rand(5).tolist()))
    assert table["recovered"].abs().max() == 0.0


# ---- data ------------------------------------------------------------------------------------------------------------


def test_loaders_that_can_be_read_once_are_held_and_their_generators_stay():
    data = torch.utils.data.TensorDataset(torch.randn(64, 6), torch.randint(3, (64,)))
    loader = torch.utils.data.DataLoader(data, 16, shuffle=True, generator=torch.Generator().manual_seed(3))
    before = loader.generator.get_state()
    found = ns.gap(used().eval(), iter(DATA), loader, max_batches=2)
    assert torch.equal(loader.generator.get_state(), before)
    assert found.measured.samples == 32


def test_a_batch_of_one_sample_leaves_out_only_what_it_hinders():
    data = [*DATA, (torch.randn(1, 6), torch.zeros(1, dtype=torch.long))]
    found = ns.gap(used().eval(), data)
    table = rows(found)
    assert math.isfinite(table.loc[RUNNING, "metric"])
    assert math.isnan(table.loc[BATCH, "metric"])
    assert "drop_last=True" in table.loc[BATCH, "caveat"]
    assert verdicts(found)["batch-statistics"] == "undecided"
    assert "drop_last=True" in repr(found)
    found = ns.gap(used().train(), data)
    assert rows(found)["metric"].notna().tolist() == [False, True, False, False]
    assert verdicts(found)["served-in-training-mode"] == "warning"


def test_norms_with_rules_of_their_own_have_rows_but_no_rank():
    model = nn.Sequential(nn.InstanceNorm1d(3, track_running_stats=True), nn.Flatten(), nn.Linear(15, 3)).eval()
    found = ns.gap(model, [(torch.randn(8, 3, 5), torch.randint(3, (8,)))] * 2)
    assert rows(found)["metric"].notna().all()
    assert found.norms["recovered"].isna().all()
    assert verdicts(found)["norm-cost"] == "undecided"


def test_frozen_norms_are_named_and_the_others_ranked():
    class FrozenBatchNorm2d(nn.Module):
        def __init__(self, n):
            super().__init__()
            self.eps = 1e-5
            for name, value in {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0}.items():
                self.register_buffer(name, torch.full((n,), value))

        def forward(self, x):
            scale = self.weight / (self.running_var + self.eps).sqrt()
            return x * scale[:, None, None] + (self.bias - self.running_mean * scale)[:, None, None]

    model = nn.Sequential(FrozenBatchNorm2d(1), nn.BatchNorm2d(1), nn.Conv2d(1, 3, 4), nn.Flatten()).eval()
    found = ns.gap(model, [(torch.randn(8, 1, 4, 4), torch.randint(3, (8,)))])
    assert dict(found.measured.frozen) == {"0": "FrozenBatchNorm2d"}
    assert list(found.norms["norm"]) == ["1"]
    assert verdicts(found)["frozen-norms"] == "undecided"


def test_statistics_that_are_not_numbers_are_a_failure_and_recalibration_is_finite():
    model = used().eval()
    model[1].running_var[2] = float("nan")
    model[1].running_var[3] = -1.0

    def metric(model, data):
        return [float(value) for x, _ in data for value in model(x).square().sum(1)]

    found = ns.gap(model, DATA, metric=metric)
    broken = next(f for f in found.findings if f.verdict.value == "failure")
    assert broken.message == "1: 2 of its stored numbers are NaN, infinite or negative variances; so at 1 of 1 norm."
    assert rows(found)["metric"].isna().tolist() == [True, False, False]
    assert verdicts(found)["stored-statistics"] == "undecided"
    assert "see mismatch.broken-statistics first" in " ".join(repr(found).split())


def test_at_most_so_many_norms_are_switched_the_most_divergent_first(digits, trained):
    found = ns.gap(corrupted(trained, "4"), None, batches(digits[1])[:2], max_norms=1).norms
    assert found["recovered"].notna().tolist() == [True, False, False]
    assert found["kl"][0] == found["kl"].max()


@pytest.mark.parametrize(("progress", "drawn"), [(True, True), (False, False), (None, False)])
def test_progress_is_drawn_on_demand(progress, drawn, capsys):
    ns.gap(used().eval(), DATA, progress=progress)
    assert ("gap:" in capsys.readouterr().err) is drawn


MODEL = used().eval()
REFUSED = {
    "model": ((3, DATA), {}, r"model=3 must be a torch\.nn\.Module"),
    "no norms": ((nn.Linear(6, 3), DATA), {}, "model=Linear has no norm with running statistics, but no norm at all"),
    "other norms": (
        (nn.Sequential(nn.LayerNorm(6)), DATA),
        {},
        r"Sequential has no norm .* work alike in both modes \(LayerNorm\): .* Look for dropout, preprocessing",
    ),
    "no data": ((MODEL, None), {}, "train_batches and target_batches are both None; pass batches"),
    "train, used up": ((MODEL, iter([])), {}, r"train_batches=<list_iterator.* is empty; pass at least one"),
    "target, empty": ((MODEL, DATA, []), {}, r"target_batches=\[\] is empty; pass at least one"),
    "train, one batch": ((MODEL, DATA[0]), {}, "train_batches: got a single batch; pass a list of batches"),
    "target, a number": ((MODEL, DATA, 3), {}, "target_batches=3 must be a sequence of batches"),
    "no pairs": ((MODEL, [DATA[0][0]]), {}, r"a batch of type Tensor is not a pair .*; pass forward=lambda"),
    "metric": ((MODEL, DATA), {"metric": 0.5}, r"metric=0\.5 must be callable as metric\(model, batches\)"),
    "metric, a matrix": (
        (MODEL, DATA),
        {"metric": lambda model, data: torch.ones(2, 2)},
        r"metric: it returned .*; it must return a number, or one number for each sample",
    ),
    "metric, text": (
        (MODEL, DATA),
        {"metric": lambda model, data: "good"},
        "metric: it returned 'good'; it must return",
    ),
    "metric, none": ((MODEL, DATA), {"metric": lambda model, data: None}, "metric: it returned None; it must return"),
    "metric, of a loader": (
        (MODEL, DATA),
        {"metric": lambda model, data: len(data.dataset)},
        "it failed with AttributeError: 'list' object has no attribute 'dataset'. It is called with a list of batches",
    ),
    "regression": (
        (MODEL, [(DATA[0][0], torch.randn(16, 3))]),
        {},
        r"metric=None takes the accuracy .* output is \(16, 3\) torch\.float32 and target \(16, 3\) .*; pass metric=",
    ),
    "max_batches": ((MODEL, DATA), {"max_batches": 0}, "max_batches=0 must be a number, at least 1, or None for all"),
    "max_norms": ((MODEL, DATA), {"max_norms": True}, "max_norms=True must be a number, at least 1, or None for all"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_measured_is_named(name):
    arguments, options, message = REFUSED[name]
    with pytest.raises(ArgumentError, match=message):
        ns.gap(*arguments, **options)


def test_a_metric_whose_values_change_their_number_is_refused():
    calls = []

    def metric(model, data):
        calls.append(None)
        return [1.0] * (1 + len(calls))

    with pytest.raises(ArgumentError, match="it returned 2 values with one kind of statistics and 3 with another"):
        ns.gap(MODEL, DATA, metric=metric)


# ---- what a reader sees ----------------------------------------------------------------------------------------------


def test_text_page_notebook_and_json_tell_the_same(digits, trained, tmp_path):
    found = ns.gap(corrupted(trained, "4"), batches(digits[0])[:4], batches(digits[1])[:4])
    page = found.report(tmp_path / "gap.html")
    texts = [page.read_text(), found._repr_html_(), repr(found)]
    for text in texts:
        assert "recalibrated on training data" in text
        for finding in found.findings:
            assert finding.verdict.value == "ok" or finding.id in text or finding.message[:40] in text
        assert f"{found.norms['recovered'][0]:+.3g} ± {found.norms['standard_error'][0]:.2g}" in text
    assert "<script" not in texts[0]
    assert "prefers-color-scheme: dark" in texts[0]
    data = json.loads((tmp_path / "gap.json").read_text())
    assert [row["norm"] for row in data["norms"]] == found.norms["norm"].tolist()
    assert [f["id"] for f in data["findings"]] == [f.id for f in found.findings]
    assert found.report(tmp_path) == tmp_path / "report.html"


def test_the_picture_shows_the_ranking(digits, trained):
    found = ns.gap(corrupted(trained, "4"), None, batches(digits[1])[:2])
    ax = found.plot()
    assert [label.get_text() for label in ax.get_yticklabels()] == found.norms["norm"].tolist()
    drawn = sorted(float(x) for container in ax.containers for x in container[0].get_xdata())
    assert drawn == pytest.approx(sorted(found.norms["recovered"]))


def test_names_of_layers_are_text():
    model = nn.Sequential()
    model.add_module("<b>x", nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3)))
    found = ns.gap(model.eval(), DATA)
    assert "<b>x" not in found._repr_html_()
    assert "&lt;b&gt;x" in found._repr_html_()
