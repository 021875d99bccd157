"""The root owns the generators: code that iterates over a network's layers sees those of the dense network."""

import copy
import io
import pickle
import threading
import types
import warnings

import pytest
import torch
from mmengine.runner.checkpoint import get_state_dict
from torch import nn
from torch.nn.utils import parametrize
from torchvision.models import resnet18

from csg_seg import CSGError, CSGWarning, fit, load_compact, materialise, retrofit, save_compact, summarise
from csg_seg.layers.bank import find_bank
from csg_seg.layers.conv import generated_convs

CSG = {'slice_shape': (8, 12, 3, 3), 'code_dim': 8}
KINDS = {
    'linear': CSG,
    'binary': CSG | {'generator': 'binary'},
    'mlp': CSG | {'generator': 'mlp', 'hidden': 3},
    'two generators': [CSG | {'include': ['2']}, CSG],
}


class Chain(nn.Sequential):
    """A container with a method and a forward of its own."""

    def forward(self, x):
        for layer in self:
            x = layer(x)
        return x + 1


def layers():
    torch.manual_seed(0)
    return [nn.Conv2d(3, 17, 3), nn.ReLU(), nn.Conv2d(17, 17, 3), nn.Conv2d(17, 9, 3, padding=1), nn.Conv2d(9, 5, 1)]


def build(csg=CSG, kind=nn.Sequential):
    return retrofit(kind(*layers()), csg)


def image():
    return torch.linspace(-1, 1, 3 * 9 * 9).view(1, 3, 9, 9)


def names(net):
    return [type(layer).__name__.removeprefix('CSG') for layer in net]


def set_last(net):
    net[-1] = nn.Conv2d(9, 7, 1)
    return net


def set_by_name(net):
    setattr(net, '4', nn.Conv2d(9, 7, 1))
    return net


def delete(position):
    def change(net):
        del net[position]
        return net

    return change


def drop(net):
    net.pop(-1)
    return net


def insert(net):
    net.insert(1, nn.BatchNorm2d(17))
    return net


CHANGES = {
    'all but the last': lambda net: net[:-1],
    'from the second': lambda net: nn.Sequential(nn.Conv2d(3, 17, 1), *net[1:]),
    'a new last': set_last,
    'a new last by name': set_by_name,
    'delete an activation': delete(1),
    'delete the last': delete(-1),
    'delete a slice': delete(slice(3, None)),
    'pop': drop,
    'append': lambda net: net.append(nn.Conv2d(5, 2, 1)),
    'extend': lambda net: net.extend([nn.ReLU(), nn.Conv2d(5, 2, 1)]),
    'insert': insert,
    'add': lambda net: net + nn.Sequential(nn.Conv2d(5, 2, 1)),
    'children': lambda net: nn.Sequential(*list(net.children())[:-1]),
    'named children': lambda net: nn.Sequential(*[child for _, child in net.named_children()][:3]),
    'unpacked': lambda net: nn.Sequential(*net),
}


