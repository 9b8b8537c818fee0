"""Reports on the datasets of a config: everything that is wrong with them, and what they hold."""

import dataclasses
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from detectron2.data import MetadataCatalog
from omegaconf import DictConfig
from tqdm import tqdm

from ..errors import DatasetError
from ..labels import printable
from .catalog import TRAIN_KEYS, VAL_KEYS, check_named, dataset_names, load_named_content
from .coco import check_same_categories, given_paths
from .faults import Fault, Outcome, join_first
from .inspection import Inspection, inspect_content, inspect_dataset

MAX_NAMED = 3


@dataclasses.dataclass(frozen=True)
class NamedDataset:
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


def find_datasets(cfg: DictConfig) -> dict[str, NamedDataset]:
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
            datasets[split] = NamedDataset(found[0], found[1], split == "train")
    if datasets:
        return datasets
    for split in ("train", "test"):
        check_named(cfg, split)
        for name in dataset_names(cfg, split):
            metadata = MetadataCatalog.get(name)
            source = metadata.get("json_file") or f"dataset {name!r}"
            image_root = metadata.get("image_root") or ""
            title = f"{split} ({name})"
            datasets[title] = NamedDataset(source, image_root, split == "train", name)
    return datasets


def describe(title: str, dataset: NamedDataset, inspection: Inspection) -> str:
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


def inspect_all(
    datasets: dict[str, NamedDataset], num_queries: int | None, workers: int
) -> dict[str, Inspection]:
    """Inspect the datasets one after the other, with several processes each.

    Args:
        datasets: see :func:`find_datasets`.
        num_queries: the number of objects of an image that the model can match.
        workers: the number of processes.

    Raises:
        DatasetError: a process was killed.
    """
    reports = {}
    try:
        with ProcessPoolExecutor(workers) as pool:
            for title, dataset in datasets.items():

                def map_files(function, records, title=title):
                    results = pool.map(function, records, chunksize=8)
                    return tqdm(results, desc=title, total=len(records), unit="image")

                reports[title] = dataset.inspect(num_queries, map_files)
    except BrokenProcessPool as error:
        raise DatasetError(
            "a process that reads images was killed, perhaps for want of memory: give fewer "
            f"--workers (now {workers})"
        ) from error
    if {"train", "test"} <= reports.keys():
        compare_categories(datasets, reports)
    return reports


def compare_categories(datasets: dict[str, NamedDataset], reports: dict[str, Inspection]) -> None:
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


def as_json(datasets: dict[str, NamedDataset], reports: dict[str, Inspection]) -> dict:
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
