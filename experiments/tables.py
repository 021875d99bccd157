"""Write the tables of README, docs and experiments, and the results in metafiles, from the figures in results/.

A document marks the place of a table with ``<!-- table: NAME -->`` and ``<!-- end -->``.
"""

import argparse
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from csg_seg.cli.failures import one_line_errors
from csg_seg.errors import CSGError
from csg_seg.files import write_whole

from .metafiles import fill_results, measured_results, metafiles
from .table_contents import TABLES

ROOT = Path(__file__).parents[1]
MARKED = re.compile(r'(<!-- table: (\S+) -->\n).*?(<!-- end -->)', re.DOTALL)


def documents() -> dict[Path, str]:
    """Return the documents that may have tables."""
    paths = [
        ROOT / 'README.md',
        ROOT / 'models' / 'README.md',
        *sorted((ROOT / 'docs').glob('*.md')),
        *sorted((ROOT / 'experiments').rglob('*.md')),
    ]
    return {path: path.read_text() for path in paths}


def fill(text: str) -> tuple[str, list[str]]:
    """Write all marked tables of a document.

    Returns:
        the new text, and the names of the tables that differ.

    Raises:
        CSGError: a marker names no table.
    """
    differing: list[str] = []

    def replace(found: re.Match[str]) -> str:
        name = found[2]
        if name not in TABLES:
            raise CSGError(f'there is no table {name!r}; choose from {", ".join(TABLES)}')
        new = f'{found[1]}{TABLES[name]()}\n{found[3]}'
        if new != found[0]:
            differing.append(name)
        return new

    return MARKED.sub(replace, text), differing


def missing_tables(texts: Mapping[Path, str]) -> list[str]:
    """Return the names of tables that no document has."""
    marked = {found[2] for text in texts.values() for found in MARKED.finditer(text)}
    return [name for name in TABLES if name not in marked]


def write(path: Path, text: str) -> None:
    """Write a document whole or not at all."""
    write_whole(path, lambda partial: partial.write_text(text))


def parse_args() -> argparse.Namespace:
    """Return the arguments of the command."""
    parser = argparse.ArgumentParser(prog='python -m experiments.tables', description=__doc__)
    parser.add_argument('--check', action='store_true', help='change nothing; fail if a table differs from its results')
    return parser.parse_args()


def main() -> None:
    """Write or check all tables."""
    args = parse_args()
    with one_line_errors():
        texts = documents()
        problems = [f'{name}: no document has this table' for name in missing_tables(texts)]
        for path, text in texts.items():
            new, differing = fill(text)
            if args.check:
                problems += [
                    f'{path.relative_to(ROOT)}: the table {name} differs from its results' for name in differing
                ]
            elif differing:
                write(path, new)
                print(f'{path.relative_to(ROOT)}: {", ".join(differing)}')
        results = measured_results()
        for path, text in metafiles().items():
            new = fill_results(text, results)
            if new != text and args.check:
                problems.append(f'{path.relative_to(ROOT)}: the results differ from results/')
            elif new != text:
                write(path, new)
                print(f'{path.relative_to(ROOT)}: results')
    if problems:
        sys.exit('\n'.join(problems))
    if args.check:
        print('all tables and metafiles agree with results/')


if __name__ == '__main__':
    main()
