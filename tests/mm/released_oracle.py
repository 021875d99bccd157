"""What the authors' networks compute, written straight from their formulas, as the oracle for reading their files.

Omidvar et al., AISTATS 2021. Every function takes the tensors of a released file
without ``module.`` prefixes, and images ``(n, 3, 32, 32)``.
"""

import math

import torch
from torch.nn import functional

GENERATORS = ('CSG.weight', 'CLG.weight')


def evaluate(tensors, x):
    """Return logits of whichever network the tensors are of."""
    if 'conv_1_3x3.weight' in tensors:
        return resnet(tensors, x)
    if 'dense1.0.bn1.weight' in tensors:
        return densenet(tensors, x)
    return mobilenet(tensors, x) if 'layers.0.conv2.weight' in tensors else shufflenet(tensors, x)


def norm(tensors, name, x):
    mean, var, weight, bias = (tensors[f'{name}.{part}'] for part in ('running_mean', 'running_var', 'weight', 'bias'))
    shape = (1, -1, 1, 1)
    return (x - mean.view(shape)) / (var.view(shape) + 1e-5).sqrt() * weight.view(shape) + bias.view(shape)


def filters(tensors, weight, code, out_channels, in_channels, kernel):
    """Return a stored weight, or the slices of its codes laid out as the authors reshape and crop them."""
    if weight in tensors:
        return tensors[weight]
    generator = next(tensors[name] for name in GENERATORS if name in tensors)
    side = math.isqrt(generator.shape[0] // kernel**2)
    rows, cols = -(-out_channels // side), -(-in_channels // side)
    slices = torch.stack([generator @ each for each in tensors[code]])
    whole = slices.reshape(rows * side, cols * side, kernel, kernel)
    return whole[:out_channels, :in_channels]


def resnet(t, x):
    x = functional.relu(norm(t, 'bn_1', functional.conv2d(x, t['conv_1_3x3.weight'], padding=1)))
    for stage, channels in ((1, 16), (2, 32), (3, 64)):
        block = 0
        while f'stage_{stage}.{block}.bn_a.weight' in t:
            name, before = f'stage_{stage}.{block}', x.shape[1]
            stride = channels // before
            weight = filters(t, f'{name}.conv_a.weight', f'{name}.code', channels, before, 3)
            out = functional.relu(norm(t, f'{name}.bn_a', functional.conv2d(x, weight, padding=1, stride=stride)))
            weight = filters(t, f'{name}.conv_b.weight', f'{name}.code2', channels, channels, 3)
            out = norm(t, f'{name}.bn_b', functional.conv2d(out, weight, padding=1))
            if stride > 1:
                x = x[:, :, ::2, ::2]
                x = torch.cat([x, torch.zeros_like(x)], 1)
            x = functional.relu(out + x)
            block += 1
    return functional.linear(x.mean((2, 3)), t['classifier.weight'], t['classifier.bias'])


def densenet(t, x):
    growth = len(t['conv1.weight']) // 2
    x = functional.conv2d(x, t['conv1.weight'], padding=1)
    for stage in (1, 2, 3):
        block = 0
        while f'dense{stage}.{block}.bn1.weight' in t:
            name = f'dense{stage}.{block}'
            out = functional.conv2d(functional.relu(norm(t, f'{name}.bn1', x)), t[f'{name}.conv1.weight'])
            weight = filters(t, f'{name}.conv2.weight', f'{name}.code2', growth, 4 * growth, 3)
            out = functional.conv2d(functional.relu(norm(t, f'{name}.bn2', out)), weight, padding=1)
            x = torch.cat([out, x], 1)
            block += 1
        x = functional.relu(norm(t, f'trans{stage}.bn', x))
        if stage < 3:
            x = functional.avg_pool2d(functional.conv2d(x, t[f'trans{stage}.conv.weight']), 2)
    return functional.linear(x.mean((2, 3)), t['linear.weight'], t['linear.bias'])


def mobilenet(t, x):
    strides = [1] * 3 + [2, 1, 1] + [2, 1, 1, 1] + [1] * 3 + [2, 1, 1] + [1]
    x = functional.relu(norm(t, 'bn1', functional.conv2d(x, t['conv1.weight'], padding=1)))
    for block, stride in enumerate(strides):
        name, width = f'layers.{block}', len(t[f'layers.{block}.bn1.weight'])
        weight = filters(t, f'{name}.conv1.weight', f'{name}.code1', width, x.shape[1], 1)
        out = functional.relu(norm(t, f'{name}.bn1', functional.conv2d(x, weight)))
        out = functional.conv2d(out, t[f'{name}.conv2.weight'], padding=1, stride=stride, groups=width)
        out = functional.conv2d(functional.relu(norm(t, f'{name}.bn2', out)), t[f'{name}.conv3.weight'])
        out = norm(t, f'{name}.bn3', out)
        if stride == 1:
            if f'{name}.shortcut.0.weight' in t:
                x = norm(t, f'{name}.shortcut.1', functional.conv2d(x, t[f'{name}.shortcut.0.weight']))
            out = out + x
        x = out
    x = functional.relu(norm(t, 'bn2', functional.conv2d(x, t['conv2.weight'])))
    return functional.linear(x.mean((2, 3)), t['linear.weight'], t['linear.bias'])


def shufflenet(t, x):
    def conv(name, number, x, *, relu, **options):
        channels = len(t[f'{name}bn{number}.weight'])
        weight, code = f'{name}conv{number}.weight', f'{name}code{number}'
        out = functional.conv2d(x, filters(t, weight, code, channels, x.shape[1], 1), **options)
        out = norm(t, f'{name}bn{number}', out)
        return functional.relu(out) if relu else out

    def depthwise(name, number, x, stride):
        return conv(name, number, x, relu=False, padding=1, stride=stride, groups=x.shape[1])

    def shuffle(left, right):
        return torch.stack([left, right], dim=2).flatten(1, 2)

    x = conv('', 1, x, relu=True, padding=1)
    for stage in (1, 2, 3):
        name = f'layer{stage}.0.'
        left = conv(name, 2, depthwise(name, 1, x, 2), relu=True)
        right = conv(name, 5, depthwise(name, 4, conv(name, 3, x, relu=True), 2), relu=True)
        x = shuffle(left, right)
        block = 1
        while f'layer{stage}.{block}.bn1.weight' in t:
            name = f'layer{stage}.{block}.'
            left, right = x.chunk(2, 1)
            right = conv(name, 3, depthwise(name, 2, conv(name, 1, right, relu=True), 1), relu=True)
            x = shuffle(left, right)
            block += 1
    x = conv('', 2, x, relu=True)
    return functional.linear(x.mean((2, 3)), t['linear.weight'], t['linear.bias'])
