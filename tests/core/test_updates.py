"""Update files: a base and an update give the network that was saved, or are refused."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from two_convs import CSG, Net, build

from csg_seg import CSGError, CSGWarning, load_compact, retrofit, save_compact
from csg_seg.storage.builders import BUILDERS, register_builder
from csg_seg.storage.digest import digest
from csg_seg.storage.format import read_compact, read_content
from csg_seg.storage.precision import DTYPES

SOURCE = {'builder': 'two convs', 'classes': 4}


@pytest.fixture(autouse=True)
def builder():
    @register_builder('two convs')
    def build_two_convs(classes):
        model = Net()
        model.head = nn.Linear(31, classes)
        return model

    yield
    del BUILDERS['two convs']


def changed(model, what):
    """Change parts of a network as a training would."""
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and any(part in name for part in what):
                tensor += 0.1 * torch.randn(tensor.shape, generator=rng).abs()
    return model


PARTS = {'codes': ['code'], 'codes and norm': ['code', 'norm'], 'all': [''], 'nothing': []}


@pytest.fixture
def base(tmp_path):
    path = tmp_path / 'base.safetensors'
    save_compact(build(), path, source=SOURCE)
    return path


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('part', PARTS)
def test_base_and_update_are_the_whole_file(part, dtype, tmp_path):
    base, update, whole = (tmp_path / f'{name}.safetensors' for name in ('base', 'update', 'whole'))
    save_compact(build(), base, dtype=dtype, source=SOURCE)
    model = changed(build(), PARTS[part])
    save_compact(model, update, base=base)  # dtype and source are the base's
    save_compact(model, whole, dtype=dtype, source=SOURCE)
    together, wanted = read_content(update), read_content(whole)
    assert_same(together.tensors, wanted.tensors)
    assert together.header == wanted.header
    assert_same(load_compact(update).state_dict(), load_compact(whole).state_dict())
    assert_same(load_compact(update, Net()).state_dict(), load_compact(whole).state_dict())


def test_an_update_holds_only_what_differs(base, tmp_path):
    update = tmp_path / 'update.safetensors'
    save_compact(changed(build(), ['code']), update, base=base)
    with safe_open(str(update), framework='pt') as file:
        assert sorted(file.keys()) == ['narrow.code', 'widen.code']
        header = file.metadata()
    assert header['base_name'] == base.name and json.loads(header['header']) == {}
    assert 'two convs' not in str(header) and 'slice_shape' not in str(header)
    codes = sum(each.numel() * 4 for name, each in build().state_dict().items() if name.endswith('.code'))
    assert update.stat().st_size < codes + 1500


def test_an_update_may_have_other_layers_settings_and_classes(base, tmp_path):
    update = tmp_path / 'update.safetensors'
    model = Net(3)
    model.head = nn.Linear(31, 9)
    retrofit(model, CSG | {'code_dim': 7, 'include': ['widen']})
    save_compact(model, update, base=base, source=SOURCE | {'classes': 9})
    assert_same(load_compact(update).state_dict(), model.state_dict())
    assert read_compact(update).source == SOURCE | {'classes': 9}
    save_compact(model, update, base=base)  # the base's source builds four classes
    assert read_compact(update).source is None
    with pytest.raises(CSGError, match='does not say how its network is built'):
        load_compact(update)


def test_the_base_may_be_elsewhere_if_it_is_given(base, tmp_path):
    update, elsewhere = tmp_path / 'update.safetensors', tmp_path / 'elsewhere' / 'renamed.safetensors'
    model = changed(build(), ['code'])
    save_compact(model, update, base=base)
    elsewhere.parent.mkdir()
    shutil.move(base, elsewhere)
    with pytest.raises(CSGError, match=r'an update of base.safetensors with checksum \w{12}, which is not beside it'):
        load_compact(update)
    assert_same(load_compact(update, base=elsewhere).state_dict(), model.state_dict())


def test_a_network_that_computes_with_its_parameters_while_it_is_built_has_updates(tmp_path):
    @register_builder('two convs')
    def build_scaled(classes):
        model = Net()
        model.scale = model.head.weight.abs().max().item()
        return model

    base, path = tmp_path / 'base.safetensors', tmp_path / 'update.safetensors'
    save_compact(build(), base, source=SOURCE)
    model = changed(build(), ['code'])
    save_compact(model, path, base=base)
    assert_same(load_compact(path).state_dict(), model.state_dict())


def test_another_base_is_refused(base, tmp_path):
    update, other = tmp_path / 'update.safetensors', tmp_path / 'other.safetensors'
    save_compact(changed(build(), ['code']), update, base=base)
    save_compact(changed(build(), ['stem']), other, source=SOURCE)
    says = (
        r'update.safetensors: an update of base.safetensors with checksum \w{12}; .*other.safetensors: it has checksum'
    )
    model = build(5)
    before = {name: each.clone() for name, each in model.state_dict().items()}
    with pytest.raises(CSGError, match=says):
        load_compact(update, model, base=other)
    assert_same(model.state_dict(), before)
    shutil.copy(other, base)
    with pytest.raises(CSGError, match='take the file that the update was made from'):
        load_compact(update)


def test_damaged_files_are_refused(base, tmp_path):
    update = tmp_path / 'update.safetensors'
    save_compact(changed(build(), ['code']), update, base=base)
    for path in (update, base):
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(CSGError, match=rf'{path.name}: damaged, its checksum does not match'):
            load_compact(update)
        path.write_bytes(content)
    load_compact(update)


@pytest.mark.parametrize(
    ('change', 'says'),
    [
        ({'header': '[]'}, 'its header cannot be read'),
        ({'header': '{"dtype": 3}'}, 'its header cannot be read'),
        ({'removed': '[]'}, 'its header cannot be read'),
        ({'removed': '[["narrow.code"], []]'}, None),  # it is in the update, so it may well be
        ({'removed': '[["stem.weight"], []]'}, 'together they are not the network that was saved'),
        ({'header': '{"dtype": "int8"}'}, 'together they are not the network that was saved'),
        ({'base_name': '../base.safetensors'}, None),  # only a name: a base is not read from other folders
        ({'base_name': ''}, 'its header cannot be read'),
        ({'base_name': 'x' * 300}, 'its header cannot be read'),
    ],
)
def test_headers_that_another_program_wrote_are_read_or_refused(change, says, base, tmp_path):
    update = tmp_path / 'update.safetensors'
    save_compact(changed(build(), ['code']), update, base=base)
    with safe_open(str(update), framework='pt') as file:
        tensors, header = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    del header['sha256']
    header |= change
    save_file(tensors, update, metadata=header | {'sha256': digest(tensors, header)})
    if says is None:
        load_compact(update)
    else:
        with pytest.raises(CSGError, match=says):
            load_compact(update)


def test_a_base_is_a_whole_file_and_not_the_update_itself(base, tmp_path):
    update, again = tmp_path / 'update.safetensors', tmp_path / 'again.safetensors'
    model = changed(build(), ['code'])
    save_compact(model, update, base=base)
    before = base.read_bytes()
    with pytest.raises(CSGError, match='itself an update; take its base'):
        save_compact(model, again, base=update)
    with pytest.raises(CSGError, match='the update would replace its base'):
        save_compact(model, base, base=base)
    with pytest.raises(CSGError, match='a whole compact checkpoint, not an update; leave out the base'):
        load_compact(base, base=base)
    with pytest.raises(FileNotFoundError, match='nowhere'):
        save_compact(model, again, base=tmp_path / 'nowhere')
    assert base.read_bytes() == before and not again.exists()


def test_the_base_of_another_network_is_refused(base, tmp_path):
    settings = dict(slice_shape=(4, 4, 3, 3), code_dim=3)
    other = retrofit(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)), settings)
    with pytest.raises(CSGError, match='base.*: holds another network; leave base out'):
        save_compact(other, tmp_path / 'update.safetensors', base=base)
    assert not (tmp_path / 'update.safetensors').exists()


def test_an_update_that_is_its_own_base_is_refused(base, tmp_path):
    update = tmp_path / 'update.safetensors'
    save_compact(changed(build(), ['code']), update, base=base)
    shutil.copy(update, base)
    with pytest.raises(CSGError, match='itself an update'):
        load_compact(update)


def test_an_update_of_another_precision_is_warned_of(base, tmp_path):
    with pytest.warns(CSGWarning, match='99% of the network differs from base.safetensors, so the update saves little'):
        save_compact(changed(build(), ['code']), tmp_path / 'update.safetensors', base=base, dtype='float16')


def test_a_file_whose_builder_is_unknown_is_loaded_into_a_given_network(base):
    build_again = BUILDERS.pop('two convs')
    try:
        with pytest.raises(CSGError, match="no builder 'two convs'.* register it .*, or give the model"):
            load_compact(base)
        network = Net()
        network.head = nn.Linear(31, 4)
        assert load_compact(base, network) is network
    finally:
        BUILDERS['two convs'] = build_again
