"""Train the missing cells of a table, each in processes of its own on one thread."""

import json
import os
import statistics
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from copy import deepcopy
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.device import get_device

from csg_seg.cli.results import made_with
from csg_seg.errors import CSGError
from csg_seg.files import check_folder, write_whole
from csg_seg.mm.mixed_precision import has_bfloat16
from csg_seg.mm.model import build_model
from csg_seg.report import summarise
from csg_seg.running.preflight import check_data, check_optimizer
from csg_seg.running.work_dir import latest_checkpoint

from .int8 import write_rounded
from .rows import Row, add_row, label_of, read_rows
from .runner import call_tool, config_file, prepare
from .table import OTHER_CELL, ROOT, Cell, Table

SPLITS = ('train', 'val', 'test')
Notify = Callable[[Mapping[str, float]], None]


def train_missing(
    table: Table,
    cells: Sequence[Cell],
    *,
    results: Path,
    data: Path,
    work_dir: Path,
    jobs: int = 1,
    float32: bool = False,
    notify: Notify = lambda progress: None,
    tell: Callable[[str], None] = print,
) -> list[str]:
    """Train and test the cells that have no row yet.

    Each finished cell is written to ``results/DATASET.json`` at once. Interrupted trainings are resumed and end with
    the same weights as uninterrupted ones.

    Args:
        table: the table.
        cells: those to train, of the table.
        results: folder of the files of results.
        data: folder that holds the data sets.
        work_dir: folder that gets a folder for each cell.
        jobs: number of cells to train at a time, one process and one thread each.
        float32: train in float32, also cells that ask for mixed precision.
        notify: called every few seconds with the fraction of each running training that is done, by label.
        tell: called with a line for each finished or failed cell.

    Returns:
        the labels of cells that failed.

    Raises:
        CSGError: a setting or the data is wrong, a folder holds a run with other settings, or this CPU has no bfloat16
            that a cell needs.
    """
    if jobs < 1:
        raise CSGError(f'--jobs {jobs}: train at least one cell at a time')
    check_folder(work_dir, given=f'--work-dir {work_dir}')
    check_folder(results, given=f'--results {results}')
    file = results / f'{table.dataset}.json'
    done = {label_of(row) for row in read_rows(file)}
    every = {cell.label: Run(table, cell, data=data, work_dir=work_dir, float32=float32) for cell in table.cells}
    wanted = {cell.label for cell in cells if cell.label not in done}
    for cell in reversed(table.cells):  # a cell stands below those that it needs
        if cell.label in wanted:
            wanted |= {label for label in cell.needs if label not in done or every[label].checkpoint() is None}
    runs = {label: run for label, run in every.items() if label in wanted}
    data_sets = set()
    for run in runs.values():
        run.check()
        if run.data_sets not in data_sets:  # once for the many cells of the same data
            data_sets.add(run.data_sets)
            run.check_data()
    for run in runs.values():
        run.check_elsewhere()
        if not (run.cell.needs or run.cell.needs_elsewhere):
            prepare(run.cfg, run.cell.seed, run.folder)
    lock, failed = threading.Lock(), []
    submitted: dict[str, Future] = {}

    def work(run: Run) -> None:
        for label in run.cell.needs:
            if label in submitted and submitted[label].exception() is not None:  # waits until it is done
                raise CSGError(f'{label}, which it needs, failed')
        row = run.finish({label: every[label].checkpoint() for label in run.cell.needs} | run.check_elsewhere())
        with lock:
            start = {label_of(each): each for each in read_rows(file) if label_of(each) in run.cell.needs}
            if start:
                row['starts_from'] = {
                    label: {split: each[split] for split in SPLITS[1:]} for label, each in start.items()
                }
            add_row(file, row, list(every))

    with ThreadPoolExecutor(jobs) as pool:
        for label, run in runs.items():
            submitted[label] = pool.submit(work, run)
        waiting: dict[Future, Run] = {submitted[label]: run for label, run in runs.items()}
        try:
            while waiting:
                ended, _ = wait(waiting, timeout=5, return_when=FIRST_COMPLETED)
                for each in ended:
                    run = waiting.pop(each)
                    try:
                        each.result()
                        tell(f'{run.cell.label}: done, {len(waiting)} left')
                    except CSGError as error:
                        failed.append(run.cell.label)
                        tell(f'{run.cell.label}: failed: {error}')
                notify({run.cell.label: run.progress() for run in waiting.values() if run.started})
        except BaseException:
            for run in runs.values():
                run.stop()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return failed


