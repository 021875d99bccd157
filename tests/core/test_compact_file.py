"""Compact checkpoints: round trips, the file itself, damaged files, other networks, saving."""

import json
import os
import resource
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

import experiments.rivals.tensor_ring  # noqa: F401 (registers a kind that is not part of the package)
from csg_seg import load_compact, materialise, retrofit, save_compact, summarise
from csg_seg.errors import CSGError
from csg_seg.files import NotWrittenError
from csg_seg.layers.conv import generated_convs
from csg_seg.storage.compact import write_compact
from csg_seg.storage.format import read_compact

CSG = {'slice_shape': (12, 20, 3, 3), 'code_dim': 24}
SIGN_MATRIX_BYTES = 24 * 12 * 20 * 3 * 3 * 4
CSGS = {
    'linear': CSG,
    'frozen': CSG | {'freeze_generator': True},
    'binary': CSG | {'generator': 'binary', 'seed': 5},
    'flat': CSG | {'layout': 'flat'},
    'mlp': CSG | {'generator': 'mlp', 'hidden': 5},
    'tensor ring': CSG | {'generator': 'tensor_ring', 'rank': 3, 'mode': 7},
    'residual': CSG | {'residual': 2},
    'binary with residual': CSG | {'generator': 'binary', 'residual': 2},
    'two generators': [CSG | {'include': ['body.3']}, CSG | {'code_dim': 9, 'generator': 'binary'}],
}


class Net(nn.Module):
    def __init__(self, seed=0, width=17):
        super().__init__()
        torch.manual_seed(seed)
        self.stem = nn.Conv2d(3, 31, 3, padding=1)
        self.body = nn.Sequential(
            nn.Conv2d(31, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, 31, 3, stride=2),
        )
        self.head = nn.Linear(31, 31)
        self.tied = nn.Linear(31, 31)
        self.tied.weight = self.head.weight

    def forward(self, x):
        return self.tied(self.head(self.body(F.relu(self.stem(x))).mean(dim=(2, 3))))


class Plain(nn.Module):
    """Convs alone: no norm layer or bias betrays the width."""

    def __init__(self, width=31):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 16, 3)
        self.widen = nn.Conv2d(16, width, 3, bias=False)
        self.narrow = nn.Conv2d(width, 16, 3, bias=False)

    def forward(self, x):
        return self.narrow(self.widen(self.stem(x)))


def images(seed=0):
    return torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(seed))


def trained(csg=CSG):
    """Return a model of which training has changed every entry."""
    model = retrofit(Net(), csg)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for step in range(3):
        optimizer.zero_grad()
        model(images(step)).square().mean().backward()
        optimizer.step()
    return model.eval()


