"""The trained networks in models/."""

import json
import sys

import pytest
from conftest import ROOT, run_program, run_tool
from PIL import Image

from experiments.runs.rows import read_rows
from experiments.runs.summary import MODELS

CONFIG = ROOT / 'configs' / 'deeplabv3' / 'csg-s16-d48_deeplabv3_r18-d16_1xb8-80e_camvid-180x240.py'
FILES = [ROOT / 'models' / f'{name}.safetensors' for name in MODELS]
# mIoU on 20 images, torch 2.15, CPU: tools/test.py CONFIG FILE --cfg-options test_dataloader.dataset.indices=20.
SCORE = 37.20


def test_every_model_is_described_and_small():
    assert FILES and sorted((ROOT / 'models').glob('*.safetensors')) == sorted(FILES)
    assert all(file.stat().st_size < 1_000_000 for file in FILES)
    rows = {row['cell']: row for row in read_rows(ROOT / 'results' / 'camvid.json') if row['seed'] == 0}
    for cell in MODELS.values():
        lost = [rows['dense'][split] - rows[cell]['int8'][split] for split in ('val', 'test')]
        assert max(lost) < 1  # as models/README.md says


@pytest.mark.parametrize('file', FILES, ids=lambda file: file.stem)
def test_an_image_is_segmented_from_the_file_alone(file, drawn, tmp_path):
    image = next((drawn / 'JPEGImages').glob('*.jpg'))
    done = run_tool('demo.py', image, file, '--out', tmp_path / 'seen.png', '--json')
    shares = json.loads(done.stdout)
    assert 'road' in shares and 90 < sum(shares.values()) <= 100.1
    with Image.open(tmp_path / 'seen.png') as seen, Image.open(image) as given:
        assert seen.size == given.size


@pytest.mark.parametrize('file', FILES, ids=lambda file: file.stem)
def test_the_network_is_loaded_in_plain_python(file):
    program = f'import csg_seg; print(type(csg_seg.load_compact({str(file)!r})).__name__)'
    done = run_program(sys.executable, '-W', 'ignore', '-c', program)
    assert done.stdout.split()[-1] == 'EncoderDecoder'


@pytest.mark.parametrize('file', FILES, ids=lambda file: file.stem)
def test_the_file_scores_as_measured(file, real_data, tmp_path):
    options = [f'test_dataloader.dataset.data_root={real_data / "camvid"}', 'test_dataloader.dataset.indices=20']
    done = run_tool('test.py', CONFIG, file, '--work-dir', tmp_path, '--json', '--cfg-options', *options)
    assert json.loads(done.stdout)['mIoU'] == pytest.approx(SCORE, abs=0.1)