class Run:
    """The training of one cell, and its folder.

    Attributes:
        cell: what is trained.
        folder: holds logs and checkpoints.
        data: folder that holds the data sets.
        amp: whether to train in bfloat16 mixed precision.
        started: whether a process of it has been started here.
    """

    def __init__(self, table: Table, cell: Cell, *, data: Path, work_dir: Path, float32: bool = False):
        self.table, self.cell = table, cell
        self.amp = cell.amp and not float32
        self.work_dir, self.data = work_dir, data
        self.folder = work_dir / table.dataset / cell.label
        self.started = False
        self._processes: list[subprocess.Popen] = []

    @cached_property
    def cfg(self) -> Config:
        """The cell's complete config, with the data where they are."""
        cfg = self.cell.read_config()
        _replace_data_root(cfg, self.data)
        cfg.default_hooks.setdefault('exact_resume', dict(type='ExactResumeHook'))
        if self.cell.amp and not self.amp:
            cfg.precision = 'float32'  # a run begun in bfloat16 is not resumed
        return cfg

    @property
    def data_sets(self) -> str:
        """The settings of all data sets, as text."""
        return str([self.cfg[f'{split}_dataloader'] for split in SPLITS])

    def check(self) -> None:
        """Check network and optimizer, and count parameters."""
        if self.amp and get_device() == 'cpu' and not has_bfloat16():
            raise CSGError(
                f'{self.cell.label} trains in bfloat16, and this CPU has no instructions for it; give '
                '--float32 to train in float32'
            )
        try:
            model = build_model(self.cfg)
            check_optimizer(self.cfg, model)
            self.stored_params = summarise(model).stored_params
            self.dense_params = summarise(build_model(self.table.dense_of(self.cell).read_config())).stored_params
        except CSGError as error:
            raise CSGError(f'{self.cell.label}: {error}') from None

    def check_data(self) -> None:
        """Check the files and labels of all splits."""
        for split in SPLITS:
            check_data(self.cfg, split)

    def check_elsewhere(self) -> dict[str, str | None]:
        """Return the checkpoints of the cells of other data sets that this one starts from, by label.

        Raises:
            CSGError: one has not been trained here.
        """
        found = {label: _trained(self.work_dir / label) for label in self.cell.needs_elsewhere}
        for label, checkpoint in found.items():
            if checkpoint is None:
                dataset, _, cell = label.partition('/')
                raise CSGError(
                    f'{self.cell.label} needs {cell} of the data set {dataset}; first train it with its own table and '
                    'the same --work-dir'
                )
        return found

    def checkpoint(self) -> str | None:
        """Return the file of the trained network, None if its training has not ended here."""
        return _trained(self.folder)

    def trained(self) -> str:
        """Return the file of the trained network.

        Raises:
            CSGError: its training has not ended here.
        """
        checkpoint = self.checkpoint()
        if checkpoint is None:
            raise CSGError(f'{self.cell.label} is not trained; run experiments.runs with the same --work-dir first')
        return checkpoint

    @property
    def splits(self) -> list[str]:
        """The splits that are tested: val and test, or test alone where both are the same."""
        return ['test'] if self.cfg.val_dataloader == self.cfg.test_dataloader else ['val', 'test']

    def config_of(self, split: str) -> Config:
        """Return the config that tests a split."""
        cfg = deepcopy(self.cfg)
        cfg.test_dataloader, cfg.test_evaluator = cfg[f'{split}_dataloader'], cfg[f'{split}_evaluator']
        return cfg

    def finish(self, needed: Mapping[str, str | None]) -> Row:
        """Train, or resume, and test.

        Args:
            needed: checkpoints of other cells, by label.

        Returns:
            the cell's row.
        """
        self.started = True
        if needed:
            paths = {f'{OTHER_CELL}{label.rpartition("-s")[0]}': path for label, path in needed.items()}
            _replace_texts(self.cfg._cfg_dict, lambda text: paths.get(text) or text)
            prepare(self.cfg, self.cell.seed, self.folder)
        self._note_commit()
        # bfloat16 on a GPU too, where float16 is the default of --amp.
        amp = ['--amp', '--cfg-options', 'optim_wrapper.dtype=bfloat16'] if self.amp else []
        self._call('train.py', config_file(self.folder), '--resume', *amp, log='train.txt')
        checkpoint = latest_checkpoint(self.folder)
        assert checkpoint is not None
        scores = self._test(checkpoint)
        rounded = self.folder / 'int8.pth'
        int8_bytes = write_rounded(self.cfg, checkpoint, rounded)
        int8_scores = self._test(str(rounded), prefix='int8-')
        rounded.unlink()
        metric = self.table.metric
        versions = made_with(seed=self.cell.seed)
        del versions['seed'], versions['device']
        return {
            'cell': self.cell.name,
            'network': self.cell.network,
            'method': self.cell.method,
            'csg': self.cell.csg,
            'stored_params': self.stored_params,
            'dense_params': self.dense_params,
            'seed': self.cell.seed,
            'size': self.cell.size,
            'epochs': self.cfg.train_cfg.get('max_epochs'),
            'metric': metric,
            'val': scores.get('val', {}).get(metric),
            'test': scores['test'][metric],
            'scores': scores,
            'int8': {'bytes': int8_bytes, **{split: each[metric] for split, each in int8_scores.items()}},
            'seconds': round(self._training_seconds()),
            'command': self._command(),
            'commit': ', '.join(self._commits()),
            'device': device(),
            'precision': 'bfloat16' if self.amp else 'float32',
            'versions': versions,
        }

    def progress(self) -> float:
        """Return the fraction of the training that is done."""
        logged = self._logged()
        if not logged:
            return 0.0
        epochs = self.cfg.train_cfg.get('max_epochs')
        if epochs:
            return (logged[-1]['epoch'] - 1) / epochs
        return logged[-1]['step'] / self.cfg.train_cfg.max_iters

    def stop(self) -> None:
        """End the processes that are running."""
        for process in self._processes:
            process.terminate()

    def _call(self, tool: str, *args: str | Path, log: str) -> str:
        return call_tool(tool, *args, log=self.folder / log, threads=1, started=self._processes.append)

    def _test(self, checkpoint: str, prefix: str = '') -> dict[str, dict[str, float]]:
        """Return the scores of a checkpoint on each split."""
        return {split: self._test_on(split, checkpoint, prefix) for split in self.splits}

    def _test_on(self, split: str, checkpoint: str, prefix: str) -> dict[str, float]:
        result = self.folder / f'{prefix}{split}.json'
        if not result.exists():
            folder = self.folder / split
            prepare(self.config_of(split), self.cell.seed, folder)
            printed = self._call('test.py', config_file(folder), checkpoint, '--json', log=f'{prefix}{split}.txt')
            write_whole(result, lambda partial: partial.write_text(printed))
        scores = {key: round(value, 4) for key, value in json.loads(result.read_text()).items()}
        if self.table.metric not in scores:
            raise CSGError(f'there is no metric {self.table.metric!r}; the {split} gave {", ".join(scores)}')
        return scores

    def _logged(self) -> list[dict[str, Any]]:
        """Return what training logged, the last entry for each iteration, over all its sessions."""
        entries: dict[int, dict[str, Any]] = {}
        for file in sorted(self.folder.glob('*/vis_data/scalars.json')):
            for line in file.read_text().splitlines():
                entry = json.loads(line) if line.endswith('}') else {}
                if 'loss' in entry and 'time' in entry:
                    entries[entry['step']] = entry
        return [entries[step] for step in sorted(entries)]

    def _training_seconds(self) -> float:
        """Return the median seconds of a training iteration, with loading of data, times the iterations.

        The median leaves out the time for which a training was suspended.
        """
        logged = self._logged()
        return logged[-1]['step'] * statistics.median(entry['time'] for entry in logged)

    def _command(self) -> str:
        float32 = ' --float32' if self.cell.amp and not self.amp else ''
        return f'python -m experiments.runs {_relative(self.table.path)} --only {self.cell.label}{float32}'

    def _note_commit(self) -> None:
        commits = list(dict.fromkeys([*self._commits(), current_commit()]))
        write_whole(self.folder / 'commits.json', lambda partial: partial.write_text(json.dumps(commits)))

    def _commits(self) -> list[str]:
        file = self.folder / 'commits.json'
        return json.loads(file.read_text()) if file.exists() else []


