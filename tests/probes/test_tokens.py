"""The largest values at norms' inputs against a sort of all of them, and where norms stand in models that are known."""

import numpy as np
import pytest
import torch
from torch import nn

import normscope as ns
from normscope.metrics.tokens import peaks, placements
from normscope.norms.recognize import recognize
from normscope.probes import tokens
from normscope.report.layers import COLUMNS, layers
from tests.awkward.base import Wrap, sgd


@pytest.fixture(autouse=True)
def fixed():
    torch.manual_seed(0)


def trained(model, *inputs, steps=1, call=lambda model, *inputs: model(*inputs), **settings):
    optimizer = sgd(model)
    with ns.attach(model, optimizer, every=1, probes=("moments", "normalization", "parameters"), **settings) as scope:
        for _ in range(steps):
            call(model, *inputs).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    record = scope.record()
    assert not (record.events["kind"] == "probe-failed").any()
    return record


def largest(x):
    """The three largest of [B, T, C] as (value, token, channel), by a sort of all values."""
    flat = x.detach().double().numpy().reshape(-1)
    order = np.argsort(-np.abs(flat))[:3]
    at = np.unravel_index(order, x.shape)
    return list(zip(flat[order].tolist(), at[-2].tolist(), at[-1].tolist(), strict=True))


@pytest.mark.parametrize("shape", [(3, 5, 8), (1, 2, 4), (7, 16)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_three_largest_values(shape, dtype):
    for seed in range(20):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
        x[..., 0, 1] *= 50  # several in one row, and one tie of rows
        values, token, channel, middle = tokens.observe(x).double().numpy()
        expected = np.array(largest(x)).T
        np.testing.assert_allclose(np.abs(values), np.abs(expected[0]), rtol=1e-6)
        if dtype is not torch.bfloat16:  # in which some are equal
            np.testing.assert_allclose(np.stack((values, token, channel)), expected, rtol=1e-6)
        assert middle[0] == pytest.approx(x.double().abs().median().item())


def test_fewer_than_three_values():
    values, *_ = tokens.observe(torch.tensor([[2.0, -3.0]]))
    assert values.tolist() == [-3.0, 2.0, 0.0]


def test_passes_of_a_step_are_joined():
    parts = torch.randn(2, 3, 5, 8)
    joined = tokens.merge(*map(tokens.observe, parts))
    assert joined[0].tolist() == pytest.approx(tokens.observe(parts.flatten(0, 1))[0].tolist())


@pytest.mark.parametrize(
    ("norm", "shape", "expected"),
    [
        (nn.LayerNorm(8), (2, 5, 8), True),
        (nn.RMSNorm(8), (5, 8), True),
        (nn.RMSNorm(8), (2, 4, 5, 8), False),  # of queries: which axis is the token is not known
        (nn.LayerNorm((5, 8)), (2, 5, 8), False),
        (nn.BatchNorm1d(5), (2, 5, 8), False),
    ],
)
def test_which_norms_have_tokens(norm, shape, expected):
    assert tokens.has_tokens(torch.zeros(shape), recognize(norm)) is expected


def test_a_massive_activation_is_named_with_token_and_channel():
    def run(model, x):
        stream = x + model.branch(x)
        push = torch.zeros_like(stream)
        push[:, 2, 3] = 5000.0
        return model.norm(stream + push)

    record = trained(Wrap(run, branch=nn.Linear(8, 8), norm=nn.LayerNorm(8)), torch.randn(4, 6, 8))
    top = peaks(record).iloc[0]
    assert (top["site"], top["token"], top["channel"]) == ("norm/input", 2, 3)
    assert top["value"] == pytest.approx(5000.0, rel=1e-2)
    (found,) = [f for f in ns.diagnose(record) if f.id == "propagation.massive-activations"]
    assert (found.verdict.value, found.evidence["token"], found.evidence["channel"]) == ("note", 2, 3)
    assert "at token 2 in channel 3; beyond both at 1 norm, (token, channel) (2, 3)." in found.message
    plain = trained(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)), torch.randn(4, 6, 8))
    (found,) = [f for f in ns.diagnose(plain) if f.id == "propagation.massive-activations"]
    assert found.verdict.value == "ok"


class PlusOne(nn.Module):
    """An RMS norm that multiplies by 1 + weight, as those of Gemma do."""

    def __init__(self, width):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.zeros(width)), 1e-6

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * (1.0 + self.weight)


PlusOne.__name__ = "PlusOneRMSNorm"


