#!/usr/bin/env python
"""Train or evaluate a detector from a lazy config, with Detectron2's trainers and hooks.

    train_net.py --config-file deformable_detr/lite_deformable_detr_r50_h3l1_2p1x3_50ep.py \\
        --num-gpus 8 train.output_dir=output/lite

The config is a file or a name of the model zoo (``lite_detr.model_zoo.list_configs()``); options
follow as ``key=value``. A dataset of one's own needs no code: see docs/own_data.md.
"""

import argparse
import logging
import sys

from detectron2.config import instantiate
from detectron2.engine import default_argument_parser, default_setup, hooks
from detectron2.engine.defaults import create_ddp_model
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from omegaconf import DictConfig
from torch import nn
from torch.multiprocessing import ProcessExitedException

from lite_detr import cli, model_zoo, ops
from lite_detr.checkpoint import DetrCheckpointer
from lite_detr.data.catalog import check_registered, split_test_sets
from lite_detr.data.coco import apply_data_config
from lite_detr.engine.ema import EMA
from lite_detr.engine.launch import launch
from lite_detr.engine.pictures import build_pictures_hook
from lite_detr.engine.preemption import Preemption, passing_signals_on
from lite_detr.engine.records import Records
from lite_detr.engine.resume import ResumePoint
from lite_detr.engine.trainer import Trainer
from lite_detr.errors import DivergenceError, WeightsError
from lite_detr.inference import DTYPES, optimize_for_program
from lite_detr.overrides import load_config
from lite_detr.random_states import same_random_states

logger = logging.getLogger("lite_detr")


def evaluate(cfg: DictConfig, model: nn.Module) -> dict:
    """Evaluate the config's test set: ``{"bbox": {"AP": ...}}``.

    With several test sets, each has its evaluator, and the results stand under its name.
    """
    test_sets, results = split_test_sets(cfg), {}
    for name, (loader, evaluator) in test_sets.items():
        results[name] = inference_on_dataset(model, instantiate(loader), instantiate(evaluator))
        if len(test_sets) > 1:
            logger.info("Results of %s:", name)
        print_csv_format(results[name])
    return results if len(results) > 1 else next(iter(results.values()))


def train(cfg: DictConfig, resume: bool) -> None:
    model = instantiate(cfg.model).to(cfg.train.device)
    logger.info(
        "%.2f M parameters; %s operators run on %s",
        sum(p.numel() for p in model.parameters()) / 1e6,
        ops.backend(cfg.train.device),
        cfg.train.device,
    )
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    loader = instantiate(cfg.dataloader.train)

    model = create_ddp_model(model, **cfg.train.ddp)
    trainer = Trainer(
        model,
        loader,
        optimizer,
        precision=cfg.train.amp.precision if cfg.train.amp.enabled else "float32",
        accumulation=cfg.train.accumulation,
        max_bad_batches=cfg.train.max_bad_batches,
    )
    checkpointer = DetrCheckpointer(model, cfg.train.output_dir, trainer=trainer)
    ema = None
    if cfg.train.ema.enabled:
        ema = EMA(model, cfg.train.ema.decay, cfg.train.output_dir)
        checkpointer.add_checkpointable("ema", ema.averaged)
    preemption = Preemption()

    def evaluate_between_iterations() -> dict:
        with preemption.leaving_at_once(), same_random_states():
            averaged = evaluate(cfg, ema.averaged.module) if ema is not None else {}
            averaged = {f"{task}_ema": result for task, result in averaged.items()}
            return averaged | evaluate(cfg, model)

    resume_point = ResumePoint(
        checkpointer,
        loader,
        Records(cfg.train.output_dir, cfg.train.max_iter),
        preemption,
        cfg.train.eval_period,
        **cfg.train.checkpointer,
    )
    trainer.register_hooks(
        [
            hooks.IterationTimer(),
            hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
            ema,
            # What is behind it is done again for the iteration that a training goes on from.
            resume_point,
            hooks.EvalHook(cfg.train.eval_period, evaluate_between_iterations),
            build_pictures_hook(cfg, model),
        ]
    )
    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=resume)
    if comm.is_main_process():
        writers = resume_point.writers(resume)
        trainer.register_hooks([hooks.PeriodicWriter(writers, period=cfg.train.log_period)])
    try:
        with preemption:
            trainer.train(trainer.iter + 1 if checkpointer.resumed else 0, cfg.train.max_iter)
    except DivergenceError as error:
        error.checkpoint = checkpointer.get_checkpoint_file()
        raise


@cli.user_errors()
def main(args) -> None:
    """Train or evaluate, in every process of a job."""
    cfg = load_config(args.config_file, args.opts)
    setup_logger(cfg.train.output_dir, distributed_rank=comm.get_rank(), name="lite_detr")
    prepare_data(cfg, args.eval_only)
    default_setup(cfg, args)
    if args.eval_only:
        if not cfg.train.init_checkpoint:
            raise WeightsError("--eval-only needs weights: set train.init_checkpoint=FILE")
        model = instantiate(cfg.model).to(cfg.train.device)
        DetrCheckpointer(model).load(cfg.train.init_checkpoint)
        if args.optimize:
            # Each process has its own; as nothing is trained, there is nothing to share.
            evaluate(cfg, optimize_for_program(model, args.optimize))
        else:
            evaluate(cfg, create_ddp_model(model, **cfg.train.ddp))
    else:
        train(cfg, args.resume)


def prepare_data(cfg: DictConfig, eval_only: bool) -> None:
    """Registers the datasets that the config gives by paths, and checks those it names.

    Raises:
        DatasetError: a dataset is missing, broken, or does not fit the config.
    """
    splits = ("test",) if eval_only else ("train", "test")
    apply_data_config(cfg, splits)
    check_registered(cfg, splits)


def parse_arguments() -> argparse.Namespace:
    parser = default_argument_parser()
    parser.add_argument(
        "--optimize",
        choices=DTYPES,
        metavar="DTYPE",
        help=f"with --eval-only: lite_detr.optimize_for_inference, in {', '.join(DTYPES)}",
    )
    args = parser.parse_args()
    if args.optimize and not args.eval_only:
        parser.error("--optimize goes with --eval-only: what is optimized cannot be trained")
    return args


if __name__ == "__main__":
    args = parse_arguments()
    try:
        with cli.user_errors():
            args.config_file = model_zoo.get_lazy_config_file(args.config_file)
            if args.num_gpus > 1:
                # Before the processes start; what is only worth a warning is left to the first.
                logger.setLevel(logging.ERROR)
                prepare_data(load_config(args.config_file, args.opts), args.eval_only)
            with passing_signals_on():
                launch(main, args)
    except ProcessExitedException as error:
        if error.exit_code > 0:
            # Not killed: the process has said why it left, or was asked to.
            sys.exit(error.exit_code)
        print(f"error: {error}", file=sys.stderr)
        # As shells count it.
        sys.exit(128 - error.exit_code)
