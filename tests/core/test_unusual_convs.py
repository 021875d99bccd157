"""Unusual convs: generated with their own forward, or left dense with a reason."""

import re

import pytest
import torch
from mmcv.cnn.bricks.conv2d_adaptive_padding import Conv2dAdaptivePadding
from mmcv.cnn.bricks.conv_ws import ConvAWS2d, ConvWS2d
from odd_network import CSG, Net, assert_refused, generated, images
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torchvision.ops import DeformConv2d

from csg_seg import materialise, retrofit, summarise
from csg_seg.errors import CSGError
from csg_seg.layers.bank import find_bank
from csg_seg.layers.conv import CSGConv
from csg_seg.retrofitting.selection import Cause, Reason


class Scaled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


class Inner(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight - weight.mean(), bias)


class Standardised(nn.Conv2d):
    """Like mmcv's ConvWS2d: normalises its weight in its forward."""

    def __init__(self, in_channels, out_channels, kernel_size, padding=0, eps=1e-5):
        super().__init__(in_channels, out_channels, kernel_size, padding=padding)
        self.eps = eps

    def forward(self, x):
        weight = self.weight - self.weight.mean(dim=(1, 2, 3), keepdim=True)
        return F.conv2d(x, weight / (weight.std() + self.eps), self.bias, self.stride, self.padding)


@pytest.mark.parametrize('kind', [Scaled, Inner, Standardised, ConvWS2d, ConvAWS2d, Conv2dAdaptivePadding])
def test_a_conv_keeps_its_own_forward(kind):
    model = Net()
    model.head = kind(31, 17, 3, padding=1)
    retrofit(model, CSG).eval()
    twin = kind(31, 17, 3, padding=1)
    buffers = dict(model.head.named_buffers())
    twin.load_state_dict({'weight': model.head.generate_weight(), 'bias': model.head.bias, **buffers})
    x = images(channels=31)
    assert isinstance(model.head, CSGConv) and isinstance(model.head, kind)
    torch.testing.assert_close(model.head(x), twin(x))
    before = model(images())
    assert type(materialise(model).head) is kind
    torch.testing.assert_close(model(images()), before)


def test_a_conv_that_takes_statistics_of_what_it_loads_gets_them():
    """mmcv's ConvAWS2d, of weights that were trained without it."""
    model = Net()
    model.head = ConvAWS2d(31, 17, 3, padding=1)
    dense = {name: each.clone() for name, each in model.state_dict().items() if 'weight_' not in name}
    retrofit(model, CSG)
    model.load_state_dict(dense, strict=False)
    torch.testing.assert_close(model.head.weight_beta.flatten(), dense['head.weight'].mean(dim=(1, 2, 3)))


def test_convs_not_of_torch_and_weights_that_start_at_zero_stay_dense():
    class Deformable(Net):
        def __init__(self):
            super().__init__()
            self.offset = nn.Conv2d(31, 18, 3, padding=1)
            nn.init.zeros_(self.offset.weight)
            self.head = DeformConv2d(31, 17, 3, padding=1)

        def forward(self, x):
            x = F.relu(self.point(self.grouped(F.relu(self.body(F.relu(self.stem(x)))))))
            return self.head(x, self.offset(x))

    model = retrofit(Deformable(), CSG)
    left = {layer.name: layer.left_dense for layer in summarise(model).layers if layer.left_dense}
    assert left['head'] == 'not a conv of torch: DeformConv2d'
    assert left['offset'] == 'its weight starts at zero'
    assert model(images()).isfinite().all()
    assert 'offset' in generated(retrofit(Deformable(), CSG | {'include': ['body', 'offset']}))
    assert_refused(Deformable(), CSG | {'include': ['body', 'head']}, 'head cannot be generated: not a conv of torch')


def test_models_that_cannot_be_retrofitted_are_refused():
    lazy = Net()
    lazy.head = nn.LazyConv2d(17, 3)
    refused = (
        (lazy, 'head.weight has no shape before the first batch; run one batch'),
        (None, 'an object of type NoneType cannot be retrofitted'),
        (Net, 'a class cannot be retrofitted; give a network'),
        (torch.fx.symbolic_trace(Net()), 'cannot be retrofitted; give a network'),
        (nn.Conv2d(31, 31, 3), 'a single Conv2d cannot be retrofitted'),
    )
    for model, said in refused:
        with pytest.raises(CSGError, match=said):
            retrofit(model, CSG)


def test_a_part_of_a_network_has_no_counts_of_its_own():
    model = retrofit(Net(), CSG)
    with pytest.raises(CSGError, match='belong to a larger model; give that model as a whole'):
        summarise(model.body)


