"""Generators that do not train as the optimizer's settings suggest are warned of once, in the first steps."""

import copy
import gc
import warnings
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.optim import optimizer as torch_optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from csg_seg import CSGWarning, fit, materialise, retrofit, save_compact, share_generators
from csg_seg.layers.conv import CSGConv
from csg_seg.layers.watch import WATCH

CSG = {'slice_shape': (8, 8, 3, 3), 'code_dim': 8}


class Net(nn.Module):
    """Two parts, as recipes make parameter groups of."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Conv2d(3, 24, 3), nn.ReLU(), nn.Conv2d(24, 24, 3), nn.ReLU())
        self.head = nn.Sequential(nn.Conv2d(24, 24, 3), nn.Conv2d(24, 5, 1))

    def forward(self, x):
        return self.head(self.backbone(x))


@pytest.fixture(autouse=True)
def no_watch_of_another_test():
    WATCH.end()
    yield
    WATCH.end()


def build(**csg):
    return retrofit(Net(), {**CSG, **csg})


def train(net, *optimizers, steps=3, every=1):
    """Train a few steps; return what csg_seg warned of."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter('always')
        for step in range(steps * every):
            net(torch.randn(2, 3, 12, 12)).square().mean().backward()
            if step % every == every - 1:
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
    return [str(each.message) for each in told if each.category is CSGWarning]


def sgd(*groups, lr=0.01, **settings):
    return torch.optim.SGD([dict(group) for group in groups], lr=lr, **settings)


def params(*modules):
    return [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]


# --- a generator that does not change ---


def by_part(net):
    return [sgd({'params': params(net.backbone)}, {'params': params(net.head)})]


def by_name(net):
    return [torch.optim.Adam([each for name, each in net.named_parameters() if not name.startswith('csg')])]


def at_no_rate(net):
    return [sgd({'params': params(net.backbone, net.head)}, {'params': params(net.csg), 'lr': 0.0})]


def in_two(net):
    return [sgd({'params': params(net.backbone)}), sgd({'params': params(net.head)})]


@pytest.mark.parametrize('kind', [{}, {'generator': 'mlp', 'hidden': 3}])
@pytest.mark.parametrize('recipe', [by_part, by_name, at_no_rate, in_two])
def test_a_generator_that_never_changes_is_warned_of_once(recipe, kind):
    net = build(**kind)
    before = net.csg[0].weight.clone()
    (told,) = train(net, *recipe(net))
    assert torch.equal(net.csg[0].weight, before)
    why = 'its learning rate is 0' if recipe is at_no_rate else 'no optimizer holds it'
    assert f'generator of backbone.2, head.0 gets gradients and does not change: {why}' in told
    assert 'Add model.csg.parameters()' in told


def test_an_optimizer_made_before_retrofit_is_warned_of_once():
    net = Net()
    early = torch.optim.SGD(net.parameters(), lr=0.01)
    retrofit(net, CSG)
    (text,) = train(net, early)
    assert 'made before retrofit' in text and 'Make the optimizer afterwards' in text
    assert train(net, torch.optim.SGD(net.parameters(), lr=0.01)) == []


def test_layers_that_are_frozen_later_are_warned_of():
    net = build()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    assert train(net, optimizer) == []
    (told,) = train(net, freeze(net))
    assert 'so all its layers change, also those frozen (backbone.2)' in told
    assert train(net, optimizer) == []
    net.requires_grad_(True)
    assert train(net, optimizer) == []
    net.backbone.requires_grad_(False)
    net.csg.requires_grad_(False)
    assert train(net, torch.optim.SGD(params(net), lr=0.01)) == []


def test_an_early_optimizer_of_other_parameters_is_silent():
    net = Net()
    early = torch.optim.SGD(net.head[1].parameters(), lr=0.01)
    retrofit(net, CSG)
    other = Net()
    assert train(net, early) == []
    assert train(other, torch.optim.SGD(other.parameters(), lr=0.01)) == []


def test_the_first_step_warns():
    net = build()
    assert len(train(net, *by_part(net), steps=1)) == 1


def test_a_slice_whose_generator_is_in_no_optimizer_is_warned_of():
    net = retrofit(nn.Sequential(*Net().backbone, *Net().head), CSG)
    features = nn.Sequential(*list(net.children())[:-1])
    del net
    (told,) = train(features, sgd({'params': params(features)}))
    assert 'no optimizer holds it' in told


# --- layers that change with their generator ---


def freeze(net, optimizer_of=sgd):
    net.backbone.requires_grad_(False)
    return optimizer_of({'params': params(net)})


def leave_out(net):
    return sgd({'params': params(net.head, net.csg)})


def rate(**of_backbone):
    def recipe(net):
        rest = params(net.head, net.csg)
        return sgd({'params': params(net.backbone), **of_backbone}, {'params': rest}, weight_decay=0.1)

    return recipe


