#!/usr/bin/env python
"""Play with a trained detector on a page in the browser.

    app.py --config-file digits/lite_dino_efficientnet_lite0.py \\
        --weights output/demo/model_final.pth --examples datasets/digits/val

Drop an image and see its objects, move the threshold, click to see where a query looks, and see
which tokens each encoder layer updates. Without --config-file and --weights it starts on the
detector of `make demo`. --compare puts a second one beside it, such as one with the full encoder.
Only this machine can open the page, unless --host says otherwise. Config overrides follow as
key=value, but not directly after --examples; they change both configs.
"""

import argparse
import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from lite_detr import cli
from lite_detr.errors import LaunchError, LiteDetrError, MissingFileError, MissingPackageError
from lite_detr.labels import printable

if TYPE_CHECKING:
    import gradio as gr

DEMO_CONFIG = "digits/lite_dino_efficientnet_lite0.py"
DEMO_WEIGHTS = "output/demo/model_final.pth"
DEMO_EXAMPLES = Path(os.environ.get("DETECTRON2_DATASETS", "datasets"), "digits", "val")
MAX_EXAMPLES = 8
THUMBNAIL = 160  # pixels
# Visitors whose image is kept; for a further one, that of the first is dropped.
MAX_VISITORS = 20
# The server reads this many times what an image may have: up to there the page says what is wrong
# with a file, and beyond only that it is refused.
MAX_UPLOAD = 5
# Gradio's page asks for nothing else, and this keeps it so.
POLICY = b"default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'"


def choose_detectors(args: argparse.Namespace) -> list[tuple[str, str | None]]:
    """Return config and weights of each detector of the command line.

    Raises:
        MissingFileError: none is given, and the demo's is not trained.
    """
    config_file, weights = args.config_file, args.weights
    if not config_file and not weights:
        weights = DEMO_WEIGHTS
        if not Path(weights).is_file():
            raise MissingFileError(
                f"the demo's detector, {weights}, is not trained yet: run `make demo`, or give "
                "another one with --config-file and --weights"
            )
    return [(config_file or DEMO_CONFIG, weights), *([tuple(args.compare)] if args.compare else [])]


def find_examples(given: Sequence[str]) -> dict[Path, Image.Image]:
    """Return usable images with their thumbnails, evenly from all that names stand for.

    Args:
        given: files, patterns and folders.
    """
    from lite_detr.analysis.explorer import check_upload
    from lite_detr.data.image_files import read_image

    images, missing = cli.find_images(given)
    for name in missing:
        print(f"{printable(name)}: skipped, as it names no image", file=sys.stderr)
    thumbnails = {}
    for path in [*images][:: max(1, len(images) // MAX_EXAMPLES)][:MAX_EXAMPLES]:
        try:
            check_upload(path)
            thumbnail = Image.fromarray(read_image(str(path), "RGB"))
        except LiteDetrError as error:
            print(f"{printable(path)}: skipped: {error}", file=sys.stderr)
            continue
        thumbnail.thumbnail((THUMBNAIL, THUMBNAIL))
        thumbnails[path] = thumbnail
    return thumbnails


class SameOrigin:
    """Middleware that lets browsers fetch from this server only, whatever a page asks for.

    Args:
        app: of ASGI.
    """

    def __init__(self, app: Callable):
        self.app = app

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        async def send_with_policy(message: dict) -> None:
            if message["type"] == "http.response.start":
                header = (b"content-security-policy", POLICY)
                message["headers"] = [*message.get("headers", ()), header]
            await send(message)

        await self.app(scope, receive, send_with_policy)


def serve(blocks: "gr.Blocks", host: str, port: int | None) -> str:
    """Serve a page in the background, and return its address.

    Args:
        blocks: the page.
        host: the address to listen on.
        port: None takes the first free one from 7860 on.

    Raises:
        LaunchError: the address is not of this machine, or the port is taken.
    """
    import gradio as gr
    from starlette.middleware import Middleware

    from lite_detr.analysis.explorer import MAX_BYTES

    theme = gr.themes.Default(
        primary_hue="indigo",
        neutral_hue="slate",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )
    try:
        _, address, _ = blocks.launch(
            server_name=host,
            server_port=port,
            max_file_size=MAX_UPLOAD * MAX_BYTES,
            state_session_capacity=MAX_VISITORS,
            theme=theme,
            css_paths=Path(__file__).with_suffix(".css"),
            app_kwargs={"middleware": [Middleware(SameOrigin)]},
            footer_links=[],
            run_history=False,
            share=False,
            ssr_mode=False,
            pwa=False,
            quiet=True,
            prevent_thread_lock=True,
        )
    except OSError as error:
        # Gradio's second sentence is for programmers.
        reason = str(error).partition(". ")[0]
        raise LaunchError(f"no page at {host}: {reason}. Give another --host or --port") from error
    return address


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    add = parser.add_argument
    cli.add_config_file(
        parser, required=False, help=f"a file or a model zoo name (default: {DEMO_CONFIG})"
    )
    add("--weights", metavar="FILE", help="of the trained detector; sets train.init_checkpoint")
    add("--compare", nargs=2, metavar=("C", "FILE"), help="config and weights of a second detector")
    add(
        "--examples",
        nargs="+",
        default=[],
        help=f"images, patterns such as '*.jpg', or folders (default: {DEMO_EXAMPLES}, if there)",
    )
    add("--host", default="127.0.0.1", help="the address to listen on (default: %(default)s)")
    add(
        "--port",
        type=cli.whole_number(1),
        metavar="N",
        help="(default: the first free one from 7860 on)",
    )
    cli.add_overrides(parser)
    args = parser.parse_intermixed_args(argv)
    if not args.examples and DEMO_EXAMPLES.is_dir():
        args.examples = [str(DEMO_EXAMPLES)]
    return args


@cli.user_errors()
def main(argv: Sequence[str] | None = None) -> int:
    """Serve the page until it is interrupted."""
    args = parse_args(argv)
    if importlib.util.find_spec("gradio") is None:
        raise MissingPackageError(
            "the page needs Gradio: `make app` installs it, and so does `pip install '.[app]'`"
        )
    detectors = choose_detectors(args)

    # From here on PyTorch and Detectron2 are imported, which takes seconds.
    cli.ignore_warnings()
    from lite_detr.analysis.explorer import Explorer
    from lite_detr.inference.predictor import load_trained_config

    explorers = [Explorer(load_trained_config(*given, args.opts)) for given in detectors]
    examples = find_examples(args.examples)
    with tempfile.TemporaryDirectory() as folder:
        # Uploads go there, and both are read when Gradio is imported.
        os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False"}
        from app_page import Page

        blocks = Page(explorers, examples).build()
        print(f"the page is at {serve(blocks, args.host, args.port)}; Ctrl-C ends it", flush=True)
        blocks.block_thread()
    return 0


if __name__ == "__main__":
    sys.exit(main())
