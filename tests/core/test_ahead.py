"""Weights made ahead equal weights made one by one, and are never out of date."""

import pickle
import threading
from copy import deepcopy

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize, prune, spectral_norm
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import experiments.rivals.tensor_ring  # noqa: F401 (registers a kind that is not part of the package)
from csg_seg import CSGError, materialise, register_generator, retrofit
from csg_seg.generators.kinds import KINDS as GENERATORS
from csg_seg.generators.linear import Generator
from csg_seg.layers.ahead import batches
from csg_seg.layers.conv import generate_weights, generated_convs

CSG = {'slice_shape': (12, 20, 3, 3), 'code_dim': 24}
KINDS = {
    'linear': CSG,
    'flat': CSG | {'layout': 'flat'},
    'binary': CSG | {'generator': 'binary'},
    'mlp': CSG | {'generator': 'mlp', 'hidden': 5},
    'tensor ring': CSG | {'generator': 'tensor_ring', 'rank': 3, 'mode': 7},
    'residual': CSG | {'residual': 2},
    'two generators': [CSG | {'include': ['one']}, CSG],
}


class Net(nn.Module):
    """Three convs in a row, of which the last may be skipped."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 17, 3)
        self.one = nn.Conv2d(17, 31, 3, bias=False)
        self.two = nn.Conv2d(31, 31, 3, padding=1)
        self.last = nn.Conv2d(31, 31, 3)

    def forward(self, x, skip=False):
        x = F.relu(self.two(F.relu(self.one(self.stem(x)))))
        return x if skip else self.last(x)


def build(csg=CSG):
    return retrofit(Net(), csg)


def images(seed=0):
    return torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(seed))


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def kept_weights(model):
    return [weight for cached in model.csg.ahead.cached.values() for weight in cached.weights]


@pytest.mark.parametrize('csg', KINDS.values(), ids=KINDS)
def test_outputs_and_gradients_are_those_of_weights_made_one_by_one(csg):
    ahead, alone = build(csg), build(csg)
    # The method itself, past the hooks of the root.
    outputs, expected = ahead(images()), alone.forward(images())
    torch.testing.assert_close(outputs, expected)
    outputs.square().mean().backward()
    expected.square().mean().backward()
    for name, gradient in gradients(alone).items():
        torch.testing.assert_close(gradients(ahead)[name], gradient)
    with torch.no_grad():
        torch.testing.assert_close(ahead(images()), expected)


@pytest.mark.parametrize('csg', KINDS.values(), ids=KINDS)
def test_a_layer_that_takes_no_part_gets_no_gradient(csg):
    model = build(csg)
    model(images(), skip=True).square().mean().backward()
    assert model.last.code.grad is None and model.last.bias.grad is None
    assert model.two.code.grad is not None


def test_ddp_finds_layers_that_take_no_part(tmp_path, monkeypatch):
    monkeypatch.setenv('GLOO_SOCKET_IFNAME', 'lo')
    dist.init_process_group('gloo', f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        model = build()
        ddp = DistributedDataParallel(model, find_unused_parameters=True)
        for _ in range(2):
            ddp(images(), skip=True).square().mean().backward()
        assert model.last.code.grad is None and model.two.code.grad is not None
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize('use_reentrant', [True, False])
@pytest.mark.parametrize('csg', KINDS.values(), ids=KINDS)
def test_layers_are_recomputed_within_activation_checkpoints(csg, use_reentrant):
    class Checkpointed(Net):
        def forward(self, x):
            return self.last(
                checkpoint(lambda y: F.relu(self.two(self.one(y))), self.stem(x), use_reentrant=use_reentrant)
            )

    recomputed, plain = retrofit(Checkpointed(), csg), build(csg)
    recomputed(images()).square().mean().backward()
    plain.last(F.relu(plain.two(plain.one(plain.stem(images()))))).square().mean().backward()
    for name, gradient in gradients(plain).items():
        torch.testing.assert_close(gradients(recomputed)[name], gradient)


def test_a_write_between_forward_and_backward_is_noticed():
    model = build()
    loss = model(images()).square().mean()
    with torch.no_grad():
        model.one.code.add_(1)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        loss.backward()


def test_second_derivatives_are_the_same():
    ahead, alone = build(), build()
    seconds = []
    for model, forward in ((ahead, ahead), (alone, alone.forward)):
        loss = forward(images()).square().mean()
        (first,) = torch.autograd.grad(loss, model.one.code, create_graph=True)
        seconds.append(torch.autograd.grad(first.square().sum(), [model.one.code, model.csg[0].weight]))
    for one, other in zip(*seconds, strict=True):
        torch.testing.assert_close(one, other)


def test_functional_calls_and_transforms_give_the_same_gradients():
    model = build()
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    x = images()
    halved = {name: each / 2 for name, each in parameters.items()}

    def loss(parameters):
        return torch.func.functional_call(model, parameters, (x,)).square().mean()

    gradient = torch.func.grad(loss)(parameters)
    model(images()).square().mean().backward()
    torch.testing.assert_close(gradient['one.code'], model.one.code.grad)
    of_generator = torch.func.grad(lambda weight: loss({'csg.0.weight': weight}))(parameters['csg.0.weight'])
    torch.testing.assert_close(of_generator, model.csg[0].weight.grad)
    with torch.no_grad():
        shares = torch.tensor([1.0, 0.5])
        losses = torch.func.vmap(lambda share: loss({'csg.0.weight': parameters['csg.0.weight'] * share}))(shares)
        torch.testing.assert_close(losses[0], loss(parameters))
    slopes = torch.func.jacrev(lambda images: model(images).sum(dim=(1, 2, 3)))(x)
    plain = torch.func.jacrev(lambda images: materialise(deepcopy(model))(images).sum(dim=(1, 2, 3)))(x)
    torch.testing.assert_close(slopes, plain)
    with torch.no_grad():
        model(images())
        assert loss(halved) != loss(parameters)


def test_evaluations_use_the_same_weights_until_training_drops_them():
    model = build().eval()
    with torch.no_grad():
        model(images())
        first = kept_weights(model)
        model(images(1))
    assert [weight.is_contiguous() for weight in first] == [True] * 3  # or every conv would copy it
    assert [id(weight) for weight in kept_weights(model)] == [id(weight) for weight in first]
    model.train()
    assert kept_weights(model) == []


def ema_swap(model):
    average = {name: each.detach() * 0.5 for name, each in model.named_parameters()}
    for name, parameter in model.named_parameters():
        kept = parameter.data.clone()
        parameter.data.copy_(average[name].data)
        average[name].data.copy_(kept)


def load_doubled(model):
    state_dict = model.state_dict()
    model.load_state_dict({name: each * 2 if name.endswith('code') else each for name, each in state_dict.items()})


def step(model):
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(images()).square().mean().backward()
    optimizer.step()
    model.eval()


CHANGES = {
    'EMA swap': ema_swap,
    'load_state_dict': load_doubled,
    'dense weights': lambda model: model.load_state_dict(Net().state_dict()),
    '.data of a code': lambda model: model.last.code.data.mul_(3),
    '.data of the generator': lambda model: model.csg[0].weight.data[3, 4].add_(1),
    'code replaced': lambda model: setattr(model.one, 'code', nn.Parameter(model.one.code.detach() + 1)),
    'training step': step,
    'train and back, a write between': lambda model: (model.train(), model.two.code.data.neg_(), model.eval()),
}


@pytest.mark.parametrize('change', CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize('mode', [torch.no_grad, torch.inference_mode])
def test_no_change_goes_unnoticed(change, mode):
    model = build().eval()
    with mode():
        before = model(images())
    change(model)
    with mode():
        after = model(images())
    assert not torch.allclose(after, before)
    with torch.no_grad():
        torch.testing.assert_close(after, materialise(deepcopy(model))(images()))


def test_residuals_that_change_are_noticed():
    model = build(KINDS['residual']).eval()
    with torch.no_grad():
        before = model(images())
        model.last.residual_out.data.add_(1)
        after = model(images())
        assert not torch.allclose(after, before)
        torch.testing.assert_close(after, materialise(model)(images()))


class Adapting(nn.Sequential):
    """Computes with other parameters than its own, as in meta-learning."""

    fast: dict[str, torch.Tensor] | None = None

    def forward(self, x):
        return super().forward(x) if self.fast is None else functional_call(self[0], self.fast, (x,))


@pytest.mark.parametrize('kind', [name for name in KINDS if name != 'two generators'])
@pytest.mark.parametrize('mode', [torch.enable_grad, torch.no_grad])
def test_parameters_swapped_within_a_pass_are_used(kind, mode):
    model = retrofit(Adapting(Net()), KINDS[kind])
    model.fast = {
        name: 2 * each.detach() for name, each in model[0].named_parameters() if name.endswith(('code', 'residual_out'))
    }
    with mode():
        expected = model.forward(images())
        torch.testing.assert_close(model(images()), expected)
        model.fast = None
        assert not torch.allclose(model(images()), expected)


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_evaluation_follows_the_models_type(dtype):
    model = build().eval()
    with torch.no_grad():
        model(images())
        outputs = model.to(dtype)(images().to(dtype))
        assert outputs.dtype == dtype
        assert torch.equal(outputs, materialise(model)(images().to(dtype)))


def test_weights_read_after_a_pass_are_those_of_now():
    model = build()
    for forward in (model, torch.no_grad()(model)):
        forward(images())
        model.one.code.data.mul_(2)
        assert torch.equal(model.one.weight, model.one.generate_weight())


def test_a_pass_that_fails_leaves_nothing_behind():
    model = build()
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 5, 9, 9))
    assert [conv.ready for _, conv in generated_convs(model)] == [None] * 3


def interrupted():
    """Return a network whose last evaluation was interrupted."""
    model = build().eval()
    handle = model.two.register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt), torch.no_grad():
        model(images())
    handle.remove()
    return model


def test_a_pass_that_is_interrupted_leaves_no_weight_of_before():
    model = interrupted()
    model.load_state_dict(model.state_dict() | {'one.code': model.one.code * 0.5})
    with torch.no_grad():
        torch.testing.assert_close(model.forward(images()), model(images()))


def test_the_next_pass_makes_all_weights_anew():
    model = interrupted()
    for conv in (model.one, model.two, model.last):
        conv.code.data.mul_(0.5)  # which changes no version counter
    model.csg.keep_weights = False
    with torch.no_grad():
        first = model(images())
        torch.testing.assert_close(first, model(images()), rtol=0, atol=0)


def test_writes_within_a_pass_are_noticed():
    model, reference = build().eval(), build().eval()
    with torch.no_grad():
        reference.last.code.mul_(2)
        expected = reference(images())

        def write(*_):
            model.last.code.copy_(reference.last.code)

        model.stem.register_forward_pre_hook(write)
        assert torch.equal(model(images()), expected)
        model.last.code.mul_(3)
        model.register_forward_pre_hook(write)
        assert torch.equal(model(images()), expected)


@pytest.mark.parametrize('csg', [CSG | {'generator': 'binary'}, CSG | {'freeze_generator': True}])
def test_weights_of_frozen_layers_need_no_graph(csg):
    model = build(csg)
    for conv in (model.stem, model.one, model.two):
        conv.requires_grad_(False)
    needed = {}
    for name, conv in generated_convs(model):
        conv.register_forward_hook(lambda *run, name=name: needed.update({name: run[2].requires_grad}))
    model(images())
    assert needed == {'one': False, 'two': False, 'last': True}


def test_two_losses_with_frozen_generator_learn_in_turn():
    """A code may be stepped before another's gradient is taken, as torch allows of products made one by one."""
    model = build(CSG | {'freeze_generator': True})
    one, two = generate_weights([model.one, model.two])
    one.sum().backward()
    with torch.no_grad():
        model.one.code.add_(1)
    two.sum().backward()
    assert model.two.code.grad is not None