RECIPES = {
    'frozen': (freeze, 'also those frozen (backbone.2)'),
    'in no optimizer': (leave_out, 'in no optimizer (backbone.2)'),
    'no rate': (rate(lr=0.0), 'at a learning rate of 0 (backbone.2)'),
    'lower rate': (rate(lr=0.001), "at a lower learning rate than the generator's 0.01 (backbone.2)"),
    'no decay': (rate(weight_decay=0.0), "with less weight decay than the generator's 0.1 (backbone.2)"),
}


@pytest.mark.parametrize(('recipe', 'says'), RECIPES.values(), ids=RECIPES)
def test_layers_meant_to_stay_fixed_that_change_are_warned_of_once(recipe, says):
    net = build()
    before = net.backbone[2].weight.detach().clone()
    (told,) = train(net, recipe(net))
    assert not torch.equal(net.backbone[2].weight, before)
    assert says in told and 'head' not in told
    assert 'freeze them before retrofit, exclude them' in told and 'freeze_generator=True' in told


@pytest.mark.parametrize(
    'settings',
    [{**CSG, 'freeze_generator': True}, {**CSG, 'generator': 'binary'}, [{**CSG, 'include': ['backbone']}, CSG]],
)
def test_the_remedies_hold_the_layers_and_are_silent(settings):
    net = retrofit(Net(), settings)
    optimizer = freeze(net)
    if isinstance(settings, list):
        net.csg[0].requires_grad_(False)
    before = net.backbone[2].weight.detach().clone()
    assert train(net, optimizer) == []
    assert torch.equal(net.backbone[2].weight, before)


@pytest.mark.parametrize('held', [True, False])
def test_a_frozen_generator_that_trains_is_warned_of(held):
    net = build(freeze_generator=True).requires_grad_(True)
    before = net.csg[0].weight.detach().clone()
    told = train(net, sgd({'params': params(net) if held else [*params(net.backbone), *params(net.head)]}))
    assert torch.equal(net.csg[0].weight, before) is not held
    assert len(told) == held
    assert all('is trained, although its settings have freeze_generator=True' in each for each in told)


def test_layers_frozen_before_retrofit_stay_dense_and_still():
    net = Net()
    net.backbone.requires_grad_(False)
    retrofit(net, CSG)
    before = net.backbone[2].weight.clone()
    assert train(net, sgd({'params': params(net)})) == []
    assert not isinstance(net.backbone[2], CSGConv) and torch.equal(net.backbone[2].weight, before)


def test_a_frozen_generator_that_trains_after_a_warm_up_is_warned_of():
    net = build(freeze_generator=True).requires_grad_(True)
    optimizer = sgd({'params': params(net)}, lr=0.0)
    assert train(net, optimizer) == []
    optimizer.param_groups[0]['lr'] = 0.01
    (told,) = train(net, optimizer)
    assert 'although its settings have freeze_generator=True' in told


class Encoding(nn.Conv2d):
    def __init__(self, *args):
        super().__init__(*args)
        self.encoder_gain = nn.Parameter(torch.ones(1))


@pytest.mark.parametrize('frozen', ['encoder_gain', 'code'])
def test_only_a_layers_code_counts_as_its_code(frozen):
    net = Net()
    net.backbone[2] = Encoding(24, 24, 3)
    retrofit(net, CSG)
    getattr(net.backbone[2], frozen).requires_grad_(False)
    assert len(train(net, sgd({'params': params(net)}))) == (frozen == 'code')


# --- no warning ---


def test_pruned_codes_train_without_a_warning():
    net = build()
    prune.l1_unstructured(net.backbone[2], 'code', 0.5)
    assert train(net, sgd({'params': params(net)})) == []


def of_all(net):
    return [sgd({'params': params(net)})]


def heads_faster(net):
    return [sgd({'params': params(net.backbone, net.csg)}, {'params': params(net.head), 'lr': 0.1})]


def one_for_each(net):
    return [sgd({'params': params(part)}) for part in (net.backbone, net.head, net.csg)]


@pytest.mark.parametrize('recipe', [of_all, heads_faster, one_for_each])
@pytest.mark.parametrize('every', [1, 3])
def test_usual_recipes_are_silent(recipe, every):
    net = build()
    assert train(net, *recipe(net), every=every) == []


