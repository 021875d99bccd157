"""Wrappers for several processes are made after retrofit and after materialise: they exchange what they then find."""

import warnings

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from two_convs import CSG, Net, batch

from csg_seg import CSGError, CSGWarning, materialise, retrofit


@pytest.fixture(autouse=True)
def one_process(tmp_path, monkeypatch):
    monkeypatch.setenv('GLOO_SOCKET_IFNAME', 'lo')
    dist.init_process_group('gloo', f'file://{tmp_path}/store', rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_wrapper_made_before_retrofit_trains_nothing():
    images, _ = batch()
    wrapper = DistributedDataParallel(Net())
    with pytest.raises(CSGError, match='give the network inside, model.module, and wrap again'):
        retrofit(wrapper, CSG)
    retrofit(wrapper.module, CSG)
    with pytest.raises(CSGError, match='made before retrofit, and would exchange no gradients of codes; wrap'):
        wrapper(images)
    with torch.no_grad():
        wrapper(images)
    DistributedDataParallel(wrapper.module)(images).sum().backward()
    assert wrapper.module.narrow.code.grad is not None


def test_codes_that_are_frozen_or_not_exchanged_on_purpose_are_no_mistake():
    images, _ = batch()
    frozen = retrofit(Net(), CSG)
    frozen.narrow.code.requires_grad_(False)
    frozen.widen.code.requires_grad_(False)
    DistributedDataParallel(frozen)(images).sum().backward()
    some = retrofit(Net(), CSG)
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(some, ['narrow.code'])
    DistributedDataParallel(some)(images).sum().backward()


def test_a_sharded_network_is_refused():
    net = Net()
    for module in (net.narrow, net):
        fully_shard(module)
    with pytest.raises(CSGError, match='stem.weight is sharded; retrofit the model before fully_shard'):
        retrofit(net, CSG)


def test_materialise_says_that_the_wrapper_exchanges_nothing():
    net = retrofit(Net(), CSG)
    with pytest.warns(CSGWarning, match='to train on, wrap model.module again'):
        materialise(DistributedDataParallel(net))
    wrapper = DistributedDataParallel(retrofit(Net(), CSG))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        materialise(wrapper.module)
