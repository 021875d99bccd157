import ast
import subprocess
import sys
from pathlib import Path

import pytest

import csg_seg

PACKAGE = Path(csg_seg.__file__).parent

# Who may import whom: a module imports only what stands on a line above its own.
ORDER = [
    {'errors', 'version'},
    {'files'},
    {'slices', 'products', 'drawing', 'frontier', 'builders', 'cli'},
    {'settings', 'doctor'},
    {'generator'},
    {'descent'},
    {'fit'},
    {'conv', 'search'},
    {'root'},
    {'watch', 'loading'},
    {'bank'},
    {'report'},
    {'retrofit', 'precision'},
    {'checkpoint'},
    {'plan'},
    {'coco'},
    {'mm'},
    {'__init__', '__main__'},
]
ERRORS_ONLY = {'models', 'released'}
LIBRARIES = {'torch', 'safetensors'}
DATA_LIBRARIES = {'coco': {'numpy', 'PIL', 'pycocotools'}, 'drawing': {'numpy', 'PIL'}}

CORE = sorted([*PACKAGE.glob('*.py'), *PACKAGE.glob('models/*.py')])
ALL = sorted(PACKAGE.rglob('*.py'))


def rank(module):
    return next(place for place, modules in enumerate(ORDER) if module in modules)


def module_of(path):
    """The module or folder of the package that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix('.py')


def parse(path):
    return ast.parse(path.read_text(encoding='utf-8'), filename=str(path))


def imported(path):
    """Yield the full dotted names that a file imports."""
    parents = ['csg_seg', *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = parents[: len(parents) - node.level + 1] if node.level else []
            base = '.'.join([*base, *([node.module] if node.module else [])])
            # 'from . import mm' names a module, 'from .errors import CSGError' is in one.
            yield from (f'{base}.{alias.name}' if base == 'csg_seg' else base for alias in node.names)


def own_imports(path):
    return {name.split('.')[1] for name in imported(path) if name.startswith('csg_seg.')}


def foreign_imports(path):
    roots = {name.split('.')[0] for name in imported(path)} - {'csg_seg'}
    return roots - set(sys.stdlib_module_names)


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


def test_the_order_knows_every_module():
    files = {module_of(path) for path in CORE} | {
        path.name for path in PACKAGE.iterdir() if (path / '__init__.py').is_file()
    }
    assert files == set().union(*ORDER) | ERRORS_ONLY


def test_the_parser_sees_imports_of_every_form():
    modules = {'builders', 'checkpoint', 'errors', 'plan', 'report', 'retrofit', 'version'}
    assert own_imports(PACKAGE / '__init__.py') == {*modules, 'mm'}
    assert 'errors' in own_imports(PACKAGE / 'retrofit.py')
    assert 'csg_seg' not in foreign_imports(PACKAGE / 'drawing.py')
    assert 'errors' in own_imports(PACKAGE / 'drawing.py')


@pytest.mark.parametrize('path', CORE, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_imports_to_its_right(path):
    own = module_of(path)
    if own in ERRORS_ONLY:
        assert own_imports(path) <= {'errors', own}
    else:
        assert all(rank(module) < rank(own) for module in own_imports(path)), own_imports(path)


@pytest.mark.parametrize('path', CORE, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_the_core_needs_only_torch_and_safetensors(path):
    assert foreign_imports(path) <= DATA_LIBRARIES.get(module_of(path), LIBRARIES)


@pytest.mark.parametrize('path', ALL, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_function_imports(path):
    functions = [each for each in ast.walk(parse(path)) if isinstance(each, (ast.FunctionDef, ast.AsyncFunctionDef))]
    inner = [(f.name, n.lineno) for f in functions for n in ast.walk(f) if isinstance(n, (ast.Import, ast.ImportFrom))]
    assert inner == []


def test_the_public_names_are_these():
    assert sorted(csg_seg.__all__) == [
        'CSGError',
        'CSGWarning',
        '__version__',
        'fit',
        'load_compact',
        'load_generators',
        'load_state_dict',
        'materialise',
        'plan',
        'register_builder',
        'retrofit',
        'save_compact',
        'summarise',
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
