"""Sinks: what a tracker gets is what the record holds, once."""

import pytest
import torch
from torch import nn

import normscope as ns
from normscope.core.errors import ArgumentError
from normscope.integrations.sinks import LoggerSink, TensorBoardSink


class Logger:
    """Like a Weights & Biases run."""

    def __init__(self):
        self.rows = []

    def log(self, values, step=None):
        self.rows.append((step, values))


class Writer:
    """Like a SummaryWriter."""

    def __init__(self):
        self.scalars, self.texts = [], []

    def add_scalar(self, tag, value, step):
        self.scalars.append((tag, step, value))

    def add_text(self, tag, text, step):
        self.texts.append((tag, step, text))


def job():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))
    return model, torch.optim.SGD(model.parameters(), 0.1)


def train(model, optimizer, scope, steps):
    for _ in range(steps):
        loss = model(torch.randn(8, 4)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scope.step(loss=loss)


def written(sink_of, target, write_at=(5, 9)):
    """Write while a run grows; return its record."""
    model, optimizer = job()
    sink = sink_of(target)
    done = 0
    with ns.attach(model, optimizer, every=2) as scope:
        for steps in write_at:
            train(model, optimizer, scope, steps - done)
            done = steps
            sink.write(scope.record())
    sink.write(scope.record(), scope.findings())
    return scope


def test_a_writer_gets_every_scalar_once():
    writer = Writer()
    record = written(TensorBoardSink, writer).record()
    places = [(tag, step) for tag, step, _ in writer.scalars]
    assert len(set(places)) == len(places)
    by_tag = {}
    for tag, step, value in writer.scalars:
        by_tag.setdefault(tag, {})[step] = value
    assert by_tag["normscope/signal_rms/3/output"] == record.series("3/output", "rms").to_dict()
    assert by_tag["normscope/gradient_rms/0/output"] == record.series("0/output", "rms", role="gradient").to_dict()
    assert by_tag["normscope/angle/3/weight"] == record.series("3/weight", "angle", role="update").to_dict()
    large, small = (record.series("3/input", f"moment.{stat}").astype(float) for stat in ("max", "p50"))
    assert by_tag["normscope/kappa50/3/input"] == (large / small).to_dict()
    assert list(by_tag["normscope/run/loss"]) == list(by_tag["normscope/run/gradient_norm"]) == list(range(9))
    assert by_tag["normscope/run/learning_rate"] == dict.fromkeys(range(0, 9, 2), 0.1)


def test_a_writer_gets_findings_as_counts_and_text():
    writer = Writer()
    scope = written(TensorBoardSink, writer)
    counts = {tag.rpartition("/")[2]: n for tag, _, n in writer.scalars if tag.startswith("normscope/findings/")}
    verdicts = [finding.verdict.value for finding in scope.findings()]
    assert counts == {verdict.value: verdicts.count(verdict.value) for verdict in ns.Verdict}
    ((tag, step, text),) = writer.texts
    assert (tag, step) == ("normscope/findings", 8)
    bad = [finding for finding in scope.findings() if finding.verdict is not ns.Verdict.OK]
    assert len(text.splitlines()) == len(bad) > 0
    assert all(finding.id in text and finding.message in text for finding in bad)


@pytest.mark.parametrize("steps", [True, False])
def test_a_logger_gets_a_row_a_step(steps):
    logger = Logger()
    record = written(lambda target: LoggerSink(target, steps=steps), logger).record()
    assert all(step == (values["normscope/step"] if steps else None) for step, values in logger.rows)
    at = [values["normscope/step"] for _, values in logger.rows if "normscope/run/loss" in values]
    assert at == list(range(9))
    losses = [values["normscope/run/loss"] for _, values in logger.rows if "normscope/run/loss" in values]
    assert losses == record.context["loss"].tolist()
    assert all(isinstance(value, (int, float)) for _, values in logger.rows for value in values.values())


def test_layers_are_chosen_by_a_glob():
    writer = Writer()
    written(lambda target: TensorBoardSink(target, "3*"), writer)
    parts = [tag.split("/")[1:3] for tag, *_ in writer.scalars]
    assert {layer for kind, layer in parts if kind not in ("run", "findings")} == {"3"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TensorBoardSink(Logger()), "writer=Logger has no add_scalar and add_text; pass a torch.utils.tensor"),
        (lambda: LoggerSink(Writer()), r"logger=Writer has no log\(values, step=\); pass a W&B run"),
    ],
)
def test_what_is_no_tracker_is_refused(make, message):
    with pytest.raises(ArgumentError, match=message):
        make()


@pytest.mark.filterwarnings("ignore")  # TensorBoard's own
def test_a_real_summary_writer_keeps_it(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(tmp_path) as writer:
        record = written(TensorBoardSink, writer).record()
    events = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0})
    events.Reload()
    series = record.series("0/output", "rms")
    kept = events.Scalars("normscope/signal_rms/0/output")
    assert [(event.step, event.value) for event in kept] == list(series.items())
    assert b"bias-before-norm" in events.Tensors("normscope/findings/text_summary")[0].tensor_proto.string_val[0]
