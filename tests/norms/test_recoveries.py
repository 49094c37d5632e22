"""Recoveries: recorded numbers in forms of their own, numpy formulas, published counts and identities."""

import numpy as np
import pytest
import torch

from normscope.core.errors import ArgumentError
from normscope.norms.area import BatchGroup
from normscope.norms.checks import check
from normscope.norms.families.recoveries import styled, with_passports
from normscope.norms.families.recoveries_condition import Modulated
from normscope.norms.families.recoveries_layers import LayerInstanceNorm
from normscope.norms.layer import Norm
from normscope.norms.operation import Standardize
from normscope.norms.row import image, labelled
from normscope.norms.table import build
from tests.norms import references_recoveries as formula
from tests.norms.keys.key import recorded_once

torch.set_num_threads(1)


def close(found, expected, rtol=1e-9):
    expected = torch.as_tensor(np.asarray(expected)) if not isinstance(expected, torch.Tensor) else expected
    atol = rtol * float(expected.abs().max())
    torch.testing.assert_close(found.detach().reshape(expected.shape), expected, rtol=0, atol=atol)


def made(name, num_features, seed=0, **options):
    torch.manual_seed(seed)
    layer = build(name, num_features, **options).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


def arrays(layer):
    return {name: value.detach().numpy() for name, value in layer.named_parameters()}


