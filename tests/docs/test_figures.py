"""Tables and figures of README and docs are those of results/."""

import re
from functools import partial

import pytest
import torch
from conftest import ROOT, run_experiment

from csg_seg import suggest
from csg_seg.errors import CSGError
from csg_seg.mm.model import build_model
from experiments import metafiles, tables
from experiments.exchange.summary import EXCHANGED, HELD
from experiments.markdown import read
from experiments.runs.rows import read_rows as read_rows_of_trainings
from experiments.runs.rows import summarise
from experiments.runs.table import read_table
from experiments.zoo.libraries import SCOPES
from experiments.zoo.rows import read_rows

# The generators of other papers that were trained on Kvasir-SEG.
GENERATORS = ('t-basis-30x', 'hypernetwork-30x', 'filter-basis-30x', 'random-basis-30x', 'mcnc-30x')
README = (ROOT / 'README.md').read_text()
SPLITS = ('val', 'test')


def test_tables_are_the_results():
    assert not tables.missing_tables(tables.documents())
    differing = {str(path.relative_to(ROOT)): tables.fill(text)[1] for path, text in tables.documents().items()}
    assert {name: each for name, each in differing.items() if each} == {}


@pytest.mark.parametrize('name', tables.TABLES)
def test_a_changed_figure_is_found(name):
    text = next(text for text in tables.documents().values() if f'<!-- table: {name} -->' in text)
    before, start, rest = text.partition(f'<!-- table: {name} -->')
    table, end, after = rest.partition('<!-- end -->')
    digit = list(re.finditer(r'\d', table))[-1]
    changed = f'{table[: digit.start()]}{9 - int(digit[0])}{table[digit.end() :]}'
    assert tables.fill(before + start + changed + end + after) == (text, [name])


def test_a_table_that_does_not_exist_is_named():
    with pytest.raises(CSGError, match="there is no table 'guess'; choose from demo"):
        tables.fill('<!-- table: guess -->\n<!-- end -->')


def test_a_table_without_a_place_is_found():
    assert tables.missing_tables({}) == list(tables.TABLES)


def summarised(name):
    """Return the mean scores of a file of results, by cell."""
    return {each['cell']: each for each in summarise(read_rows_of_trainings(ROOT / 'results' / f'{name}.json'))}


def differences(scores, cell, other):
    """Return how many points (val and test) a cell is ahead of another."""
    return [scores[cell][split][0] - scores[other][split][0] for split in SPLITS]


def points(differences):
    return ' and '.join(f'{each:.1f}' for each in differences)


def test_the_command_checks_all_tables():
    assert run_experiment('tables', '--check').stdout == 'all tables and metafiles agree with results/\n'


def test_figures_in_the_text_are_the_results():
    names = ('speed-deeplabv3-r18', 'precision-deeplabv3-r18-180x240', 'precision-deeplabv3-r18-360x480')
    ratios = [read(name)['summary']['csg']['step_ratio'] for name in names]
    large, small = (read(f'peers-deeplabv3-r18{width}')['networks'] for width in ('', '-w32'))
    ratios += [large[cell]['step_ratio'] for cell in ('csg-10x', 'csg-47x')]
    ratios += [small[cell]['step_ratio'] for cell in ('csg-auto-6x', 'csg-auto-30x')]
    assert f'{min(ratios):.1f} to {max(ratios):.1f} times as long as a dense one' in README
    most = max(small['csg-6x']['step_ratio'], read('accumulation-deeplabv3-r18')['summary']['csg']['step_ratio'])
    assert f'up to {most:.1f} times with small images or batches' in README
    peers = [read(f'peers-{name}')['networks'] for name in ('deeplabv3-r18', 'resnet18-96', 'resnet18-224')]
    measured = [each for networks in (*peers, small) for each in networks.items()]
    ratios += [each['step_ratio'] for name, each in measured if name.startswith('csg')]
    ratios.append(read('accumulation-deeplabv3-r18')['summary']['csg']['step_ratio'])
    speed = (ROOT / 'docs' / 'speed.md').read_text()
    assert f'up to {max(ratios):.2f} times as long as a dense one' in speed
    slowest = read('accumulation-deeplabv3-r18')['summary']['csg, float32']['step_ratio']
    assert f"up to {slowest:.1f} times with `precision='float32'`" in speed


def test_int8_changes_scores_as_little_as_the_readme_says():
    files = [path for path in (ROOT / 'results').glob('*.json') if '"int8": {"bytes"' in path.read_text()]
    assert len(files) >= 7
    rows = [row for file in files for row in read_rows_of_trainings(file) if 'int8' in row]
    changes = [
        abs(row['int8'][split] - row[split]) for row in rows for split in ('val', 'test') if split in row['int8']
    ]
    assert len(changes) >= 10 and 0.4 < max(changes) < 0.5 and 'less than 0.5 in all' in README


