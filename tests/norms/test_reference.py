"""Recorded numbers of public implementations: outputs, gradients, buffers after three steps, evaluation."""

import pytest
import torch

from normscope.norms.table import ROWS
from tests.norms.keys import KEYS, ONCE
from tests.norms.keys.key import FOLDER, recorded, recorded_once

torch.set_num_threads(1)

REPRODUCED = [key for key in KEYS if not key.different]


def compare(key, what, found, expected):
    if what in key.skip:
        return
    expected = expected.to(torch.float64)
    found = found.detach().to(torch.float64).reshape(expected.shape)
    torch.testing.assert_close(
        found,
        expected,
        rtol=0,
        atol=key.rtol * float(expected.abs().max().clamp_min(1e-12)),
        msg=lambda m: f"{what}: {m}",
    )


def ours(key, name):
    return key.names.get(name, name)


def load(key, layer, data):
    state = layer.state_dict()
    for name, value in ((n.removeprefix("state0/"), v) for n, v in data.items() if n.startswith("state0/")):
        target = ours(key, name)
        if f"state0/{name}" in key.skip or (key.stacked and "." in name):
            continue
        assert target in state, f"{name} is recorded, but the layer has {sorted(state)}"
        value = key.put[target](value, data) if target in key.put else value
        state[target].copy_(value.reshape(state[target].shape))
    for target, pieces in key.stacked.items():
        state[target].copy_(torch.stack(pieces(data, "state0")).reshape(state[target].shape))


def taken(key, name, value, data):
    return key.take[name](value, data) if name in key.take else value


def gradients(key, layer, data, step):
    prefix = f"gp{step}/"
    for name in (n.removeprefix(prefix) for n in data if n.startswith(prefix)):
        if prefix + name not in key.skip:
            grad = layer.get_parameter(ours(key, name)).grad
            compare(key, prefix + name, taken(key, f"grad {ours(key, name)}", grad, data), data[prefix + name])


@pytest.mark.parametrize("key", REPRODUCED, ids=lambda key: key.key)
def test_reproduced(key):
    data = recorded(key.key)
    layer = key.make().double().train()
    load(key, layer, data)
    for step in "123":
        x = data[f"x{step}"].clone().requires_grad_()
        layer.zero_grad()
        y = key.call(layer, x * 1.0, step, data)
        (y * data[f"w{step}"]).sum().backward()
        if f"y{step}" in data:
            compare(key, f"y{step}", y, data[f"y{step}"])
            compare(key, f"gx{step}", x.grad, data[f"gx{step}"])
        gradients(key, layer, data, step)
    after = layer.state_dict()
    for name in (n.removeprefix("state3/") for n in data if n.startswith("state3/")):
        if f"state3/{name}" not in key.skip and not (key.stacked and "." in name):
            found = taken(key, ours(key, name), after[ours(key, name)], data)
            compare(key, f"state3/{name}", found, data[f"state3/{name}"])
    for name, pieces in key.stacked.items():
        compare(key, f"state3/{name}", after[name], torch.stack(pieces(data, "state3")))
    layer.eval()
    compare(key, "y_eval", key.call(layer, data["x_eval"], "_eval", data), data["y_eval"])


@pytest.mark.parametrize("key", [key for key in ONCE if not key.different], ids=lambda key: key.key)
def test_reproduced_once(key):
    data = recorded_once(key.key)
    layer = key.make().double().train()
    state = layer.state_dict()
    for prefix in ("param_", "buf0_"):
        for name in (n.removeprefix(prefix) for n in data if n.startswith(prefix)):
            if prefix + name not in key.skip:
                state[ours(key, name)].copy_(data[prefix + name].reshape(state[ours(key, name)].shape))
    x = data["x"].clone().requires_grad_()
    y = key.call(layer, x * 1.0, data, training=True)
    (y * data["gy"]).sum().backward()
    compare(key, "y_train", y, data["y_train"])
    compare(key, "gx", x.grad, data["gx"])
    for name in (n.removeprefix("grad_") for n in data if n.startswith("grad_")):
        if f"grad_{name}" not in key.skip:
            compare(key, f"grad_{name}", layer.get_parameter(ours(key, name)).grad, data[f"grad_{name}"])
    for name in (n.removeprefix("buf1_") for n in data if n.startswith("buf1_")):
        if f"buf1_{name}" not in key.skip:
            compare(key, f"buf1_{name}", layer.state_dict()[ours(key, name)], data[f"buf1_{name}"])
    layer.eval()
    evaluated = key.call(layer, data.get("x_eval", data["x"]), data, training=False)
    compare(key, "y_eval", evaluated, data["y_eval"])


def test_every_file_is_in_the_table_and_every_entry_has_its_file():
    for keys, folder in ((KEYS, FOLDER), (ONCE, FOLDER / "other")):
        names = [key.key for key in keys]
        assert len(names) == len(set(names))
        assert {path.stem for path in folder.glob("*.npz")} >= {key.key for key in keys if not key.different}


def test_rows_name_keys_that_are_reproduced():
    claimed = {name for row in ROWS for name in row.keys}
    assert claimed <= {key.key for key in (*REPRODUCED, *ONCE) if not key.different}
