"""Train a network, with the arguments of mmsegmentation's train.py."""

import argparse
import os

from csg_seg.cli import options
from csg_seg.cli.failures import one_line_errors

with one_line_errors():
    from mmengine.registry import RUNNERS
    from mmengine.runner import Runner

    from csg_seg.errors import CSGError
    from csg_seg.files import writing_into
    from csg_seg.layers.bank import find_bank
    from csg_seg.mm.checkpoints.unpickling import forbid_unpickling
    from csg_seg.mm.hooks.checkpoint_guard import CheckpointGuardHook
    from csg_seg.mm.hooks.csg import CSGHook, log_size
    from csg_seg.mm.hooks.label_guard import LabelGuardHook
    from csg_seg.mm.hooks.progress_bar import ProgressBarHook
    from csg_seg.mm.model import bare_model, build_model
    from csg_seg.running.amp import use_amp_to_train
    from csg_seg.running.configs import load_config
    from csg_seg.running.preflight import check_backbone, check_data, check_optimizer, check_scores, check_starts
    from csg_seg.running.processes import use_cpu_processes
    from csg_seg.running.work_dir import RESUME, check_complete, guard_checkpoints, latest_checkpoint


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    options.add_config(parser)
    parser.add_argument('--work-dir', help='folder for logs and checkpoints (default: work_dirs/CONFIG)')
    parser.add_argument('--resume', action='store_true', help='resume from the latest checkpoint in the work folder')
    parser.add_argument('--amp', action='store_true', help='use automatic mixed precision, in bfloat16 on a CPU')
    options.add_cfg_options(parser)
    options.add_launcher(parser)
    args = parser.parse_args()
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    return args


def resume_latest(cfg, *, named: bool) -> None:
    """Resume from the checkpoint that the user named, or the latest in the work folder.

    A config's ``load_from`` only starts a run.
    """
    if not named and cfg.get('load_from') is not None:
        cfg.load_from = None if latest_checkpoint(cfg.work_dir) else cfg.load_from
        cfg.resume = cfg.load_from is None
    path = cfg.get('load_from') or latest_checkpoint(cfg.work_dir)
    if cfg.resume and path:
        if path.endswith('.safetensors'):
            raise CSGError('a compact checkpoint has no training state to resume; give the .pth beside it')
        if '://' not in path:
            check_complete(path)


def main() -> None:
    args = parse_args()
    with one_line_errors():
        forbid_unpickling()
        cfg = load_config(args.config, args.cfg_options, work_dir=args.work_dir, launcher=args.launcher)
        cfg.resume = args.resume
        if args.amp:
            use_amp_to_train(cfg)
        if args.resume:
            resume_latest(cfg, named='load_from' in (args.cfg_options or {}))
        model = build_model(cfg)  # a mistake shows here, before anything is written
        check_optimizer(cfg, model)
        check_starts(cfg)
        check_backbone(cfg, model)
        del model
        check_data(cfg, 'train')
        check_data(cfg, 'val')
        check_scores(cfg, 'val')
        use_cpu_processes(cfg)
        with writing_into(cfg.work_dir, after=RESUME), ProgressBarHook() as bars, LabelGuardHook(cfg) as labels:
            runner = RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)
            runner.register_hook(CheckpointGuardHook())
            runner.register_hook(bars)
            runner.register_hook(labels)
            guard_checkpoints(runner, after=RESUME)
            if find_bank(bare_model(runner.model)) and not any(isinstance(hook, CSGHook) for hook in runner.hooks):
                log_size(runner)  # as the hook does
            runner.train()


if __name__ == '__main__':
    main()