def test_trained_networks_score_as_the_results_say():
    text = (ROOT / 'docs' / 'results.md').read_text()
    scores = summarised('camvid')

    def losses(cell: str) -> list[float]:
        assert scores[cell]['seeds'] == scores['dense']['seeds'] == 3
        return differences(scores, 'dense', cell)

    assert max(losses('csg-10x')) < 0.1
    assert 'that was not tuned, CSG [scores like dense](docs/results.md#camvid) at 10x' in README
    assert losses('csg-20x') == pytest.approx([0, 1], abs=0.1)
    assert 'At 20x it loses about one point on test and nothing on val' in text
    assert losses('csg-47x') == pytest.approx([1, 1.3], abs=0.1)
    assert 'At 47x it loses about one point on val and 1.3 on test' in text
    tiny, ahead = differences(scores, 'dense', 'csg-100x'), differences(scores, 'csg-100x', 'narrow-47x')
    assert 'At 100x (one seed), CSG loses {:.1f} and {:.1f} points.'.format(*tiny) in text
    assert 'less than half of `narrow-47x`, and scores {:.1f} and {:.1f} points higher'.format(*ahead) in text
    assert scores['csg-100x']['stored_params'] < scores['narrow-47x']['stored_params'] / 2
    narrow = [f'{loss:.1f}' for cell in ('narrow-10x', 'narrow-47x') for loss in losses(cell)]
    assert 'loses {} and {} points (val and test) at 10x, {} and {} at 47x'.format(*narrow) in text
    tucker, tucker_47x, separable, smaller = (
        [f'{scores["dense"][split][0] - scores[cell][split][0]:.1f}' for split in ('val', 'test')]
        for cell in ('tucker-10x', 'tucker-47x', 'separable-10x', 'separable-47x')
    )
    assert tucker[0] == tucker[1] and f'loses {tucker[0]} points on val and test at 10x' in text
    assert 'At 47x it loses {} and {}, more than `csg-47x`'.format(*tucker_47x) in text
    assert 'lose {} and {} at 10x, {} and {} at 47x'.format(*separable, *smaller) in text
    for size in ('10x', '47x'):
        best = scores[f'csg-{size}']
        rivals = [each for each in scores.values() if each['cell'].endswith(f'-{size}') and each['method'] != 'csg']
        assert len(rivals) >= 3
        assert all(each[split][0] < best[split][0] for each in rivals for split in ('val', 'test'))
    assert 'At 10x and 47x it scores higher than all others of equal size' in text


@pytest.mark.parametrize('name', ['csg-10x', 'csg-20x', 'csg-47x'])
def test_a_step_of_the_generator_moves_weights_as_far_as_the_page_says(name):
    assert 'about six times as far as the step on the codes' in (ROOT / 'docs' / 'how_it_works.md').read_text()
    (cell,) = read_table(ROOT / 'experiments' / 'runs' / 'tables' / 'camvid.yml').matching([f'{name}-s0'])
    torch.manual_seed(0)
    model = build_model(cell.read_config()).train()
    rng = torch.Generator().manual_seed(0)
    scores = model._forward(torch.randn(4, 3, 90, 120, generator=rng))
    labels = torch.randint(scores.shape[1], (4, *scores.shape[2:]), generator=rng)
    torch.nn.functional.cross_entropy(scores, labels).backward()
    moved = torch.zeros(2)
    generator = model.csg[0]
    for conv in model.csg.layers.values():
        if conv.generator is generator and conv.code.grad is not None:  # the auxiliary head takes no part
            by_code = conv.code.grad @ generator.weight.detach()
            by_generator = conv.code.detach() @ generator.weight.grad
            moved += torch.stack([by_code.square().sum(), by_generator.square().sum()])
    assert (moved[1] / moved[0]).sqrt().item() == pytest.approx(6, abs=0.5)


