"""Every row of the table against the laws that its traits declare."""

import pytest
import torch

from normscope.core.errors import ArgumentError
from normscope.norms.checks import LAWS, Case, LawBroken, check, laws
from normscope.norms.table import ROWS

torch.set_num_threads(1)


def case(row):
    return Case(row.example, row.inputs, row.features)


CASES = [pytest.param(row, law, id=f"{row.name}-{law.name}") for row in ROWS for law in laws(case(row))]


@pytest.mark.parametrize(("row", "law"), CASES)
def test_law(row, law):
    law.test(case(row))


def test_a_layer_that_lies_is_found():
    class Shifted(torch.nn.BatchNorm2d):
        traits = laws.__globals__["Traits"](crosses_batch=True, stateful=True, shift_invariant=True, ranks=(4,))

        def forward(self, x):
            return super().forward(x) + x

        def __repr__(self):
            return "Shifted(8)"

    with pytest.raises(LawBroken, match="shift"):
        check(lambda: Shifted(8), skip=["repr"])


def test_an_unknown_law_is_refused():
    with pytest.raises(ArgumentError, match="did you mean 'shift'"):
        check(torch.nn.Identity, skip=["shfit"])


def test_laws_have_different_names():
    assert len({law.name for law in LAWS}) == len(LAWS)
