"""Draw architecture.svg; write the tree of architecture.md from the first line of each file's docstring.

``python docs/architecture.py`` does both, ``python docs/architecture.py FILE.png`` draws another file. Needs
matplotlib.
"""

import ast
import re
import sys
from pathlib import Path

from matplotlib import rcParams
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

# Title of each path, and its steps: the file, and what happens there.
PATHS = {
    'A config becomes a weight': [
        ('a config', "model = dict(type='CSGModel',\nbase_type=..., csg=dict(...))"),
        ('mm/model.py', 'builds the dense model that the\nconfig inherited, retrofits it'),
        ('generators/settings.py', 'checks the csg dict'),
        ('retrofitting/selection.py', 'chooses the convs to generate,\nwith a reason for the others'),
        ('retrofitting/surgery.py', 'swaps each chosen conv:\nits weight becomes a code'),
        ('layers/bank.py', 'holds the generators,\nonce, at the root'),
        ('layers/ahead.py', 'in each forward pass, makes the\nweights of small layers together'),
        ('generators/linear.py', 'slices = codes @ generator'),
        ('generators/slices.py', 'joins the slices of a layer\nand crops the overhang'),
        ('layers/conv.py', 'the conv computes\nwith that weight'),
    ],
    'A file becomes a network': [
        ('small.safetensors', 'generators once, codes,\nthe rest, and how to build'),
        ('storage/format.py', 'verifies the checksum, and the\nheader against the tensors'),
        ('storage/precision.py', 'int8 and half floats\nbecome float32 again'),
        ('storage/builders.py', 'builds the dense network from\nregistered names only'),
        ('retrofitting/surgery.py', 'retrofits it as the file says'),
        ('checkpoint.pth', 'of a training run,\ndense or CSG'),
        ('mm/checkpoints/unpickling.py', 'reads tensors,\nunpickles no object'),
        ('layers/state_dict_checks.py', 'refuses what does not fit,\nbefore anything is copied'),
        ('fitting.py', 'dense weights only: finds the\nnearest generator and codes'),
        ('a network', 'train, test, or materialise\nto plain convs'),
    ],
}
# A step that no arrow leads to, and where the arrow of the step before it leads instead.
STARTS = {'checkpoint.pth': 'layers/state_dict_checks.py'}
COLUMNS = 5
WIDTH, HEIGHT, GAP_X, GAP_Y, TITLE = 3.0, 1.0, 0.5, 0.55, 0.6
FILL = {'mm': '#dbe9f6', 'generators': '#fde8cf', 'layers': '#fde8cf', 'fitting.py': '#fde8cf'}
OTHER, OUTSIDE = '#e4f1dd', 'white'
ARROW = dict(arrowstyle='-|>', color='#555555', linewidth=1.2, shrinkA=0, shrinkB=0, mutation_scale=12)


HERE = Path(__file__).parent
ROOT = HERE.parent
PAGE = HERE / 'architecture.md'
TREE = re.compile(r'(?<=<!-- tree -->\n```\n).*?(?=```\n<!-- end -->)', re.DOTALL)


def colour(name: str) -> str:
    """Return the colour of a box: by the room, white for what is not a file of the package."""
    if '/' not in name and name != 'fitting.py':
        return OUTSIDE
    return FILL.get(name.split('/')[0], OTHER)


def draw(path: Path) -> None:
    """Draw both paths, each in two rows."""
    rcParams['svg.hashsalt'] = 'csg_seg'  # the same picture gives the same file
    rcParams['svg.fonttype'] = 'none'
    rows = sum(-(-len(steps) // COLUMNS) for steps in PATHS.values())
    width = COLUMNS * WIDTH + (COLUMNS - 1) * GAP_X
    height = rows * (HEIGHT + GAP_Y) + len(PATHS) * TITLE
    figure = Figure(figsize=(width * 0.78, height * 0.78))
    axis = figure.add_axes((0.01, 0.01, 0.98, 0.98))
    axis.set(xlim=(-0.1, width + 0.1), ylim=(-height, 0.1))
    axis.set_axis_off()
    top = 0.0
    for title, steps in PATHS.items():
        axis.text(0, top - 0.3, title, fontsize=13, fontweight='bold', va='center')
        top -= TITLE
        corners = []
        for position, (name, text) in enumerate(steps):
            row, column = divmod(position, COLUMNS)
            x, y = column * (WIDTH + GAP_X), top - row * (HEIGHT + GAP_Y) - HEIGHT
            corners.append((x, y))
            box = FancyBboxPatch(
                (x, y), WIDTH, HEIGHT, boxstyle='round,pad=0,rounding_size=0.1', facecolor=colour(name)
            )
            axis.add_patch(box)
            family = 'monospace' if '/' in name or '.' in name else 'sans-serif'
            axis.text(x + WIDTH / 2, y + 0.78, name, ha='center', va='center', fontsize=9, family=family, weight='bold')
            axis.text(x + WIDTH / 2, y + 0.36, text, ha='center', va='center', fontsize=8.5)
        names = [name for name, _ in steps]
        for (x, y), name in zip(corners, names[1:], strict=False):
            next_x, next_y = corners[names.index(STARTS.get(name, name))]
            if next_y == y:
                axis.annotate('', (next_x, y + HEIGHT / 2), (x + WIDTH, y + HEIGHT / 2), arrowprops=ARROW)
            else:  # from the end of a row to a box of the next
                middle = y - GAP_Y / 2
                bend = [(x + WIDTH / 2, y), (x + WIDTH / 2, middle), (next_x + WIDTH / 2, middle)]
                axis.plot(*zip(*bend, strict=True), color=ARROW['color'], linewidth=ARROW['linewidth'])
                axis.annotate('', (next_x + WIDTH / 2, next_y + HEIGHT), bend[-1], arrowprops=ARROW)
        top -= -(-len(steps) // COLUMNS) * (HEIGHT + GAP_Y)
    figure.savefig(path, metadata={'Date': None} if path.suffix == '.svg' else None, dpi=110)


def tree() -> str:
    """Return a line for each folder and file of the package, and for each experiment: its name, and what it is for."""
    lines = []
    for folder in ('csg_seg', 'experiments'):
        lines += [*_lines(ROOT / folder, depth=0, files=folder == 'csg_seg'), '']
    width = max(len(name) for name, _ in filter(None, lines)) + 2
    return ''.join(f'{line[0]:{width}}{line[1]}\n' if line else '\n' for line in lines[:-1])


def _lines(path: Path, *, depth: int, files: bool) -> list:
    """Return name and first docstring line of a folder, its files and its folders, indented by depth."""
    indent = '  ' * depth
    found = [(f'{indent}{path.name}/', _first_line(path / '__init__.py'))]
    if files:
        inside = sorted(each for each in path.glob('*.py') if each.name[:2] != '__')
        found += [(f'{indent}  {each.name}', _first_line(each)) for each in inside]
    for each in sorted(each.parent for each in path.glob('*/__init__.py')):
        found += _lines(each, depth=depth + 1, files=files)
    return found


def _first_line(path: Path) -> str:
    line = (ast.get_docstring(ast.parse(path.read_text(encoding='utf-8'))) or '').split('\n')[0]
    return re.sub(r':\w+:`([^`]*)`', r'\1', line).replace('``', '')


if __name__ == '__main__':
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / 'architecture.svg')
    PAGE.write_text(TREE.sub(lambda _: tree(), PAGE.read_text(encoding='utf-8')), encoding='utf-8')