def test_a_network_of_inference_tensors_runs():
    with torch.inference_mode():
        model = build().eval()
        outputs = model(images())
        torch.testing.assert_close(outputs, materialise(model)(images()))


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('mode', [torch.no_grad, torch.enable_grad])
def test_a_traced_network_is_stored_and_gives_the_same(mode, tmp_path):
    model = build().eval()
    with mode():
        traced = torch.jit.trace(model, images())
        traced.save(str(tmp_path / 'traced.pt'))
        torch.testing.assert_close(torch.jit.load(tmp_path / 'traced.pt')(images(1)), model(images(1)))


def test_threads_evaluate_beside_one_that_trains():
    model = build()
    with torch.no_grad():
        expected = model(images())
    problems = []

    def evaluate():
        try:
            with torch.no_grad():
                for _ in range(60):
                    torch.testing.assert_close(model(images()), expected)
        except Exception as error:
            problems.append(error)

    threads = [threading.Thread(target=evaluate) for _ in range(2)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        model(images()).sum().backward()
    assert problems == []


@torch.no_grad()
def test_what_is_written_into_a_kept_weight_is_gone_by_the_next_pass():
    model = build().eval()
    expected = model(images())

    def scale(module, inputs):
        module.weight.mul_(2)

    handle = model.one.register_forward_pre_hook(scale)
    written = model(images())
    assert not torch.equal(written, expected) and torch.equal(model(images()), written)
    handle.remove()
    assert torch.equal(model(images()), expected)


def test_casting_lets_kept_weights_go():
    model = build().eval()
    with torch.no_grad():
        model(images())
    model.to(torch.float64)
    assert kept_weights(model) == []


@pytest.mark.parametrize('bound', [1, 17 * 31 * 9 + 31 * 31 * 9, 10**9])
def test_neighbours_are_made_together_up_to_a_bound(bound, monkeypatch):
    monkeypatch.setattr('csg_seg.layers.ahead.AT_ONCE', bound)
    model = build()
    convs = [conv for _, conv in generated_convs(model)]
    groups = list(batches(convs))
    assert [conv for group in groups for conv in group] == convs
    sizes = [[conv.weight_shape.numel() for conv in group] for group in groups]
    assert all(len(group) == 1 or sum(group) <= bound for group in sizes)
    assert all(sum(group) + after[0] > bound for group, after in zip(sizes, sizes[1:], strict=False))
    outputs = model(images())
    torch.testing.assert_close(outputs, model.forward(images()))


def test_a_compiled_forward_takes_the_weights_made_ahead():
    model = build()
    twin = deepcopy(model)
    twin.forward = torch.compile(twin.forward, backend='eager')
    for training in (True, False, True):
        with torch.set_grad_enabled(training):
            for each in (model, twin):
                each.train(training)(images(1))  # compile, and keep weights
            with FlopCounterMode(display=False) as of_eager:
                expected = model(images())
            with FlopCounterMode(display=False) as of_compiled:
                torch.testing.assert_close(twin(images()), expected)
        assert of_compiled.get_total_flops() == of_eager.get_total_flops()


def test_a_part_trains_within_a_pass_without_gradients():
    class Inner(Net):
        def forward(self, x):
            with torch.enable_grad():
                return super().forward(x)

    model = retrofit(Inner(), CSG)
    with torch.no_grad():
        outputs = model(images())
    outputs.square().mean().backward()
    assert model.one.code.grad is not None


def test_copies_and_pickles_carry_no_kept_weights():
    model = build().eval()
    fresh = len(pickle.dumps(model))
    with torch.no_grad():
        expected = model(images())
    assert len(pickle.dumps(model)) == fresh
    for twin in (deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert kept_weights(twin) == []
        with torch.no_grad():
            assert torch.equal(twin(images()), expected)
            twin.one.code.data.zero_()
            assert not torch.equal(twin(images()), expected)
    assert len(kept_weights(model)) == 3


@pytest.mark.parametrize('csg', KINDS.values(), ids=KINDS)
def test_a_materialised_network_evaluates_to_the_same_bits(csg):
    model = build(csg).eval()
    with torch.no_grad():
        expected = model(images())
        assert torch.equal(materialise(model)(images()), expected)


def test_a_materialised_network_is_free_of_hooks():
    model = build()
    materialise(model)
    assert not (model._forward_hooks or model._forward_pre_hooks or model._forward_hooks_always_called)


class Half(nn.Module):
    def forward(self, weight):
        return weight / 2


COMPUTED = {
    'pruned': lambda generator: prune.l1_unstructured(generator, 'weight', 0.9),
    'spectral norm': lambda generator: spectral_norm(generator),
    'parametrised': lambda generator: parametrize.register_parametrization(generator, 'weight', Half()),
}


@pytest.mark.parametrize('compute', COMPUTED.values(), ids=COMPUTED)
def test_a_generator_whose_weight_is_computed_trains_and_is_up_to_date(compute):
    model = build().eval()
    with torch.no_grad():
        before = model(images())
        compute(model.csg[0])
        after = model(images())
        assert not torch.allclose(before, after)
        torch.testing.assert_close(after, model.forward(images()))
    (own,) = model.csg[0].parameters()
    start = own.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        model(images()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(own, start)


def test_a_pruned_generator_loads_its_checkpoint():
    one, two = build(), build(CSG | {'seed': 1})
    for each in (one, two):
        prune.l1_unstructured(each.csg[0], 'weight', 0.5)
        each.eval()
    two.load_state_dict(one.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(two(images()), one(images()))


def test_hooks_that_write_nothing_leave_the_weights_as_they_were_made():
    model = build().eval()
    for conv in (model.one, model.two, model.last):
        conv.register_forward_pre_hook(lambda conv, inputs: None)
    with torch.no_grad():
        model(images())
    read = []
    model.two.register_forward_hook(lambda conv, inputs, outputs: read.append(conv.weight))
    with torch.no_grad():
        model(images())
    assert any(read[0] is weight for weight in kept_weights(model))


def clamp(conv, inputs):
    conv.code.data.clamp_(-1e-3, 1e-3)


@pytest.mark.parametrize('grad', [True, False])
def test_hooks_that_write_to_codes_without_their_version_are_followed(grad):
    model = build()
    for conv in (model.one, model.two, model.last):
        conv.register_forward_pre_hook(clamp)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(model(images()), model.forward(images()))


def test_generators_with_attributes_and_dropout_are_up_to_date():
    class Scaled(Generator):
        has_linear_part = True
        scale = 1.0

        def forward(self, code):
            return self.scale * super().forward(F.dropout(code, 0.5, self.training))

    register_generator('scaled')(Scaled)
    try:
        model = build(CSG | {'generator': 'scaled'}).eval()
        with torch.no_grad():
            before = model(images())
            assert torch.equal(model(images()), before)
            model.csg[0].scale = 0.5
            assert not torch.equal(model(images()), before)
            model.train()
            assert not torch.equal(model(images()), model(images()))
    finally:
        del GENERATORS['scaled']


def test_a_generator_that_was_replaced_is_refused_in_evaluation():
    model = build().eval()
    with torch.no_grad():
        model(images())
        other = deepcopy(model.csg[0])
        other.weight.zero_()
        model.csg[0] = other
        with pytest.raises(CSGError, match="its generator is not this network's"):
            model(images())