@pytest.mark.parametrize(("norm", "offset"), [(nn.RMSNorm, 0.0), (PlusOne, 1.0)])
def test_the_table_of_layers_tells_how_the_largest_gain_drifted(norm, offset):
    model = nn.Sequential(nn.Linear(8, 8), norm(8))
    with torch.no_grad():
        model[1].weight[2] = 3.0 - offset
    record = trained(model, torch.randn(4, 6, 8), steps=5)
    (row,) = [row for row in layers(record) if row.site == "1/output"]
    cell = dict(zip((name for name, _ in COLUMNS), row.cells, strict=True))["largest gain"]
    first, last = map(float, cell.text.split(" → "))
    assert first == pytest.approx(3.0, abs=0.1)
    assert last == pytest.approx((model[1].weight + offset).abs().max().item(), rel=1e-2)
    assert cell.value == pytest.approx(last / first, rel=1e-2)


def hugging_face(name):
    transformers = pytest.importorskip("transformers")
    small = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    wide = small | {"intermediate_size": 24}
    configs = {
        "gpt2": lambda: transformers.GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=4),
        "llama": lambda: transformers.LlamaConfig(**wide),
        "bert": lambda: transformers.BertConfig(**wide),
        "olmo2": lambda: transformers.Olmo2Config(**wide),
        "gemma2": lambda: transformers.Gemma2Config(**wide, num_key_value_heads=2, head_dim=4),
        "bloom": lambda: transformers.BloomConfig(vocab_size=40, hidden_size=16, n_layer=2, n_head=4),
        "t5": lambda: transformers.T5Config(vocab_size=40, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4),
    }
    kinds = {"bert": transformers.AutoModelForMaskedLM, "t5": transformers.AutoModelForSeq2SeqLM}
    return kinds.get(name, transformers.AutoModelForCausalLM).from_config(configs[name]())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpt2", {"h.1.ln_1": "pre", "h.0.ln_2": "pre", "ln_f": "final"}),
        (
            "llama",
            {"layers.0.input_layernorm": "pre", "layers.1.post_attention_layernorm": "pre", "model.norm": "final"},
        ),
        ("bert", {"layer.0.attention.output.LayerNorm": "post", "layer.1.output.LayerNorm": "post"}),
        (
            "olmo2",
            {
                "layers.0.post_attention_layernorm": "branch",
                "layers.1.post_feedforward_layernorm": "branch",
                "layers.0.self_attn.q_norm": "qk",
                "model.norm": "final",
            },
        ),
        (
            "gemma2",
            {
                "layers.0.input_layernorm": "peri",
                "layers.0.post_attention_layernorm": "peri",
                "layers.1.pre_feedforward_layernorm": "peri",
                "layers.1.post_feedforward_layernorm": "peri",
                "model.norm": "final",
            },
        ),
        ("bloom", {"word_embeddings_layernorm": "first", "h.0.post_attention_layernorm": "pre", "ln_f": "final"}),
        ("t5", {"encoder.block.0.layer.1.layer_norm": "pre", "encoder.final_layer_norm": "final"}),
    ],
)
def test_placement_in_models_of_hugging_face(name, expected):
    ids = torch.randint(0, 40, (3, 9))
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if name == "t5" else {})
    found = placements(trained(hugging_face(name), call=lambda model: model(**inputs).logits))
    for ending, kind in expected.items():
        assert {place for path, place in found.items() if path.endswith(ending)} == {kind}, (ending, found)
    main = {
        "gpt2": "pre",
        "llama": "pre",
        "bert": "post",
        "olmo2": "branch",
        "gemma2": "peri",
        "bloom": "pre",
        "t5": "pre",
    }
    blocks = {place for path, place in found.items() if any(c.isdigit() for c in path)} - {"qk"}
    assert blocks == {main[name]}


@pytest.mark.parametrize(("first", "expected"), [(True, "pre"), (False, "post")])
def test_placement_in_torch(first, expected):
    layer = nn.TransformerEncoderLayer(16, 4, 24, norm_first=first, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    found = placements(trained(model, torch.randn(3, 5, 16)))
    assert set(found.values()) == {expected}
    assert len(found) == 4


def test_norms_of_a_plain_network_have_no_place():
    model = nn.Sequential(
        nn.Linear(8, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 2)
    )
    assert placements(trained(model, torch.randn(4, 8))) == {}


def test_the_table_of_layers_names_the_place():
    layer = nn.TransformerEncoderLayer(16, 4, 24, norm_first=True, batch_first=True)
    record = trained(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), torch.randn(3, 5, 16))
    rows = {row.site: dict(zip((name for name, _ in COLUMNS), row.cells, strict=True)) for row in layers(record)}
    assert rows["layers.0.norm1/output"]["norm"].text == "layer: pre"
    assert rows["layers.1.norm2/output"]["largest gain"].text == "1 → 1"
