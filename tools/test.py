"""Evaluate a checkpoint, with the arguments of mmsegmentation's test.py."""

import argparse
import json
import os

from csg_seg.cli import console, options
from csg_seg.cli.failures import one_line_errors

with one_line_errors():
    from mmengine.runner import Runner

    from csg_seg.errors import CSGError
    from csg_seg.files import check_folder, writing_into
    from csg_seg.mm.checkpoints.unpickling import check_file, forbid_unpickling
    from csg_seg.mm.hooks.checkpoint_guard import CheckpointGuardHook
    from csg_seg.mm.hooks.label_guard import LabelGuardHook
    from csg_seg.mm.hooks.progress_bar import ProgressBarHook
    from csg_seg.mm.model import build_model
    from csg_seg.running.amp import use_amp_to_test
    from csg_seg.running.configs import load_config
    from csg_seg.running.preflight import check_data, check_scores
    from csg_seg.running.processes import use_cpu_processes


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    options.add_config(parser)
    options.add_checkpoint(parser)
    parser.add_argument('--work-dir', help='folder for the metrics (default: work_dirs/CONFIG)')
    parser.add_argument('--out', help='folder to save predictions in, for evaluation elsewhere')
    parser.add_argument('--show', action='store_true', help='show predictions in a window')
    parser.add_argument('--show-dir', help='folder to save images in, with the predictions drawn on them')
    parser.add_argument('--wait-time', type=float, default=2, help='seconds to show each window (default: 2)')
    options.add_cfg_options(parser)
    options.add_launcher(parser)
    options.add_json(parser, 'print the scores as JSON, the log to stderr')
    parser.add_argument('--tta', action='store_true', help='use test-time augmentation')
    parser.add_argument('--amp', action='store_true', help='use automatic mixed precision, in bfloat16 on a CPU')
    args = parser.parse_args()
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    return args


def apply_options(cfg, args: argparse.Namespace) -> None:
    """Write the options that concern testing into the config."""
    cfg.load_from = args.checkpoint
    for option, folder in (('--out', args.out), ('--show-dir', args.show_dir)):
        if folder:
            check_folder(folder, given=f'{option} {folder}')
    if args.show or args.show_dir:
        show_predictions(cfg, args)
    if args.tta:
        if 'tta_pipeline' not in cfg or 'tta_model' not in cfg:
            raise CSGError('--tta needs tta_pipeline and tta_model in the config; leave it out, or add them')
        cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline
        cfg.tta_model.module = cfg.model
        cfg.model = cfg.tta_model
    if args.out is not None:
        if cfg.get('default_scope') == 'mmpretrain':
            raise CSGError('--out saves segmentation maps, this network classifies; --json prints its scores')
        cfg.test_evaluator.update(output_dir=args.out, keep_results=True)


def show_predictions(cfg, args: argparse.Namespace) -> None:
    """Turn on the config's visualization hook."""
    hook = cfg.default_hooks.get('visualization')
    if hook is None:
        raise CSGError('--show and --show-dir need a visualization hook in the default_hooks of the config')
    if hook.type == 'VisualizationHook':  # mmpretrain's
        hook.update(enable=True, interval=1, show=args.show, wait_time=args.wait_time, out_dir=args.show_dir)
        return
    hook.update(draw=True, show=args.show, wait_time=args.wait_time)
    if args.show_dir:
        cfg.visualizer.save_dir = args.show_dir


def main() -> None:
    args = parse_args()
    with one_line_errors():
        forbid_unpickling()
        cfg = load_config(args.config, args.cfg_options, work_dir=args.work_dir, launcher=args.launcher)
        check_file(args.checkpoint)
        build_model(cfg)  # a mistake shows here, before anything is written
        check_data(cfg, 'test')
        check_scores(cfg, 'test')
        apply_options(cfg, args)
        if args.amp:
            use_amp_to_test(cfg)
        use_cpu_processes(cfg)
        with writing_into(cfg.work_dir), console.notes_to_stderr(when=args.json), ProgressBarHook() as bars:
            runner = Runner.from_cfg(cfg)
            runner.register_hook(CheckpointGuardHook(complete=True))
            runner.register_hook(bars)
            runner.register_hook(LabelGuardHook(cfg))
            scores = runner.test()
    if args.json and runner.rank == 0:
        print(json.dumps(scores, default=float))  # mmseg's scores are NumPy's


if __name__ == '__main__':
    main()
