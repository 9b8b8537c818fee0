#!/usr/bin/env python
"""Run a detector from an ONNX file over images, by NumPy, Pillow and ONNX Runtime alone.

    onnx_demo.py --model detector.onnx --input datasets/digits/val --output output/onnx

The file is one of tools/export.py; it says how images are prepared and what the classes are called.
One in .xml is OpenVINO's, and runs by OpenVINO, in the --precision given. Folders are searched with
their sub-folders, but not hidden ones. An image NAME.jpg becomes DIR/NAME.png, in a like
sub-folder, or DIR/NAME_2.png and so on if that name is taken. --json FILE writes the detections for
other programs. The exit status is 0 if all images were read, and 1 if one was not or none was
found. The program can be copied: it needs no other file.
"""

import argparse
import glob
import itertools
import json
import os
import sys
import tempfile
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont, ImageOps

# The suffixes that a folder is searched for; a file named on the command line may have any.
IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
# Pillow knows forty formats, some of which start other programs (EPS starts Ghostscript).
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
Image.init()
# Those that this version of Pillow knows.
IMAGE_FORMATS = tuple(name for name in FORMATS if name in Image.OPEN)
MAX_ASPECT_RATIO = 500
MAX_LABEL = 40  # characters
MAX_STEM = 240  # bytes of a picture's name before its number and its suffix
# By Okabe and Ito, for all eyes.
COLOURS = ("#0072b2", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#e69f00", "#f0e442")


class Detections(NamedTuple):
    """The objects in an image, best first.

    Attributes:
        boxes: ``[N, 4]``, (x1, y1, x2, y2) in pixels of the image.
        scores: ``[N]``
        classes: ``[N]``, int64.
    """

    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray


# Arrays by name -> boxes, scores and classes of a batch.
Run = Callable[[dict[str, np.ndarray]], Sequence[np.ndarray]]
OUTPUTS = ("boxes", "scores", "classes")
# What OpenVINO may compute in, and how a device says that it can.
PRECISIONS = {"f32": "FP32", "bf16": "BF16", "f16": "FP16"}


def load_onnx(path: str) -> tuple[Run, dict[str, str], set[str]]:
    """Return a function that runs a model, its metadata and the names of its inputs."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    metadata = session.get_modelmeta().custom_metadata_map
    inputs = {value.name for value in session.get_inputs()}
    return lambda arrays: session.run(OUTPUTS, arrays), metadata, inputs


def load_openvino(path: str, precision: str) -> tuple[Run, dict[str, str], set[str]]:
    """Return what :func:`load_onnx` does, of OpenVINO's file in .xml with its weights in .bin.

    Raises:
        ValueError: the processor does not compute in the precision.
    """
    import openvino

    core = openvino.Core()
    able = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if PRECISIONS[precision] not in able:
        found = ", ".join(name for name, word in PRECISIONS.items() if word in able)
        raise ValueError(f"--precision is {precision}, and this processor has {found}")
    model = core.read_model(path)
    keys = (("lite_detr", key) for key in ("preprocessing", "class_names"))
    metadata = {
        key: str(model.get_rt_info([section, key]).value)
        for section, key in keys
        if model.has_rt_info([section, key])
    }
    inputs = {value.any_name for value in model.inputs}
    # Without the hint, processors that have it would compute in bfloat16.
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": precision})

    def run(arrays: dict[str, np.ndarray]) -> Sequence[np.ndarray]:
        results = compiled(arrays)
        return [results[name] for name in OUTPUTS]

    return run, metadata, inputs


class OnnxDetector:
    """A detector in a file of ``tools/export.py``.

    Args:
        path: of the file.
        precision: ``f32``, ``bf16`` or ``f16``, for OpenVINO.

    Raises:
        ValueError: the file is of another program, or is not ONNX, or the processor lacks the
            precision.
    """

    def __init__(self, path: str, precision: str = "f32"):
        is_onnx = not path.endswith(".xml")
        try:
            loaded = load_onnx(path) if is_onnx else load_openvino(path, precision)
            self.run, metadata, inputs = loaded
        except ImportError as error:
            raise ValueError(f"{path} cannot be loaded: pip install {error.name}") from error
        # Of the runtimes' own kinds, which have no public names.
        except Exception as error:
            raise ValueError(f"{path} cannot be loaded: {one_line(error)}") from error
        if "preprocessing" not in metadata or inputs != {"images", "image_sizes"}:
            raise ValueError(f"{path} does not say how to prepare images; tools/export.py does")
        try:
            preprocessing = json.loads(metadata["preprocessing"])
            names = json.loads(metadata.get("class_names", "[]"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} holds metadata that are not JSON; export it again") from error
        if not is_preprocessing(preprocessing) or not is_list_of_names(names):
            raise ValueError(f"{path} holds metadata of another kind; export it again")
        self.channels, self.resize = preprocessing["channels"], preprocessing["resize"]
        self.class_names = names

    def __call__(self, image: Image.Image) -> Detections:
        """Detect objects in an upright RGB image; empty boxes are omitted.

        Raises:
            ValueError: the image cannot be resized as the detector needs it.
        """
        width, height = image.size
        if self.resize:
            size = resized(width, height, self.resize["short_side"], self.resize["max_size"])
            if min(size) == 0:
                raise ValueError(
                    "image too thin to resize: nothing is left of one side of its "
                    f"{width} x {height} pixels"
                )
            if size[0] * size[1] > Image.MAX_IMAGE_PIXELS:
                raise ValueError(f"resized to {size[0]} x {size[1]} pixels, it is too large")
            image = image.resize(size, Image.Resampling.BILINEAR)
        pixels = np.asarray(image, dtype=np.float32)
        if self.channels == "BGR":
            pixels = pixels[:, :, ::-1]
        inputs = {
            "images": np.ascontiguousarray(pixels.transpose(2, 0, 1)[None]),
            "image_sizes": np.array([pixels.shape[:2]], dtype=np.int64),
        }
        boxes, scores, classes = (output[0] for output in self.run(inputs))
        scale = np.array([width / image.width, height / image.height] * 2, dtype=np.float32)
        boxes = np.clip(boxes * scale, 0, np.array([width, height] * 2, dtype=np.float32))
        full = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        return Detections(boxes[full], scores[full], classes[full])

    def class_name(self, number: int) -> str | int:
        """Return the name of a class, or its number if the file has no name for it."""
        return self.class_names[number] if 0 <= number < len(self.class_names) else number


def is_preprocessing(value: object) -> bool:
    """Return whether metadata say how to prepare an image."""
    if not isinstance(value, dict) or value.get("channels") not in ("RGB", "BGR"):
        return False
    resize = value.get("resize", 0)
    if resize is None:
        return True
    sides = ("short_side", "max_size")
    return isinstance(resize, dict) and all(
        type(resize.get(side)) is int and 0 < resize[side] < 2**64 for side in sides
    )


def is_list_of_names(value: object) -> bool:
    """Return whether metadata are names of classes."""
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def resized(width: int, height: int, short_side: int, max_size: int) -> tuple[int, int]:
    """Return width and height for a shorter side of ``short_side`` and sides up to ``max_size``.

    Steps and rounding are those of Detectron2's ``ResizeShortestEdge``.
    """
    scale = short_side / min(height, width)
    if height < width:
        new_height, new_width = float(short_side), scale * width
    else:
        new_height, new_width = scale * height, float(short_side)
    if max(new_height, new_width) > max_size:
        scale = max_size / max(new_height, new_width)
        new_height, new_width = new_height * scale, new_width * scale
    return int(new_width + 0.5), int(new_height + 0.5)


def read(path: Path) -> Image.Image:
    """Read an image in RGB, turned as its EXIF orientation says.

    Grey images of 16 bits keep their upper eight.

    Raises:
        ValueError: the file cannot be used; the message says why.
    """
    try:
        # To open a named pipe would wait for another program to write into it.
        if path.exists() and not path.is_file():
            raise OSError("it is not a regular file")
        with path.open("rb") as file, Image.open(file, formats=IMAGE_FORMATS) as image:
            is_grey_16 = image.mode.startswith("I;16") or (
                image.mode == "I" and image.format in ("PNG", "PPM")
            )
            is_wide = image.mode in ("I", "F") and not is_grey_16
            if not is_wide:
                turn_upright(image)
            if is_grey_16:
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            found = None if is_wide else image.convert("RGB")
    except Image.DecompressionBombError as error:
        limit = f"{2 * Image.MAX_IMAGE_PIXELS} pixels, Pillow's limit"
        raise ValueError(f"image of too many pixels: it has more than {limit}") from error
    # Pillow's readers raise anything on a broken file.
    except Exception as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        if isinstance(error, Image.UnidentifiedImageError):
            reason = f"not an image of the formats {', '.join(IMAGE_FORMATS)}"
        raise ValueError(f"unreadable image: {reason}") from error
    if found is None:
        raise ValueError(
            "image of 32-bit pixels: 32 bits do not say what is black and what is white: save it "
            "with 8 or 16"
        )
    width, height = found.size
    if max(found.size) > MAX_ASPECT_RATIO * min(found.size):
        raise ValueError(
            f"image too thin to resize: {width} x {height} pixels are thinner than "
            f"1 : {MAX_ASPECT_RATIO}"
        )
    return found


def turn_upright(image: Image.Image) -> None:
    """Turn an opened image in place as its EXIF orientation says, if that can be read."""
    image.load()
    try:
        ImageOps.exif_transpose(image, in_place=True)
    # Broken metadata raise anything; the pixels have been read.
    except Exception:
        return


def draw(image: Image.Image, found: Detections, detector: OnnxDetector) -> None:
    """Draw boxes with class and score into an image."""
    canvas = ImageDraw.Draw(image)
    line = max(2, round(min(image.size) / 250))
    font = ImageFont.load_default(max(12, min(image.size) // 40))
    # The best last, on top of the others.
    for box, score, number in list(zip(*found))[::-1]:
        colour = COLOURS[number % len(COLOURS)]
        canvas.rectangle(box.tolist(), outline=colour, width=line)
        text = f"{label(detector.class_name(number))} {score:.0%}"
        left = max(0, min(box[0], image.width - font.getlength(text)))
        corner = (left, max(0, box[1] - font.size - line))
        canvas.rectangle(canvas.textbbox(corner, text, font), fill=colour)
        is_dark = ImageColor.getcolor(colour, "L") < 100
        canvas.text(corner, text, "white" if is_dark else "black", font)


def label(name: object) -> str:
    """Return a class name as one line of text to draw, whatever characters it holds."""
    kept = []
    for character in str(name):
        category = unicodedata.category(character)
        if category in ("Cc", "Zl", "Zp"):
            kept.append(" ")
        elif category == "Cs":
            kept.append("\N{REPLACEMENT CHARACTER}")
        elif category != "Cf":
            kept.append(character)
    line = " ".join("".join(kept).split())
    return line if len(line) <= MAX_LABEL else f"{line[: MAX_LABEL - 3]}..."


def one_line(text: object) -> str:
    """Return a text on one line that any terminal takes."""
    characters = " ".join(str(text).split()) or type(text).__name__
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in characters
    )


def find_images(
    given: Sequence[str], exclude: Path | None = None
) -> tuple[dict[Path, Path], list[str]]:
    """Find the images that files, patterns and folders name.

    Folders are searched with their sub-folders, but not hidden ones, nor ``exclude``.

    Returns:
        The images, each once, with the path of their folder in the one that was given; and the
        arguments that name none.
    """
    images: dict[Path, Path] = {}
    missing = []
    for text in given:
        found = expand(text, exclude)
        if not found:
            missing.append(text)
        for path, below in found:
            images.setdefault(path, below)
    return images, missing


def expand(text: str, exclude: Path | None) -> list[tuple[Path, Path]]:
    path = Path(text)
    try:
        if path.is_dir():
            return search(path, exclude)
        # Before it is taken for a pattern, as names may hold brackets.
        if path.is_file():
            return [(path, Path())]
    # A folder that cannot be read, or a name that no file can have.
    except OSError:
        return []
    matches = sorted(match for match in map(Path, glob.glob(text)) if match.is_file())
    return [(match, Path()) for match in matches]


def search(root: Path, exclude: Path | None) -> list[tuple[Path, Path]]:
    found = []
    # Links may lead back to a folder above them.
    seen = {exclude.resolve()} if exclude else set()
    # What was named is searched even if output goes there.
    seen.discard(root.resolve())
    for folder, subfolders, names in os.walk(root, followlinks=True):
        here = Path(folder).resolve()
        if here in seen:
            subfolders.clear()
            continue
        seen.add(here)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        files = (Path(folder, name) for name in sorted(names) if not name.startswith("."))
        found += [
            (file, file.parent.relative_to(root))
            for file in files
            if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file()
        ]
    return found


def picture_paths(images: dict[Path, Path], folder: Path) -> Iterator[Path]:
    """Yield where each image's picture goes: never onto another's, nor onto one of the images."""
    taken = {image.resolve() for image in images}
    for image, below in images.items():
        stem = image.stem
        # File systems take names of 255 bytes.
        while len(os.fsencode(stem)) > MAX_STEM:
            stem = stem[:-1]
        numbered = (f"{stem}_{number}.png" for number in itertools.count(2))
        names = itertools.chain([f"{stem}.png"], numbered)
        paths = (folder / below / name for name in names)
        path = next(path for path in paths if path.resolve() not in taken)
        taken.add(path.resolve())
        path.parent.mkdir(parents=True, exist_ok=True)
        yield path


def predict(detector: OnnxDetector, path: Path, threshold: float) -> tuple[Image.Image, Detections]:
    """Return the image of a file, and its detections with at least a score."""
    image = read(path)
    found = detector(image)
    sure = found.scores >= threshold
    return image, Detections(*(values[sure] for values in found))


def make_writable(folder: Path | None, file: Path | None) -> None:
    """Create the folder for pictures and the file for detections, as far as they are asked for.

    Raises:
        ValueError: one cannot be written.
    """
    try:
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        if file:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.open("w").close()
    except OSError as error:
        name = one_line(error.filename or folder)
        raise ValueError(f"{name} cannot be written ({error.strerror}): give another") from error


def json_entry(path: Path, size: tuple[int, int], found: Detections, names: OnnxDetector) -> dict:
    """Return an image's object in the JSON file, which is the one that demo.py writes."""
    return {
        "file_name": str(path),
        "height": size[1],
        "width": size[0],
        "detections": [
            {
                "class": names.class_name(number),
                "score": round(score, 5),
                "box": [round(corner, 2) for corner in box],
            }
            for box, score, number in zip(*(values.tolist() for values in found))
        ],
    }


def json_line(entry: dict) -> str:
    line = json.dumps(entry, ensure_ascii=False)
    # Bytes that are not UTF-8 in the name of a file, which os.fsencode restores.
    return json.dumps(entry) if any("\ud800" <= c <= "\udfff" for c in line) else line


def score(text: str) -> float:
    """Argument type: a number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"given {text}, accepted are numbers from 0 to 1")
    return value


def folder(text: str) -> Path:
    """Argument type: a folder that exists or can be created."""
    path = Path(text)
    try:
        is_other = path.exists() and not path.is_dir()
    # Of a name that no file can have.
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text[:100]}: {error.strerror}") from None
    if is_other:
        raise argparse.ArgumentTypeError(f"{text} is a file; give a folder")
    return path


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--model", required=True, metavar="FILE", help="a file of tools/export.py, in .onnx or .xml"
    )
    add("--input", required=True, nargs="+", help="images, patterns such as '*.jpg', or folders")
    add("--output", type=folder, metavar="DIR", help="for pictures; created if need be")
    add("--json", type=Path, metavar="FILE.json", help="write classes, scores and boxes to it")
    add(
        "--precision",
        choices=PRECISIONS,
        default="f32",
        help="type that OpenVINO may compute in; detections differ (default: %(default)s)",
    )
    add(
        "--confidence-threshold",
        type=score,
        default=0.3,
        metavar="SCORE",
        help="drop detections with a lower score (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    if not args.output and not args.json:
        parser.error("nothing to write: give --output DIR for pictures, --json FILE.json, or both")
    if args.json and args.json.suffix.lower() != ".json":
        parser.error(f"argument --json: given {args.json}, accepted are names that end in .json")
    if args.precision != "f32" and not args.model.endswith(".xml"):
        parser.error(f"--precision {args.precision} is for OpenVINO's files, in .xml")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo and return its exit status."""
    args = parse_args(argv)
    images, missing = find_images(args.input, exclude=args.output)
    for text in missing:
        print(
            f"{one_line(text)}: skipped, as it is not a file, a pattern of files or a folder with "
            f"images ({', '.join(IMAGE_SUFFIXES)})",
            file=sys.stderr,
        )
    if not images:
        return 1
    try:
        detector = OnnxDetector(args.model, args.precision)
        make_writable(args.output, args.json)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1

    written, pictures, separator = [], None, "[\n"
    if args.output:
        pictures = picture_paths(images, args.output)
        written.append(f"pictures are in {one_line(args.output)}")
    if args.json:
        written.append(f"detections are in {one_line(args.json)}")
    num_images, num_detections = 0, 0
    with open(args.json or os.devnull, "w", encoding="utf-8") as file:
        try:
            for path in images:
                picture = next(pictures) if pictures else None
                try:
                    image, found = predict(detector, path, args.confidence_threshold)
                # The runtimes, too, raise anything for an image that the file's graph refuses.
                except Exception as error:
                    print(f"{one_line(path)}: skipped: {one_line(error)}", file=sys.stderr)
                    entry = {"file_name": str(path), "problem": one_line(error)}
                else:
                    entry = json_entry(path, image.size, found, detector)
                    num_images += 1
                    num_detections += len(found.scores)
                    if picture:
                        draw(image, found, detector)
                        image.save(picture)
                file.write(separator + json_line(entry))
                separator = ",\n"
        finally:
            # What an interrupted run has found can be read.
            file.write("[]\n" if separator == "[\n" else "\n]\n")
    num_failures = len(missing) + len(images) - num_images
    print(
        f"images: {num_images}, detections: {num_detections}, failures: {num_failures}; "
        f"{', '.join(written)}"
    )
    return 1 if num_failures else 0


if __name__ == "__main__":
    sys.exit(main())
