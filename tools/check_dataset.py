#!/usr/bin/env python
"""Report all that is wrong with a dataset before a training: reads its annotations and every image.

check_dataset.py data.train_json=blood/train.json data.train_images=blood/images \\
    data.val_json=blood/val.json data.val_images=blood/images
check_dataset.py --config-file dino/dino_r50_4scale_12ep.py   # the datasets that the config names

The options are those of train_net.py. The exit status is 0 if a run would use all of the data, 1 if
it would be refused, stop or skip some, and 2 if there is nothing to check. docs/data_faults.md says
what becomes of each kind of fault.
"""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from detectron2.data import MetadataCatalog
from omegaconf import OmegaConf
from tqdm import tqdm

from lite_detr import model_zoo
from lite_detr.data.coco import (
    TRAIN_KEYS,
    VAL_KEYS,
    DatasetError,
    check_registered,
    check_same_categories,
    given_paths,
)
from lite_detr.data.faults import Fault, Outcome, some
from lite_detr.data.inspection import Inspection, inspect_dataset
from lite_detr.overrides import load_config

CONFIG = "deformable_detr/lite_deformable_detr_r50_h3l1_2p1x3_50ep.py"
NAMED = 3


def find_datasets(cfg) -> dict[str, tuple[str, str]]:
    """The annotation file and the folder of images of each split that a config gives.

    Raises:
        DatasetError: only one of the two is given, or a named dataset is not there.
    """
    paths, datasets = given_paths(cfg), {}
    for split, keys in (("train", TRAIN_KEYS), ("test", VAL_KEYS)):
        found = [paths[key] for key in keys if key in paths]
        if len(found) == 1:
            raise DatasetError(f"data.{keys[0]} and data.{keys[1]} go together: give both")
        if found:
            datasets[split] = (found[0], found[1])
    if datasets:
        return datasets
    check_registered(cfg)
    for split in ("train", "test"):
        names = cfg.dataloader[split].dataset.names
        for name in [names] if isinstance(names, str) else names:
            metadata = MetadataCatalog.get(name)
            datasets[f"{split} ({name})"] = (metadata.json_file, metadata.image_root)
    return datasets


def describe(split: str, paths: tuple[str, str], inspection: Inspection) -> str:
    """The report on one dataset."""
    lines = [f"{split}: {paths[0]}, images in {paths[1]}"]
    for outcome in Outcome:
        faults = [fault for fault in inspection.faults if fault.outcome is outcome]
        if faults:
            lines.append(f"  {outcome.value}")
            lines += [line for fault in faults for line in describe_fault(fault)]
    if not inspection.faults:
        lines.append("  nothing to report")
    return "\n".join(lines + describe_summary(inspection.summary))


def describe_fault(fault: Fault) -> list[str]:
    lines = [f"    {len(fault.where):>6}  {fault.kind}"]
    if fault.reasons:
        named = [f"{name}: {why}" for name, why in zip(fault.where[:NAMED], fault.reasons)]
        named += ["..."] if len(fault.where) > NAMED else []
    elif fault.outcome is Outcome.REFUSED:
        named = [fault.message]
    else:
        named = [some(fault.where, NAMED)]
    return lines + [f"            {name}" for name in named]


def describe_summary(summary: dict) -> list[str]:
    if not summary:
        return []
    width, height, per_image = (
        "{smallest} to {largest} (median {median:g})".format_map(summary[key])
        for key in ("width", "height", "objects_per_image")
    )
    by_size = ", ".join(f"{count} {size}" for size, count in summary["objects_by_size"].items())
    lines = [
        f"  {summary['images']} images, {width} wide, {height} high",
        f"  {summary['objects']} objects: {by_size}; {per_image} in an image",
    ]
    classes = sorted(summary["objects_by_class"].items(), key=lambda item: -item[1])
    longest = max(len(name) for name, _ in classes)
    return lines + [f"    {name:<{longest}}  {count:>8}" for name, count in classes]


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", default=CONFIG, help="a file, or a name of the model zoo")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count(), help="processes that read images"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the whole report to a file"
    )
    parser.add_argument("opts", nargs="*", metavar="key=value", help="as those of train_net.py")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the reports; returns the exit status."""
    args = parse_args(argv)
    try:
        cfg = load_config(args.config_file, args.opts)
        datasets = find_datasets(cfg)
    except (DatasetError, FileNotFoundError, model_zoo.ConfigError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    num_queries = OmegaConf.select(cfg, "model.queries.num_queries")
    try:
        reports = inspect_all(datasets, num_queries, args.workers)
    except BrokenProcessPool:
        print(
            "error: a process that reads images was killed, perhaps for want of memory: "
            f"give fewer --workers (now {args.workers})",
            file=sys.stderr,
        )
        return 2
    for split, inspection in reports.items():
        print(describe(split, datasets[split], inspection))
    if args.json:
        args.json.write_text(json.dumps(as_json(datasets, reports), indent=1))
    return int(any(inspection.loses_data for inspection in reports.values()))


def inspect_all(datasets: dict, num_queries: int | None, workers: int) -> dict[str, Inspection]:
    """Inspects the datasets one after the other, with several processes each."""
    reports = {}
    with ProcessPoolExecutor(workers) as pool:
        for split, paths in datasets.items():

            def map_files(function, records, split=split):
                results = pool.map(function, records, chunksize=8)
                return tqdm(results, desc=split, total=len(records), unit="image")

            is_train = split.startswith("train")
            reports[split] = inspect_dataset(*paths, not is_train, num_queries, map_files)
    if {"train", "test"} <= reports.keys():
        compare_categories(datasets, reports)
    return reports


def compare_categories(datasets: dict, reports: dict[str, Inspection]) -> None:
    """Adds what a training would be refused for: validation with other categories."""
    train, test = reports["train"], reports["test"]
    if not (train.summary and test.summary):
        return
    try:
        check_same_categories(datasets["train"][0], train, datasets["test"][0], test)
    except DatasetError as error:
        fault = Fault("different categories", Outcome.REFUSED, str(error), (datasets["test"][0],))
        reports["test"] = dataclasses.replace(test, faults=(fault, *test.faults))


def as_json(datasets: dict, reports: dict[str, Inspection]) -> dict:
    return {
        split: {
            "json_file": datasets[split][0],
            "image_root": datasets[split][1],
            "summary": inspection.summary,
            "faults": [
                dataclasses.asdict(fault) | {"outcome": fault.outcome.name.lower()}
                for fault in inspection.faults
            ],
        }
        for split, inspection in reports.items()
    }


if __name__ == "__main__":
    sys.exit(main())