def snapshot(model):
    types = {name: type(module) for name, module in model.named_modules()}
    return types, {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_unchanged(model, kept):
    types, state = snapshot(model)
    assert types == kept[0]
    assert list(state) == list(kept[1])
    assert all(torch.equal(tensor, kept[1][name]) for name, tensor in state.items())


def assert_refused(path, model, message, error=CSGError):
    kept = snapshot(model)
    with pytest.raises(error, match=message) as caught:
        load_compact(path, model)
    assert str(path) in str(caught.value)
    assert_unchanged(model, kept)


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp('saved') / 'model.safetensors'
    save_compact(trained(), path)
    return path


def contents(path):
    """Return a file's header and data; safetensors writes its metadata in any order."""
    data = path.read_bytes()
    (length,) = struct.unpack('<Q', data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def test_wrong_arguments_are_refused(tmp_path):
    path = tmp_path / 'model.safetensors'
    with pytest.raises(CSGError, match=r'save_compact\(model, path\): the model is an object of type PosixPath'):
        save_compact(path, trained())
    with pytest.raises(CSGError, match=r'load_compact\(path, model\): the model is an object of type PosixPath'):
        load_compact(Net(), path)
    with pytest.raises(CSGError, match='a compact checkpoint is a safetensors file; name it model.safetensors'):
        save_compact(trained(), path.with_suffix('.pth'))
    with pytest.raises(CSGError, match="keep_weights must be True, False or None; got 'no'"):
        load_compact(path, Net(), keep_weights='no')
    assert not list(tmp_path.iterdir())


# --- round trips ---


@pytest.mark.parametrize('csg', CSGS.values(), ids=CSGS)
@pytest.mark.parametrize('into', ['dense', 'retrofitted'])
def test_loading_restores_every_entry_and_output(tmp_path, csg, into):
    model = trained(csg)
    save_compact(model, tmp_path / 'model.safetensors')
    twin = Net(seed=1)
    if into == 'retrofitted':
        reseeded = [each | {'seed': 7} for each in (csg if isinstance(csg, list) else [csg])]
        retrofit(twin, reseeded)
    assert load_compact(tmp_path / 'model.safetensors', twin) is twin
    for name, tensor in model.state_dict().items():
        # A linear generator may keep the seed it was built with; its weight has been replaced.
        assert torch.equal(twin.state_dict()[name], tensor) or name.endswith('_extra_state'), name
    for one, two in zip(model.csg, twin.csg, strict=True):
        assert torch.equal(one.weight, two.weight)
        assert {p.requires_grad for p in one.parameters()} == {p.requires_grad for p in two.parameters()}
    assert torch.equal(twin.eval()(images()), model(images()))
    assert twin.tied.weight is twin.head.weight


@pytest.mark.parametrize('csg', CSGS.values(), ids=CSGS)
def test_saving_a_loaded_model_gives_the_same_file(tmp_path, csg):
    save_compact(trained(csg), tmp_path / 'one')
    save_compact(load_compact(tmp_path / 'one', Net(seed=1)), tmp_path / 'two')
    assert contents(tmp_path / 'one') == contents(tmp_path / 'two')


def test_a_loaded_network_reports_what_stayed_dense(saved):
    summary = summarise(load_compact(saved, Net()))
    assert {layer.name for layer in summary.layers if layer.left_dense} == {'stem'}
    assert [layer.name for layer in summary.layers if layer.generator == 0] == ['body.0', 'body.3']


def test_a_loaded_network_can_be_materialised(saved):
    model = load_compact(saved, Net()).eval()
    before = model(images())
    assert torch.equal(materialise(model)(images()), before)
    assert list(model.state_dict()) == list(Net().state_dict())


def test_batch_norm_statistics_are_kept(saved):
    model = load_compact(saved, Net(seed=1))
    assert model.body[1].num_batches_tracked.item() == 3
    assert not torch.equal(model.body[1].running_mean, torch.zeros(17))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize('csg', [CSG, CSGS['binary']], ids=['linear', 'binary'])
def test_each_float_type_comes_back_exactly(tmp_path, csg, dtype):
    model = trained(csg).to(dtype)
    save_compact(model, tmp_path / 'model')
    assert load_file(tmp_path / 'model')['body.0.code'].dtype == dtype
    twin = load_compact(tmp_path / 'model', Net(seed=1).to(dtype))
    assert twin.csg[0].weight.dtype == twin.body[0].code.dtype == dtype
    for name, tensor in model.state_dict().items():
        assert torch.equal(twin.state_dict()[name], tensor), name
    assert torch.equal(twin.csg[0].weight, model.csg[0].weight)


def test_a_half_precision_file_takes_half_the_bytes(tmp_path):
    save_compact(trained(), tmp_path / 'float')
    save_compact(trained().half(), tmp_path / 'half')
    assert (tmp_path / 'half').stat().st_size == pytest.approx((tmp_path / 'float').stat().st_size / 2, rel=0.02)


def test_what_no_file_can_hold_or_replace_is_refused(tmp_path):
    model = retrofit(Net(), CSG)
    os.mkfifo(tmp_path / 'pipe')
    with pytest.raises(CSGError, match='a device or pipe, not a file'):
        save_compact(model, tmp_path / 'pipe')
    model.total_params = nn.Parameter(torch.ones(1))
    with pytest.raises(CSGError, match="total_params: the name of a profiler's counter"):
        save_compact(model, tmp_path / 'x.safetensors')
    assert [path.name for path in tmp_path.iterdir()] == ['pipe']


def test_write_compact_keeps_its_state_dict_and_metadata(tmp_path):
    model = trained()
    average = {name: tensor * 2 if name.endswith('code') else tensor for name, tensor in model.state_dict().items()}
    write_compact(model, average, tmp_path / 'model', metadata={'classes': 'sky, bicyclist', 'über': '\u2713'})
    compact = read_compact(tmp_path / 'model')
    assert compact.metadata.items() >= {'classes': 'sky, bicyclist', 'über': '\u2713'}.items()
    assert torch.equal(compact.tensors['body.0.code'], 2 * model.body[0].code)


def test_an_extra_state_that_is_not_a_tensor_is_refused(tmp_path):
    class Noted(nn.Identity):
        def get_extra_state(self):
            return {'note': 'old'}

    model = Net()
    model.noted = Noted()
    message = 'noted._extra_state: a dict in the state dict, not a tensor; save it separately'
    with pytest.raises(CSGError, match=message):
        save_compact(retrofit(model, CSG), tmp_path / 'model')
    assert not any(tmp_path.iterdir())


# --- the file ---


@pytest.mark.parametrize('csg', CSGS.values(), ids=CSGS)
def test_the_file_is_as_large_as_the_summary_says(tmp_path, csg):
    model = trained(csg)
    save_compact(model, tmp_path / 'model')
    # The tied weight is written under both of its names, as in a state dict.
    assert abs((tmp_path / 'model').stat().st_size - summarise(model).stored_bytes) < 4000


def test_a_binary_file_is_smaller_by_the_sign_matrix(tmp_path):
    save_compact(trained(CSGS['frozen']), tmp_path / 'frozen')
    save_compact(trained(CSGS['binary']), tmp_path / 'binary')
    saved_bytes = (tmp_path / 'frozen').stat().st_size - (tmp_path / 'binary').stat().st_size
    assert saved_bytes == pytest.approx(SIGN_MATRIX_BYTES, abs=300)
    assert not any(name.startswith('csg.') for name in load_file(tmp_path / 'binary'))


def test_the_file_is_a_json_header_and_raw_tensors_alone(saved):
    header, data = contents(saved)
    metadata = header.pop('__metadata__')
    assert metadata['format'] == 'csg_seg compact checkpoint'
    assert json.loads(metadata['layers']) == {'body.0': [0, [17, 31, 3, 3]], 'body.3': [0, [31, 17, 3, 3]]}
    (generator,) = json.loads(metadata['generators'])
    assert (generator['slice_shape'], generator['code_dim']) == ([12, 20, 3, 3], 24)
    spans = sorted(entry['data_offsets'] for entry in header.values())
    assert [start for start, _ in spans] == [0, *(end for _, end in spans[:-1])]
    assert spans[-1][1] == len(data)


def test_the_generator_is_in_the_file_once(saved):
    header, _ = contents(saved)
    shapes = [entry['shape'] for name, entry in header.items() if name != '__metadata__']
    assert shapes.count([24, 2160]) == 1


def test_saving_does_not_change_the_model(tmp_path):
    model = trained()
    kept = snapshot(model)
    save_compact(model, tmp_path / 'model')
    assert_unchanged(model, kept)


# --- damaged files ---


@pytest.mark.parametrize('fraction', [0.0, 0.00001, 0.001, 0.01, 0.5, 0.9, 0.99999])
def test_a_truncated_file_is_refused(tmp_path, saved, fraction):
    data = saved.read_bytes()
    cut = tmp_path / 'cut'
    cut.write_bytes(data[: int(fraction * len(data))])
    assert_refused(cut, Net(), 'damaged.*copy it again')


def test_a_lengthened_file_is_refused(tmp_path, saved):
    (tmp_path / 'long').write_bytes(saved.read_bytes() + b'\0')
    assert_refused(tmp_path / 'long', Net(), 'damaged.*copy it again')


def test_a_flipped_bit_in_any_tensor_is_refused(tmp_path, saved):
    data = bytearray(saved.read_bytes())
    (length,) = struct.unpack('<Q', data[:8])
    header, _ = contents(saved)
    damaged = tmp_path / 'damaged'
    ends = [entry['data_offsets'][1] for name, entry in header.items() if name != '__metadata__']
    for end in ends:
        data[8 + length + end - 1] ^= 1
        damaged.write_bytes(data)
        with pytest.raises(CSGError, match='damaged, its checksum does not match; copy it again') as caught:
            read_compact(damaged)
        assert str(damaged) in str(caught.value)
        data[8 + length + end - 1] ^= 1
    data[-1] ^= 128
    damaged.write_bytes(data)
    assert_refused(damaged, Net(), 'damaged')


def test_a_flipped_bit_anywhere_in_the_header_is_refused(tmp_path):
    # A small file, because each byte of its header is tried.
    model = retrofit(Plain(), CSG | {'generator': 'binary'})
    save_compact(model, tmp_path / 'good')
    data = bytearray((tmp_path / 'good').read_bytes())
    (length,) = struct.unpack('<Q', data[:8])
    blank = 8 + len(bytes(data[8 : 8 + length]).rstrip())  # spaces after the JSON carry nothing
    damaged = tmp_path / 'damaged'
    accepted = []
    for position in range(blank):
        data[position] ^= 1
        damaged.write_bytes(data)
        try:
            read_compact(damaged)
        except CSGError as error:
            assert str(damaged) in str(error)
        else:
            accepted.append(position)
        data[position] ^= 1
    assert blank > 500
    assert accepted == []


@pytest.mark.parametrize('content', [b'', b'hello', b'\0' * 100, b'PK\x03\x04' + b'x' * 500, b'{"a": 1}' * 100])
def test_a_file_of_another_kind_is_refused(tmp_path, content):
    (tmp_path / 'other').write_bytes(content)
    assert_refused(tmp_path / 'other', Net(), 'not a compact checkpoint')


def test_a_pickled_checkpoint_is_refused_unopened(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ('the file was unpickled',))

    torch.save({'bomb': Bomb()}, tmp_path / 'model.pth')
    assert_refused(tmp_path / 'model.pth', Net(), 'not a compact checkpoint')


@pytest.mark.parametrize('metadata', [None, {'format': 'pt'}])
def test_a_foreign_safetensors_file_is_refused(tmp_path, metadata):
    state = {name: tensor.clone() for name, tensor in Net().state_dict().items()}
    save_file(state, tmp_path / 'dense', metadata=metadata)
    assert_refused(tmp_path / 'dense', Net(), 'not written by csg_seg.save_compact; load it as an ordinary')


@pytest.mark.parametrize('version', ['1', '5'])
def test_a_file_of_another_version_is_refused(version, tmp_path, saved):
    header, _ = contents(saved)
    save_file(load_file(saved), tmp_path / 'later', metadata=header['__metadata__'] | {'version': version})
    assert_refused(tmp_path / 'later', Net(), f'version {version} of the format, but this csg_seg reads 2, 3, 4; use')


def test_a_file_of_version_2_is_read():
    convs = nn.Conv2d(3, 5, 3), nn.Conv2d(5, 7, 3), nn.Conv2d(7, 6, 3)
    model = nn.Sequential(convs[0], nn.BatchNorm2d(5), nn.ReLU(), *convs[1:])
    load_compact(Path(__file__).parents[1] / 'data' / 'compact_version2.safetensors', model).eval()
    out = model(torch.linspace(-1, 1, 3 * 9 * 9).view(1, 3, 9, 9)).flatten()
    # What the network gave that was saved, its signs drawn from the seed in the file.
    wanted = torch.tensor([0.8166248798370361, 0.8107795119285583, 0.8049342632293701, 0.7640165090560913])
    torch.testing.assert_close(out[:4], wanted)


def test_a_missing_file_is_named(tmp_path):
    assert_refused(tmp_path / 'none', Net(), 'no such file', FileNotFoundError)
    assert_refused(tmp_path / 'no folder' / 'none', Net(), 'no such file', FileNotFoundError)


def test_loading_a_folder_is_refused(tmp_path):
    assert_refused(tmp_path, Net(), 'a folder, not a compact checkpoint; give a file in it')


# --- other networks ---


@pytest.mark.parametrize(
    ('model', 'message'),
    [
        (lambda: Net(width=18), 'in the file and .* in the model; load it into the network it was made from'),
        (lambda: Net(width=40), 'load it into the network it was made from'),
        (
            lambda: nn.ModuleDict({'net': Net()}),
            r'body.0 is a conv of weight \(17, 31, 3, 3\) in the file and not in the model',
        ),
        (
            lambda: nn.DataParallel(Net()),
            'wrapped in DataParallel; give the network inside, model.module',
        ),
        (lambda: nn.Linear(3, 3), r'body.0 is a conv of weight \(17, 31, 3, 3\) in the file and not in the model'),
        (lambda: widened(), 'lacks extra.bias .2 such entries.; load it into the network it was made from'),
        (
            lambda: shortened(),
            'has the unexpected entry head.bias .2 such entries.; load it into the network',
        ),
    ],
)
def test_another_network_is_refused(saved, model, message):
    assert_refused(saved, model(), message)


def widened():
    model = Net()
    model.extra = nn.Linear(3, 3)
    return model


def shortened():
    model = Net()
    del model.head
    return model


@pytest.mark.parametrize('wrap', [lambda net: net, lambda net: retrofit(net, CSG)], ids=['dense', 'retrofitted'])
@pytest.mark.parametrize('width', [30, 32])
def test_another_width_within_the_same_grid_is_refused(tmp_path, wrap, width):
    save_compact(retrofit(Plain(), CSG), tmp_path / 'model')
    assert_refused(tmp_path / 'model', wrap(Plain(width)), 'load it into the (dense )?network it was made from')


def test_a_grouped_conv_in_place_of_an_ungrouped_one_is_refused(tmp_path):
    csg = CSG | {'slice_shape': (16, 16, 3, 3)}
    save_compact(retrofit(Plain(), csg), tmp_path / 'model')
    other = Plain()
    other.widen = nn.Conv2d(16, 31 * 2, 3, groups=2, bias=False)
    other.narrow = nn.Conv2d(62, 16, 3, bias=False)
    assert_refused(tmp_path / 'model', other, 'load it into the network it was made from')
    other = Plain(32)
    other.widen = nn.Conv2d(16, 32, 3, groups=2, bias=False)
    assert_refused(tmp_path / 'model', other, 'widen')


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'code_dim': 25}, r'made with code_dim \[24\], the model has \[25\]; load it into the dense network'),
        ({'slice_shape': (20, 12, 3, 3)}, r'made with slice_shape .*; load it into the dense network'),
        ({'layout': 'flat'}, r"made with layout \['block'\], the model has \['flat'\]; load it into the dense network"),
        ({'generator': 'binary'}, r"made with generator \['linear'\], .*; load it into the dense network"),
        ({'residual': 1}, r'made with residual \[0\], the model has \[1\]; load it into the dense network'),
        ({'include': ['body.0']}, r'body.3 is generated differently in the file; load it into the dense network'),
    ],
)
def test_other_settings_are_refused(saved, change, message):
    assert_refused(saved, retrofit(Net(), CSG | change), message)


