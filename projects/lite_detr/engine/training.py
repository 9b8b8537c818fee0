"""Train or evaluate a detector from a lazy config, with Detectron2's trainers and hooks."""

import argparse
import logging
import os
from contextlib import nullcontext

import torch
from detectron2.config import instantiate
from detectron2.engine import default_setup, hooks
from detectron2.engine.defaults import create_ddp_model
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from omegaconf import DictConfig, OmegaConf
from torch import nn

from .. import ops
from ..checkpoint import DetrCheckpointer
from ..cores import share_cores
from ..data.catalog import check_registered, class_metadata, split_test_sets
from ..data.coco import apply_data_config
from ..errors import DivergenceError, WeightsError
from ..inference import keep_freed_memory, optimize_for_program
from ..inference.optimize import use_channels_last
from ..inference.released import release_config, release_run
from ..inference.tta import add_tta, refuse_tta
from ..modeling.detector import Detector
from ..overrides import build, load_config
from ..random_states import same_random_states
from .best import build_best_checkpointer, check_best
from .ema import AVERAGED, EMA
from .launch import find_place
from .options import RunOptions, check_folder, check_options, check_resumed
from .pictures import build_pictures_hook
from .preemption import Preemption
from .progress import ProgressBar, set_up_logging
from .resume import Records, ResumePoint
from .summary import summarize
from .trackers import build_trackers, check_trackers
from .trainer import Trainer

logger = logging.getLogger("lite_detr")


def plan(args: argparse.Namespace) -> None:
    """Decide on the number of a job's processes, and check what they need before they start.

    Warnings are left to the first of them.

    Args:
        args: those of :mod:`lite_detr.commands.train`; without ``num_gpus`` it is set, to 1 on GPUs
            and otherwise to the number that this machine's cores serve best.

    Raises:
        LiteDetrError: something in the config does not fit.
    """
    shares_cores = (
        args.num_gpus is None
        and args.num_machines == 1
        and find_place(args, os.environ) is None
        and not torch.cuda.is_available()
    )
    if args.num_gpus is None:
        args.num_gpus = 1
    if args.num_gpus <= 1 and not shares_cores:
        # This process checks for itself.
        return
    level = logger.level
    logger.setLevel(logging.ERROR)
    cfg = load_config(args.config_file, args.opts)
    if shares_cores:
        batch_size = OmegaConf.select(cfg, "dataloader.train.total_batch_size")
        args.num_gpus = share_cores(batch_size or 1)
    if args.num_gpus > 1:
        # The process that writes is on the first machine.
        if not args.eval_only and args.machine_rank == 0:
            check_folder(str(cfg.train.output_dir), args.resume)
        prepare(cfg, args.eval_only)
    logger.setLevel(level)


def run(args: argparse.Namespace) -> None:
    """Train or evaluate, in every process of a job.

    Args:
        args: those of :mod:`lite_detr.commands.train`.
    """
    cfg = load_config(args.config_file, args.opts)
    check_options(cfg.train)
    if not args.eval_only:
        check_trackers(cfg.train)
    resume = not args.eval_only and check_folder(str(cfg.train.output_dir), args.resume)
    set_up_logging(cfg.train.output_dir, comm.get_rank())
    prepare(cfg, args.eval_only)
    default_setup(cfg, args)
    if cfg.train.device == "cpu":
        keep_freed_memory()
    if not args.eval_only:
        train(cfg, resume)
        return
    if not cfg.train.init_checkpoint:
        raise WeightsError("evaluation needs weights: set train.init_checkpoint=FILE")
    model = build_model(cfg)
    DetrCheckpointer(model).load(cfg.train.init_checkpoint)
    if args.optimize:
        # Each process has its own; as nothing is trained, there is nothing to share.
        model = optimize_for_program(model, args.optimize)
    else:
        model = create_ddp_model(model, **cfg.train.ddp)
    evaluate(cfg, add_tta(cfg, model))


