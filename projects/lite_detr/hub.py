"""Trained detectors on the Hugging Face Hub, or in a folder of the same files.

A detector is one file, ``model.safetensors``, with its weights, its config and the names of its
classes. Nothing that it holds is run: see :mod:`lite_detr.inference.released`.
"""

import re
from pathlib import Path
from types import ModuleType

from detectron2.config import instantiate
from torch import nn

from .checkpoint import DetrCheckpointer
from .checkpoint.release_file import Release, read_release
from .errors import MissingFileError, MissingPackageError, downloading
from .inference.predictor import TrainedDetector
from .inference.released import released_config

# The name of the file in a repository, and of its page.
FILE = "model.safetensors"
CARD = "README.md"
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


def from_pretrained(
    name: str,
    *,
    threshold: float = 0.0,
    optimize: str | None = None,
    device: str | None = None,
    revision: str | None = None,
    endpoint: str | None = None,
) -> TrainedDetector:
    """Return a trained detector that is ready to predict images.

    Args:
        name: ``user/name`` on the Hub, a folder with ``model.safetensors``, or such a file.
        threshold: detections with a lower score are dropped.
        optimize: name of a dtype for :func:`lite_detr.optimize_for_inference`; None disables it.
        device: None takes a GPU if there is one.
        revision: a branch, tag or commit of the repository.
        endpoint: another address than the Hub's.

    Raises:
        MissingFileError: the name is neither a file, a folder with one, nor a repository's.
        MissingPackageError: it is a repository's, and huggingface_hub is not installed.
        DownloadError: the repository cannot be reached, or has no such file.
        WeightsError: the file is broken, has no config, or one that is refused.
    """
    config = released_config(find_file(name, revision, endpoint), device)
    return TrainedDetector(config, threshold, optimize)


def load(
    name: str,
    *,
    device: str | None = None,
    revision: str | None = None,
    endpoint: str | None = None,
) -> nn.Module:
    """Return a trained detector as a model of Detectron2, in evaluation mode.

    Arguments and errors are those of :func:`from_pretrained`.
    """
    path = find_file(name, revision, endpoint)
    config = released_config(path, device)
    model = instantiate(config.model).to(config.train.device).eval()
    DetrCheckpointer(model).load(path)
    return model


def push(
    weights: str | Path,
    repository: str,
    *,
    private: bool = False,
    message: str = "Upload a detector of lite_detr",
    endpoint: str | None = None,
) -> str:
    """Upload a detector to the Hub, with a page that says how to use it.

    The repository is created if need be; a page that it has stays.

    Args:
        weights: a safetensors file with a config, as ``train.safetensors=True`` and
            ``tools/convert_checkpoint.py`` write it.
        repository: ``user/name``.
        private: whether a new repository is private.
        message: of the commit.
        endpoint: another address than the Hub's.

    Returns:
        The address of the repository.

    Raises:
        MissingPackageError: huggingface_hub is not installed.
        WeightsError: the file is broken, has no config, or one that would be refused.
        DownloadError: the Hub cannot be reached, or refuses the upload.
    """
    hub = import_hub()
    path = find_file(str(weights), None, None)
    # What others could not load is not uploaded.
    released_config(path)
    api = hub.HfApi(endpoint=endpoint)
    with downloading(f"the upload of {path} to {repository}", "lite_detr.hub.push(FILE, ...)"):
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_file(
            path_or_fileobj=path, path_in_repo=FILE, repo_id=repository, commit_message=message
        )
        if not api.file_exists(repository, CARD):
            api.upload_file(
                path_or_fileobj=card(repository, read_release(path)).encode(),
                path_in_repo=CARD,
                repo_id=repository,
                commit_message=message,
            )
    return str(address)


def card(repository: str, release: Release) -> str:
    """Return the page of a repository."""
    kind = str((release.config or {})["model"]["_target_"]).rpartition(".")[2]
    names = release.class_names
    classes = f"\nClasses: {', '.join(names)}.\n" if names else ""
    return f"""---
library_name: lite-detr
pipeline_tag: object-detection
---
# {repository.partition("/")[2]}

A {kind} detector, trained with lite_detr {release.version}.
{classes}
```python
import lite_detr

detector = lite_detr.from_pretrained("{repository}", threshold=0.5)
for prediction in detector.predict_files(["image.jpg"]):
    print(prediction.instances)
```
"""


def find_file(name: str, revision: str | None, endpoint: str | None) -> str:
    """Return the local path of a detector's file, which is downloaded if it is on the Hub."""
    path = Path(name)
    is_folder = path.is_dir()
    path = path / FILE if is_folder else path
    if path.is_file():
        return str(path)
    if is_folder or path.suffix == ".safetensors" or not REPOSITORY.fullmatch(name):
        raise MissingFileError(
            f"weights {path}: there is no such file; give a file, a folder with {FILE}, or "
            "user/name on the Hub"
        )
    hub = import_hub()
    with downloading(f"weights {name}", "the path of a file or of its folder"):
        return hub.hf_hub_download(name, FILE, revision=revision, endpoint=endpoint)


def import_hub() -> ModuleType:
    try:
        import huggingface_hub
    except ModuleNotFoundError:
        raise MissingPackageError(
            "detectors on the Hub need huggingface_hub, which is not installed: "
            'pip install "lite-detr[hub]", or pip install huggingface_hub'
        ) from None
    return huggingface_hub
