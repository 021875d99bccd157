"""The documentation site."""

import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

nbformat = pytest.importorskip('nbformat', reason='the site is built with Python 3.11 or later')
nbclient = pytest.importorskip('nbclient')

NOTEBOOK = ROOT / 'docs' / 'tutorial.ipynb'


def build(source, out):
    command = [sys.executable, '-m', 'sphinx', '-W', '--keep-going', '-q', str(source), str(out)]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_site_is_built_without_warnings_and_every_page_is_in_its_contents(tmp_path):
    done = build(ROOT / 'docs', tmp_path)
    assert done.returncode == 0, done.stderr
    contents = (tmp_path / 'index.html').read_text()
    pages = [path for path in (ROOT / 'docs').iterdir() if path.suffix in ('.md', '.ipynb')]
    assert len(pages) > 20
    assert [path.name for path in pages if f'href="{path.stem}.html"' not in contents and path.stem != 'index'] == []


def test_a_link_to_nowhere_stops_the_build(tmp_path):
    source = tmp_path / 'docs'
    source.mkdir()
    shutil.copy(ROOT / 'docs' / 'conf.py', source)
    (source / 'index.md').write_text('# Page\n\n[nowhere](nowhere.md)\n')
    done = build(source, tmp_path / 'out')
    assert done.returncode != 0 and 'nowhere.md' in done.stderr


def test_the_notebook_is_stored_with_the_outputs_of_its_cells():
    cells = [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == 'code']
    assert len(cells) > 8
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {'stream', 'execute_result', 'display_data'}
    assert [output.text for output in outputs if output.get('name') == 'stderr'] == []  # warnings, paths of a machine


@pytest.mark.full
def test_the_notebook_runs(tmp_path):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=900, resources={'metadata': {'path': str(tmp_path)}}).execute()
    assert (tmp_path / 'plain.onnx').stat().st_size > 5 * (tmp_path / 'small.safetensors').stat().st_size
