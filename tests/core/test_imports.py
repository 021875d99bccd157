"""The order in which the rooms of the package may import each other, and what the package imports."""

import ast
import subprocess
import sys
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import csg_seg

PACKAGE = Path(csg_seg.__file__).parent


def room_of(path, folder=PACKAGE):
    """The file or folder of ``folder`` that a file belongs to."""
    return path.relative_to(folder).parts[0].removesuffix('.py')


# Rooms are folders, or files beside them. A room imports its own files and the rooms on the lines above its own.
ORDER = [
    {'errors', 'registration', 'version'},
    {'files'},
    {'generators', 'models', 'data'},
    {'fitting'},
    {'layers'},
    {'report', 'distillation'},
    {'retrofitting'},
    {'storage'},
    {'planning'},
    {'mm'},
    {'running'},
    {'deploy'},
    {'cli'},
    {'__init__', '__main__'},
]
# The same inside csg_seg/mm. csg_seg/mm/__init__.py registers everything, so it is above all of them.
MM_ORDER = [
    {'config_parts', 'figures', 'networks'},
    {'datasets', 'metrics', 'checkpoints'},
    {'patches', 'mixed_precision'},
    {'teacher'},
    {'model'},
    {'hooks', 'plan_files'},
    {'__init__'},
]
LIBRARIES = {'torch', 'numpy', 'safetensors'}
DATA_LIBRARIES = {'numpy', 'PIL', 'pycocotools'}
LARGEST_SHARE = 1 / 4
# Modules that functions import: optional packages, and csg_seg.mm, which imports mmengine.
LATE_IMPORTS = {
    'cli/console.py': {'rich.console', 'rich.progress', 'rich.table', 'rich.text'},
    'cli/options.py': {'mmengine.config'},
    'registration.py': {'csg_seg.mm'},
    'storage/builders.py': {'torchvision.models', 'timm', 'mmengine'}
    | {'segmentation_models_pytorch', 'monai.networks.nets', 'transformers'},
}

ALL = sorted(path for path in PACKAGE.rglob('*.py') if '.mim' not in path.parts)
MM = [path for path in ALL if path.is_relative_to(PACKAGE / 'mm')]
CORE = [path for path in ALL if room_of(path) not in ('mm', 'running', 'deploy', 'cli')]


def parse(path):
    return ast.parse(path.read_text(encoding='utf-8'), filename=str(path))