def assert_left_dense(model, reason):
    """Assert that the head stays dense, and that including it by its full name is refused."""
    message = re.escape(f'csg[0]: head cannot be generated: {reason}; remove it from include')
    assert_refused(model, CSG | {'include': ['body', 'head']}, message)
    retrofit(model, CSG)
    assert 'head' not in generated(model)
    assert find_bank(model).left_dense['head'] == reason


def test_a_conv_with_a_replaced_forward_is_left_dense():
    model = Net()
    model.head.forward = lambda x: x
    assert_left_dense(model, Reason(Cause.REPLACED_FORWARD))


@pytest.mark.filterwarnings('ignore:.*weight_norm.* is deprecated')
@pytest.mark.parametrize(
    'computed',
    [
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.spectral_norm,
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
        lambda conv: prune.random_unstructured(conv, 'weight', amount=0.5),
    ],
    ids=['weight_norm', 'spectral_norm', 'old weight_norm', 'old spectral_norm', 'pruned'],
)
def test_a_computed_weight_is_left_dense(computed):
    model = Net()
    computed(model.head)
    model.eval()  # spectral norms move their vectors whenever the weight is read in training
    assert_left_dense(model, Reason(Cause.COMPUTED))


class Negated(nn.Module):
    def forward(self, bias):
        return -bias


def test_a_conv_with_a_computed_bias_is_left_dense():
    model = Net()
    nn.utils.parametrize.register_parametrization(model.head, 'bias', Negated())
    assert_left_dense(model, Reason(Cause.COMPUTED))
    out = model.eval()(images())
    assert torch.equal(materialise(model)(images()), out)


def test_tied_weights_are_left_dense_and_name_each_other():
    model = Net()
    model.body.append(nn.Conv2d(34, 34, 3, padding=1))
    model.body.append(nn.Conv2d(34, 34, 3, padding=1))
    model.body[5].weight = model.body[4].weight
    retrofit(model, CSG)
    assert model.body[5].weight is model.body[4].weight
    left = find_bank(model).left_dense
    assert left['body.4'] == Reason(Cause.SHARED, 'body.5.weight')
    assert left['body.5'] == Reason(Cause.SHARED, 'body.4.weight')


def test_a_weight_held_twice_is_left_dense():
    model = Net()
    model.anchor = model.head.weight
    assert_left_dense(model, Reason(Cause.SHARED, 'anchor'))


@pytest.mark.parametrize('register', ['register_hook', 'register_post_accumulate_grad_hook'])
def test_a_weight_with_a_hook_on_its_gradient_is_left_dense(register):
    model = Net()
    getattr(model.head.weight, register)(lambda gradient: None)
    assert_left_dense(model, Reason(Cause.HOOKED))


def test_a_weight_of_another_shape_than_its_conv_says_is_left_dense():
    model = Net()
    model.head.out_channels = 34
    assert_left_dense(model, Reason(Cause.OTHER_SHAPE, '(17, 31, 3, 3), not (34, 31, 3, 3)'))


def test_a_conv_with_a_kernel_size_that_is_no_tuple_is_left_dense():
    model = Net()
    model.head.kernel_size = 3
    assert_left_dense(model, Reason(Cause.OTHER_SHAPE, 'kernel_size is 3, not a tuple'))


def test_attributes_of_a_weight_go_to_its_code_and_back():
    model = Net()
    model.head.weight.lr_mult = 0.1
    retrofit(model, CSG)
    assert model.head.code.lr_mult == 0.1 and not hasattr(model.body[0].code, 'lr_mult')
    assert materialise(model).head.weight.lr_mult == 0.1


def test_a_conv_with_an_attribute_that_generated_convs_need_is_left_dense():
    class Ready(nn.Conv2d):
        def ready(self):
            return True

    model = Net()
    model.head = Ready(31, 17, 3)
    assert_left_dense(model, Reason(Cause.NAME_TAKEN, 'ready'))


@pytest.mark.parametrize('value', [True, nn.Parameter(torch.ones(3))], ids=['attribute', 'parameter'])
def test_a_conv_with_an_own_attribute_that_generated_convs_need_is_left_dense(value):
    model = Net()
    model.head.code = value
    assert_left_dense(model, Reason(Cause.NAME_TAKEN, 'code'))


@pytest.mark.parametrize('hold', [lambda weight: [weight], lambda weight: {'weight': weight}], ids=['list', 'dict'])
def test_a_weight_that_a_module_keeps_elsewhere_is_left_dense(hold):
    model = Net()
    model.kept = hold(model.head.weight)
    assert_left_dense(model, Reason(Cause.SHARED, 'kept'))


def test_one_module_in_two_places_stays_one():
    model = Net()
    model.alias = model.head
    retrofit(model, CSG)
    assert model.alias is model.head
    out = model.eval()(images())
    assert torch.equal(materialise(model)(images()), out)
    assert list(model.state_dict())[-2:] == ['alias.weight', 'alias.bias']