def _trained(folder: Path) -> str | None:
    """Return the checkpoint in the folder of a cell, None if its training has not ended."""
    return latest_checkpoint(folder) if (folder / 'test.json').exists() else None


def _replace_texts(node: Any, change: Callable[[str], str]) -> None:
    """Change every text in a config, in place."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        if isinstance(value, str):
            node[key] = change(value)
        elif isinstance(value, (dict, list)):
            _replace_texts(value, change)


def _replace_data_root(cfg: Config, data: Path) -> None:
    """Let a config read the data sets in another folder than ``data``."""

    def change(text: str) -> str:
        first, *rest = Path(text).parts or ('',)
        return str(data.joinpath(*rest)) if first == 'data' else text

    for split in SPLITS:
        _replace_texts(cfg[f'{split}_dataloader'], change)


def current_commit() -> str:
    """Return the commit of this checkout, with ``+`` if tracked files differ from it; 'unknown' outside git."""
    try:
        commit, changes = (
            subprocess.run(['git', *args], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
            for args in (('rev-parse', '--short', 'HEAD'), ('status', '--porcelain', '-uno'))
        )
    except (OSError, subprocess.CalledProcessError):
        return 'unknown'
    return f'{commit}+' if changes else commit


def device() -> str:
    """Return the name of the GPU, or of the CPU, its vector instructions and the number of threads."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f'{processor()}, {torch.backends.cpu.get_cpu_capability()}, 1 thread'


def processor() -> str:
    """Return the name of the CPU."""
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        return 'CPU'
    return next((line.partition(':')[2].strip() for line in lines if line.startswith('model name')), 'CPU')


def _relative(path: Path) -> str:
    return os.path.relpath(path.resolve(), ROOT) if path.resolve().is_relative_to(ROOT) else str(path)
