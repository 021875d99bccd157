import json

import numpy as np
import pytest

from csg_seg.errors import CSGError
from csg_seg.generators.linear import Generator
from csg_seg.generators.registry import KINDS, Option, register_generator
from csg_seg.generators.settings import Settings, matches

GOOD = {'slice_shape': (16, 16, 3, 3), 'code_dim': 128}
SLICE_SHAPE = r'slice_shape must be four positive integers \(s_out, s_in, kh, kw\), such as \(16, 16, 3, 3\)'
CODE_DIM = 'code_dim must be an integer of at least 1'
SEED = 'seed must be an integer of at least 0'
FREEZE = 'freeze_generator must be True or False'
INCLUDE = r"include must be patterns on module names, such as \['backbone\.\*'\]"
EXCLUDE = r"exclude must be patterns on module names, such as \['backbone\.\*'\]"

BAD_VALUES = [
    ({'slice_shape': (16, 16)}, SLICE_SHAPE),
    ({'slice_shape': (16, 16, 3, 3, 3, 3)}, SLICE_SHAPE),
    ({'slice_shape': ()}, SLICE_SHAPE),
    ({'slice_shape': 16}, SLICE_SHAPE),
    ({'slice_shape': None}, SLICE_SHAPE),
    ({'slice_shape': '3333'}, SLICE_SHAPE),
    ({'slice_shape': ('16', '16', '3', '3')}, SLICE_SHAPE),
    ({'slice_shape': (16, 0, 3, 3)}, SLICE_SHAPE),
    ({'slice_shape': (-16, 16, 3, 3)}, SLICE_SHAPE),
    ({'slice_shape': (16.0, 16, 3, 3)}, SLICE_SHAPE),
    ({'slice_shape': (True, 16, 3, 3)}, SLICE_SHAPE),
    ({'code_dim': 0}, CODE_DIM),
    ({'code_dim': -1}, CODE_DIM),
    ({'code_dim': True}, CODE_DIM),
    ({'code_dim': 1.5}, CODE_DIM),
    ({'code_dim': '128'}, CODE_DIM),
    ({'code_dim': None}, CODE_DIM),
    ({'layout': 'Block'}, "layout must be one of 'block', 'flat'; got 'Block'"),
    ({'layout': None}, "layout must be one of 'block', 'flat'"),
    ({'layout': ['flat']}, "layout must be one of 'block', 'flat'"),
    ({'generator': 'cnn'}, "unknown generator 'cnn'; known are 'linear', 'binary', 'mlp'"),
    ({'generator': 'cnn', 'rank': 3}, 'import the module that registers it'),
    ({'generator': None}, "unknown generator None; known are 'linear', 'binary', 'mlp'"),
    ({'generator': ['mlp']}, r"unknown generator \['mlp'\]; known are 'linear', 'binary', 'mlp'"),
    ({'hidden': 8}, "'hidden' is a key of generator='mlp', not of 'linear'; drop it"),
    ({'generator': 'binary', 'hidden': 8}, "'hidden' is a key of generator='mlp', not of 'binary'; drop it"),
    ({'generator': 'mlp'}, "'hidden' is missing; generator='mlp' needs it, try hidden=8"),
    ({'generator': 'mlp', 'hidden': 0}, 'hidden must be an integer of at least 1'),
    ({'residual': -1}, 'residual must be an integer of at least 0'),
    ({'residual': None}, 'residual must be an integer of at least 0'),
    ({'residual': True}, 'residual must be an integer of at least 0'),
    ({'freeze_generator': 1}, FREEZE),
    ({'freeze_generator': 'yes'}, FREEZE),
    ({'freeze_generator': None}, FREEZE),
    ({'generator': 'binary', 'freeze_generator': False}, "drop freeze_generator=False or use 'linear'"),
    ({'include': [1]}, INCLUDE),
    ({'include': 5}, INCLUDE),
    ({'include': [['layer1']]}, INCLUDE),
    ({'include': {'layer1': True}}, INCLUDE),
    ({'exclude': [None]}, EXCLUDE),
    ({'exclude': True}, EXCLUDE),
    ({'exclude': b'layer1'}, EXCLUDE),
    ({'seed': -1}, SEED),
    ({'seed': 0.5}, SEED),
    ({'seed': True}, SEED),
    ({'seed': 2**70}, 'seed must be an integer'),
]

UNKNOWN_KEYS = [
    ('slice_shap', "did you mean 'slice_shape'?"),
    ('codedim', "did you mean 'code_dim'?"),
    ('freeze_gen', "did you mean 'freeze_generator'?"),
    ('inlcude', "did you mean 'include'?"),
    ('zzz', 'known keys: slice_shape, code_dim, layout, generator, freeze_generator, include, exclude, seed'),
    (7, 'known keys: slice_shape'),
]

ROUND_TRIPS = [
    {},
    {'slice_shape': [12, 20, 1, 3], 'code_dim': 1},
    {'slice_shape': [12, 20, 3], 'code_dim': 1},
    {'slice_shape': [12, 20, 3, 1, 3], 'code_dim': 1},
    {'layout': 'flat', 'freeze_generator': True, 'seed': 2**40},
    {'generator': 'binary', 'include': ['layer*.conv2', 'head'], 'exclude': ['layer4']},
    {'generator': 'binary', 'freeze_generator': True, 'include': []},
    {'generator': 'mlp', 'hidden': 16, 'residual': 2},
    {'generator': 'mlp', 'hidden': 16, 'freeze_generator': True},
]


