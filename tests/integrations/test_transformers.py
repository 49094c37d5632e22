"""The callback of the Hugging Face Trainer, and Accelerate, in tiny trainings."""

import warnings

import pytest
import torch
from torch import nn

import normscope as ns
from normscope.core.errors import ArgumentError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed, which the Trainer needs")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from normscope.integrations.sinks import LoggerSink
    from normscope.integrations.transformers import NormscopeCallback

pytestmark = pytest.mark.filterwarnings("ignore")  # those of the libraries


class Texts(torch.utils.data.Dataset):
    def __init__(self):
        self.tokens = torch.randint(0, 32, (16, 8), generator=torch.Generator().manual_seed(1))

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, index):
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


def train(folder, callback=None, resume=None, epochs=2, **settings):
    transformers.set_seed(0)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 32, "n_positions": 8}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
    arguments = transformers.TrainingArguments(
        str(folder),
        num_train_epochs=epochs,
        per_device_train_batch_size=4,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **{"save_strategy": "no", "logging_steps": 1, **settings},
    )
    trainer = transformers.Trainer(
        model=model, args=arguments, train_dataset=Texts(), callbacks=[callback] if callback else []
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def bits(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()} | {
        "random": torch.get_rng_state()
    }


@pytest.mark.parametrize(
    "settings",
    [{}, {"gradient_accumulation_steps": 2}, {"bf16": True}, {"gradient_checkpointing": True}],
    ids=["plain", "accumulation", "autocast", "checkpointing"],
)
def test_a_training_is_bit_identical_and_recorded(settings, tmp_path):
    plain = bits(train(tmp_path / "plain", **settings))
    callback = NormscopeCallback(tmp_path / "a", every=1)
    trainer = train(tmp_path / "watched", callback, **settings)
    watched = bits(trainer)
    assert all(torch.equal(plain[name], watched[name]) for name in plain)
    record = ns.load(tmp_path / "a")
    steps = 8 // settings.get("gradient_accumulation_steps", 1)
    assert record.steps.tolist() == list(range(steps))
    seen = {(block.site, block.role) for block in record.blocks}
    assert {
        ("transformer.h.0.ln_1/output", "gradient"),
        ("transformer.h.1.mlp.c_fc/weight", "update"),
        ("transformer.ln_f/output", "value"),
    } <= seen
    logged = [log for log in trainer.state.log_history if "loss" in log]
    context = record.context.drop_duplicates("step")
    assert context["loss"].tolist() == pytest.approx([float(log["loss"]) for log in logged])
    assert context["grad_norm"].tolist() == pytest.approx([float(log["grad_norm"]) for log in logged])
    assert callback.scope.closed
    hooks = [
        hook for m in trainer.model.modules() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())
    ]
    assert not [hook for hook in hooks if type(hook).__module__.startswith("normscope")]


def test_a_training_from_a_checkpoint_goes_on_with_its_record(tmp_path):
    train(tmp_path / "out", NormscopeCallback(tmp_path / "a", every=2), epochs=1, save_strategy="epoch")
    before = ns.load(tmp_path / "a")
    callback = NormscopeCallback(tmp_path / "a", every=2)
    train(tmp_path / "out", callback, resume=True, epochs=3, save_strategy="epoch")
    after = ns.load(tmp_path / "a")
    assert before.context["step"].unique().tolist() == list(range(4))
    assert after.context["step"].unique().tolist() == list(range(12))
    assert after.context.head(len(before.context)).equals(before.context)


def test_a_new_training_into_a_folder_of_another_is_refused(tmp_path):
    train(tmp_path, NormscopeCallback(tmp_path / "a"), epochs=1)
    with pytest.raises(ns.StoreError, match="holds a run already"):
        train(tmp_path, NormscopeCallback(tmp_path / "a"), epochs=1)


def test_an_unknown_setting_is_named_at_once():
    with pytest.raises(ArgumentError, match=r"setting='layer' is unknown; did you mean 'layers'"):
        NormscopeCallback("runs/a", layer=3)


# ---- Accelerate ------------------------------------------------------------------------------------------------------


class Tracker(accelerate.tracking.GeneralTracker):
    name = "list"
    requires_logging_directory = False

    def __init__(self):
        super().__init__()
        self.rows = []

    @property
    def tracker(self):
        return self.rows

    def store_init_configuration(self, values):
        pass

    def log(self, values, step=None, **kwargs):
        self.rows.append((step, values))


def run_accelerated(attached, mixed="no"):
    torch.manual_seed(0)
    tracker = Tracker()
    accelerator = accelerate.Accelerator(
        cpu=True, gradient_accumulation_steps=2, log_with=tracker, mixed_precision=mixed
    )
    accelerator.init_trackers("run")
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.2), nn.Linear(6, 2))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    loader = torch.utils.data.DataLoader(torch.randn(32, 4), batch_size=4)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    assert type(optimizer) is accelerate.optimizer.AcceleratedOptimizer
    scope = ns.attach(model, optimizer, every=1, scaler=accelerator.scaler) if attached else None
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(batch).square().mean()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
    if scope is not None:
        scope.close()
        LoggerSink(accelerator).write(scope.record(), scope.findings())
    state = [*accelerator.unwrap_model(model).state_dict().values(), torch.get_rng_state()]
    accelerator.end_training()
    return state, scope, tracker.rows


@pytest.mark.parametrize("mixed", ["no", "bf16"])
def test_a_prepared_model_is_attached_to_like_any_other(mixed):
    (plain, _, _), (watched, scope, rows) = run_accelerated(False, mixed), run_accelerated(True, mixed)
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))
    record = scope.record()
    assert record.steps.tolist() == [0, 1, 2, 3]  # eight batches, two a step
    assert record.context["optimizer"].unique().tolist() == ["Adam"]
    assert {("0/output", "gradient"), ("3/weight", "update")} <= {(b.site, b.role) for b in record.blocks}
    assert [step for step, _ in rows] == [0, 1, 2, 3, 3]
    assert rows[0][1]["normscope/signal_rms/0/output"] == record.series("0/output", "rms").iloc[0]
    accelerate.state.AcceleratorState._reset_state(True)
