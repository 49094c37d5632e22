import pytest
import torch
from torch import nn

from normscope.core.errors import ArgumentError
from normscope.workbench import mlp, residual_cnn, transformer


def count(model, kind):
    return sum(isinstance(module, kind) for module in model.modules())


def test_residual_cnn_has_its_blocks_norms_and_names():
    model = residual_cnn(channels=4, blocks=(2, 1), classes=7)
    names = dict(model.named_modules())
    assert {"stem.conv", "stage1.block2.norm2", "stage2.block1.relu1", "pool", "head"} <= {*names}
    assert "stage2.block2" not in names
    # stem, two for each of three blocks, one in the shortcut where the shape changes
    assert count(model, nn.BatchNorm2d) == 1 + 2 * 3 + 1
    assert all(module.inplace for module in model.modules() if isinstance(module, nn.ReLU))
    shapes = {}
    for name in ("stem", "stage1", "stage2"):
        names[name].register_forward_hook(lambda _, __, output, name=name: shapes.update({name: output.shape}))
    assert model(torch.randn(3, 1, 28, 28)).shape == (3, 7)
    assert shapes == {"stem": (3, 4, 14, 14), "stage1": (3, 4, 14, 14), "stage2": (3, 8, 7, 7)}


def test_a_residual_block_adds_its_input():
    block = residual_cnn(channels=4, blocks=(1,)).stage1.block1
    nn.init.zeros_(block.norm2.weight)
    x = torch.randn(2, 4, 5, 5)
    assert torch.equal(block(x), x.relu())


def test_other_norms_take_the_place_of_batch_norm():
    assert count(residual_cnn(norm=lambda channels: nn.GroupNorm(2, channels)), nn.BatchNorm2d) == 0
    assert count(transformer(5, width=8, layers=2, heads=2, norm=nn.RMSNorm), nn.RMSNorm) == 5
    assert count(mlp([4, 3, 3, 2], norm=nn.LayerNorm), nn.LayerNorm) == 2
    assert count(mlp([4, 3, 3, 2], norm=None), (nn.BatchNorm1d, nn.LayerNorm)) == 0


@pytest.mark.parametrize(
    ("model", "example"),
    [
        (lambda: residual_cnn(), torch.randn(8, 1, 28, 28)),
        (lambda: transformer(11), torch.randint(11, (2, 64))),
        (lambda: mlp([784, 32, 10]), torch.randn(8, 1, 28, 28)),
    ],
)
def test_every_parameter_receives_a_gradient(model, example):
    torch.manual_seed(0)
    network = model()
    output = network(example)
    (output.float() * torch.randn_like(output)).sum().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    torch.manual_seed(0)
    assert all(one.equal(other) for one, other in zip(network.parameters(), model().parameters(), strict=True))


def test_the_transformer_is_causal_and_knows_places():
    torch.manual_seed(0)
    model = transformer(7, width=12, layers=2, heads=3, context=6)
    tokens = torch.tensor([[1, 2, 3, 1, 2, 3]])
    changed = tokens.clone()
    changed[0, 4] = 5
    before, after = model(tokens), model(changed)
    assert before.shape == (1, 6, 7)
    torch.testing.assert_close(before[0, :4], after[0, :4])
    assert (before[0, 4:] - after[0, 4:]).abs().amax(-1).min() > 1e-4
    assert (before[0, 0] - before[0, 3]).abs().max() > 1e-4
    assert count(model, nn.LayerNorm) == 2 * 2 + 1


def test_attention_equals_its_formula():
    torch.manual_seed(0)
    attention = transformer(7, width=12, layers=1, heads=3, context=6).block1.attention
    x = torch.randn(2, 6, 12)
    weight, bias = attention.qkv.weight.view(3, 3, 4, 12), attention.qkv.bias.view(3, 3, 1, 4)
    q, k, v = (torch.einsum("ntw,hdw->nhtd", x, weight[part]) + bias[part] for part in range(3))
    scores = (torch.einsum("nhtd,nhsd->nhts", q, k) / 2).masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf)
    mixed = torch.einsum("nhts,nhsd->nthd", scores.softmax(-1), v).flatten(2)
    torch.testing.assert_close(attention(x), attention.projection(mixed))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: transformer(7, width=10, heads=4), "width=10 is no multiple of heads=4; try width=12"),
        (lambda: mlp([784]), r"sizes=\[784\] needs an input and an output"),
    ],
)
def test_impossible_sizes_are_refused(build, message):
    with pytest.raises(ArgumentError, match=message):
        build()


def test_a_perceptron_without_bias_keeps_that_of_its_head():
    assert [name for name, _ in mlp([4, 3, 2], bias=False).named_parameters() if "bias" in name] == [
        "layer1.norm.bias",
        "head.bias",
    ]