@pytest.mark.parametrize(('change', 'message'), BAD_VALUES)
def test_a_bad_value_is_refused_by_key_and_remedy(change, message):
    with pytest.raises(CSGError, match=rf'csg\[3\].*{message}'):
        Settings.from_dict(GOOD | change, position=3)


@pytest.mark.parametrize(('key', 'hint'), UNKNOWN_KEYS)
def test_an_unknown_key_is_refused_with_a_hint(key, hint):
    with pytest.raises(CSGError) as caught:
        Settings.from_dict(GOOD | {key: 1}, position=2)
    assert str(caught.value).startswith(f'csg[2]: unknown key {key!r}')
    assert hint in str(caught.value)


@pytest.mark.parametrize('key', list(GOOD))
def test_a_missing_key_is_named_with_an_example(key):
    with pytest.raises(CSGError, match=rf"'{key}' is missing; .*slice_shape=\(16, 16, 3, 3\), code_dim=128"):
        Settings.from_dict({name: value for name, value in GOOD.items() if name != key})


@pytest.mark.parametrize('csg', [None, 3, 'csg', [('code_dim', 3)]])
def test_settings_that_are_no_dict_are_refused(csg):
    with pytest.raises(CSGError, match=r'csg\[0\]: expected a dict of settings'):
        Settings.from_dict(csg)


def test_integers_of_numpy_are_taken():
    settings = Settings.from_dict({'slice_shape': [*np.array([16, 16, 3, 3])], 'code_dim': np.int64(128)})
    assert json.dumps(settings.to_dict()) == json.dumps(Settings.from_dict(GOOD).to_dict())


@pytest.mark.parametrize('change', ROUND_TRIPS)
def test_from_dict_inverts_to_dict_through_json(change):
    settings = Settings.from_dict(GOOD | change)
    assert Settings.from_dict(json.loads(json.dumps(settings.to_dict())), position=9) == settings


def test_the_defaults_are_the_papers():
    settings = Settings.from_dict(GOOD)
    assert (settings.layout, settings.generator, settings.freeze_generator) == ('block', 'linear', False)
    assert (settings.include, settings.exclude, settings.kernel) == (None, (), (3, 3))


def test_optional_keys_are_written_only_where_they_are_set():
    written = [
        'slice_shape',
        'code_dim',
        'layout',
        'generator',
        'freeze_generator',
        'include',
        'exclude',
        'seed',
    ]
    assert list(Settings.from_dict(GOOD | {'hidden': None, 'residual': 0}).to_dict()) == written


@pytest.fixture
def grown():
    """A kind with two options, one of which has a default, and a constraint between settings."""

    @register_generator('grown')
    class Grown(Generator):
        OPTIONS = {'depth': Option(minimum=2), 'width': Option(minimum=1, default=3)}

        @classmethod
        def check_settings(cls, settings):
            if settings.options['depth'] > settings.code_dim:
                raise CSGError(f'depth must be at most code_dim; got {settings.options["depth"]}')

    yield GOOD | {'generator': 'grown', 'depth': 4}
    del KINDS['grown']


def test_a_registered_kind_brings_its_options(grown):
    settings = Settings.from_dict(grown | {'residual': 2})
    assert settings.options == {'depth': 4, 'width': 3}
    assert list(settings.to_dict())[-3:] == ['depth', 'width', 'residual']
    assert Settings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings
    assert Settings.from_dict(grown | {'width': 5}) != Settings.from_dict(grown)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'depth': None}, "'depth' is missing; generator='grown' needs it, try depth=8"),
        ({'depth': 1}, 'depth must be an integer of at least 2; got 1'),
        ({'width': 2.0}, 'width must be an integer of at least 1; got 2.0'),
        ({'depth': 129}, 'depth must be at most code_dim; got 129'),
        ({'hidden': 4}, "'hidden' is a key of generator='mlp', not of 'grown'; drop it"),
        ({'generator': 'linear'}, "'depth' is a key of generator='grown', not of 'linear'; drop it"),
        ({'dept': 4}, "unknown key 'dept'; did you mean 'depth'"),
    ],
)
def test_a_registered_kinds_options_are_checked(grown, change, message):
    with pytest.raises(CSGError, match=rf'csg\[1\]: {message}'):
        Settings.from_dict(grown | change, position=1)


def test_the_seed_is_the_position_unless_given():
    assert Settings.from_dict(GOOD, position=4).seed == 4
    assert Settings.from_dict(GOOD | {'seed': 0}, position=4).seed == 0


def test_a_binary_generator_is_frozen_by_default():
    assert Settings.from_dict(GOOD | {'generator': 'binary'}).freeze_generator is True


def test_one_pattern_needs_no_list():
    settings = Settings.from_dict(GOOD | {'include': 'layer1', 'exclude': 'layer2'})
    assert (settings.include, settings.exclude) == (('layer1',), ('layer2',))


@pytest.mark.parametrize(
    ('pattern', 'named'),
    [
        ('layer1.0.conv1', True),
        ('layer1', True),
        ('layer1.0', True),
        ('layer*.conv1', True),
        ('layer?', True),
        ('*', True),
        ('layer', False),
        ('conv1', False),
        ('layer1.0.conv1.weight', False),
        ('Layer1', False),
    ],
)
def test_a_pattern_names_a_module_or_its_ancestor(pattern, named):
    assert matches('layer1.0.conv1', pattern) is named
