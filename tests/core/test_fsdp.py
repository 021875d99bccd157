"""FSDP2 and FSDP1 shard codes and generators as any parameters."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torchvision.models import resnet18

from csg_seg import load_compact, retrofit, save_compact

CSG = {'slice_shape': (16, 16, 3, 3), 'code_dim': 128}
RANKS = 2
WAYS = ('whole', 'blocks', 'flat')


def dense() -> nn.Module:
    """Without batch norm, whose statistics each rank would have of its own images."""
    torch.manual_seed(0)
    return resnet18(num_classes=10, norm_layer=lambda channels: nn.GroupNorm(4, channels))


def shard(model: nn.Module, how: str) -> nn.Module:
    if how == 'flat':
        return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device('cpu'))
    if how == 'blocks':
        for name in ('layer1', 'layer2', 'layer3', 'layer4'):
            for block in model.get_submodule(name):
                fully_shard(block)
    return fully_shard(model)


def train(model: nn.Module, rank: int, ranks: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    rng = torch.Generator().manual_seed(1)
    for _ in range(3):
        images, labels = torch.randn(4, 3, 32, 32, generator=rng), torch.randint(10, (4,), generator=rng)
        F.cross_entropy(model(images.chunk(ranks)[rank]), labels.chunk(ranks)[rank]).backward()
        optimizer.step()
        optimizer.zero_grad()


def count_held(parameter: torch.Tensor) -> int:
    return (parameter.to_local() if isinstance(parameter, DTensor) else parameter).numel()


def whole_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    if isinstance(model, FullyShardedDataParallel):  # get_model_state_dict crashes of a dense one too, on a CPU
        with FullyShardedDataParallel.summon_full_params(model, writeback=False):
            return {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def work(rank: int, folder: str) -> None:
    """One rank; the first writes what all together have learned."""
    torch.set_num_threads(1)
    dist.init_process_group('gloo', f'file://{folder}/store', rank=rank, world_size=RANKS)
    for how in WAYS:
        model = retrofit(dense(), CSG)
        total = sum(parameter.numel() for parameter in model.parameters())
        model = shard(model, how)
        train(model, rank, RANKS)
        held = sum(count_held(parameter) for parameter in model.parameters())
        weights = whole_weights(model)
        if rank == 0:
            torch.save({'weights': weights, 'share': held / total}, f'{folder}/{how}.pth')
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope='module')
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('fsdp')
    torch.multiprocessing.spawn(work, (str(folder),), nprocs=RANKS)
    return folder


@pytest.mark.parametrize('how', WAYS)
def test_sharded_training_equals_training_of_one_process(trained, how, tmp_path):
    found = torch.load(trained / f'{how}.pth', weights_only=True)
    alone = retrofit(dense(), CSG)
    start = {name: tensor.clone() for name, tensor in alone.state_dict().items()}
    train(alone, 0, 1)
    assert found['share'] == pytest.approx(1 / RANKS, abs=0.01)
    assert found['weights'].keys() == start.keys()
    for name, tensor in alone.state_dict().items():
        torch.testing.assert_close(found['weights'][name], tensor, rtol=1e-3, atol=1e-5)
        if not name.endswith('_extra_state'):
            assert not torch.equal(tensor, start[name]), name
    # What was sharded becomes a compact checkpoint like any other.
    whole = retrofit(dense(), CSG)
    whole.load_state_dict(found['weights'])
    save_compact(whole, tmp_path / 'small.safetensors')
    assert torch.equal(load_compact(tmp_path / 'small.safetensors', dense()).csg[0].weight, whole.csg[0].weight)
