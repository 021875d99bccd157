"""Tables that tools print."""

from csg_seg.cli.console import print_table


def test_long_names_are_folded_and_not_cut(capsys):
    name = 'csg-s16-d128_deeplabv3_' + 'r' * 60
    print_table(('network', 'parameters stored'), [(name, '1'), (name + 'x', '2')], width=50)
    lines = capsys.readouterr().out.splitlines()
    names = ''.join(line.split('\u2502')[1].strip() for line in lines if '\u2502' in line)
    assert names == name + name + 'x'


def test_cells_are_printed_as_they_are(capsys):
    print_table(('a [bold] b', 'count'), [('a [backbone] b', ':car:'), ('ends in \\', '[/]')])
    printed = capsys.readouterr().out
    assert all(cell in printed for cell in ('a [bold] b', 'a [backbone] b', ':car:', 'ends in \\ ', '[/]'))


def test_text_is_aligned_left_and_numbers_right(capsys):
    print_table(('network', 'hook', 'seconds'), [('r18', 'a', '1'), ('r18', 'longer', '22.22')], left=2)
    row = next(line for line in capsys.readouterr().out.splitlines() if ' a ' in line)
    assert [cell for cell in row.split('\u2502') if cell] == [' r18     ', ' a      ', '       1 ']