def train(cfg: DictConfig, resume: bool) -> None:
    options = RunOptions(cfg)
    writes_safetensors = bool(OmegaConf.select(cfg, "train.safetensors"))
    if writes_safetensors:
        # What cannot be written is an error before training.
        release_config(cfg)
    model = build_model(cfg)
    if isinstance(model, Detector) and model.device.type == "cpu":
        # Convolutions and their gradients are faster then, in bfloat16 twice as fast.
        use_channels_last(model)
    cfg.optimizer.params.model = model
    optimizer = build(cfg, "optimizer")
    loader = build(cfg, "dataloader.train")

    model = create_ddp_model(model, **cfg.train.ddp)
    trainer = Trainer(
        model,
        loader,
        optimizer,
        precision=cfg.train.amp.precision if cfg.train.amp.enabled else "float32",
        accumulation=cfg.train.accumulation,
        max_bad_batches=cfg.train.max_bad_batches,
    )
    checkpointer = DetrCheckpointer(model, cfg.train.output_dir, options=options, trainer=trainer)
    ema = None
    if cfg.train.ema.enabled:
        ema = EMA(model, cfg.train.ema.decay, cfg.train.output_dir)
        checkpointer.add_checkpointable("ema", ema.averaged)
    best = build_best_checkpointer(cfg, model, ema)
    preemption = Preemption()

    def evaluate_between_iterations() -> dict:
        with preemption.leaving_at_once(), same_random_states():
            averaged = evaluate(cfg, ema.averaged.module) if ema is not None else {}
            averaged = {f"{task}{AVERAGED}": result for task, result in averaged.items()}
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
            hooks.LRScheduler(scheduler=build(cfg, "lr_multiplier")),
            ema,
            # The hooks after it run again for the iteration that a run goes on from.
            resume_point,
            hooks.EvalHook(cfg.train.eval_period, evaluate_between_iterations),
            best,
            build_pictures_hook(cfg, model),
        ]
    )
    rest = checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=resume)
    if checkpointer.resumed:
        check_resumed(rest, trainer.iter, cfg.train)
    start = trainer.iter + 1 if checkpointer.resumed else 0
    bar = nullcontext()
    if comm.is_main_process():
        writers = [*build_trackers(cfg), *resume_point.writers(resume)]
        bar = ProgressBar(start, cfg.train.max_iter)
        trainer.register_hooks([hooks.PeriodicWriter(writers, period=cfg.train.log_period), bar])
    logger.info("%s", describe(cfg))
    try:
        with preemption, bar:
            trainer.train(start, cfg.train.max_iter)
    except DivergenceError as error:
        error.checkpoint = checkpointer.get_checkpoint_file()
        raise
    if comm.is_main_process():
        if writes_safetensors:
            for path in release_run(cfg):
                logger.info("%s has the weights, the config and the names of the classes", path)
        logger.info("%s", summarize(cfg, trainer, best))


def describe(cfg: DictConfig) -> str:
    """Return what is about to happen, and where to find it, in a sentence or two."""
    train, processes = cfg.train, comm.get_world_size()
    batch_size = OmegaConf.select(cfg, "dataloader.train.total_batch_size")
    images = f" of {batch_size * train.accumulation} images" if batch_size else ""
    often = f"every {train.eval_period} iterations and " if train.eval_period else ""
    return (
        f"Training {train.max_iter} iterations{images} in {processes} "
        f"process{'es' if processes > 1 else ''}, with an evaluation {often}at the end. "
        f"{train.output_dir} gets the weights, the complete log (log.txt) and config (config.yaml)"
    )


def build_model(cfg: DictConfig) -> nn.Module:
    model = build(cfg, "model").to(cfg.train.device)
    if metadata := class_metadata(cfg):
        model.class_names = tuple(metadata.thing_classes)
    logger.info(
        "%.2f M parameters; %s operators run on %s",
        sum(p.numel() for p in model.parameters()) / 1e6,
        ops.backend(cfg.train.device),
        cfg.train.device,
    )
    return model


def evaluate(cfg: DictConfig, model: nn.Module) -> dict:
    """Evaluate the config's test set and return ``{"bbox": {"AP": ...}}``.

    With several test sets, each has its evaluator, and its results are under its name.
    """
    test_sets, results = split_test_sets(cfg), {}
    for name, (loader, evaluator) in test_sets.items():
        results[name] = inference_on_dataset(model, instantiate(loader), instantiate(evaluator))
        if len(test_sets) > 1:
            logger.info("Results of %s:", name)
        print_csv_format(results[name])
    return results if len(results) > 1 else next(iter(results.values()))


def prepare(cfg: DictConfig, eval_only: bool) -> None:
    """Register the datasets that the config gives by paths, and check those it names.

    Raises:
        DatasetError: a dataset is missing, broken, or does not fit the config.
        ConfigError: the config asks for what training cannot do.
    """
    if not eval_only:
        refuse_tta(cfg, "training")
    splits = ("test",) if eval_only else ("train", "test")
    apply_data_config(cfg, splits)
    check_registered(cfg, splits)
    if not eval_only:
        check_best(cfg)