def test_networks_on_drawn_images_score_as_the_page_says():
    rows = read_rows_of_trainings(ROOT / 'results' / 'drawn.json')
    scores = {each['cell']: each for each in summarise(rows)}
    text = (ROOT / 'docs' / 'results.md').read_text()
    assert f'a step of the dense network took {read("demo")["dense"]["step_seconds"]:.2f} seconds there' in text
    (dense, noise), (csg, _), (narrow, _) = (scores[name]['test'] for name in ('dense', 'csg-6x', 'narrow-6x'))
    assert all(scores[name]['seeds'] == 3 for name in ('dense', 'csg-6x', 'narrow-6x'))
    assert abs(csg - dense) < noise and narrow < dense - noise
    assert 'CSG scores like dense within the noise of the seeds' in text
    assert f'dense and CSG differ by {abs(csg - dense):.1f} points, less than the seeds do' in text
    by_label = {(row['cell'], row['seed']): row['test'] for row in rows}
    assert all(by_label[f'{name}-900', 0] - by_label[name, 0] > 5 for name in ('dense', 'csg-6x'))
    assert 'after 900 (one seed), both score at least five points higher' in text


@pytest.mark.parametrize('name', ['camvid', 'camvid-90x120', 'cifar10', 'drawn', 'kvasir', 'kvasir-96x96'])
def test_the_command_of_a_row_names_its_cell(name):
    for row in read_rows_of_trainings(ROOT / 'results' / f'{name}.json'):
        assert f'{row["command"]} '.count(f' {row["cell"]}-s{row["seed"]} ') == 1


@pytest.fixture(scope='module')
def ahead():
    """Return a function of two small networks on CamVid: how many points (val and test) the first is ahead."""
    return partial(differences, summarised('camvid-90x120'))


def test_at_the_best_learning_rate_networks_score_as_the_pages_say(ahead):
    text = (ROOT / 'docs' / 'results.md').read_text()
    rows = read_rows_of_trainings(ROOT / 'results' / 'camvid-90x120.json')
    scores = {each['cell']: each for each in summarise(rows)}
    assert scores['dense']['seeds'] == scores['csg-auto-6x']['seeds'] == 3
    found = ahead('csg-auto-6x', 'dense')
    assert min(found) > -0.5
    assert 'CSG (`csg-auto`: settings from `ratio`) and depthwise-separable convolutions (`separable`)' in README
    assert 'score like dense; fewer channels (`narrow`) score lower' in README
    large = ahead('dense', 'csg-6x')
    assert f"the paper's for large networks, and is {points(large)} points below dense" in text
    assert min(large) > 0 and 1.5 < max(large) < 2.5
    assert 'up to two points lower with slices of 16 x 16' in (ROOT / 'docs' / 'faq.md').read_text()
    assert ahead('csg-auto-6x', 'csg-6x') == pytest.approx([2, 2], abs=0.5)
    assert 'about two points higher than slices of 16 x 16' in (ROOT / 'docs' / 'settings.md').read_text()
    basis = points(ahead('dense', 'filter-basis-6x'))
    assert f'The generator of [Filter Basis](other_methods.md) is {basis} points below dense at 6x' in text
    assert max(map(abs, ahead('separable-6x', 'dense'))) < 0.5
    assert 'Depthwise-separable convolutions (`separable`) score like dense at 6x' in text
    by_cell = [[row[split] for row in rows if row['cell'] == cell] for cell in scores for split in ('val', 'test')]
    most = max(max(each) - min(each) for each in by_cell)
    assert f'Seeds of one network differ by up to {most:.1f} points' in text


def test_at_30x_networks_score_as_the_pages_say(ahead):
    text = (ROOT / 'docs' / 'results.md').read_text()
    rows = read_rows_of_trainings(ROOT / 'results' / 'camvid-90x120.json')
    rivals = {row['cell'] for row in rows if row['cell'].endswith('-30x') and not row['method'].startswith('csg')}
    assert rivals == {'separable-30x', 'narrow-30x', 'tucker-30x'}
    assert all(min(ahead('csg-auto-30x', cell)) > 2 for cell in rivals)
    both = 'the difference is {:+.1f} points on val and {:+.1f} on test'.format(*ahead('csg-100x', 'separable-30x'))
    assert f'It scores like `separable-30x`, which is more than three times as large: {both}' in text
    val, test = ahead('csg-trained-30x', 'csg-auto-30x')
    assert f'`csg-trained-30x` is {val:.1f} points above `csg-auto-30x` on val and {test:.1f} on test' in text
    assert val == pytest.approx(1, abs=0.3) and test == pytest.approx(1, abs=0.3)
    behind = points(ahead('csg-auto-30x', 'separable-30x'))
    log = (ROOT / 'docs' / 'research_log.md').read_text()
    assert f'At 30x (one seed) they score {behind} points lower than CSG' in log


