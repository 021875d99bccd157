"""Workers exchange what is stored: counted in buckets and on the wire."""

import json
import os

import pytest
import torch
from conftest import ROOT, run_experiment

from csg_seg import summarise
from csg_seg.errors import CSGError
from csg_seg.mm.model import build_model
from csg_seg.running.configs import read_config
from experiments.batches import random_batch
from experiments.exchange.__main__ import print_tables
from experiments.exchange.links import NAMESPACES, link, parse_rate
from experiments.exchange.workers import Measurement, measure_exchange, summarise_seconds

DENSE = ROOT / 'configs' / 'cifar10' / 'resnet20_b192-200e_cifar10.py'
CSG = DENSE.with_name(f'csg-s12-d72_{DENSE.name}')
# Many layers, and more than DDP's first bucket.
LARGE = ROOT / 'configs' / 'deeplabv3' / 'csg-s16-d128_deeplabv3_r18-d8_1xb4-1k_camvid-144x192.py'
RATE = '50mbit'
HOOKS = ('none', 'fp16', 'powersgd')


def links_or_reason() -> str | None:
    try:
        with link():
            return None
    except CSGError as error:
        return str(error)


NO_LINKS = links_or_reason()


@pytest.fixture(scope='module')
def measured():
    """Four networks in two processes, over a slow link where one can be made."""
    frozen = read_config(CSG, {'model.csg.freeze_generator': True})
    cfgs = {'dense': read_config(DENSE), 'csg': read_config(CSG), 'frozen': frozen, 'large': read_config(LARGE)}
    rates = () if NO_LINKS else (RATE,)
    return measure_exchange(cfgs, Measurement(hooks=HOOKS, rates=rates, rounds=1, size=(32, 32)))


@pytest.mark.parametrize(('name', 'config'), [('dense', DENSE), ('csg', CSG), ('large', LARGE)])
def test_a_step_exchanges_what_is_trained_and_no_more(measured, name, config):
    found = measured['networks'][name]
    trained = 4 * summarise(build_model(read_config(config))).trainable_params
    assert found['all_reduced_bytes'] == found['gradient_bytes'] == found['parameter_bytes'] == trained


def test_a_frozen_generator_is_held_and_not_exchanged(measured):
    free, frozen = measured['networks']['csg'], measured['networks']['frozen']
    generator = 4 * 72 * 12 * 12 * 9
    assert frozen['parameter_bytes'] == free['parameter_bytes']
    for key in ('gradient_bytes', 'all_reduced_bytes'):
        assert frozen[key] == free[key] - generator
    assert not any(each['generator'] for each in frozen['buckets'])


def test_the_optimizer_holds_as_much_as_its_method_needs(measured):
    for name, copies in (('dense', 1), ('csg', 1), ('frozen', 1), ('large', 2)):  # SGD with momentum, AdamW
        found = measured['networks'][name]
        assert found['optimizer_bytes'] == pytest.approx(copies * found['gradient_bytes'], rel=1e-3)


def test_the_generator_whose_gradient_is_ready_last_travels_last(measured):
    buckets = measured['networks']['large']['buckets']
    assert [each['generator'] for each in buckets] == [False] * (len(buckets) - 1) + [True]
    assert 1 < len(buckets) <= 3


@pytest.mark.skipif(NO_LINKS is not None, reason=str(NO_LINKS))
def test_the_wire_carries_the_gradients_and_takes_its_time(measured):
    for name, found in measured['networks'].items():
        slow = measured['links'][RATE][name]
        for hook, share in (('none', 1.0), ('fp16', 0.5)):
            sent = slow[hook]['sent'][0]
            # Headers of packets, acknowledgements of the other direction, barriers.
            assert share * found['all_reduced_bytes'] < sent < 1.1 * share * found['all_reduced_bytes'] + 20_000
        assert slow['powersgd']['sent'][0] < slow['fp16']['sent'][0]
        # The bucket of the link holds a little that needs no time.
        waited = slow['none']['seconds'][0]
        assert waited > 8 * (found['all_reduced_bytes'] - 2**18) / parse_rate(RATE)
    assert measured['links']['none']['large']['none']['seconds'] < measured['links'][RATE]['large']['none']['seconds']


@pytest.mark.skipif(NO_LINKS is not None, reason=str(NO_LINKS))
def test_links_are_gone_afterwards(measured):
    assert list(NAMESPACES.glob(f'csg{os.getpid()}-*')) == []
    with pytest.raises(KeyboardInterrupt), link() as (one, _):
        assert (NAMESPACES / one.namespace).exists()
        raise KeyboardInterrupt
    assert list(NAMESPACES.glob(f'csg{os.getpid()}-*')) == []


def test_batches_are_what_losses_need_and_repeat_with_their_seed():
    for config in (CSG, LARGE):
        model = build_model(read_config(config))
        batch = random_batch(model, 2, 33, 47)
        loss, _ = model.parse_losses(model(**batch, mode='loss'))
        assert torch.isfinite(loss)
        again, other = random_batch(model, 2, 33, 47), random_batch(model, 2, 33, 47, seed=1)
        assert torch.equal(batch['inputs'], again['inputs']) and not torch.equal(batch['inputs'], other['inputs'])


def test_ratios_are_those_of_the_same_rounds():
    assert summarise_seconds([2.0, 6.0, 3.0], [1.0, 2.0, 3.0]) == {'seconds': 3.0, 'ratio': 2.0}


@pytest.mark.parametrize(
    ('change', 'said'),
    [
        ({'hooks': ['zip']}, "there is no hook 'zip'; choose from none, fp16, powersgd"),
        ({'rates': ['fast']}, "'fast' is not a rate; give one from 10kbit to 100gbit, such as 100mbit or 1gbit"),
        ({'rates': ['0mbit']}, "'0mbit' is not a rate"),
        ({'rates': ['1gbit'], 'processes': 4}, 'a link has two ends; use 2 processes, not 4'),
        ({'processes': 0}, 'processes=0'),
        ({'batch_size': 1}, 'batch_size 2, because of batch norm'),
    ],
)
def test_mistakes_are_named(change, said):
    with pytest.raises(CSGError, match=said):
        Measurement(**change)


@pytest.mark.full
def test_the_tool_counts_in_four_processes_and_prints(tmp_path, capsys):
    out = tmp_path / 'counts.json'
    done = run_experiment('exchange', DENSE, CSG, '--processes', 4, '--size', 32, 32, '--out', out, '--json')
    result = json.loads(done.stdout)
    assert result == json.loads(out.read_text())
    dense, csg = result['networks'].values()
    assert dense['all_reduced_bytes'] / csg['all_reduced_bytes'] == pytest.approx(269_722 / 115_426)
    times = {'none': {'seconds': [1.5], 'sent': [5_000_000]}}
    print_tables({**result, 'links': {'1gbit': {'dense': times, 'csg': times}}})
    printed = capsys.readouterr().out
    assert all(each in printed for each in ('1.08', '0.5*', '1gbit', '1.50', '1.00x', '5.0'))


@pytest.mark.parametrize(
    ('arguments', 'said'),
    [
        ([CSG, '--links', 'fast'], "'fast' is not a rate"),
        ([CSG, CSG], 'two of the configs have one name'),
        ([CSG, '--cfg-options', 'model.csg.code_dim=0'], 'code_dim must be an integer'),
    ],
)
def test_the_tool_ends_with_one_line_on_a_mistake(arguments, said):
    done = run_experiment('exchange', *arguments, check=False)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith('error: ') and said in done.stderr
