"""What README and docs tell users to type works."""

import re
import subprocess
import sys

import pytest
from conftest import ROOT, run_program
from mmengine.config import Config

import csg_seg  # noqa: F401 ('mmseg::' bases resolve once it is imported)

README = (ROOT / 'README.md').read_text()
DOCUMENTS = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *sorted((ROOT / 'docs').glob('*.md'))]


def blocks(language: str) -> list[str]:
    return re.findall(rf'```{language}\n(.*?)```', README, flags=re.DOTALL)


def test_three_lines_make_a_config(tmp_path):
    (lines,) = [block for block in blocks('python') if 'base_type' in block]
    assert len(lines.splitlines()) == 3
    (tmp_path / 'mine.py').write_text(lines)
    printed = run_program(sys.executable, ROOT / 'tools' / 'report.py', tmp_path / 'mine.py').stdout
    assert '68,114,570 dense: 3.87x smaller' in printed
    assert '68.11 M dense, 3.87x smaller' in README


def test_hook_lines_make_a_config(tmp_path):
    (line,) = [block for block in blocks('python') if 'default_hooks' in block]
    (tmp_path / 'hook.py').write_text("_base_ = 'mmseg::pspnet/pspnet_r50-d8_4xb4-40k_voc12aug-512x512.py'\n" + line)
    assert Config.fromfile(tmp_path / 'hook.py').default_hooks.csg.csg.code_dim == 128


def test_plain_pytorch_example_runs(tmp_path):
    (example,) = [block for block in blocks('python') if 'import torchvision' in block]
    done = subprocess.run([sys.executable, '-c', example], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 'x smaller' in done.stdout and (tmp_path / 'model.safetensors').exists()


@pytest.mark.parametrize('document', DOCUMENTS, ids=lambda path: path.name)
def test_named_files_exist(document):
    text = document.read_text()
    links = re.findall(r'\]\((?!http)([^)#]+)\)', text)
    names = re.findall(r'(?:tools|configs|docs|tests|csg_seg)/[\w/.-]*\w', text)
    folder = document.parent
    missing = [link for link in links if not (folder / link).exists()]
    missing += [name for name in names if not (ROOT / name).exists() and 'dataset_converters/voc_aug' not in name]
    assert not missing


def test_options_of_the_tools_are_mmsegs():
    import mmseg

    for tool in ('train.py', 'test.py'):
        theirs = (ROOT.__class__(mmseg.__file__).parent / '.mim' / 'tools' / tool).read_text()
        ours = (ROOT / 'tools' / tool).read_text()
        options = re.findall(r"'(--[\w-]+)'", theirs)
        assert options and all(f"'{option}'" in ours for option in options)