def test_evaluation_of_small_networks_takes_as_long_as_the_page_says():
    text = (ROOT / 'docs' / 'results.md').read_text()
    ratios = {name: each['evaluation_ratio'] for name, each in read('peers-deeplabv3-r18-w32')['networks'].items()}
    faster = sorted(ratio for name, ratio in ratios.items() if name.startswith('narrow'))
    assert 'only narrow networks ({:.2f} and {:.2f} of'.format(*faster) in text
    assert f'`separable-30x` ({ratios.pop("separable-30x"):.2f}) evaluate faster' in text
    slower = sorted(ratio for name, ratio in ratios.items() if name.startswith('tucker'))
    assert '`tucker` takes {:.2f} and {:.2f} times as long'.format(*slower) in text
    own = sorted(ratio for name, ratio in ratios.items() if name.startswith('csg-auto'))
    assert 'and `csg-auto` {:.2f} and {:.2f} times, until it is [materialised]'.format(*own) in text
    assert all(ratio > 0.9 for name, ratio in ratios.items() if not name.startswith('narrow'))


def test_slices_of_the_small_network_are_those_that_the_page_says():
    text = (ROOT / 'docs' / 'results.md').read_text()
    table = read_table(ROOT / 'experiments' / 'rivals' / 'tables' / 'camvid_90x120.yml')
    found, chosen = (build_model(table.matching([f'{name}-s0'])[0].read_config()) for name in ('csg-auto-6x', 'csg-6x'))
    assert found.csg[0].settings.slice_shape == (8, 8, 3, 3) and '3x3 convs alone, with slices of 8 x 8.' in text
    codes = sum(conv.code.numel() for conv in chosen.csg.layers.values())
    assert sum(each.numel() for each in chosen.csg[0].parameters()) > codes
    assert 'their generator stores more than all codes' in text
    (full,) = read_table(ROOT / 'experiments' / 'runs' / 'tables' / 'camvid.yml').matching(['dense-s0'])
    assert suggest(build_model(full.read_config()), 10)[0]['slice_shape'] == (16, 16, 3, 3)
    log = (ROOT / 'docs' / 'research_log.md').read_text()
    assert 'At 180 x 240 and 10x, `ratio` finds 16 x 16' in log


def test_the_learning_rate_changes_scores_as_the_pages_say(ahead):
    text = (ROOT / 'docs' / 'results.md').read_text()
    dense, csg, narrow = (ahead(cell, f'{cell}-lr-0.02') for cell in ('dense', 'csg-6x', 'narrow-6x'))
    gains = f'dense gains {points(dense)} points, `csg-6x` {points(csg)}, and `narrow-6x` {points(narrow)}'
    assert gains in text
    log = (ROOT / 'docs' / 'research_log.md').read_text()
    assert f'0.2 gains {points(dense)} points for dense. It gains {points(csg)} for CSG' in log
    assert all(more > less for more, less in zip(dense, csg, strict=True))
    lower = [ahead('dense', f'dense-lr-{rate}') for rate in (0.02, 0.06)]
    val, test = ahead('dense', 'dense-lr-0.5')
    assert min(map(min, lower)) > 0 and val > 0.5 and abs(test) < 0.5
    assert 'dense scores highest on val at 0.2; on test, 0.5 scores about the same' in text
    low, middle = (ahead(f'csg-6x-lr-{rate}', f'dense-lr-{rate}') for rate in (0.02, 0.06))
    assert f'{points(low)} points above dense at 0.02 (one seed each, no more than seeds differ), level' in text
    assert 'level with it at 0.06, and below it at 0.2' in text
    assert max(map(abs, middle)) <= 0.6 and max(ahead('csg-6x', 'dense')) < 0
    for other, plain in (
        ('csg-6x-long-rows-lr-0.02', 'csg-6x-lr-0.02'),
        ('csg-6x-generator-0.1', 'csg-6x'),
        ('csg-6x-generator-no-decay', 'csg-6x'),
    ):
        assert max(ahead(other, plain)) < 0.3 and f'`{other}`' in text
    assert 'A slower [generator](how_it_works.md#start-values) gains nothing' in text


