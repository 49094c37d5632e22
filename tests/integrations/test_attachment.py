"""What the callbacks of all frameworks share."""

import pytest
import torch
from torch import nn

from normscope.integrations.attachment import Attachment


@pytest.mark.parametrize("first", [False, True])
def test_of_several_processes_the_first_attaches_to_a_plain_model(first):
    model = nn.Linear(2, 2)
    attachment = Attachment(None, (), {})
    attachment.begin(model, (torch.optim.SGD(model.parameters(), 0.1),), first=first, resumed=False)
    assert (attachment.scope is not None) == first
    attachment.end()
