#!/usr/bin/env python
"""Report everything that is wrong with a dataset: reads its annotations and every image.

check_dataset.py data.train_json=blood/train.json data.train_images=blood/images \\
    data.val_json=blood/val.json data.val_images=blood/images
check_dataset.py --config-file dino/dino_r50_4scale_12ep.py   # the datasets that the config names

The overrides are those of train_net.py. The exit status is 0 if a run would use all of the data, 1
if it would be refused, stop or skip some, and 2 if nothing can be checked. docs/data_faults.md says
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

from detectron2.data import MetadataCatalog
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from lite_detr import cli
from lite_detr.data.catalog import (
    TRAIN_KEYS,
    VAL_KEYS,
    check_named,
    dataset_names,
    load_named_content,
)
from lite_detr.data.coco import check_same_categories, given_paths
from lite_detr.data.faults import Fault, Outcome, join_first
from lite_detr.data.inspection import Inspection, inspect_content, inspect_dataset
from lite_detr.errors import DatasetError
from lite_detr.labels import printable
from lite_detr.overrides import load_config

CONFIG = "deformable_detr/lite_deformable_detr_r50_h3l1_2p1x3_50ep.py"
MAX_NAMED = 3


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A dataset to inspect.

    Attributes:
        source: its annotation file, or its name in Detectron2's catalog.
        image_root: the folder of its images; empty if records name them in full.
        is_train: it is for training.
        name: in Detectron2's catalog; empty if it is given by paths.
    """

    source: str
    image_root: str
    is_train: bool
    name: str = ""

    def inspect(self, num_queries: int | None, map_files) -> Inspection:
        for_evaluation = not self.is_train
        if not self.name:
            return inspect_dataset(
                self.source, self.image_root, for_evaluation, num_queries, map_files
            )
        try:
            loaded = load_named_content(self.name, "train" if self.is_train else "test")
        except DatasetError as error:
            fault = Fault("annotation file", Outcome.REFUSED, str(error), (self.source,))
            return Inspection((fault,))
        if loaded is None:
            message = f"{self.source} is a PyTorch dataset, whose records cannot be inspected"
            return Inspection((Fault("PyTorch dataset", Outcome.USED, message, (self.source,)),))
        in_catalog = not MetadataCatalog.get(self.name).get("checked")
        return inspect_content(*loaded, for_evaluation, num_queries, map_files, in_catalog)


def find_datasets(cfg: DictConfig) -> dict[str, Dataset]:
    """Return the datasets that a config gives, by the titles of their reports.

    Raises:
        DatasetError: a path is missing, or a named dataset is not available.
    """
    paths, datasets = given_paths(cfg), {}
    for split, keys in (("train", TRAIN_KEYS), ("test", VAL_KEYS)):
        found = [paths[key] for key in keys if key in paths]
        if len(found) == 1:
            raise DatasetError(f"data.{keys[0]} and data.{keys[1]} go together: give both")
        if found:
            datasets[split] = Dataset(found[0], found[1], split == "train")
    if datasets:
        return datasets
    for split in ("train", "test"):
        check_named(cfg, split)
        for name in dataset_names(cfg, split):
            metadata = MetadataCatalog.get(name)
            source = metadata.get("json_file") or f"dataset {name!r}"
            image_root = metadata.get("image_root") or ""
            title = f"{split} ({name})"
            datasets[title] = Dataset(source, image_root, split == "train", name)
    return datasets


def describe(title: str, dataset: Dataset, inspection: Inspection) -> str:
    """Return the report on one dataset."""
    place = f", images in {dataset.image_root}" if dataset.image_root else ""
    lines = [f"{title}: {dataset.source}{place}"]
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
        named = [
            f"{name}: {reason}" for name, reason in zip(fault.where[:MAX_NAMED], fault.reasons)
        ]
        named += ["..."] if len(fault.where) > MAX_NAMED else []
    elif fault.outcome is Outcome.REFUSED:
        named = [fault.message]
    else:
        named = [join_first(fault.where, MAX_NAMED)]
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
    classes = [(printable(name), count) for name, count in summary["objects_by_class"].items()]
    classes.sort(key=lambda item: -item[1])
    longest = max(len(name) for name, _ in classes)
    return lines + [f"    {name:<{longest}}  {count:>8}" for name, count in classes]


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    cli.add_config_file(parser, required=False, default=CONFIG)
    parser.add_argument(
        "--workers",
        type=cli.whole_number(1),
        default=os.cpu_count(),
        metavar="N",
        help="processes that read images (default: the number of cores)",
    )
    parser.add_argument(
        "--json", type=cli.file_name(".json"), metavar="FILE", help="write the whole report to it"
    )
    cli.add_overrides(parser)
    return parser.parse_args(argv)


@cli.user_errors(status=2)
def main(argv: Sequence[str] | None = None) -> int:
    """Print the reports and return the exit status."""
    args = parse_args(argv)
    cfg = load_config(args.config_file, args.opts)
    datasets = find_datasets(cfg)
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
    for title, inspection in reports.items():
        for line in describe(title, datasets[title], inspection).splitlines():
            print(printable(line))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(as_json(datasets, reports), indent=1))
    return int(any(inspection.loses_data for inspection in reports.values()))


def inspect_all(
    datasets: dict[str, Dataset], num_queries: int | None, workers: int
) -> dict[str, Inspection]:
    """Inspect the datasets one after the other, with several processes each."""
    reports = {}
    with ProcessPoolExecutor(workers) as pool:
        for title, dataset in datasets.items():

            def map_files(function, records, title=title):
                results = pool.map(function, records, chunksize=8)
                return tqdm(results, desc=title, total=len(records), unit="image")

            reports[title] = dataset.inspect(num_queries, map_files)
    if {"train", "test"} <= reports.keys():
        compare_categories(datasets, reports)
    return reports


def compare_categories(datasets: dict[str, Dataset], reports: dict[str, Inspection]) -> None:
    """Add a fault if validation has other categories, for which training would be refused."""
    train, test = reports["train"], reports["test"]
    if not (train.summary and test.summary):
        return
    source = datasets["test"].source
    try:
        check_same_categories(datasets["train"].source, train, source, test)
    except DatasetError as error:
        fault = Fault("different categories", Outcome.REFUSED, str(error), (source,))
        reports["test"] = dataclasses.replace(test, faults=(fault, *test.faults))


def as_json(datasets: dict[str, Dataset], reports: dict[str, Inspection]) -> dict:
    """Return the reports as the JSON file holds them."""
    return {
        title: {
            "json_file": datasets[title].source,
            "image_root": datasets[title].image_root,
            "summary": inspection.summary,
            "faults": [
                dataclasses.asdict(fault) | {"outcome": fault.outcome.name.lower()}
                for fault in inspection.faults
            ],
        }
        for title, inspection in reports.items()
    }


if __name__ == "__main__":
    sys.exit(main())