def test_generators_in_another_order_are_refused(tmp_path):
    one, other = CSG | {'include': ['body.0']}, CSG | {'include': ['body.3']}
    save_compact(trained([one, other]), tmp_path / 'model')
    assert_refused(tmp_path / 'model', retrofit(Net(), [other, one]), 'load it into the dense network')


def test_a_dense_conv_with_a_computed_weight_is_refused(saved):
    model = Net()
    nn.utils.parametrizations.weight_norm(model.body[0])
    assert_refused(saved, model, 'body.0')


def test_a_dense_model_with_an_attribute_of_the_banks_name_is_refused(saved):
    model = Net()
    model.csg = 3
    assert_refused(saved, model, "attribute named 'csg'")


# --- saving ---


@pytest.mark.parametrize(
    ('model', 'message'),
    [
        (lambda: Net(), 'not retrofitted; call csg_seg.retrofit on it, or use torch.save'),
        (lambda: materialise(trained()), 'not retrofitted; call csg_seg.retrofit on it, or use torch.save'),
        (lambda: nn.DataParallel(trained()), 'inside this DataParallel; give model.module'),
        (lambda: torch.compile(trained()), 'inside this OptimizedModule; give model._orig_mod'),
    ],
)
def test_only_a_retrofitted_model_can_be_saved(tmp_path, model, message):
    with pytest.raises(CSGError, match=message):
        save_compact(model(), tmp_path / 'model')
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(CSGError, match='no such folder; create it before saving model'):
        save_compact(trained(), tmp_path / 'none' / 'model')
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_the_files_place_is_named(tmp_path):
    (tmp_path / 'model').mkdir()
    with pytest.raises(CSGError, match='model: a folder, not a file; choose another path'):
        save_compact(trained(), tmp_path / 'model')
    assert list(tmp_path.iterdir()) == [tmp_path / 'model']