def test_on_kvasir_networks_score_as_the_page_says():
    text = (ROOT / 'docs' / 'results.md').read_text()
    rows = read_rows_of_trainings(ROOT / 'results' / 'kvasir-96x96.json')
    scores = {each['cell']: each for each in summarise(rows)}

    def losses(cell):
        return differences(scores, 'dense', cell)

    assert all(scores[cell]['seeds'] == 3 for cell in ('dense', 'csg-auto-30x', 'narrow-30x'))
    csg, separable, narrow = (losses(f'{name}-30x') for name in ('csg-auto', 'separable', 'narrow'))
    assert f'It is {points(losses("csg-100x"))} points below dense, and scores higher than `separable-30x`' in text
    for name in ('narrow-30x', 'separable-30x'):
        assert max(a - b for a, b in zip(losses('csg-100x'), losses(name), strict=True)) < 0
        assert scores[name]['stored_params'] > 3 * scores['csg-100x']['stored_params']
    (row,) = (row for row in rows if row['cell'] == 'narrow-100x')
    assert all(each['mAcc'] == 50 for each in row['scores'].values())
    assert f'at 0.06 it is {points(losses("narrow-100x-lr-0.06"))} points below dense' in text
    assert scores['csg-auto-6x']['seeds'] == 3
    by_cell = [[row[split] for row in rows if row['cell'] == cell] for cell in scores for split in ('val', 'test')]
    most = max(max(each) - min(each) for each in by_cell)
    of_dense = [[row[split] for row in rows if row['cell'] == 'dense'] for split in ('val', 'test')]
    spread = max(max(each) - min(each) for each in of_dense)
    assert f'Seeds of one network differ by up to {most:.1f} points (dense: {spread:.1f})' in text
    assert 'CSG at 6x and 30x differs from dense by less than 2 points' in text
    behind = [rival - mine for rival, mine in zip([*narrow, *separable], [*csg, *csg], strict=True)]
    assert max(*csg, *losses('csg-auto-6x')) < 2 < min(spread, *behind)
    first = {row['cell']: row for row in rows if row['seed'] == 0}
    assert f'As CP decomposition (`cp`, one seed), low rank is {points(losses("cp-30x"))} points below dense' in text
    val, test = zip(*(losses(name) for name in GENERATORS), strict=True)
    assert (
        f'are {min(val):.1f} to {max(val):.1f} points below dense on val and {min(test):.1f} to {max(test):.1f}' in text
    )
    assert losses('t-basis-30x') == [max(val), max(test)] and 'T-Basis scores lowest' in text
    assert losses('random-basis-30x') == [min(val), min(test)] and 'The random basis scores highest' in text
    for split in ('val', 'test'):
        assert abs(first['dense'][split] - first['dense-lr-0.06'][split]) < 0.5
        for cell in ('narrow-30x', 'separable-30x'):
            assert first[f'{cell}-lr-0.06'][split] < first[cell][split]
    assert 'dense scores about the same, `narrow-30x` and `separable-30x` score lower' in text


def test_generators_from_another_data_set_score_as_the_pages_say():
    text, log = ((ROOT / 'docs' / f'{name}.md').read_text() for name in ('results', 'research_log'))
    scores = summarised('camvid-90x120')

    def ahead(cell, other):
        return differences(scores, f'{cell}-30x', f'{other}-30x')

    assert f'score like random ones, {points(ahead("csg-frozen", "csg-travelled"))} points lower' in text
    assert max(ahead('csg-frozen', 'csg-travelled')) < 1
    assert f'Frozen random generators lose {points(ahead("csg-auto", "csg-frozen"))} points' in text
    assert f'still score {points(ahead("csg-frozen", "separable"))} points higher than depthwise-separable' in text
    assert f'{points(ahead("csg-auto", "csg-travelled"))} points below networks that train their own' in log
    lost = [scores['dense'][split][0] - scores['csg-binary-30x'][split][0] for split in ('val', 'test')]
    below = points(ahead('csg-auto', 'csg-binary'))
    assert f'It is {points(lost)} points below dense, and {below} below `csg-auto-30x`' in text
    assert max(map(abs, ahead('csg-binary', 'csg-frozen'))) < 1
    higher, lower = ahead('csg-binary', 'csg-frozen')
    assert f'as `csg-frozen-30x`: {higher:.1f} points higher on val and {-lower:.1f} lower on test' in text


def test_a_trained_encoder_scores_as_the_page_says():
    text = (ROOT / 'docs' / 'results.md').read_text()
    scores = summarised('camvid-90x120')
    dense, csg = (scores[f'efficientnet-{name}'] for name in ('dense', 'csg-auto-4x'))
    val, test = (csg[split][0] - dense[split][0] for split in ('val', 'test'))
    assert f'is {-val:.1f} points below dense on val and {test:.1f} above it on test' in text
    scratch = points([dense[split][0] - scores['efficientnet-dense-scratch'][split][0] for split in ('val', 'test')])
    assert f'(`efficientnet-dense-scratch`), dense is {scratch} points lower' in text
    trained = [scores['efficientnet-csg-trained-4x'][split][0] - dense[split][0] for split in ('val', 'test')]
    assert f'It is {points(trained)} points above dense.' in text
    assert max(differences(scores, 'efficientnet-dense', 'dense')) < 0
    assert 'it scores lower than half-width DeepLabV3-R18' in text