def imported(path):
    """Yield the full dotted names that a file imports, to the last module or name."""
    parents = ['csg_seg', *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = parents[: len(parents) - node.level + 1] if node.level else []
            base = '.'.join([*base, *([node.module] if node.module else [])])
            yield from (f'{base}.{alias.name}' for alias in node.names)


def rooms_imported(path, folder='csg_seg'):
    """Return the rooms of a folder that a file imports from."""
    return {name.removeprefix(f'{folder}.').split('.')[0] for name in imported(path) if name.startswith(f'{folder}.')}


def foreign_imports(path):
    roots = {name.split('.')[0] for name in imported(path)} - {'csg_seg'}
    return roots - set(sys.stdlib_module_names)


def rank(room, order):
    return next(place for place, rooms in enumerate(order) if room in rooms)


def relative(path):
    return str(path.relative_to(PACKAGE))


def module_name(path):
    return '.'.join(['csg_seg', *path.relative_to(PACKAGE).with_suffix('').parts]).removesuffix('.__init__')


def run_without_mm(script):
    """Run a script where the mm packages are not installed."""
    hidden = """
import importlib.machinery, sys
MM = ('mmengine', 'mmcv', 'mmseg', 'mmpretrain')

class WithoutMM(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split('.')[0] in MM else super().find_spec(name, path, target)

sys.meta_path[:] = [WithoutMM if each is importlib.machinery.PathFinder else each for each in sys.meta_path]
"""
    return subprocess.run([sys.executable, '-c', hidden + script], capture_output=True, text=True)


@pytest.mark.parametrize(('folder', 'order'), [(PACKAGE, ORDER), (PACKAGE / 'mm', MM_ORDER)], ids=['csg_seg', 'mm'])
def test_the_order_knows_every_room(folder, order):
    found = [path for path in folder.iterdir() if path.suffix == '.py' or (path / '__init__.py').is_file()]
    assert sorted(room_of(path, folder) for path in found) == sorted(room for rooms in order for room in rooms)


def test_the_parser_sees_imports_of_every_form():
    found = rooms_imported(PACKAGE / '__init__.py')
    assert found >= {'errors', 'planning', 'report', 'retrofitting', 'storage', 'version'}
    assert 'generators' in rooms_imported(PACKAGE / 'fitting.py')
    assert {'hooks', 'model'} <= rooms_imported(PACKAGE / 'mm' / '__init__.py', 'csg_seg.mm')
    assert {'numpy', 'PIL'} <= foreign_imports(PACKAGE / 'data' / 'drawn.py')


@pytest.mark.parametrize('path', ALL, ids=relative)
def test_no_room_imports_a_room_above_it(path):
    own = room_of(path)
    assert [room for room in rooms_imported(path) - {own} if rank(room, ORDER) >= rank(own, ORDER)] == []


@pytest.mark.parametrize('path', MM, ids=relative)
def test_no_room_of_mm_imports_a_room_above_it(path):
    own = room_of(path, PACKAGE / 'mm')
    rooms = rooms_imported(path, 'csg_seg.mm') - {own}
    assert [room for room in rooms if rank(room, MM_ORDER) >= rank(own, MM_ORDER)] == []


def test_no_file_imports_itself_through_others():
    files = {module_name(path): path for path in ALL if path.name != '__init__.py'}
    graph = {}
    for name, path in files.items():
        full = list(imported(path))
        graph[name] = {each for each in files if each in full or any(other.startswith(f'{each}.') for other in full)}
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_models_and_data_see_errors_and_files_only():
    paths = [path for path in ALL if room_of(path) in ('models', 'data')]
    assert paths
    for path in paths:
        assert rooms_imported(path) <= {'errors', 'files', room_of(path)}


def test_no_folder_holds_more_than_a_quarter_of_the_lines():
    """Of the whole package, with all that is below a folder."""
    lines = Counter()
    for path in ALL:
        lines[room_of(path)] += len(path.read_text().splitlines())
    folder, most = lines.most_common(1)[0]
    assert most <= LARGEST_SHARE * sum(lines.values()), folder


@pytest.mark.parametrize('path', CORE, ids=relative)
def test_the_core_needs_only_torch_numpy_and_safetensors(path):
    assert foreign_imports(path) <= (DATA_LIBRARIES if room_of(path) == 'data' else LIBRARIES)


def test_the_package_imports_no_experiment():
    assert {path for path in ALL if 'experiments' in foreign_imports(path)} == set()


def literal_import(node):
    """The module that ``import_module('literal')`` imports; None for any other node."""
    if isinstance(node, ast.Call) and 'import_module' in (
        getattr(node.func, 'id', None),
        getattr(node.func, 'attr', None),
    ):
        return node.args[0].value if isinstance(node.args[0], ast.Constant) else None
    return None


@pytest.mark.parametrize('path', ALL, ids=relative)
def test_no_function_imports(path):
    functions = [each for each in ast.walk(parse(path)) if isinstance(each, (ast.FunctionDef, ast.AsyncFunctionDef))]
    inner = [node for function in functions for node in ast.walk(function)]
    assert [node.lineno for node in inner if isinstance(node, (ast.Import, ast.ImportFrom))] == []
    assert {name for name in map(literal_import, inner) if name} == LATE_IMPORTS.get(relative(path), set())


def test_the_public_names_are_these():
    assert sorted(csg_seg.__all__) == [
        'CSGError',
        'CSGWarning',
        'Teacher',
        '__version__',
        'fit',
        'load_compact',
        'load_generators',
        'load_state_dict',
        'materialise',
        'plan',
        'register_builder',
        'register_generator',
        'retrofit',
        'save_compact',
        'share_generators',
        'suggest',
        'summarise',
        'train_only',
    ]
    assert all(callable(getattr(csg_seg, name)) for name in csg_seg.__all__ if name != '__version__')


def test_the_core_works_without_mm(tmp_path):
    script = f"""
import importlib.util
import torch
from torch import nn
for name in MM:
    assert importlib.util.find_spec(name) is None, name
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f'{{name}} should be missing')
import csg_seg

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 31, 3)
        self.second = nn.Conv2d(31, 17, 3)

    def forward(self, x):
        return self.second(self.first(x))

model = csg_seg.retrofit(Net(), dict(slice_shape=(12, 20, 3, 3), code_dim=1))
x = torch.randn(1, 3, 9, 9)
out = model(x)
csg_seg.save_compact(model, {str(tmp_path / 'model.safetensors')!r})
twin = csg_seg.load_compact({str(tmp_path / 'model.safetensors')!r}, Net())
assert torch.equal(twin(x), out)
assert csg_seg.summarise(model).compression_ratio > 1
assert torch.equal(csg_seg.materialise(model)(x), out)
assert not any(name.split('.')[0] in MM for name in __import__('sys').modules)
try:
    import csg_seg.mm
except ModuleNotFoundError as error:
    print('works without', error.name)
"""
    done = run_without_mm(script)
    assert (done.returncode, done.stdout, done.stderr) == (0, 'works without mmengine\n', '')
