"""The Lightning callback in tiny fits."""

import logging
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import normscope as ns
from normscope.core.errors import ArgumentError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    lightning = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")
    other = pytest.importorskip("pytorch_lightning", reason="pytorch_lightning is not installed")
    from normscope.integrations.lightning import NormscopeCallback

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # Lightning's own
    pytest.mark.parametrize("library", [lightning, other], ids=["lightning", "pytorch_lightning"]),
]
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def module_of(library, automatic=True, fails_at=None):
    class Net(library.LightningModule):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.2), nn.ReLU())
            self.head = nn.Linear(6, 2)
            self.automatic_optimization = automatic
            self.losses = []

        def training_step(self, batch, index):
            if len(self.losses) == fails_at:
                raise RuntimeError("on purpose")
            loss = self.head(self.body(batch[0])).square().mean()
            self.losses.append(float(loss.detach()))
            if not automatic:
                optimizers = self.optimizers()
                for optimizer in optimizers:
                    optimizer.zero_grad()
                self.manual_backward(loss)
                for optimizer in optimizers:
                    optimizer.step()
            return loss

        def validation_step(self, batch, index):
            self.head(self.body(batch[0]))

        def configure_optimizers(self):
            if automatic:
                return torch.optim.Adam(self.parameters(), 1e-2)
            return [torch.optim.SGD(part.parameters(), 0.1) for part in (self.body, self.head)]

    return Net()


def fit(library, callbacks=(), checkpoint=None, epochs=2, automatic=True, fails_at=None, **settings):
    torch.manual_seed(0)
    module = module_of(library, automatic, fails_at)
    data = DataLoader(TensorDataset(torch.randn(32, 4)), batch_size=8, shuffle=True)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = library.Trainer(
        accelerator="cpu", max_epochs=epochs, callbacks=list(callbacks), enable_checkpointing=False, **quiet, **settings
    )
    trainer.fit(module, data, data, ckpt_path=checkpoint)
    return module, trainer


def bits(module):
    return {name: value.clone() for name, value in module.state_dict().items()} | {"random": torch.get_rng_state()}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"accumulate_grad_batches": 2},
        {"gradient_clip_val": 0.01},
        {"precision": "bf16-mixed"},
        {"automatic": False},
    ],
    ids=["plain", "accumulation", "clipping", "autocast", "manual"],
)
def test_a_fit_is_bit_identical_and_recorded(library, settings, tmp_path):
    plain = bits(fit(library, **settings)[0])
    callback = NormscopeCallback(tmp_path / "a", every=1)
    module, _ = fit(library, [callback], **settings)
    watched = bits(module)
    assert all(torch.equal(plain[name], watched[name]) for name in plain)
    record = ns.load(tmp_path / "a")
    steps = 8 // settings.get("accumulate_grad_batches", 1)
    assert record.steps.tolist() == list(range(steps))
    seen = {(block.site, block.role) for block in record.blocks}
    assert {("body.0/output", "gradient"), ("head/weight", "update"), ("body.1/running", "value")} <= seen
    each = torch.tensor(module.losses).reshape(steps, -1).mean(1)
    assert record.context.drop_duplicates("step")["loss"].tolist() == pytest.approx(each.tolist(), rel=1e-6)
    if "gradient_clip_val" in settings:
        assert record.context["grad_norm"].max() <= 0.01 * (1 + 1e-5)
    assert callback.scope.closed
    assert not any("_forward_hooks" in key and value for m in module.modules() for key, value in vars(m).items())


def test_a_fit_from_a_checkpoint_goes_on_with_its_record(library, tmp_path):
    _, trainer = fit(library, [NormscopeCallback(tmp_path / "a", every=2)], epochs=1)
    trainer.save_checkpoint(tmp_path / "last.ckpt", weights_only=False)
    before = ns.load(tmp_path / "a")
    fit(library, [NormscopeCallback(tmp_path / "a", every=2)], checkpoint=tmp_path / "last.ckpt", epochs=3)
    after = ns.load(tmp_path / "a")
    assert before.context["step"].tolist() == list(range(4))
    assert after.context["step"].unique().tolist() == list(range(12))
    assert after.context.head(len(before.context)).equals(before.context)
    assert [part["step"] for part in after.runs[0]["segments"]] == [0, 4]


def test_a_new_fit_into_a_folder_of_another_is_refused(library, tmp_path):
    fit(library, [NormscopeCallback(tmp_path / "a")], epochs=1)
    with pytest.raises(ns.StoreError, match="holds a run already"):
        fit(library, [NormscopeCallback(tmp_path / "a")], epochs=1)


def test_a_fit_that_breaks_off_keeps_its_record(library, tmp_path):
    callback = NormscopeCallback(tmp_path / "a", every=1)
    with pytest.raises(RuntimeError, match="on purpose"):
        fit(library, [callback], fails_at=3)
    assert callback.scope.closed
    assert ns.load(tmp_path / "a").steps.tolist() == [0, 1, 2]


def test_sinks_get_the_record_at_each_epoch(library):
    class Sink:
        def __init__(self):
            self.seen = []

        def write(self, record, findings):
            self.seen.append((len(record.steps), len(findings) > 20))

    sink = Sink()
    fit(library, [NormscopeCallback(every=1, sinks=[sink])])
    assert sink.seen == [(4, True), (8, True), (8, True)]


def test_an_unknown_setting_is_named_at_once(library):
    with pytest.raises(
        ArgumentError, match=r"setting='evry' is unknown; did you mean 'every'.*argument of normscope.at"
    ):
        NormscopeCallback("runs/a", evry=3)