def test_saving_replaces_an_older_file(tmp_path, saved):
    (tmp_path / 'model').write_bytes(b'older')
    save_compact(trained(), tmp_path / 'model')
    assert contents(tmp_path / 'model') == contents(saved)
    assert list(tmp_path.iterdir()) == [tmp_path / 'model']


def test_a_symbolic_link_stays_and_its_file_is_replaced(tmp_path):
    net = retrofit(Net(), CSG)
    link, file = tmp_path / 'latest.safetensors', tmp_path / 'runs' / 'net.safetensors'
    link.symlink_to(file)
    with pytest.raises(CSGError, match='runs: no such folder'):
        save_compact(net, link)
    file.parent.mkdir()
    for _ in range(2):
        save_compact(net, link)
        assert link.is_symlink() and [*file.parent.iterdir()] == [file]
    load_compact(link, Net())


@pytest.mark.parametrize('existing', [False, True])
def test_a_save_that_fails_midway_leaves_no_trace(tmp_path, saved, existing):
    path = tmp_path / 'model'
    if existing:
        path.write_bytes(saved.read_bytes())
    model = trained(CSG | {'code_dim': 25})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))  # the disk is full after 10 kB
    try:
        with pytest.raises(NotWrittenError):
            save_compact(model, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == ([path] if existing else [])
    if existing:
        assert len(list(generated_convs(load_compact(path, Net())))) == 2