def test_a_warm_up_from_zero_delays_the_warning():
    net = build()
    optimizer = rate(lr=0.0)(net)
    rates = [group['lr'] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group['lr'] = 0.0
    assert train(net, optimizer, steps=2) == []
    for group, lr in zip(optimizer.param_groups, rates, strict=True):
        group['lr'] = torch.tensor(lr)
    assert len(train(net, optimizer)) == 1


def test_steps_of_another_network_do_not_end_the_watch():
    net, other = build(), nn.Conv2d(3, 3, 3)
    assert train(other, sgd({'params': params(other)}), steps=2) == []
    assert len(train(net, *by_part(net))) == 1


def test_copies_are_watched_too():
    net = build()
    train(net, *of_all(net))
    twin = copy.deepcopy(net)
    assert len(train(twin, *by_part(twin))) == 1


def test_a_network_that_is_retrofitted_again_is_watched_again():
    net = build()
    assert len(train(net, *by_part(net))) == 1
    retrofit(materialise(net), CSG)
    assert len(train(net, *by_part(net))) == 1


def test_replaced_layers_are_not_warned_of():
    net = build()
    net(torch.zeros(1, 3, 12, 12))
    net.head = nn.Conv2d(24, 5, 1)
    assert train(net, sgd({'params': params(net)})) == []


# --- a network that was trained before retrofit ---


class Trained(Net):
    def __init__(self, norm=nn.BatchNorm2d):
        super().__init__()
        self.backbone.insert(3, norm(24))

    def trained(self):
        torch.nn.init.uniform_(self.backbone[3].weight, 0.5, 1.5)
        return self


@pytest.mark.parametrize('norm', [nn.BatchNorm2d, partial(nn.GroupNorm, 4)])
def test_trained_weights_that_retrofit_replaces_are_warned_of(norm):
    net = retrofit(Trained(norm).trained(), CSG)
    (told,) = train(net, *of_all(net))
    assert told.startswith('the network was trained before retrofit, which gave new start values to backbone.2.')


@pytest.mark.parametrize('end', ['saved', 'materialised', 'evaluated'])
def test_trained_weights_that_retrofit_replaces_are_warned_of_without_a_training(end, tmp_path):
    net = retrofit(Trained().trained(), CSG)
    ends = {
        'saved': lambda: save_compact(net, tmp_path / 'net.safetensors'),
        'materialised': lambda: materialise(net),
        'evaluated': torch.no_grad()(lambda: net.eval()(torch.rand(1, 3, 12, 12))),
    }
    with pytest.warns(CSGWarning, match='retrofit, which gave new start values to backbone.2') as told:
        ends[end]()
    assert told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        ends['evaluated']()
    assert train(net, *of_all(net)) == []


@pytest.mark.parametrize('again', [False, True])
def test_an_optimizer_made_before_materialise_is_warned_of(again):
    net = build()
    optimizers = of_all(net)
    assert train(net, *optimizers) == []
    materialise(net)
    if again:
        retrofit(net, CSG)
    (told,) = train(net, *optimizers)
    assert told.startswith('the optimizer was made before retrofit or materialise')
    assert train(net, *of_all(net)) == []


def test_start_values_and_weights_that_are_fitted_or_loaded_are_not_warned_of():
    new = retrofit(Trained(), CSG)
    weights = Trained().trained().state_dict()
    fitted = retrofit(Trained().trained(), CSG)
    fit(fitted, weights)
    resumed = retrofit(Trained().trained(), CSG)
    resumed.load_state_dict(fitted.state_dict())
    for net in (new, fitted, resumed):
        assert train(net, *of_all(net)) == []


# --- no cost ---


def hooks():
    return len(torch_optimizer._global_optimizer_post_hooks)


def test_after_the_first_step_nothing_is_watched():
    net = build()
    assert hooks() == 1
    train(net, *of_all(net), steps=1)
    net(torch.zeros(1, 3, 12, 12))
    assert hooks() == 0
    train(net, *of_all(net))
    assert hooks() == 0


def test_hooks_of_others_are_called_all_the_same():
    net, steps = build(), []
    handle = register_optimizer_step_post_hook(lambda *_: steps.append(1))
    try:
        train(net, *of_all(net))
    finally:
        handle.remove()
    assert len(steps) == 3


def test_no_warning_is_repeated():
    net = nn.Sequential(*Net().backbone, *Net().head)
    retrofit(net, CSG)
    net[2].requires_grad_(False)
    assert len(train(net, sgd({'params': params(net)}))) == 1
    assert train(net[:-1], sgd({'params': params(net[:-1])})) == []


@pytest.mark.parametrize('end', ['materialised', 'gone', 'never trained'])
def test_networks_that_are_not_trained_are_forgotten(end):
    net, other = build(), nn.Conv2d(3, 3, 3)
    if end == 'materialised':
        materialise(net)
    if end == 'gone':
        del net
        gc.collect()
    train(other, sgd({'params': params(other)}), steps=101 if end == 'never trained' else 1)
    assert WATCH.is_over and not WATCH.layers


def test_optimizers_of_unusual_kinds_are_read():
    class OwnRate(torch.optim.Optimizer):
        def __init__(self, parameters):
            super().__init__(parameters, {'lr': None})

        def step(self, closure=None):
            with torch.no_grad():
                for group in self.param_groups:
                    for parameter in group['params']:
                        parameter.sub_(0.01 * parameter.grad)

    net = build()
    unfinished = torch.optim.Optimizer.__new__(torch.optim.Optimizer)
    assert train(net, OwnRate(net.parameters())) == []
    (told,) = train(net := build(), OwnRate([each for name, each in net.named_parameters() if 'csg' not in name]))
    assert 'gets gradients and does not change' in told and not hasattr(unfinished, 'param_groups')


@pytest.mark.parametrize('trained', [0, 1, 2])
def test_a_step_that_changes_networks_that_share_a_generator_is_warned_of(trained):
    networks = [build() for _ in range(3)]
    share_generators(*networks)
    (told,) = train(networks[trained], sgd({'params': params(networks[trained])}), steps=1)
    assert 'also those in no optimizer' in told and 'of network' in told
    assert networks[0].csg[0] is networks[2].csg[0]