def test_the_page_says_in_short_what_the_results_are():
    text = (ROOT / 'docs' / 'results.md').read_text()
    camvid, kvasir = (summarised(name) for name in ('camvid-90x120', 'kvasir-96x96'))
    lost = [each for scores in (camvid, kvasir) for each in differences(scores, 'dense', 'csg-auto-30x')]
    said = f'{min(lost):.1f} to {max(lost):.1f} points'
    assert f'CSG loses nothing measurable at 6x, and {said} at 30x.**' in text
    assert f'At 30x, CSG loses {said} and scores highest of what we trained' in README
    assert f'cost no measurable accuracy, and 30 times {said} of mIoU' in README
    faq = (ROOT / 'docs' / 'faq.md').read_text()
    assert f'At 30x, it lost {said} on CamVid and Kvasir-SEG.' in faq
    assert max(max(differences(scores, 'dense', 'csg-auto-6x')) for scores in (camvid, kvasir)) < 1.1
    val, test = differences(camvid, 'dense', 'csg-auto-10x')
    assert f'At 10x (CamVid), it is {val:.1f} points below dense on val and level on test' in text and abs(test) < 0.3
    assert camvid['csg-auto-10x']['seeds'] == 3
    small = differences(kvasir, 'unet-dense', 'unet-csg-auto-4x')
    more = [each for scores in (camvid, kvasir) for each in differences(scores, 'unet-dense', 'unet-csg-auto-10x')]
    said = f'{min(more):.1f} to {max(more):.1f}'
    assert f'UNet loses more: {points(small)} points at 4x, {said} at 10x.' in text
    assert f'UNet loses more: {said} points at 10x (one seed).' in README and f'UNet lost more: {said} points' in faq
    separable, narrow = (
        [each for scores in (camvid, kvasir) for each in differences(scores, 'csg-auto-30x', f'{rival}-30x')]
        for rival in ('separable', 'narrow')
    )
    others = [each for name in GENERATORS for each in differences(kvasir, 'csg-auto-30x', name)]
    assert min(*separable, *narrow) > 2
    rivals = [
        each
        for scores in (camvid, kvasir)
        for cell in scores
        if cell.endswith('-30x') and not cell.startswith('csg')
        for each in differences(scores, 'csg-auto-30x', cell)
    ]
    assert min(rivals) > 0 and '**At 30x, all other networks of equal size lose more**' in text
    assert f'score {min(others):.1f} to {max(others):.1f} points lower than CSG on Kvasir-SEG (one seed each)' in text
    assert f'by at least {min(others):.1f} points (one seed)' in (ROOT / 'docs' / 'research_log.md').read_text()
    pruned = {f'{each:.1f}' for each in differences(kvasir, 'csg-auto-30x', 'pruned-30x')}
    assert pruned == {'1.5'} and 'for twice the epochs, comes closest, 1.5 points lower' in text


def test_seeds_differ_as_the_page_says():
    most = []
    for names in (('camvid-90x120', 'camvid'), ('kvasir-96x96',)):
        rows = [(name, row) for name in names for row in read_rows_of_trainings(ROOT / 'results' / f'{name}.json')]
        cells = {(name, row['cell']) for name, row in rows}
        scores = [
            [row[split] for name, row in rows if (name, row['cell']) == cell] for cell in cells for split in SPLITS
        ]
        most.append(max(max(each) - min(each) for each in scores))
    said = 'Seeds of one network differ by up to {:.1f} points on CamVid and {:.1f} on Kvasir-SEG'.format(*most)
    assert said in (ROOT / 'docs' / 'results.md').read_text()


def test_networks_that_continue_score_as_the_pages_say():
    text = (ROOT / 'docs' / 'results.md').read_text()
    found = []
    for name in ('camvid-90x120', 'kvasir-96x96', 'camvid'):
        scores = summarised(name)
        for cell, each in scores.items():
            if each['method'] == 'csg-trained':
                assert each['seeds'] == 1 and 4 <= round(each['dense_params'] / each['stored_params']) <= 31
                found += differences(scores, cell, cell.partition('csg-')[0] + 'dense')
    most = f'at most {-min(found):.1f} points below dense'
    assert f'CSG is {most}, and above it in most cases** (one seed each)' in text
    assert (
        f'CSG is at most {-min(found):.1f} points below the mean of dense, and mostly above it, at 4x to 30x' in README
    )
    assert sum(each > 0 for each in found) > len(found) / 2
    first = {
        row['cell']: row for row in read_rows_of_trainings(ROOT / 'results' / 'camvid-90x120.json') if row['seed'] == 0
    }
    lost = points([first['dense'][split] - first['csg-trained-30x'][split] for split in SPLITS])
    assert f'CSG at 30x is {lost} points below the dense network of the seed' in text
    faq = (ROOT / 'docs' / 'faq.md').read_text()
    assert 'it lost less at 30x, and nothing in UNet at 10x' in faq
    kvasir = summarised('kvasir-96x96')
    more, ahead = (points(differences(kvasir, 'dense-80e', cell)) for cell in ('dense', 'csg-trained-30x'))
    assert f'scores {more} points higher than dense, and so {ahead} higher than continued CSG at 30x' in text
    assert 'a dense network trained for as long [gains more]' in README
    log = (ROOT / 'docs' / 'research_log.md').read_text()
    assert f'dense gains {more} points from 80 epochs instead of 40 (one seed)' in log
    lost = points(differences(kvasir, 'unet-dense', 'unet-csg-auto-10x'))
    gained = points(differences(kvasir, 'unet-csg-trained-10x', 'unet-dense'))
    assert f'UNet loses {lost} points from scratch, and is {gained} points above dense' in log


