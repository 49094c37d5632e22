from dataclasses import dataclass

import pytest
import torch
from torch import nn

from normscope.probes import layout


@dataclass
class Output:
    logits: torch.Tensor
    extra: object = None


def test_walk():
    a, b, c = (torch.tensor(float(i)) for i in range(3))
    output = {"x": (a, [b, "text"]), "y": Output(c, {"z": None}), 3: a}
    assert [(slot, t.item()) for slot, t in layout.tensors(output)] == [
        ("output.x.0", 0),
        ("output.x.1.0", 1),
        ("output.y.logits", 2),
        ("output.3", 0),
    ]
    assert list(layout.tensors(Output)) == list(layout.tensors("text")) == list(layout.tensors(None)) == []


def test_walk_ends_on_a_structure_that_holds_itself():
    loop = [torch.ones(1)]
    loop.append(loop)
    assert 1 <= len(list(layout.tensors(loop))) < 20


@pytest.mark.parametrize(
    ("shape", "axis"),
    [((3, 4, 5, 6), 1), ((3, 4, 5, 6), -3), ((3, 4, 5), -1), ((3, 4), 0), ((2, 3, 4), 0), ((7,), -1), ((), -1)],
)
def test_the_view_holds_every_element_of_its_channel(shape, axis):
    x = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    for tensor in (x, x.to(memory_format=torch.channels_last)) if x.dim() == 4 else (x,):
        view = layout.channeled(tensor, axis)
        found = view.x if view.rows else view.x.movedim(1, -1).reshape(-1, view.x.shape[1])
        expected = x.movedim(axis, -1).reshape(-1, x.shape[axis]) if x.dim() > 1 else x.reshape(-1, 1)
        assert view.count == len(found) == len(expected)
        assert torch.equal(found.sort(0).values, expected.sort(0).values)


def test_the_view_of_ordinary_memory_is_no_copy():
    for x, axis in (
        (torch.ones(3, 4, 5, 6), 1),
        (torch.ones(3, 4, 5, 6).to(memory_format=torch.channels_last), 1),
        (torch.ones(3, 4, 5), -1),
        (torch.ones(4, 3, 5).transpose(0, 1), -1),
        (torch.ones(2, 3, 4, 5).permute(2, 0, 1, 3), -1),
    ):
        assert layout.channeled(x, axis).x.data_ptr() == x.data_ptr()


def test_rows_whose_dimensions_have_changed_places_are_all_there():
    x = torch.arange(120.0).reshape(2, 3, 4, 5)
    for turned in (x.permute(2, 0, 1, 3), x.permute(1, 2, 0, 3), x[:, ::2].transpose(0, 1), x[:1].expand(3, 3, 4, 5)):
        view = layout.channeled(turned, -1)
        assert view.rows
        assert view.count == turned.numel() // 5
        assert torch.equal(view.x.sort(0).values, turned.reshape(-1, 5).sort(0).values)


@pytest.mark.parametrize(
    ("tensor", "why"),
    [
        (torch.ones(2), ""),
        (torch.ones(2, dtype=torch.bfloat16), ""),
        (torch.ones(2, dtype=torch.int64), "int64 values"),
        (torch.ones(2, dtype=torch.bool), "bool values"),
        (torch.ones(2, dtype=torch.complex64), "complex64 values"),
        (torch.ones(0, 3), "empty: shape (0, 3)"),
        (torch.eye(2).to_sparse(), "sparse values"),
    ],
)
def test_why_unmeasured(tensor, why):
    assert layout.why_unmeasured(tensor).startswith(why)
    assert bool(layout.why_unmeasured(tensor)) == bool(why)


@pytest.mark.parametrize(
    ("shape", "before", "axis"),
    [
        ((2, 3, 4, 4), None, 1),
        ((2, 3, 4), None, -1),
        ((2, 3), None, -1),
        ((2, 3, 4), ((5, 3, 9), 1), 1),
        ((2, 3, 4), ((5, 7, 9), 1), -1),
        ((2, 5), ((2, 3, 4), 1), -1),
        ((), None, -1),
    ],
)
def test_guessed_axis(shape, before, axis):
    assert layout.guessed_axis(shape, before) == axis


def test_axes_that_a_class_fixes():
    found = [
        layout.own_axis(m)
        for m in (nn.Conv1d(1, 1, 1), nn.Conv2d(1, 1, 1), nn.ConvTranspose3d(1, 1, 1), nn.Linear(1, 1), nn.ReLU())
    ]
    assert found == [-2, -3, -4, -1, None]


@pytest.mark.parametrize(
    ("args", "kwargs", "size"),
    [
        ((torch.ones(4, 2),), {}, 4),
        ((), {"x": torch.ones(3)}, 3),
        ((1, [torch.ones(5, 1)]), {}, 5),
        ((), {}, 0),
        ((torch.tensor(1.0),), {}, 0),
    ],
)
def test_batch_size(args, kwargs, size):
    assert layout.batch_size(args, kwargs) == size
