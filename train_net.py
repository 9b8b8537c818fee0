#!/usr/bin/env python
"""Train or evaluate a detector from a lazy config, with Detectron2's trainers and hooks.

    train_net.py --config-file deformable_detr/lite_deformable_detr_r50_h3l1_2p1x3_50ep.py \\
        --num-gpus 8 train.output_dir=output/lite

The config is a file or a name of the model zoo (``lite_detr.model_zoo.list_configs()``); options
follow as ``key=value``. A dataset of one's own needs no code: see docs/own_data.md.
"""

import logging
import sys

from detectron2.config import LazyConfig, instantiate
from detectron2.engine import (
    AMPTrainer,
    SimpleTrainer,
    default_argument_parser,
    default_setup,
    default_writers,
    hooks,
    launch,
)
from detectron2.engine.defaults import create_ddp_model
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from omegaconf import DictConfig
from torch import nn

from lite_detr import model_zoo
from lite_detr.checkpoint import DetrCheckpointer, WeightsError
from lite_detr.data.coco import DatasetError, apply_data_config, check_registered

logger = logging.getLogger("lite_detr")


def evaluate(cfg: DictConfig, model: nn.Module) -> dict:
    """Runs the config's evaluator over its test set: ``{"bbox": {"AP": ...}}``."""
    results = inference_on_dataset(
        model, instantiate(cfg.dataloader.test), instantiate(cfg.dataloader.evaluator)
    )
    print_csv_format(results)
    return results


def train(cfg: DictConfig, resume: bool) -> None:
    model = instantiate(cfg.model).to(cfg.train.device)
    logger.info("%.2f M parameters", sum(p.numel() for p in model.parameters()) / 1e6)
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    loader = instantiate(cfg.dataloader.train)

    model = create_ddp_model(model, **cfg.train.ddp)
    trainer = (AMPTrainer if cfg.train.amp.enabled else SimpleTrainer)(model, loader, optimizer)
    checkpointer = DetrCheckpointer(
        model, cfg.train.output_dir, fine_tune=not resume, trainer=trainer
    )
    trainer.register_hooks(
        [
            hooks.IterationTimer(),
            hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
            hooks.PeriodicCheckpointer(checkpointer, **cfg.train.checkpointer)
            if comm.is_main_process()
            else None,
            hooks.EvalHook(cfg.train.eval_period, lambda: evaluate(cfg, model)),
            hooks.PeriodicWriter(
                default_writers(cfg.train.output_dir, cfg.train.max_iter),
                period=cfg.train.log_period,
            )
            if comm.is_main_process()
            else None,
        ]
    )
    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=resume)
    start = trainer.iter + 1 if resume and checkpointer.has_checkpoint() else 0
    trainer.train(start, cfg.train.max_iter)


def main(args) -> None:
    """Runs in every process of a job."""
    cfg = load_config(args)
    setup_logger(cfg.train.output_dir, distributed_rank=comm.get_rank(), name="lite_detr")
    prepare_data(cfg, args.eval_only)
    default_setup(cfg, args)
    if args.eval_only:
        if not cfg.train.init_checkpoint:
            raise WeightsError("--eval-only needs weights: set train.init_checkpoint=FILE")
        model = instantiate(cfg.model).to(cfg.train.device)
        DetrCheckpointer(model).load(cfg.train.init_checkpoint)
        evaluate(cfg, create_ddp_model(model, **cfg.train.ddp))
    else:
        train(cfg, args.resume)


def load_config(args) -> DictConfig:
    return LazyConfig.apply_overrides(model_zoo.get_config(args.config_file), args.opts)


def prepare_data(cfg: DictConfig, eval_only: bool) -> None:
    """Registers the datasets that the config gives by paths, and checks those it names.

    Raises:
        DatasetError: a dataset is missing, broken, or does not fit the config.
    """
    splits = ("test",) if eval_only else ("train", "test")
    apply_data_config(cfg, splits)
    check_registered(cfg, splits)


if __name__ == "__main__":
    args = default_argument_parser().parse_args()
    try:
        args.config_file = model_zoo.get_lazy_config_file(args.config_file)
        if args.num_gpus > 1:
            # Said here once, and not by every process from the depth of a traceback; what is only
            # worth a warning is left to the first of them.
            logger.setLevel(logging.ERROR)
            prepare_data(load_config(args), args.eval_only)
        launch(
            main,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(args,),
        )
    except (FileNotFoundError, model_zoo.ConfigError, DatasetError, WeightsError) as error:
        sys.exit(f"error: {error}")