def test_a_training_on_another_machine_scores_as_the_page_says():
    rows = {row['cell']: row for row in read_rows_of_trainings(ROOT / 'results' / 'camvid-90x120.json')[::-1]}
    first, again = rows['dense'], rows['csg-trained-10x']['starts_from']['dense-s0']
    assert first['seed'] == 0
    said = [f'{each["val"]} and {each["test"]}' for each in (first, again)]
    text = (ROOT / 'docs' / 'results.md').read_text()
    assert '{} (val and test), and {} when it was trained again on another machine'.format(*said) in text


def test_other_networks_are_better_where_the_page_says():
    text = (ROOT / 'docs' / 'results.md').read_text()
    camvid, kvasir = (summarised(name) for name in ('camvid-90x120', 'kvasir-96x96'))
    costs = read('peers-deeplabv3-r18-w32')['networks']
    for scores in (camvid, kvasir):
        assert max(map(abs, differences(scores, 'csg-auto-6x', 'separable-6x'))) < 1.5
    assert round(costs['csg-auto-6x']['flops'] / costs['separable-6x']['flops']) == 6 and 'with a sixth of' in text
    times = [costs[f'narrow-{size}']['evaluation_ratio'] for size in ('6x', '30x')]
    assert "`narrow` evaluates in {:.2f} and {:.2f} of dense's time".format(*times) in text
    sizes = {name: each['int8_bytes'] for name, each in camvid.items()}
    small, tiny = (round(sizes['dense'] / sizes[name]) for name in ('csg-auto-30x', 'csg-100x'))
    assert f'is {small} times smaller than that of dense, and that of `csg-100x` {tiny} times' in text
    pruned = kvasir['pruned-30x']['int8_bytes'] / kvasir['csg-auto-30x']['int8_bytes']
    assert [pruned, sizes['narrow-30x'] / sizes['csg-auto-30x']] == pytest.approx([0.75, 0.75], abs=0.04)
    assert 'The files of `narrow-30x` and `pruned-30x` are a quarter smaller than that of CSG' in text
    assert sizes['narrow-100x'] / sizes['csg-100x'] == pytest.approx(0.5, abs=0.02)
    assert 'that of `narrow-100x` is half as large' in text


def test_resnet20_scores_on_cifar10_as_the_pages_say():
    scores = summarised('cifar10')
    paper, found = (
        f'{scores["dense"]["test"][0] - scores[name]["test"][0]:.1f}' for name in ('csg-2.3x', 'csg-auto-2.3x')
    )
    text = (ROOT / 'docs' / 'classification.md').read_text()
    assert f"is {paper} points below dense with slices of 12 x 12, the paper's, and {found} with the settings" in text
    rows = read_rows_of_trainings(ROOT / 'results' / 'cifar10.json')
    minutes = [round(row['seconds'] / 60) for row in rows]
    assert f'A training took {min(minutes)} to {max(minutes)} minutes' in text
    binary = scores['dense']['test'][0] - scores['csg-binary-12x']['test'][0]
    assert f'(`csg-binary-12x`) stores 12 times less and is {binary:.1f} points below dense' in text
    text = (ROOT / 'docs' / 'results.md').read_text()
    assert (
        f'is {found} points below dense after 20 epochs with the settings that `ratio` finds, and {paper} with' in text
    )
    assert f'(#image-classification) is {found} points below dense after a short training with the settings' in text
    assert f'`ratio` finds, and {paper} with those of the paper (one seed)' in text


