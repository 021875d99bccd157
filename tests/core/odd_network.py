"""A small network of convs of each kind, and what a refusal must leave unchanged."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from csg_seg import retrofit
from csg_seg.errors import CSGError
from csg_seg.layers.conv import generated_convs

CSG = {'slice_shape': (12, 20, 3, 3), 'code_dim': 24}


class Net(nn.Module):
    """Convs of each kind that a generator may meet, 17 and 31 channels wide."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.stem = nn.Conv2d(3, 31, 3, padding=1)
        self.body = nn.Sequential(
            nn.Conv2d(31, 17, 3, padding=1, bias=False),
            nn.BatchNorm2d(17),
            nn.ReLU(),
            nn.Conv2d(17, 34, 3, stride=2),
        )
        self.grouped = nn.Conv2d(34, 34, 3, padding=1, groups=2)
        self.point = nn.Conv2d(34, 31, 1)
        self.tiny = nn.Conv2d(31, 2, 3, padding=1)
        self.head = nn.Conv2d(31, 17, 3, padding=1)

    def forward(self, x):
        x = F.relu(self.point(self.grouped(F.relu(self.body(F.relu(self.stem(x)))))))
        return self.head(x).mean(dim=1) + self.tiny(x).mean(dim=1)


def images(n=2, size=11, channels=3, seed=0):
    return torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(seed))


def generated(model):
    return [name for name, _ in generated_convs(model)]


def shape_of(model):
    """Return everything that a refusal must leave unchanged."""
    return (
        {name: type(module) for name, module in model.named_modules()},
        {name: tensor.detach().clone() for name, tensor in model.state_dict().items()},
        {name: (id(parameter), parameter.requires_grad) for name, parameter in model.named_parameters()},
    )


def assert_refused(model, csg, message):
    types, state, parameters = shape_of(model)
    with pytest.raises(CSGError, match=message):
        retrofit(model, csg)
    types_after, state_after, parameters_after = shape_of(model)
    assert types_after == types
    assert parameters_after == parameters
    assert list(state_after) == list(state)
    assert all(torch.equal(state_after[name], tensor) for name, tensor in state.items())
