"""Gradients that are accumulated with weights made once equal those of batches that make their own."""

import pickle
from copy import deepcopy

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from csg_seg import CSGError, materialise, retrofit

CSG = {'slice_shape': (12, 20, 3, 3), 'code_dim': 24}
KINDS = {
    'linear': CSG,
    'binary': CSG | {'generator': 'binary'},
    'frozen': CSG | {'freeze_generator': True},
    'mlp': CSG | {'generator': 'mlp', 'hidden': 5},
    'residual': CSG | {'residual': 2},
    'two generators': [CSG | {'include': ['1']}, CSG],
}


class Net(nn.Sequential):
    """Three convs, of which the last may be skipped."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__(nn.Conv2d(3, 17, 3, bias=False), nn.Conv2d(17, 31, 3), nn.Conv2d(31, 13, 3))

    def forward(self, x, skip=False, recompute=False):
        x = self[0](x).tanh()
        x = checkpoint(self[1], x, use_reentrant=False) if recompute else self[1](x)
        return x.mean() if skip else self[2](x.tanh()).square().mean()


def build(csg=CSG):
    return retrofit(Net(), csg).double()


def batches(count=3):
    rng = torch.Generator().manual_seed(1)
    return [torch.randn(2, 3, 9, 9, generator=rng, dtype=torch.float64) for _ in range(count)]


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_equal_gradients(one, other, **tolerances):
    for name, wanted in gradients(other).items():
        got = gradients(one)[name]
        assert (got is None) == (wanted is None), name
        if wanted is not None:
            torch.testing.assert_close(got, wanted, **tolerances, msg=lambda text, name=name: f'{name}: {text}')


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('options', [{}, {'skip': True}, {'recompute': True}], ids=str)
def test_gradients_are_the_sums_over_the_batches(kind, options):
    model, twin = build(KINDS[kind]), build(KINDS[kind])
    with model.csg.accumulate():
        for images in batches():
            model(images, **options).backward()
    for images in batches():
        twin(images, **options).backward()
    assert any(grad is not None for grad in gradients(twin).values())
    assert_equal_gradients(model, twin)


def test_a_layer_that_only_some_batches_use_keeps_its_gradient():
    model, twin = build(), build()
    with model.csg.accumulate():
        for images, skip in zip(batches(), (False, True, True), strict=True):
            model(images, skip=skip).backward()
    for images, skip in zip(batches(), (False, True, True), strict=True):
        twin(images, skip=skip).backward()
    assert_equal_gradients(model, twin)


def test_a_layer_that_takes_no_part_gets_no_gradient_from_a_pruned_generator():
    model = build()
    prune.l1_unstructured(model.csg[0], 'weight', 0.5)
    with model.csg.accumulate():
        for images in batches():
            model(images, skip=True).backward()
    assert model[2].code.grad is None and model[1].code.grad is not None


def test_accumulation_goes_on_from_gradients_that_are_there_and_training_goes_on_after_it():
    model, twin = build(), build()
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1, momentum=0.9) for each in (model, twin)]
    for turn in range(3):
        first, *others, last = batches(4)
        model(first).backward()
        with model.csg.accumulate():
            for images in others:
                model(images).backward()
        model(last).backward()
        for images in (first, *others, last):
            twin(images).backward()
        assert_equal_gradients(model, twin)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=bool(turn))
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_weights_are_generated_once():
    def operations(model, accumulates, count):
        with FlopCounterMode(display=False) as counter:
            if accumulates:
                with model.csg.accumulate():
                    for images in batches(count):
                        model(images).backward()
            else:
                for images in batches(count):
                    model(images).backward()
        return counter.get_total_flops()

    dense = Net().double()
    with FlopCounterMode(display=False) as counter:
        dense(batches(1)[0]).backward()
    one_batch = counter.get_total_flops()
    generation = operations(build(), False, 1) - one_batch
    assert generation > 0
    assert operations(build(), False, 5) == 5 * (one_batch + generation)
    assert operations(build(), True, 5) == 5 * one_batch + generation


@pytest.mark.parametrize('first', [True, False])
def test_autocast_for_some_batches_only_is_refused(first):
    model = build(CSG | {'precision': 'autocast'}).float()
    one, other, _ = batches()
    with pytest.raises(CSGError, match='autocast differs between the batches'), model.csg.accumulate():
        for images, enabled in ((one, first), (other, not first)):
            with torch.autocast('cpu', dtype=torch.bfloat16, enabled=enabled):
                model(images.float()).backward()


def test_mixed_precision_sums_in_the_precision_of_the_parameters():
    model, twin = (build(CSG | {'precision': 'autocast'}).float() for _ in range(2))
    with torch.autocast('cpu', dtype=torch.bfloat16):
        with model.csg.accumulate():
            for images in batches():
                model(images.float()).backward()
            leaves = model.csg.accumulation.leaves.values()
            assert len(leaves) == len(model.csg.layers) and all(
                each.dtype == each.grad.dtype == torch.float32 for each in leaves
            )
        for images in batches():
            twin(images.float()).backward()
    for name, wanted in gradients(twin).items():  # rounding depends on the CPU's instructions
        assert (gradients(model)[name] - wanted).norm() < 0.05 * wanted.norm(), name


def test_evaluation_inside_is_that_of_the_current_weights():
    model = build()
    other = build(CSG | {'seed': 9})
    with pytest.raises(RuntimeError, match='modified by an inplace operation'), model.csg.accumulate():
        model(batches()[1]).backward()
        model.load_state_dict(other.state_dict())
        with torch.no_grad():
            torch.testing.assert_close(model(batches()[0]), other(batches()[0]))


def test_a_step_inside_is_refused():
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(CSGError, match='step the optimizer after the with block'), model.csg.accumulate():
        model(batches()[0]).backward()
        optimizer.step()
    assert_usable(model)


def test_a_block_inside_a_block_is_refused():
    model = build()
    with pytest.raises(CSGError, match='leave the other block first'), model.csg.accumulate(), model.csg.accumulate():
        pass
    assert_usable(model)


def test_a_backward_pass_after_the_block_or_past_the_weights_is_refused():
    model = build()
    with pytest.raises(CSGError, match='no generated weight got a gradient'), model.csg.accumulate():
        loss = model(batches()[0])
    with pytest.raises(CSGError, match='must run inside the with block'):
        loss.backward()
    with pytest.raises(CSGError, match='without inputs'), model.csg.accumulate():
        model(batches()[0]).backward(inputs=[model[2].bias])
    with model.csg.accumulate():
        first, second = (model(images) for images in batches(2))
        first.backward()
    with pytest.raises(CSGError, match='must run inside the with block'):
        second.backward()
    assert_usable(model)


def test_materialising_inside_is_refused():
    model = build()
    with pytest.raises(CSGError, match='materialise after the with block'), model.csg.accumulate():
        model(batches()[0]).backward()
        materialise(model)
    assert_usable(model)


def test_other_values_for_a_moment_are_those_that_compute():
    model = build()
    others = {name: 1.3 * tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    wanted = torch.func.functional_call(model, others, batches()[0])
    with model.csg.accumulate():
        model(batches()[0]).backward()
        torch.testing.assert_close(torch.func.functional_call(model, others, batches()[0]), wanted)


def test_an_error_inside_discards_the_sums():
    model = build()
    with pytest.raises(ZeroDivisionError), model.csg.accumulate():
        model(batches()[0]).backward()
        raise ZeroDivisionError
    assert all(conv.code.grad is None for conv in model.csg.layers.values())
    assert_usable(model)


def test_an_empty_block_and_copies_made_inside_change_nothing():
    model = build()
    with model.csg.accumulate():
        pass
    with model.csg.accumulate():
        model(batches()[0]).backward()
        copies = [deepcopy(model), pickle.loads(pickle.dumps(model))]
    for copy in copies:
        copy.zero_grad()
        assert_usable(copy)
    assert_usable(model)


def work(rank: int, folder: str) -> None:
    """One of two ranks; both must get the mean of their gradients."""
    torch.set_num_threads(1)
    dist.init_process_group('gloo', f'file://{folder}/store', rank=rank, world_size=2)
    model = build()
    ddp = DistributedDataParallel(model)
    *others, last = batches(6)[rank::2]
    with ddp.no_sync(), model.csg.accumulate():
        for images in others:
            ddp(images).backward()
    ddp(last).backward()
    torch.save(gradients(model), f'{folder}/{rank}.pth')
    dist.barrier()
    dist.destroy_process_group()


def test_ranks_exchange_the_sums_with_the_last_batch(tmp_path, monkeypatch):
    monkeypatch.setenv('GLOO_SOCKET_IFNAME', 'lo')
    torch.multiprocessing.spawn(work, (str(tmp_path),), nprocs=2)
    twin = build()
    for images in batches(6):
        (twin(images) / 2).backward()
    for rank in range(2):
        got = torch.load(tmp_path / f'{rank}.pth')
        for name, wanted in gradients(twin).items():
            torch.testing.assert_close(got[name], wanted)


def test_sharded_parameters_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv('GLOO_SOCKET_IFNAME', 'lo')
    dist.init_process_group('gloo', f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        model = fully_shard(build(), mesh=dist.init_device_mesh('cpu', (1,)))
        with pytest.raises(CSGError, match='are sharded'), model.csg.accumulate():
            pass
    finally:
        dist.destroy_process_group()


def assert_usable(model):
    model.zero_grad()
    model(batches()[0]).backward()
    twin = deepcopy(model)
    twin.zero_grad()
    twin(batches()[0]).backward()
    assert_equal_gradients(model, twin)
    assert all(conv.code.grad is not None for conv in model.csg.layers.values())
