"""What is recorded of attention, against its definition in float64 with dense scores."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import normscope as ns
from normscope.probes import attention
from normscope.probes.attention import Scores, observe
from tests.awkward.base import Wrap, sgd

B, H, L, S, D = 3, 4, 7, 7, 5


@pytest.fixture(autouse=True)
def fixed():
    torch.manual_seed(0)


def dense(q, k, scale, seen=None, bias=None):
    """Largest logit, ceiling and relative entropy of each head, from all scores at once."""
    q, k = (x.detach().double() for x in (q, k))
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    logits = torch.einsum("bhid,bhjd->bhij", q, k) * scale
    seen = torch.ones(logits.shape, dtype=torch.bool) if seen is None else seen.expand(logits.shape)
    weights = ((logits if bias is None else logits + bias).masked_fill(~seen, -math.inf)).softmax(3)
    keys = seen.sum(3)
    entropy = -(weights * weights.clamp(min=1e-300).log()).sum(3) / keys.clamp(min=2).log()
    counted = keys > 1
    return {
        "logit": logits.masked_fill(~seen, -math.inf).amax((0, 2, 3)).numpy(),
        "ceiling": (q.norm(dim=3).amax((0, 2)) * k.norm(dim=3).amax((0, 2)) * abs(scale)).numpy(),
        "entropy": ((entropy * counted).sum((0, 2)) / counted[:, 0].sum()).numpy(),
    }


def check(found, expected):
    for stat, values in expected.items():
        np.testing.assert_allclose(found[stat], values, rtol=2e-5, atol=1e-6, err_msg=stat)


def measured(model, *inputs, site, **settings):
    """Train one step and return what was recorded of a site."""
    optimizer = sgd(model)
    with ns.attach(model, optimizer, every=1, probes="attention", **settings) as scope:
        output = model(*inputs)
        (output[0] if isinstance(output, tuple) else output).square().mean().backward()
        optimizer.step()
    record = scope.record()
    assert not (record.events["kind"] == "probe-failed").any()
    return {item.stat: item.values[0] for item in record.channels if item.site == site}


class Attends(nn.Module):
    """Attention with everything in its own hands; keeps queries and keys for the tests."""

    def __init__(self, attend, heads=H, keys=H, width=D):
        super().__init__()
        self.heads, self.keys, self.attend = heads, keys, attend
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(8, n * width) for n in (heads, keys, keys))
        self.out = nn.Linear(heads * width, 8)

    def forward(self, x):
        q, k, v = (
            part(x).unflatten(-1, (n, -1)).transpose(1, 2)
            for part, n in ((self.q_proj, self.heads), (self.k_proj, self.keys), (self.v_proj, self.keys))
        )
        self.q, self.k = 3 * q, 2 * k
        return self.out(self.attend(self.q, self.k, v).transpose(1, 2).flatten(2))


CAUSAL = torch.ones(L, S).tril().bool()
HOLES = torch.rand(B, 1, L, S, generator=torch.Generator().manual_seed(1)) > 0.4
HOLES[..., 0] = True
BIAS = torch.randn(H, L, S, generator=torch.Generator().manual_seed(2))


def written(q, k, v, *, scale=D**-0.5, seen=None, bias=None, cap=None):
    logits = q @ k.transpose(2, 3) * scale
    logits = cap * torch.tanh(logits / cap) if cap else logits
    logits = logits if bias is None else logits + bias
    return F.dropout(logits.masked_fill(~CAUSAL if seen is None else ~seen, -1e9).softmax(3), 0.1) @ v


def einsum(q, k, v):
    return torch.einsum("bhij,bhjd->bhid", (torch.einsum("bhid,bhjd->bhij", q, k) / D**0.5).softmax(3), v)


@pytest.mark.parametrize(
    ("attend", "settings"),
    [
        (F.scaled_dot_product_attention, {}),
        (
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.7),
            {"seen": CAUSAL, "scale": 0.7},
        ),
        (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, HOLES), {"seen": HOLES}),
        (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, BIAS), {"bias": BIAS}),
        (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.2, is_causal=True), {"seen": CAUSAL}),
        (written, {"seen": CAUSAL}),
        (lambda q, k, v: written(q, k, v, scale=0.3, seen=HOLES), {"seen": HOLES, "scale": 0.3}),
        (lambda q, k, v: written(q, k, v, bias=BIAS), {"seen": CAUSAL, "bias": BIAS}),
        (einsum, {}),
    ],
)
def test_each_way_to_attend_is_seen(attend, settings):
    model = Attends(attend)
    found = measured(model, torch.randn(B, L, 8), site="/attention")
    check(found, dense(model.q, model.k, settings.pop("scale", D**-0.5), **settings))


def test_a_soft_cap_is_looked_through():
    model = Attends(lambda q, k, v: written(q, k, v, cap=2.0))
    found = measured(model, torch.randn(B, L, 8), site="/attention")
    expected = dense(model.q, model.k, D**-0.5, CAUSAL)
    check({"logit": found["logit"]}, {"logit": expected["logit"]})
    assert expected["logit"].max() > 2.0


def test_keys_that_serve_several_heads():
    model = Attends(lambda *qkv: F.scaled_dot_product_attention(*qkv, enable_gqa=True), keys=2)
    found = measured(model, torch.randn(B, L, 8), site="/attention")
    check(found, dense(model.q, model.k, D**-0.5))


def test_a_softmax_over_queries_is_another_thing():
    model = Attends(lambda q, k, v: (q @ k.mT / D**0.5).softmax(2) @ v)
    assert set(measured(model, torch.randn(B, L, 8), site="/attention")) == {"ceiling"}


def test_a_sum_of_two_products_is_not_taken_for_one():
    model = Attends(lambda q, k, v: ((q @ k.mT + k @ q.mT) / D**0.5).softmax(3) @ v)
    found = measured(model, torch.randn(B, L, 8), site="/attention")
    assert set(found) == {"ceiling"}  # of the projections


@pytest.mark.parametrize("weights", [True, False])
def test_multihead_attention(weights):
    attend = nn.MultiheadAttention(8, 2, batch_first=True, bias=True)
    model = Wrap(lambda m, x: m.a(x, x, x, need_weights=weights, attn_mask=~CAUSAL)[0], a=attend)
    x = torch.randn(B, L, 8)
    q, k, _ = F.linear(x, attend.in_proj_weight, attend.in_proj_bias).chunk(3, -1)
    q, k = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in (q, k))
    check(measured(model, x, site="a/attention"), dense(q, k, 0.5, CAUSAL))


def test_blocks_of_scores_give_what_all_of_them_do(monkeypatch):
    q, k = torch.randn(6, H, 9, D), torch.randn(6, 2, 11, D)
    bias = torch.randn(6, H, 9, 11).masked_fill(torch.rand(6, H, 9, 11) > 0.8, -1e9)
    whole = Scores(q, k, 0.4, False, bias, None)
    for cells in (1, 60, 500, 5000):
        monkeypatch.setattr(attention, "_CELLS", cells)
        found = {name: value.numpy() for name, value in zip(("logit", "ceiling"), observe(whole), strict=False)}
        check(found, {stat: dense(q, k, 0.4, bias > -5000)[stat] for stat in found})


def test_a_large_batch_is_looked_at_in_part(monkeypatch):
    q = torch.randn(8, H, 9, D)
    monkeypatch.setattr(attention, "_PRODUCTS", 2 * H * 9 * 9 * D)
    found = observe(Scores(q, q, 0.4, False, None, None))
    assert found.sequences == (2, 8)
    check({"logit": found.logit.numpy()}, {"logit": dense(q[::4], q[::4], 0.4)["logit"]})


def test_entropy_is_1_where_all_keys_are_alike_and_0_where_one_is_seen():
    zeros, ones = torch.zeros(2, 1, 4, 3), torch.eye(4)[None, None].expand(2, 1, 4, 4) * 100
    for causal in (False, True):
        alike = observe(Scores(zeros, zeros, 1.0, causal, None, None))
        single = observe(Scores(ones, ones, 1.0, causal, None, None))
        assert alike.entropy / alike.facts[0] == pytest.approx(1.0)
        assert single.entropy / single.facts[0] == pytest.approx(0.0)


def test_weights_that_underflow_do_not_hide_a_collapse():
    def attend(q, k, v):
        return (q @ k.mT * 1e4).softmax(3) @ v

    found = measured(Attends(attend), torch.randn(B, L, 8), site="/attention")
    assert (found["entropy"] < 0.02).all()


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_attention_is_seen_when_it_is_computed_again(reentrant):
    runs = []

    def attend(q, k, v):
        runs.append(torch.is_grad_enabled())
        return F.scaled_dot_product_attention(q, k, v)

    inner = Attends(attend)
    block = Wrap(lambda m, x: m.last(torch.relu(m.a(x))), a=inner, last=nn.Linear(8, 8))
    model = Wrap(lambda m, x: checkpoint(m.b, m.first(x), use_reentrant=reentrant), b=block, first=nn.Linear(8, 8))
    found = measured(model, torch.randn(B, L, 8), site="b.a/attention")
    assert len(runs) == 2  # a look at what was packed would have made it three
    check(found, dense(inner.q, inner.k, D**-0.5))


def test_attention_that_is_packed_inside_a_module_is_not_unpacked():
    runs = []

    def core(q, k, v):
        runs.append(1)
        return F.scaled_dot_product_attention(q, k, v)

    model = Attends(lambda *qkv: checkpoint(core, *qkv, use_reentrant=False))
    found = measured(model, torch.randn(B, L, 8), site="/attention")
    assert len(runs) == 2
    assert set(found) == {"ceiling"}


def test_projections_bound_what_is_not_seen():
    model = Attends(lambda q, k, v: torch.relu(q @ k.mT) @ v)  # no softmax
    model.head_dim, model.scaling = D, 0.25
    found = measured(model, torch.randn(B, L, 8), site="/attention")
    q, k = model.q / 3, model.k / 2
    check(found, {"ceiling": dense(q, k, 0.25)["ceiling"]})


def test_a_joint_projection_is_cut_in_three():
    attend = nn.Module()
    attend.qkv, attend.num_heads = nn.Linear(8, 24), 2
    model = Wrap(lambda m, x: m.a.qkv(x)[..., :8], a=attend)
    model.a.forward = lambda x: x
    x = torch.randn(B, L, 8)
    q, k, _ = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in attend.qkv(x).chunk(3, -1))
    check(measured(model, x, site="a/attention"), {"ceiling": dense(q, k, 0.5)["ceiling"]})


def test_what_may_change_queries_after_their_projection_is_not_bounded():
    model = Attends(lambda q, k, v: torch.relu(q @ k.mT) @ v)
    model.qk_norm = True
    assert measured(model, torch.randn(B, L, 8), site="/attention") == {}


def test_log_z_of_the_output():
    model = Wrap(lambda m, x: m.head(m.a(x)), a=Attends(F.scaled_dot_product_attention), head=nn.Linear(8, 9))
    x = torch.randn(B, L, 8)
    expected = torch.logsumexp(model(x).detach().double(), -1)
    optimizer = sgd(model)
    with ns.attach(model, optimizer, every=1, probes="attention") as scope:
        model(x).square().mean().backward()
        optimizer.step()
    record = scope.record()
    assert record.series("/logits", "log_z").tolist() == pytest.approx([float(expected.mean())], rel=1e-6)
    assert record.series("/logits", "log_z_size").tolist() == pytest.approx([float(expected.abs().max())], rel=1e-6)


def test_nothing_is_said_of_a_model_that_does_not_attend():
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    assert measured(model, torch.randn(B, 8), site="/attention") == {}


def families():
    transformers = pytest.importorskip("transformers")
    small = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4}
    grouped = small | {"intermediate_size": 24, "num_key_value_heads": 2}
    return {
        "gpt2": transformers.GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=1, n_head=4),
        "bert": transformers.BertConfig(**small, intermediate_size=24),
        "llama": transformers.LlamaConfig(**grouped),
        "qwen3": transformers.Qwen3Config(**grouped, head_dim=8),
        "gemma2": transformers.Gemma2Config(**grouped, head_dim=8),
    }


HUGGING_FACE = [
    ("gpt2", "transformer.h.0.attn", "sdpa"),
    ("gpt2", "transformer.h.0.attn", "eager"),
    ("bert", "bert.encoder.layer.0.attention.self", "sdpa"),
    ("bert", "bert.encoder.layer.0.attention.self", "eager"),
    ("llama", "model.layers.0.self_attn", "sdpa"),
    ("llama", "model.layers.0.self_attn", "eager"),
    ("qwen3", "model.layers.0.self_attn", "sdpa"),
    ("gemma2", "model.layers.0.self_attn", "eager"),  # it caps its scores, which the fused kernel cannot
]


@pytest.mark.parametrize(("name", "path", "kind"), HUGGING_FACE)
def test_models_of_hugging_face(name, path, kind, monkeypatch):
    """A model records what the queries and keys say that its attention function is given in a second run."""
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.models.gemma2 import modeling_gemma2

    make = AutoModelForMaskedLM if name == "bert" else AutoModelForCausalLM
    model = make.from_config(families()[name], attn_implementation=kind)
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.3
    ids, optimizer = torch.randint(0, 40, (B, 9)), sgd(model.eval())
    with ns.attach(model, optimizer, every=1, probes="attention") as scope:
        model(input_ids=ids).logits.square().mean().backward()
        caught = {}

        def spy(module, query, key, value, mask, **others):
            caught.update(q=query, k=key)
            return torch.zeros_like(query).transpose(1, 2), None

        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", spy)
        monkeypatch.setattr(modeling_gemma2, "eager_attention_forward", spy)
        if name != "gemma2":
            model.set_attn_implementation("sdpa")
        with torch.no_grad():
            model(input_ids=ids)
        optimizer.step()
    found = {i.stat: i.values[0] for i in scope.record().channels if i.site == f"{path}/attention"}
    scale = 256**-0.5 if name == "gemma2" else caught["q"].shape[-1] ** -0.5
    expected = dense(caught["q"], caught["k"], scale, None if name == "bert" else torch.ones(9, 9).tril().bool())
    if name == "gemma2":
        del expected["entropy"]  # of capped scores
    check(found, expected)


def test_a_failure_switches_attention_off_and_nothing_else(monkeypatch):
    monkeypatch.setattr(attention, "observe", lambda scores: 1 / 0)
    model = Attends(F.scaled_dot_product_attention)
    optimizer = sgd(model)
    with ns.attach(model, optimizer, every=1) as scope:
        for _ in range(2):
            model(torch.randn(B, L, 8)).square().mean().backward()
            optimizer.step()
    record = scope.record()
    failed = record.events[record.events["kind"] == "probe-failed"]
    assert list(failed["message"]) == ["attention: ZeroDivisionError: division by zero"]
    assert len(record.series("out/output", "rms")) == 2


def test_nothing_is_kept_from_step_to_step():
    model = Attends(F.scaled_dot_product_attention)
    optimizer = sgd(model)
    with ns.attach(model, optimizer, every=1, probes="attention") as scope:
        for _ in range(3):
            model(torch.randn(B, L, 8)).square().mean().backward()
            optimizer.step()
            held = vars(scope._session._attention)
            assert (held["_found"], held["_claimed"], held["_output"]) == ({}, set(), None)
