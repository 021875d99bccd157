"""What a retrofitted network starts from: its layers' Kaiming variance, the dense network's activations."""

import copy
import statistics

import pytest
import torch
from torchvision.models import resnet50
from two_convs import RESNET_CSG, assert_starts_at_kaiming_variance, build, train

from csg_seg import retrofit
from csg_seg.layers.conv import kaiming_std


@pytest.mark.parametrize('kind', [{}, {'generator': 'binary'}, {'generator': 'mlp', 'hidden': 7}])
@pytest.mark.parametrize(
    ('slice_shape', 'code_dim'),
    [
        ((12, 20, 3, 3), 72),
        ((16, 16, 3, 3), 128),
        ((16, 16, 3, 3), 512),
        ((16, 16, 3, 3), 3),
        ((32, 32, 3, 3), 128),
        ((1, 1, 3, 3), 8),
        ((12, 20, 1, 1), 16),
        ((16, 16, 1, 1), 60),
        ((12, 20, 1, 5), 31),
    ],
)
def test_a_generated_weight_starts_at_its_layers_kaiming_variance(kind, slice_shape, code_dim):
    assert_starts_at_kaiming_variance({'slice_shape': slice_shape, 'code_dim': code_dim, **kind})


def test_the_kaiming_std_is_torchs_fan_out():
    conv = torch.nn.Conv2d(128, 256, (3, 5))
    torch.nn.init.kaiming_normal_(conv.weight, mode='fan_out', generator=torch.Generator().manual_seed(0))
    assert kaiming_std(conv) == pytest.approx(conv.weight.std().item(), rel=0.01)


def test_the_kaiming_std_keeps_gradients_variance_through_groups_and_transposed_convs():
    # One output channel of a group reaches as many inputs: gradients add up over out / groups.
    assert kaiming_std(torch.nn.Conv2d(64, 256, 3, groups=4)) == kaiming_std(torch.nn.Conv2d(64, 64, 3))
    assert kaiming_std(torch.nn.ConvTranspose2d(64, 32, 3)) == kaiming_std(torch.nn.Conv2d(64, 32, 3))


@pytest.mark.parametrize('kind', [{}, {'generator': 'binary'}, {'generator': 'mlp', 'hidden': 7}, {'residual': 2}])
def test_reset_parameters_draws_new_start_values(kind):
    def reset(seed):
        torch.manual_seed(seed)
        for module in model.modules():
            if hasattr(module, 'reset_parameters'):
                module.reset_parameters()
        return {name: value.clone() for name, value in model.named_parameters()}

    model = build(**kind)
    parameters = dict(model.named_parameters())
    signs = model.csg[0].weight.clone()
    train(model)
    trained = {name: value.clone() for name, value in parameters.items()}
    one, other, again = reset(1), reset(2), reset(1)
    constant = ('residual_out', 'norm.weight', 'norm.bias', 'hidden_bias')
    for name, value in model.named_parameters():
        assert value is parameters[name] and torch.equal(one[name], again[name])
        assert not torch.equal(one[name], trained[name])
        assert name.endswith(constant) or not torch.equal(one[name], other[name])
    assert model.narrow.weight.std().item() == pytest.approx(kaiming_std(model.narrow), rel=0.1)
    assert (kind.get('generator') == 'binary') == torch.equal(model.csg[0].weight, signs)


def test_reset_parameters_restores_the_signs_of_a_network_without_memory():
    model, signs = build(generator='binary'), build(generator='binary').csg[0].weight
    model.to_empty(device='cpu').csg[0].weight.fill_(3)
    model.csg[0].reset_parameters()
    assert torch.equal(model.csg[0].weight, signs)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_signs_do_not_depend_on_the_default_dtype(dtype):
    generator = build(generator='binary').csg[0]
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        assert torch.equal(type(generator)(generator.settings, torch.Generator()).weight, generator.weight)
    finally:
        torch.set_default_dtype(default)


def test_reset_parameters_keeps_a_frozen_generator():
    model = build(freeze_generator=True)
    weight, code = model.csg[0].weight.clone(), model.narrow.code.clone()
    model.csg[0].reset_parameters()
    model.narrow.reset_parameters()
    assert torch.equal(model.csg[0].weight, weight) and not torch.equal(model.narrow.code, code)


def test_codes_are_drawn_apart_from_their_generator():
    model = build()
    code = model.narrow.code.detach().flatten()
    drawn_first = model.csg[0].weight.detach().flatten()[: code.numel()]
    correlation = torch.corrcoef(torch.stack([code, drawn_first]))[0, 1].item()
    # Six standard deviations of independent draws.
    assert abs(correlation) < 6 * code.numel() ** -0.5


STAGES = ('layer1', 'layer2', 'layer3', 'layer4')


def stage_stds(model, x, *, training):
    """Return the output std of each stage and of its 3x3 convs."""
    model = copy.deepcopy(model).train(training)
    stds = {}

    def record(name):
        return lambda _module, _input, output: stds.__setitem__(name, output.std().item())

    for name, module in model.named_modules():
        if name in STAGES or name.endswith('.conv2'):
            module.register_forward_hook(record(name))
    with torch.no_grad():
        model(x)
    return {
        **{stage: stds[stage] for stage in STAGES},
        **{f'{s} 3x3': statistics.mean(v for n, v in stds.items() if n.startswith(f'{s}.')) for s in STAGES},
    }


def mean_stage_stds(models, x, *, training):
    each = [stage_stds(model, x, training=training) for model in models]
    return {name: statistics.geometric_mean(one[name] for one in each) for name in each[0]}


@pytest.fixture(scope='module')
def dense_resnets():
    networks = []
    for seed in range(3):
        torch.manual_seed(seed)
        networks.append(resnet50())
    return networks


@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('kind', ['linear', 'binary'])
def test_resnet50_starts_with_the_dense_networks_activations(dense_resnets, kind, training):
    # The mean of three networks: in eval mode, one dense ResNet-50 differs from the next by 20 %.
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    dense = mean_stage_stds(dense_resnets, x, training=training)
    csgs = [RESNET_CSG | {'generator': kind, 'seed': seed} for seed in range(3)]
    networks = [retrofit(copy.deepcopy(net), csg) for net, csg in zip(dense_resnets, csgs, strict=True)]
    generated = mean_stage_stds(networks, x, training=training)
    ratios = {name: generated[name] / dense[name] for name in dense}
    assert all(0.7 < ratio < 1.4 for ratio in ratios.values()), ratios
