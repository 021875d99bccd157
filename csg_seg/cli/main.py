"""The command ``csg-seg``, also ``python -m csg_seg``: ``doctor``, and the tools as subcommands."""

import ast
import json
import runpy
import sys
from dataclasses import asdict
from difflib import get_close_matches
from pathlib import Path

from csg_seg.errors import CSGError
from csg_seg.version import __version__

from .doctor import examine
from .failures import one_line_errors

TOOLS = Path(__file__).parents[1] / '.mim' / 'tools'
DOCTOR = 'Check the installation: versions, devices and conflicts. Takes --json.'
TASKS = {
    'Choose settings': ('report', 'plan'),
    'Train and test': ('train', 'test', 'compare'),
    'Use a trained network': ('compact', 'demo', 'materialise', 'export_onnx'),
    'Data and checkpoints of others': ('draw_voc', 'coco2voc', 'released2csg', 'rename_weights'),
    'Installation': ('doctor',),
}


def tools() -> dict[str, Path]:
    """Return the tools by name; those outside of folders come first."""
    paths = sorted(TOOLS.glob('**/*.py'), key=lambda path: (len(path.parts), path))
    return {path.stem: path for path in paths}


def print_findings(*, as_json: bool) -> int:
    """Print what is installed; return 1 if something must be corrected."""
    findings = examine()
    if as_json:
        print(json.dumps([asdict(each) for each in findings]))
    else:
        width = max(len(each.name) for each in findings)
        for each in findings:
            print(f'{each.name:{width}}  {each.state}' + (f'\n{"":{width}}  -> {each.remedy}' if each.remedy else ''))
    return int(any(each.remedy for each in findings))


def describe() -> dict[str, dict[str, str]]:
    """Return what each command does, by task and name."""
    says = {'doctor': DOCTOR}
    for name, path in tools().items():
        says[name] = (ast.get_docstring(ast.parse(path.read_text())) or '').splitlines()[0]
    return {task: {name: says[name] for name in names} for task, names in TASKS.items()}


def usage() -> str:
    """Return the list of commands."""
    lines = ['usage: csg-seg COMMAND [OPTIONS]', '', 'csg-seg COMMAND --help explains a command.']
    width = max(len(name) for names in TASKS.values() for name in names)
    for task, commands in describe().items():
        lines += ['', f'{task}:', *(f'  {name:{width}}  {text}' for name, text in commands.items())]
    return '\n'.join(lines)


def main() -> None:
    """Run a command."""
    command, *rest = sys.argv[1:] or ['--help']
    if command in ('-h', '--help'):
        print(usage())
    elif command == '--version':
        print(__version__)
    elif command == 'doctor':
        if rest in (['-h'], ['--help']):
            print(f'usage: csg-seg doctor [--json]\n\n{DOCTOR}')
            return
        unknown = [each for each in rest if each != '--json']
        if unknown:
            sys.exit(f'error: doctor does not know {unknown[0]}; it takes --json alone')
        sys.exit(print_findings(as_json='--json' in rest))
    else:
        with one_line_errors():
            if command not in tools():
                near = get_close_matches(command, tools(), 1)
                instead = f'did you mean {near[0]}?' if near else 'csg-seg --help lists them'
                raise CSGError(f'there is no command {command}; {instead}')
        path = str(tools()[command])
        sys.argv = [path, *rest]
        runpy.run_path(path, run_name='__main__')
