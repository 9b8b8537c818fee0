"""Detect objects in images and videos: draw them, write them to a JSON file, or both.

    %(prog)s --config-file digits/lite_deformable_detr_efficientnet_lite0.py \\
        --weights output/model_final.pth --input datasets/digits/val --output output/demo

Folders are searched with their sub-folders, but not hidden ones. An image NAME.jpg becomes
DIR/NAME.png and a video NAME.avi DIR/NAME.mp4, in like sub-folders; DIR/NAME_2.png and so on if a
name is taken. --output one.jpg names the picture of a single image, --output one.mp4 the video of a
single video or of --webcam. --json FILE writes the detections for other programs; without --output
nothing is drawn, which saves most of the time. Config overrides follow as key=value, but not right
after --input, which would take them for images. The exit status is 0 if all files were read, and 1
if one was not or none was found.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from .. import cli, model_zoo, register
from ..cores import limit_threads
from ..errors import SaveError, VideoError
from ..labels import printable

# Of a video that is written; pictures may have any of the suffixes of images.
FILM_SUFFIX = ".mp4"
OUTPUT_SUFFIXES = (*cli.IMAGE_SUFFIXES, FILM_SUFFIX)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    add = parser.add_argument
    cli.add_config_file(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--input",
        nargs="+",
        help="images, videos, patterns such as '*.jpg', or folders",
    )
    source.add_argument(
        "--webcam",
        nargs="?",
        type=cli.whole_number(0),
        const=0,
        metavar="N",
        help="predict what a camera sees, by default the first, number 0; shown in a window "
        "until q or Ctrl-C is pressed",
    )
    add(
        "--output",
        type=cli.folder_or_file(*OUTPUT_SUFFIXES),
        metavar="DIR",
        help="for pictures and videos, created if need be; or the file of a single one, whose "
        f"suffix sets its format: {' '.join(OUTPUT_SUFFIXES)}",
    )
    add(
        "--json",
        type=cli.file_name(".json"),
        metavar="FILE.json",
        help="write the classes, scores and boxes of all images and frames",
    )
    add("--weights", metavar="FILE", help="of the trained detector; sets train.init_checkpoint")
    add(
        "--confidence-threshold",
        type=cli.score,
        default=0.3,
        metavar="SCORE",
        help="drop detections with a lower score (default: %(default)s)",
    )
    add(
        "--contact-sheet",
        type=cli.file_name(".png"),
        metavar="FILE.png",
        help="also put the first pictures on one sheet",
    )
    add(
        "--batch-size",
        type=cli.whole_number(1),
        default=1,
        metavar="N",
        help="images of the same size, frames or slices to predict at once (default: %(default)s)",
    )
    add(
        "--workers",
        type=cli.whole_number(0),
        metavar="N",
        help="processes that read images ahead (default: as in the config's test loader)",
    )
    add(
        "--slice",
        type=cli.whole_number(1),
        metavar="SIDE",
        help="predict large pictures in overlapping slices, SIDE pixels wide and high, and as a "
        "whole; needs SAHI",
    )
    add(
        "--track",
        action="store_true",
        help="number the objects of a video, the same in all frames; needs the trackers package",
    )
    cli.add_optimize(parser)
    cli.add_overrides(parser)
    args = parser.parse_intermixed_args(argv)
    if not args.output and not args.json and args.webcam is None:
        parser.error("nothing to write: give --output DIR for pictures, --json FILE.json, or both")
    if args.contact_sheet and (not args.output or args.webcam is not None):
        parser.error("--contact-sheet shows the pictures of --input: give --output DIR for them")
    return args


def find_inputs(args: argparse.Namespace) -> tuple[dict[Path, Path], dict[Path, Path], int]:
    """Return the images and the videos, see ``cli.find_images``, and how many names had none."""
    folder = None if is_file(args.output) else args.output
    suffixes = (*cli.IMAGE_SUFFIXES, *cli.VIDEO_SUFFIXES)
    found, missing = cli.find_images(args.input or (), suffixes, exclude=folder)
    for text in missing:
        print(
            f"{printable(text)}: skipped, as it is not a file, a pattern of files or a folder with "
            f"images ({', '.join(cli.IMAGE_SUFFIXES)}) or videos ({', '.join(cli.VIDEO_SUFFIXES)})",
            file=sys.stderr,
        )
    videos = {path: found[path] for path in found if path.suffix.lower() in cli.VIDEO_SUFFIXES}
    images = {path: found[path] for path in found if path not in videos}
    return images, videos, len(missing)


def is_file(output: Path | None) -> bool:
    return output is not None and cli.names_file(output, OUTPUT_SUFFIXES)


def check_single(
    output: Path, images: Sequence[Path], videos: Sequence[Path], webcam: int | None
) -> None:
    """Check that an output file is for the only input, and is not the input itself.

    Raises:
        SaveError: it is not.
    """
    name, is_film = printable(output), output.suffix.lower() == FILM_SUFFIX
    num_videos = len(videos) + (webcam is not None)
    if (len(images), num_videos) != ((0, 1) if is_film else (1, 0)):
        raise SaveError(
            f"--output {name} is for one {'video' if is_film else 'image'}, and the input has "
            f"another number (images: {len(images)}, videos: {num_videos}): give a folder"
        )
    if any(path.resolve() == output.resolve() for path in (*images, *videos)):
        raise SaveError(f"--output {name} would replace the input itself: give another file")


def plan_outputs(
    args: argparse.Namespace, images: Mapping[Path, Path], videos: Mapping[Path, Path]
) -> tuple[Iterator[Path] | None, Iterator[Path] | None]:
    """Return where the pictures and the videos go, and make sure that all output can be written.

    Raises:
        SaveError: it cannot, or ``--output`` is a file for several inputs.
    """
    output = args.output
    pictures, films = None, None
    if is_file(output):
        check_single(output, list(images), list(videos), args.webcam)
        cli.make_folder(output.parent)
        pictures, films = iter([output]), iter([output])
    elif output:
        cli.make_folder(output)
        pictures = cli.picture_paths(images, output)
        films = cli.picture_paths(videos, output, FILM_SUFFIX)
        if args.webcam is not None:
            films = iter([output / f"webcam{FILM_SUFFIX}"])
    for path in filter(None, (args.json, args.contact_sheet)):
        cli.make_file(path)
    return pictures, films


def say_written(args: argparse.Namespace, kinds: str) -> str:
    """Return where the results are."""
    written = []
    if args.output:
        is_in = "the result is" if is_file(args.output) else f"{kinds} are in"
        written.append(f"{is_in} {printable(args.output)}")
    if args.json:
        written.append(f"detections are in {printable(args.json)}")
    return ", ".join(written)


@cli.user_errors()
def main(argv: Sequence[str] | None = None) -> int:
    """Predict and return the exit status."""
    args = parse_args(argv)
    model_zoo.get_lazy_config_file(args.config_file)
    images, videos, num_missing = find_inputs(args)
    if not images and not videos and args.webcam is None:
        return 1
    if args.track and (images or not videos and args.webcam is None):
        raise VideoError("--track numbers the objects of videos: give no images, or omit it")
    pictures, films = plan_outputs(args, images, videos)

    # From here on PyTorch and Detectron2 are imported, which takes seconds.
    register()
    limit_threads()
    from ..inference.predictor import TrainedDetector, load_trained_config
    from ..inference.runs import Run, default_workers
    from ..inference.video import VideoReader, load_opencv, open_window

    if args.slice:
        from ..inference.slices import SlicedDetector
    if args.track:
        from ..inference.tracking import FOLLOWS, load_trackers

        load_trackers()

    with ExitStack() as stack:
        # What takes little time and may fail, before the detector is loaded.
        if videos:
            load_opencv()
        if args.webcam is not None:
            camera = stack.enter_context(VideoReader(args.webcam))
            window = stack.enter_context(open_window(camera.name, bool(args.output or args.json)))
        cfg = load_trained_config(args.config_file, args.weights, args.opts)
        threshold = args.confidence_threshold * (FOLLOWS if args.track else 1)
        detector = TrainedDetector(cfg, threshold, args.optimize)
        if args.slice:
            detector = SlicedDetector(detector, args.slice)
        tracked = args.confidence_threshold if args.track else None
        run = stack.enter_context(Run(detector, args.json, args.batch_size, tracked))
        if images:
            num_workers = default_workers(cfg) if args.workers is None else args.workers
            run.predict_images(list(images), pictures, num_workers, args.contact_sheet)
        if videos:
            run.predict_videos(list(videos), films)
        if args.webcam is not None:
            run.predict_video(camera, next(films) if films else None, window)
    counts = run.counts
    counts.failures += num_missing
    kinds = " and ".join(["pictures"] * bool(images) + ["videos"] * (not images or bool(videos)))
    print("; ".join(filter(None, (counts.summary(), say_written(args, kinds)))))
    if hint := counts.hint(args.confidence_threshold):
        print(hint, file=sys.stderr)
    return 1 if counts.failures else 0
