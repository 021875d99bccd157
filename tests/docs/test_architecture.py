"""The page about the architecture shows the package as it is."""

import runpy

from conftest import ROOT

DRAWING = runpy.run_path(str(ROOT / 'docs' / 'architecture.py'))


def test_the_tree_on_the_page_is_that_of_the_files():
    (shown,) = DRAWING['TREE'].findall((ROOT / 'docs' / 'architecture.md').read_text())
    assert shown == DRAWING['tree'](), 'run python docs/architecture.py'


def test_every_file_and_folder_says_what_it_is_for():
    lines = [line for line in DRAWING['tree']().splitlines() if line]
    assert len(lines) > 60
    assert [line for line in lines if len(line.split(maxsplit=1)) < 2] == []


def test_the_picture_names_files_that_exist():
    steps = [name for path in DRAWING['PATHS'].values() for name, _ in path]
    files = [name for name in steps if DRAWING['colour'](name) != DRAWING['OUTSIDE']]
    assert len(files) > 10
    assert [name for name in files if not (ROOT / 'csg_seg' / name).is_file()] == []


def test_the_picture_is_drawn(tmp_path):
    DRAWING['draw'](tmp_path / 'seen.svg')
    drawn = (tmp_path / 'seen.svg').read_text()
    for path, steps in DRAWING['PATHS'].items():
        assert path in drawn
        assert all(name in drawn for name, _ in steps)