def test_unet_scores_as_the_page_says():
    text = (ROOT / 'docs' / 'results.md').read_text()
    scores, polyps = (
        {name.removeprefix('unet-'): each for name, each in summarised(data_set).items() if name.startswith('unet-')}
        for data_set in ('camvid-90x120', 'kvasir-96x96')
    )
    csg, ahead = differences(scores, 'dense', 'csg-auto-10x'), differences(scores, 'csg-auto-10x', 'narrow-10x')
    assert f'is {points(csg)} points below dense (val and test), {ahead[0]:.1f} above a narrow network' in text
    assert abs(ahead[1]) < 0.5 and 'and like it on test' in text
    slower = points(differences(scores, 'dense', 'dense-lr-0.06'))
    val, test = differences(scores, 'csg-auto-10x-lr-0.06', 'csg-auto-10x')
    below = points(differences(scores, 'dense-lr-0.06', 'csg-auto-10x-lr-0.06'))
    assert f'At 0.06, dense is {slower} points lower than at 0.2. CSG is {val:.1f} points higher on val' in text
    assert f'and {-test:.1f} lower on test, and so {below} points below dense.' in text
    large, small, narrow = (
        points(differences(polyps, 'dense', name)) for name in ('csg-auto-10x', 'csg-auto-4x', 'narrow-10x')
    )
    assert f'CSG is {large} points below dense at 10x (val and test), and {small} at 4x' in text
    assert f'A narrow network is {narrow} below at 10x' in text
    trained = points(differences(polyps, 'csg-trained-10x', 'dense'))
    assert f'It is {trained} points above dense.' in text
    assert summarised('camvid-90x120')['csg-auto-30x']['stored_params'] < scores['csg-auto-10x']['stored_params']


def test_networks_trained_in_float32_are_those_that_the_page_names():
    rows = read_rows_of_trainings(ROOT / 'results' / 'camvid.json')
    assert {row['method'] for row in rows if row.get('precision') == 'float32'} == {'tucker', 'separable'}
    text = (ROOT / 'docs' / 'results.md').read_text()
    assert '`tucker` and `separable` were trained in float32, on a CPU without bfloat16' in text


def test_found_settings_score_like_chosen_ones_within_the_noise():
    scores = summarised('camvid')
    found, chosen = scores['csg-auto-47x-40e'], scores['csg-47x-40e']
    assert found['seeds'] == chosen['seeds'] == 3
    for split in ('val', 'test'):
        assert abs(found[split][0] - chosen[split][0]) < max(found[split][1], chosen[split][1])
    assert 'within the noise of three seeds' in (ROOT / 'docs' / 'settings.md').read_text()


def test_steps_are_as_near_to_their_floors_as_the_page_says():
    text = (ROOT / 'docs' / 'speed.md').read_text()
    large = ['speed-resnet56', 'speed-deeplabv3-r18', 'precision-deeplabv3-r18-360x480']
    measured = {name: read(name)['summary'] for name in (*large, 'precision-deeplabv3-r18-180x240')}
    measured['accumulation'] = read('accumulation-deeplabv3-r18')['summary']
    over = [
        each[network]['step_ratio'] / each[network]['floor']
        for each in measured.values()
        for network in ('csg', 'csg, generated once')
        if network in each
    ]
    assert len(over) == 6
    assert max(over) <= 1.05 and 'takes at most 1.05 times its floor' in text
    assert max(measured[name]['csg']['floor'] for name in large) <= 1.02 and 'at most 1.02 for ResNet-56' in text


@pytest.mark.parametrize('name', EXCHANGED)
def test_ranks_of_two_and_four_processes_exchange_the_same(name):
    two, four = (read(f'exchange-{name}{count}')['networks'] for count in ('', '-4'))
    assert two.keys() == four.keys()
    for network in two:
        assert {key: two[network][key] for key in HELD} == {key: four[network][key] for key in HELD}


@pytest.mark.parametrize('scope', SCOPES)
def test_every_network_of_a_library_has_one_row(scope):
    names = [row['name'] for row in read_rows(ROOT / 'results' / f'zoo-{scope}.jsonl', scope)]
    assert names and len(set(names)) == len(names)


def test_metafiles_have_the_results_of_trained_configs():
    results = metafiles.measured_results()
    trained = 'csg-s16-d128_deeplabv3_r18-d16_1xb8-80e_camvid-180x240'
    rows = read_rows_of_trainings(ROOT / 'results' / 'camvid.json')
    scores = [row['test'] for row in rows if row['cell'] == 'csg-10x']
    assert results[trained][0]['Metrics'] == {'mIoU': round(sum(scores) / len(scores), 2)}
    for text in metafiles.metafiles().values():
        assert metafiles.fill_results(text, results) == text
    assert any('Results' in text for text in metafiles.metafiles().values())