def images(n=4, c=8, seed=1):
    return torch.randn(n, c, 4, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 + 1


def vectors(n=4, size=5, seed=2):
    return torch.randn(n, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_adain_recorded():
    data = recorded_once("adain")
    content, style = data["content"].clone().requires_grad_(), data["style"].clone().requires_grad_()
    y = build("adain", 3)(content, style)
    (y * data["gy"]).sum().backward()
    close(y, data["y"])
    close(content.grad, data["g_content"])
    close(style.grad, data["g_style"])
    again = build("adain", 3)(data["content"], torch.cat([data["style_std"], data["style_mean"]], 1).flatten(1))
    close(again, data["y"])


@pytest.mark.parametrize(
    ("key", "name", "prefix"), [("ccbn_categorical", "ccbn", ""), ("sandwich_bn", "sabn", "class_")]
)
def test_class_conditional_recorded(key, name, prefix):
    data = recorded_once(key)
    layer = build(name, 3, classes=3).double()
    state = layer.state_dict()
    for half, kind in zip(data["param_embed.weight"].chunk(2, 1), ("weight", "bias"), strict=True):
        state[prefix + kind].copy_(half)
    for kind in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        for source in (f"param_bn.{kind}", f"buf0_bn.{kind}"):
            if source in data:
                state[kind].copy_(data[source])
    x = data["x"].clone().requires_grad_()
    y = layer(x, data["labels"])
    (y * data["gy"]).sum().backward()
    close(y, data["y_train"])
    close(x.grad, data["gx"])
    found = [layer.get_parameter(prefix + kind).grad for kind in ("weight", "bias")]
    close(torch.cat(found, 1), data["grad_embed.weight"])
    for kind in ("weight", "bias"):
        if prefix:
            close(layer.get_parameter(kind).grad, data[f"grad_bn.{kind}"])
    for kind in ("running_mean", "running_var"):
        close(getattr(layer, kind), data[f"buf1_bn.{kind}"])
    close(layer.eval()(data["x"], data["labels"]), data["y_eval"])


def test_sandwich_with_statistics_of_each_class():
    layer, x, labels = made("sabn", 8, classes=2, separate=True), images(6), torch.tensor([0, 1, 1, 0, 1, 1])
    p, y = arrays(layer), layer(x, labels)
    for c in range(2):
        z = formula.standardized(x[labels == c].numpy(), (0, 2, 3))
        shared = z * p["weight"][:, None, None] + p["bias"][:, None, None]
        close(y[labels == c], shared * p["class_weight"][c][:, None, None] + p["class_bias"][c][:, None, None])
        close(layer.branches[c].running_mean, 0.1 * x[labels == c].mean((0, 2, 3)))
    check(lambda: build("sabn", 8, classes=3, separate=True), labelled)


def test_conditional_instance_recorded():
    data = recorded_once("conditional_in_torch")
    layer = build("conditional-instance", 4, classes=6).double()
    layer.load_state_dict(dict(zip(("weight", "bias"), data["embedding"].chunk(2, 1), strict=True)))
    close(layer(data["x"], data["labels"]), data["y"])
    mixed = torch.nn.functional.one_hot(data["labels"], 6).double()
    close(layer(data["x"], mixed), data["y"])


def test_language_conditional_recorded():
    """That code normalizes by one mean and variance of everything and keeps a gain for each example of the batch."""
    data = recorded_once("cbn_vqa")
    x = data["x"].clone().requires_grad_()
    parts = BatchGroup(1), Standardize(1e-5, unbiased=True), Modulated(4, 5, shared=False)
    layer = Norm(*parts, num_features=3).double()
    state, gradients, rows = layer.state_dict(), {}, []
    for i in range(2):
        layer.zero_grad()
        for ours, theirs in (("to_scale", "gamma"), ("to_shift", "beta")):
            for ends in ("0.weight", "0.bias", "2.weight", "2.bias"):
                state[f"{ours}.{ends}"].copy_(data[f"param_fc_{theirs}.{ends}"])
            # their gain stands beside the last bias
            state[f"{ours}.2.bias"].add_(data[f"param_{theirs}s"][i])
        y = layer(x, data["emb"])[i]
        rows.append(y)
        (y * data["gy"][i]).sum().backward()
        for ours, theirs in (("to_scale", "gamma"), ("to_shift", "beta")):
            close(layer.get_parameter(f"{ours}.2.bias").grad, data[f"grad_{theirs}s"][i])
            for ends in ("0.weight", "0.bias", "2.weight", "2.bias"):
                grad = layer.get_parameter(f"{ours}.{ends}").grad
                name = f"grad_fc_{theirs}.{ends}"
                gradients[name] = gradients.get(name, 0) + grad.clone()
    close(torch.stack(rows), data["y_train"])
    close(torch.stack(rows), data["y_eval"])
    close(x.grad, data["gx"])
    for name, grad in gradients.items():
        close(grad, data[name])


def test_self_modulation_recorded():
    data = recorded_once("self_modulation")
    x = data["x"].permute(0, 3, 1, 2)
    layer = build("self-modulation", 2, style=5, hidden=6, eps=1e-3).double()
    prefix = "self__self_batch_norm_sbn_"
    names = {"trunk.0": "hidden", "to_scale": "gamma", "to_shift": "beta"}
    for ours, theirs in names.items():
        layer.state_dict()[f"{ours}.weight"].copy_(data[f"{prefix}{theirs}_kernel"].T)
        layer.state_dict()[f"{ours}.bias"].copy_(data[f"{prefix}{theirs}_bias"])
    close(layer(x, data["z"]).permute(0, 2, 3, 1), data["self_y"])


def test_vector_conditional_recorded():
    data = recorded_once("self_modulation")
    x = data["x"].permute(0, 3, 1, 2)
    layer = Norm(
        build("bn", 2).area, Standardize(1e-3), Modulated(5), build("bn", 2).population, num_features=2
    ).double()
    for ours, theirs in {"to_scale": "gamma", "to_shift": "beta"}.items():
        layer.state_dict()[f"{ours}.weight"].copy_(data[f"cond__cond_batch_norm_condition_{theirs}_kernel"].T)
        layer.state_dict()[f"{ours}.bias"].copy_(data[f"cond__cond_batch_norm_condition_{theirs}_bias"])
    close(layer(x, data["z"]).permute(0, 2, 3, 1), data["cond_y"])


def test_dynamic_layer():
    layer, x = made("dynamic-layer", 8, size=3), images().flatten(2).mT
    close(layer(x), formula.dynamic_layer(x.numpy(), arrays(layer)))


def test_dynamic_layer_of_another_sequence():
    layer, x, other = made("dynamic-layer", 8, size=3, features=5), images().flatten(2).mT, vectors(28).reshape(4, 7, 5)
    p = arrays(layer)
    a = np.tanh(other.numpy() @ p["summary.weight"].T + p["summary.bias"]).mean(1)
    scale, shift = (a @ p[f"{n}.weight"].T + p[f"{n}.bias"] for n in ("to_scale", "to_shift"))
    close(layer(x, other), formula.standardized(x.numpy(), 2) * scale[:, None] + shift[:, None])
    with pytest.raises(ArgumentError, match="sequence"):
        layer(x)


@pytest.mark.parametrize(("unbiased", "smooth"), [(True, 0.0), (False, 0.1), (False, 0.0)])
def test_adaptive_layer_instance(unbiased, smooth):
    layer = made("adalin", 8, adaptive=True, rho=0.6, unbiased=unbiased, smooth=smooth)
    x, style = images(), vectors(size=16)
    rho = layer.mix.detach().numpy()
    scale, shift = style[:, :8], style[:, 8:]
    expected = formula.layer_instance(x.numpy(), rho, scale.numpy(), shift.numpy(), int(unbiased), smooth)
    close(layer(x, style), expected)
    close(layer(x, (scale[:, :, None, None], shift[:, :, None, None])), expected)


def test_adaptive_layer_instance_starts_as_published():
    assert torch.equal(LayerInstanceNorm(3, adaptive=True).mix, torch.full((3,), 0.9))
    assert torch.equal(LayerInstanceNorm(3).mix, torch.zeros(3))
    layer = LayerInstanceNorm(3, rho=1.5)
    layer.clip()
    assert torch.equal(layer.mix, torch.ones(3))


@pytest.mark.parametrize("base", ["group", "instance", "layer"])
def test_instance_meta(base):
    layer, x = made("ilm", 32, base=base, groups=16, keys=8, hidden=2), images(c=32)
    groups = {"group": 16, "instance": 32, "layer": 1}[base]
    normalized = formula.group(x.numpy(), groups, ddof=1)
    close(layer(x), formula.instance_meta(x.numpy(), arrays(layer), 8, normalized))


def test_associate():
    layer, x = made("associate", 32, groups=16, hidden=3), images(c=32)
    normalized = formula.group(x.numpy(), 16)
    expected = formula.instance_meta(x.numpy(), arrays(layer), 16, normalized, crossed=True, ddof=0)
    close(layer(x), expected)


def residual_widths(blocks, bottleneck):
    """Numbers of channels of all normalizations of a residual network for ImageNet."""
    found, inputs = [64], 64
    for stage, count in enumerate(blocks):
        width = 64 * 2**stage
        outputs = 4 * width if bottleneck else width
        for block in range(count):
            found += [width, width, outputs] if bottleneck else [width, width]
            found += [outputs] if block == 0 and inputs != outputs else []
            inputs = outputs
    return found


# depth: blocks of each stage, bottleneck blocks, parameters without the increase, increase in percent (group, instance)
TABLE_4 = {
    18: ((2, 2, 2, 2), False, 11_689_512, 0.03, 2.79),
    34: ((3, 4, 6, 3), False, 21_797_672, 0.03, 2.46),
    50: ((3, 4, 6, 3), True, 25_557_032, 0.04, 20.70),
    101: ((3, 4, 23, 3), True, 44_549_160, 0.04, 20.31),
    152: ((3, 8, 36, 3), True, 60_192_808, 0.05, 20.18),
}


@pytest.mark.parametrize("depth", TABLE_4)
def test_parameters_of_associate_normalization_are_the_published_ones(depth):
    blocks, bottleneck, total, *published = TABLE_4[depth]
    widths = residual_widths(blocks, bottleneck)
    assert len(widths) == {18: 20, 34: 36, 50: 53, 101: 104, 152: 155}[depth]
    for base, expected in zip(("group", "instance"), published, strict=True):
        with torch.device("meta"):
            counts = [sum(p.numel() for p in build("associate", c, base=base).parameters()) for c in widths]
        increase = sum(counts) - 2 * sum(widths)
        assert round(100 * increase / total, 2) == expected


def test_representative_identity():
    """Equation 8: centering moves the input by center_weight times the difference of K and its mean."""
    layer, x = made("rbn", 8), images()
    z = x.mean((2, 3))
    plain = build("bn", 8, affine=False).double()
    moved = x + (layer.center_weight * z)[:, :, None, None]
    difference = (moved - moved.mean((0, 2, 3), keepdim=True)) - (x - x.mean((0, 2, 3), keepdim=True))
    expected = layer.center_weight[:, None, None] * (z - z.mean(0))[:, :, None, None]
    close(difference, expected.expand_as(x).detach())
    y = plain(moved)
    gate = torch.sigmoid(y.mean((2, 3)) * layer.scale_weight + layer.scale_bias)[:, :, None, None]
    expected = y * gate * layer.weight[:, None, None] + layer.bias[:, None, None]
    close(layer(x), expected.detach())


def test_representative_starts_with_a_gate_of_sigmoid_1():
    x = images()
    close(build("rbn", 8).double()(x), build("bn", 8).double()(x).detach() / (1 + np.exp(-1)))


def test_representative_with_deviations():
    layer, x = made("rbn", 8, centering="deviation", scaling="deviation"), images()
    moved = x + (layer.center_weight * x.flatten(2).std(2, correction=0))[:, :, None, None]
    y = build("bn", 8, affine=False).double()(moved)
    gate = torch.sigmoid(y.flatten(2).std(2, correction=0) * layer.scale_weight + layer.scale_bias)
    expected = y * (gate * layer.weight)[:, :, None, None] + layer.bias[:, None, None]
    close(layer(x), expected.detach())


@pytest.mark.parametrize("kernel", [1, 3])
def test_dynamic_instance(kernel):
    layer = made("din", 8, style=5, kernel=kernel, groups=2)
    x, v = images(), vectors()
    close(layer(x, v), formula.dynamic_instance(x.numpy(), v.numpy(), arrays(layer), kernel, 2))


def test_adaptive_convolution():
    layer, x, v = made("adacon", 8, style=5, groups=2), images(), vectors()
    close(layer(x, v), formula.adaptive_convolution(x.numpy(), v.numpy(), arrays(layer), 3, 2))


def test_passports():
    layer, x = made("passport", 8), images()
    passports = images(2, seed=5), images(1, seed=6)
    expected = formula.passport(x.numpy(), *(p.numpy() for p in passports), arrays(layer))
    close(layer(x, passports), expected)
    public = formula.standardized(x.numpy(), (0, 2, 3)) * layer.weight.detach().numpy()[:, None, None]
    close(layer(x), public + layer.bias.detach().numpy()[:, None, None])
    both = layer(torch.cat([x, x]), passports, torch.arange(8) >= 4)
    close(both[4:], expected)
    scale = layer.scale_and_shift(passports)[0].detach().numpy()
    signature = np.sign(scale + 0.05)
    loss = 0.1 * np.maximum(0.1 - signature * scale, 0).sum() + 1e-5 * (scale**2).sum()
    assert float(layer.sign_loss(passports, torch.from_numpy(signature)).detach()) == pytest.approx(loss, rel=1e-12)


def test_passport_branches_have_their_own_statistics():
    x, passports = images(), (images(1, seed=5), images(1, seed=6))
    apart, shared = made("passport", 8), made("passport", 8, published=True)
    for layer in (apart, shared):
        layer(x, passports)
    assert torch.equal(apart.public.running_mean, torch.zeros(8, dtype=torch.float64))
    close(shared.public.running_mean, 0.1 * x.mean((0, 2, 3)))


@pytest.mark.parametrize("sampling", [False, True])
def test_semantic(sampling):
    layer, x = made("attentive-semantic", 8, entities=3, sampling=sampling).eval(), images()
    expected = formula.semantic(x.numpy(), arrays(layer), 10.0, [0, 10, 19] if sampling else None)
    close(layer(x), expected)


def test_options_obey_the_laws():
    for name, options, inputs in (
        ("adain", {"style": 5}, styled),
        ("adalin", {"adaptive": True}, lambda n, g: (*image(n, g), styled(16, g)[1].repeat(1, 4)[:, :16])),
        ("rbn", {"centering": "deviation", "scaling": "deviation", "affine": False}, image),
        ("conditional-batch", {"style": 5}, styled),
        ("conditional-batch", {"style": 5, "hidden": 3}, styled),
        ("attentive", {"groups": 4, "attention": "two-sigmoid"}, image),
        ("attentive", {"attention": "two-bn-hsigmoid"}, image),
        ("attentive", {"attention": "bn-softmax"}, image),
        ("associate", {"base": "instance"}, image),
        ("self", {"both": True}, image),
        ("passport", {"published": True}, with_passports),
    ):
        assert check(lambda name=name, options=options: build(name, 8, **options), inputs)


def test_semantic_regions_and_penalty():
    layer, x = made("attentive-semantic", 8, entities=3), images()
    close(layer.layout(x).sum(1), torch.ones(4, 20, dtype=torch.float64))
    f = layer.filters.detach().numpy()
    assert float(layer.orthogonality().detach()) == pytest.approx(((f @ f.T - np.eye(3)) ** 2).sum(), rel=1e-12)


@pytest.mark.parametrize("both", [False, True])
def test_selfnorm(both):
    layer, x = made("self", 8, both=both), images()
    close(layer(x), formula.selfnorm(x.numpy(), arrays(layer), both))


def test_crossed_instances():
    layer, x, order = build("crossed-instance", 8), images(), torch.tensor([2, 0, 3, 1])
    z, other = x.flatten(2), x[order].flatten(2)
    sd, sd_other = ((v.var(2, keepdim=True) + 1e-5).sqrt() for v in (z, other))
    expected = (z - z.mean(2, keepdim=True)) / sd * sd_other + other.mean(2, keepdim=True)
    close(layer(x, order), expected.reshape(x.shape))
    assert torch.equal(layer.eval()(x), x)
    assert torch.equal(build("crossed-instance", 8, probability=0.0)(x), x)


def test_enhancement_starts_with_a_gate_of_sigmoid_minus_1():
    x = images()
    close(build("iebn", 8).double()(x), build("bn", 8).double()(x).detach() / (1 + np.e))


def test_adanorm_is_what_it_says():
    x = images().flatten(2).mT
    h = (x - x.mean(2, keepdim=True)) / (x.std(2, keepdim=True) + 1e-5)
    close(build("adanorm", 8, scale=1.5, slope=0.2)(x), 1.5 * (1 - 0.2 * h) * h)


def test_spatially_adaptive_is_batch_normalization_where_the_map_says_nothing():
    layer, x = build("spade", 8, labels=2, hidden=4).double(), images()
    with torch.no_grad():
        for module in (layer.map_gain, layer.map_shift):
            module.weight.zero_()
            module.bias.zero_()
    close(layer(x, torch.ones(4, 2, 3, 3)), build("bn", 8).double()(x).detach())


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: build("adain", 8)(images()), ["condition=None", "style"]),
        (lambda: build("adain", 8)(images(), images(c=4)), ["(4, 4, 4, 5)", "8 channels"]),
        (lambda: build("spade", 8, labels=3)(images(), images(c=2)), ["(4, 2, 4, 5)", "(N, 3, H, W)"]),
        (lambda: build("self-modulation", 8, style=5)(images()), ["condition=None", "length 5"]),
        (lambda: build("ccbn", 8), ["classes=None", "style=None"]),
        (lambda: build("attentive", 8, attention="bn-sigmoyd"), ["bn-sigmoyd", "bn-sigmoid"]),
        (lambda: build("attentive", 8, attention="bn-sigmoid", groups=4), ["bn-sigmoid", "groups=4", "hsigmoid"]),
        (lambda: build("attentive", 8, attention="sigmoid")(images()[:, :, 0, 0].float()), ["samples", "(4, 8)"]),
        (lambda: build("adacon", 8, style=5, kernel=2), ["kernel=2", "odd"]),
        (lambda: build("din", 8, style=5, kernel=3).double()(images().flatten(2), vectors()), ["kernel=1"]),
        (lambda: build("clipped-layer", 8, tail=0.5), ["tail=0.5"]),
        (lambda: build("rbn", 8, scaling="median"), ["median", "deviation"]),
        (lambda: build("sabn", 8, classes=3)(images()), ["condition=None", "labels"]),
    ],
)
def test_errors_name_argument_value_and_options(call, words):
    with pytest.raises(ArgumentError) as caught:
        call()
    for word in words:
        assert word in str(caught.value)
