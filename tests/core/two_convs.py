"""A small network of two generated convs, and laws that several test files check."""

import statistics

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import experiments.rivals.tensor_ring  # noqa: F401 (registers a kind that is not part of the package)
from csg_seg import retrofit

CSG = {'slice_shape': (12, 20, 3, 3), 'code_dim': 24}
RESNET_CSG = {'slice_shape': (16, 16, 3, 3), 'code_dim': 128}
BEYOND = [{'generator': 'mlp', 'hidden': 5}, {'generator': 'tensor_ring', 'rank': 3}, {'residual': 2}]


class Net(nn.Module):
    """Two generated convs, 17x31 and 31x17, behind a dense first one."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.stem = nn.Conv2d(3, 31, 3, padding=1)
        self.narrow = nn.Conv2d(31, 17, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(17)
        self.widen = nn.Conv2d(17, 31, 3, stride=2)
        self.head = nn.Linear(31, 4)

    def forward(self, x):
        x = F.relu(self.norm(self.narrow(F.relu(self.stem(x)))))
        return self.head(F.relu(self.widen(x)).mean(dim=(2, 3)))


def build(seed=0, **changes):
    return retrofit(Net(seed), CSG | changes)


def batch(n=8, size=9, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, size, size, generator=rng), torch.randint(4, (n,), generator=rng)


def train(model, steps=30, lr=0.05):
    x, target = batch()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr, momentum=0.9)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def snapshot(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_same_state(model, kept):
    now = model.state_dict()
    assert list(now) == list(kept)
    for name, tensor in now.items():
        assert torch.equal(tensor, kept[name]), name


def gradients(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


def assert_starts_at_kaiming_variance(csg):
    out_channels, in_channels, kernel = 17, 31, csg['slice_shape'][2:]
    wanted = 2 / (out_channels * kernel[0] * kernel[1])  # He et al., ICCV 2015, fan out
    variances = []
    for seed in range(60):
        model = nn.Module()
        model.first = nn.Conv2d(3, 3, 1)
        model.conv = nn.Conv2d(in_channels, out_channels, kernel)
        retrofit(model, csg | {'seed': seed})
        weight = model.conv.generate_weight().detach().double()
        assert weight.shape == (out_channels, in_channels, *kernel)
        variances.append(weight.square().mean().item())
    ratio = statistics.mean(variances) / wanted
    error = statistics.stdev(variances) / wanted / len(variances) ** 0.5
    assert error < 0.08
    assert ratio == pytest.approx(1.0, abs=max(0.03, 3.5 * error))