@pytest.mark.parametrize('change', CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize('kind', [nn.Sequential, Chain])
@pytest.mark.parametrize('csg', KINDS.values(), ids=KINDS)
def test_a_container_changes_as_its_dense_twin(csg, kind, change):
    net = build(csg, kind).eval()
    torch.manual_seed(1)
    expected = change(materialise(copy.deepcopy(net))).eval()
    torch.manual_seed(1)
    changed = change(net).eval()
    assert names(changed) == names(expected) and len(changed) == len(expected)
    assert [name for name, _ in changed.named_children()] == [name for name, _ in expected.named_children()]
    assert type(changed).__name__ == type(expected).__name__
    with torch.no_grad():
        torch.testing.assert_close(changed(image()), expected(image()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('csg', KINDS.values(), ids=KINDS)
def test_a_slice_is_a_retrofitted_network_of_its_own(csg, tmp_path):
    features = build(csg)[:-1]
    generators = {
        f'csg.{position}.{name}'
        for position, each in enumerate(find_bank(build(csg)))
        for name, _ in each.named_parameters()
    }
    assert {name for name, _ in features.named_parameters() if name.startswith('csg.')} == generators
    other = build(csg)[:-1]
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1)
    features.load_state_dict(other.state_dict())
    assert torch.equal(features(image()), other(image()))
    save_compact(features, tmp_path / 'features.safetensors')
    read = load_compact(tmp_path / 'features.safetensors', nn.Sequential(*layers()[:-1]))
    assert torch.equal(read(image()), other(image()))


def test_an_element_stays_what_it_was():
    net = retrofit(nn.Sequential(nn.Sequential(*layers()[:3]), nn.Sequential(*layers()[3:])), CSG)
    assert find_bank(net[0]) is None and find_bank(net.pop(1)) is None


@pytest.mark.parametrize('kind', [nn.ModuleList, nn.ModuleDict])
def test_other_containers_are_counted_as_dense(kind):
    items = {str(position): layer for position, layer in enumerate(layers())}
    net, dense = (kind(items if kind is nn.ModuleDict else items.values()) for _ in range(2))
    retrofit(net, CSG)
    assert len(net) == len(dense) == 5
    if kind is nn.ModuleDict:
        assert list(net) == list(net.keys()) == list(dense) and 'csg' not in net
        assert names(net.values()) == names(dense.values()) and len(net.items()) == 5
        net.pop('4')
    else:
        assert names(net) == names(dense) and net[-1] is list(net)[-1]
        net.pop(-1)
    assert len(net) == 4 and 'csg.0.weight' in net.state_dict()


def test_first_and_last_of_any_root_are_those_of_the_dense_network():
    net, dense = retrofit(resnet18(num_classes=5), {'slice_shape': (16, 16, 3, 3), 'code_dim': 16}), resnet18()
    assert [name for name, _ in net.named_children()] == [name for name, _ in dense.named_children()]
    features = nn.Sequential(*list(net.children())[:-1]).eval()
    assert features(torch.rand(1, 3, 64, 64)).shape == (1, 512, 1, 1)
    assert [name for name, _ in net.named_parameters()][-2:] == ['fc.weight', 'fc.bias']
    assert isinstance(net, type(dense)) and type(net).__name__ == 'ResNet'


def test_children_and_own_parameters_are_all_there_is():
    net = build(KINDS['two generators'])

    def collect(module, prefix=''):
        for name, parameter in module.named_parameters(recurse=False):
            yield prefix + name, parameter
        for name, child in module.named_children():
            yield from collect(child, f'{prefix}{name}.')

    assert dict(collect(net)) == dict(net.named_parameters())
    assert len([*collect(net)]) == len([*net.named_parameters()])


def test_generators_move_cast_and_change_mode_with_the_root():
    net = build(KINDS['mlp'])
    assert {parameter.dtype for parameter in net.double().parameters()} == {torch.float64}
    assert not any(module.training for module in net.eval().modules())
    seen = []
    net.apply(seen.append)
    assert {*seen} == {*net.modules()} and len(seen) == len({*seen})


@pytest.mark.parametrize('csg', KINDS.values(), ids=KINDS)
def test_copies_and_pickles_are_roots_with_generators_of_their_own(csg):
    net = build(csg, Chain).eval()
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert type(twin) is type(net) and names(twin) == names(net)
        assert torch.equal(twin(image()), net(image()))
        assert twin[2].generator is find_bank(twin)[0] and twin[2].generator is not net[2].generator
    assert type(materialise(net)) is Chain


def test_a_class_with_a_state_of_its_own_is_copied_by_it():
    class Counted(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.copies = nn.Sequential(*layers()), 0

        def __getstate__(self):
            return {**self.__dict__, 'copies': self.copies + 1}

    net = retrofit(Counted(), CSG)
    assert copy.deepcopy(net).copies == 1 and find_bank(copy.deepcopy(net)) is not None


# --- copied layers ---


class Net(nn.Module):
    """A part that may be there twice."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 17, 3)
        self.head = nn.Sequential(nn.Conv2d(17, 17, 3), nn.Conv2d(17, 9, 3))

    def forward(self, x):
        x = self.stem(x)
        return self.head(x) + self.twin(x)


def copied(module):
    return copy.deepcopy(module)


def unpickled(module):
    return pickle.loads(pickle.dumps(module))


def saved(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = [copied, unpickled, saved]


def with_twin(csg, way, steps=0):
    net = retrofit(Net(), csg)
    with torch.no_grad():
        for generator in find_bank(net):
            for parameter in generator.parameters():
                parameter.mul_(1 + steps / 10)
    net.twin = way(net.head)
    return net


@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('csg', [each for name, each in KINDS.items() if name != 'two generators'])
def test_a_copied_part_shares_the_networks_generator(csg, way, tmp_path):
    trained, fresh = with_twin(csg, way, steps=5), with_twin(csg, way)
    fresh.load_state_dict(trained.state_dict())
    assert torch.equal(fresh(image()), trained(image()))
    assert {conv.generator for _, conv in generated_convs(trained)} == {trained.csg[0]}
    save_compact(trained, tmp_path / 'twins.safetensors')
    assert summarise(trained).stored_params == sum(each.numel() for each in trained.parameters())
    dense = materialise(copy.deepcopy(trained))
    torch.testing.assert_close(dense(image()), trained(image()))
    assert trained.half()(image().half()).isfinite().all()


@pytest.mark.parametrize('way', WAYS)
def test_a_copied_part_trains_with_the_shared_generator(way):
    net = with_twin(CSG, way)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        net(image()).square().mean().backward()
        optimizer.step()
    assert net.twin[0].generator is net.csg[0]
    again = with_twin(CSG, way)
    again.load_state_dict(net.state_dict())
    assert torch.equal(again(image()), net(image()))


def test_a_copy_that_leaves_the_network_stays_what_it_was():
    net = retrofit(Net(), CSG)
    kept = copy.deepcopy(net.head)
    before = kept(torch.ones(1, 17, 9, 9)).detach()
    with torch.no_grad():
        net.csg[0].weight.mul_(2)
    assert torch.equal(kept(torch.ones(1, 17, 9, 9)), before)


def of_another_network(net):
    with torch.no_grad():
        other = retrofit(Net(), CSG)
        other.csg[0].weight.add_(1)
    return other.head


def of_before_training(net):
    kept = copy.deepcopy(net.head)
    with torch.no_grad():
        net.csg[0].weight.add_(1)
    return kept


def of_other_settings(net):
    return retrofit(Net(), CSG | {'code_dim': 4}).head


@pytest.mark.parametrize('foreign', [of_another_network, of_before_training, of_other_settings])
def test_a_layer_with_another_generator_is_refused_everywhere(foreign, tmp_path):
    net = retrofit(Net(), CSG)
    net.twin = foreign(net)
    weights = {}
    for use in (
        net.state_dict,
        lambda: net.load_state_dict(weights),
        net.double,
        lambda: save_compact(net, tmp_path / 'never.safetensors'),
        lambda: summarise(net),
        lambda: materialise(net),
    ):
        with pytest.raises(CSGError, match="twin.0: its generator is not this network's.*copy a layer of the network"):
            use()
    assert not [*tmp_path.iterdir()]


def test_a_network_may_lose_its_generated_layers_and_get_others():
    net = build()
    net[2] = nn.Conv2d(17, 17, 3)
    assert summarise(net).generators[0].layers == 1
    again = build()
    again[2] = nn.Conv2d(17, 17, 3)
    again.load_state_dict(net.state_dict())
    assert torch.equal(again(image()), net(image()))


# --- threads ---


@pytest.mark.parametrize('learns', [True, False])
def test_threads_share_a_network(learns):
    net = build().eval()
    with torch.set_grad_enabled(learns):
        expected = net(image())
    wrong = []

    def work():
        with torch.set_grad_enabled(learns):
            for _ in range(50):
                found = net(image())
                if learns:
                    found.square().mean().backward()  # of a graph of this thread's own
                if not torch.allclose(found, expected, atol=1e-6):
                    wrong.append(found)

    def guarded():
        try:
            work()
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=guarded) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong[0]


def test_a_weight_taken_away_while_it_is_read_is_made_again():
    net = build().eval()
    with torch.no_grad():
        expected = net(image())

    class Vanishing(type(net[2])):
        """A layer from which another thread takes the weight between any two reads of it."""

        @property
        def ready(self):
            return self.__dict__.pop('ready', None)

    net[2].__class__ = Vanishing
    with torch.no_grad():
        assert torch.equal(net(image()), expected)


def test_classes_that_cannot_be_subclassed_are_refused_in_a_line():
    class Final(type):
        def __new__(cls, name, bases, body):
            if any(isinstance(base, Final) for base in bases):
                raise KeyError(name)
            return super().__new__(cls, name, bases, body)

    class Fixed(nn.Sequential, metaclass=Final):
        pass

    with pytest.raises(CSGError, match='Fixed cannot be extended at run time'):
        retrofit(Fixed(*layers()), CSG)


def test_code_that_asks_for_the_class_finds_the_dense_ones_names():
    net = build(kind=Chain)
    assert (type(net).__name__, type(net).__module__, type(net).__doc__) == ('Chain', Chain.__module__, Chain.__doc__)
    assert isinstance(type(net).forward, types.FunctionType) and type(net).forward is Chain.forward


# --- roots of classes that differ ---


class Earlier(nn.Sequential):
    """Methods as they were before PyTorch had all of today's arguments."""

    def _apply(self, fn):
        return super()._apply(fn)

    def named_parameters(self, prefix='', recurse=True):
        return super().named_parameters(prefix, recurse)

    def __iter__(self):
        return iter([*super().__iter__()][::-1])


def test_methods_of_earlier_signatures_are_called_as_they_were():
    net, dense = build(kind=Earlier), Earlier(*layers())
    assert {parameter.dtype for parameter in net.double().parameters()} == {torch.float64}
    assert names(net) == names(dense) == ['Conv2d', 'Conv2d', 'Conv2d', 'ReLU', 'Conv2d']


def test_a_class_that_registers_its_subclasses_does_not_hear_of_those_made_at_run_time():
    known = []

    class Registered(nn.Sequential):
        def __init_subclass__(cls, *, key):
            known.append(key)

    class RegisteredConv(nn.Conv2d):
        def __init_subclass__(cls, *, key):
            known.append(key)

    net = Registered(*layers())
    net[2] = RegisteredConv(17, 17, 3)
    retrofit(net, CSG)
    assert [name for name, _ in generated_convs(net)] == ['2', '3'] and not known
    with torch.no_grad():
        expected = net(image())
        assert torch.equal(materialise(net)(image()), expected)
    assert type(net) is Registered and type(net[2]) is RegisteredConv


def test_the_class_of_a_network_or_layer_makes_dense_ones():
    net = build(kind=Chain)
    for made in (type(net)(*layers()), type(net[2])(17, 17, 3)):
        assert type(made) in (Chain, nn.Conv2d) and made.double() is made
        pickle.loads(pickle.dumps(made.train()))


class Open(nn.Sequential):
    """A network whose methods take more arguments, and which answers for every name."""

    def train(self, mode=True, freeze=False):
        self.is_frozen = freeze
        return super().train(mode)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.isidentifier():
                return None
            raise


def test_own_arguments_and_answers_of_a_roots_class_stay():
    net = build(kind=Open)
    assert net.train(True, freeze=True).is_frozen and net.nothing is None


class Twice(nn.Module):
    def forward(self, gain):
        return 2 * gain


def with_gain():
    net = nn.Sequential(*layers())
    net.gain = nn.Parameter(torch.ones(1))
    return net


def test_a_network_with_a_parametrised_parameter_of_its_own_is_refused():
    net = with_gain()
    parametrize.register_parametrization(net, 'gain', Twice())
    with pytest.raises(CSGError, match='Sequential itself is parametrised; retrofit a module that holds it'):
        retrofit(net, CSG)


def test_a_parametrised_root_is_not_materialised():
    net = retrofit(with_gain(), CSG)
    parametrize.register_parametrization(net, 'gain', Twice())
    with pytest.raises(CSGError, match='Sequential itself is parametrised; call parametrize.remove_parametrizations'):
        materialise(net)
    parametrize.remove_parametrizations(net, 'gain')
    assert type(materialise(net)) is nn.Sequential and net.gain == 2


class Cached(nn.Conv2d):
    """A conv that does not copy what it caches, as a lambda cannot be pickled."""

    def __getstate__(self):
        return {name: each for name, each in vars(self).items() if name != 'cache'}


def test_the_state_of_a_convs_own_class_is_copied():
    net = layers()
    net[2] = Cached(17, 17, 3)
    net = retrofit(nn.Sequential(*net), CSG)
    net[2].cache = lambda: None
    for copied in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert not hasattr(copied[2], 'cache') and torch.equal(copied(image()), net(image()))


def test_attributes_of_a_roots_own_class_stay():
    class Own(nn.Sequential):
        hook_handles, bare_kind = 'hooks', 'kind'

        def refresh(self):
            return 'fresh'

        def follow(self):
            return 'followed'

    net = build(kind=Own)
    for own in (net, copy.deepcopy(net), materialise(copy.deepcopy(net))):
        assert (own.hook_handles, own.bare_kind, own.refresh(), own.follow()) == ('hooks', 'kind', 'fresh', 'followed')


def test_every_modules_own_parameters_are_each_parameter_once():
    net = build(KINDS['two generators'])
    own = [parameter for module in net.modules() for parameter in module.parameters(recurse=False)]
    assert len(own) == len([*net.parameters()]) and {*own} == {*net.parameters()}


# --- parts and wholes ---


@pytest.mark.parametrize('first', ['part', 'whole'])
def test_a_part_and_its_whole_are_materialised_in_any_order(first):
    net = build().eval()
    part = net[:-1]
    with torch.no_grad():
        wanted = net(image())
        part(image())
        materialise(part if first == 'part' else net)
        torch.testing.assert_close(net(image()), wanted)
        torch.testing.assert_close(net[-1](part(image())), wanted)


def test_a_part_has_no_generators_once_its_whole_is_materialised():
    net = build()
    part, rest = net[:-1], net[:1]
    materialise(net)
    for each in (part, rest):
        assert not any(name.startswith('csg') for name in each.state_dict())
    assert type(part) is nn.Sequential


def test_a_part_is_refused_with_what_to_do(tmp_path):
    net = retrofit(nn.ModuleDict({'encoder': nn.Sequential(*layers()), 'head': nn.Conv2d(5, 2, 1)}), CSG)
    part = net['encoder']
    for act in (
        lambda: save_compact(part, tmp_path / 'part.safetensors'),
        lambda: fit(part, nn.Sequential(*layers()).state_dict()),
        lambda: retrofit(part, CSG),
    ):
        with pytest.raises(CSGError, match='this Sequential is a part of a retrofitted network; '):
            act()


def test_a_state_dict_of_a_part_is_warned_of_and_one_of_the_whole_is_not():
    net = retrofit(nn.ModuleDict({'encoder': nn.Sequential(*layers()), 'head': nn.Conv2d(5, 2, 1)}), CSG)
    with pytest.warns(CSGWarning, match='codes without their generator') as told:
        net['encoder'].state_dict()
    assert len(told) == 1
    part = build()[:3]
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        net.state_dict()
        nn.ModuleList([net]).state_dict()
        get_state_dict(nn.ModuleList([net]))
        part.state_dict()
        net['head'].state_dict()
        materialise(copy.deepcopy(net))['encoder'].state_dict()


def test_a_fit_of_a_part_leaves_the_rest():
    net = build()
    before = net[3].weight.clone()
    fit(net[:3], nn.Sequential(*layers()[:3]).state_dict())
    assert torch.equal(net[3].weight, before)


def test_layers_that_came_unseen_are_adopted_or_refused_by_the_first_step():
    net = retrofit(Net(), CSG)
    net.twin = copy.deepcopy(net.head)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    Net.forward(net, image()).square().mean().backward()  # past the root's hooks
    optimizer.step()
    assert net.twin[0].generator is net.csg[0]
    other, stranger = build(), build()
    with torch.no_grad():
        stranger.csg[0].weight.add_(1)
    other[2] = stranger[2]
    with pytest.raises(CSGError, match="its generator is not this network's"):
        other(image())


class Initialised(nn.Sequential):
    """As mmengine's modules, which initialise once."""

    _is_init = False

    def init_weights(self):
        self._is_init = True


def test_a_trained_network_is_initialised_once():
    net = build(kind=Initialised)
    begun = []
    find_bank(net).loading.before_init = begun.append
    net.init_weights()
    net.init_weights()
    assert len(begun) == 1
