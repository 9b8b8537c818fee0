"""The page of ``app.py``: its layout, and what happens when a visitor does something.

What is shown of a detector comes from :mod:`lite_detr.analysis.explorer`. Importing this module
needs Gradio.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
from PIL import Image

from lite_detr.analysis.explorer import (
    MAX_BYTES,
    MAX_PIXELS,
    ROUNDS,
    Explorer,
    Picture,
    Point,
    View,
    check_upload,
    time_in_turns,
)
from lite_detr.analysis.figures import COLOURS
from lite_detr.errors import LiteDetrError
from lite_detr.labels import printable

THRESHOLD = 0.3
ONE, ALL = "the one I click", "all"
FORGET_AFTER = 3600  # seconds

INTRODUCTION = (
    "Drop an image, move the threshold, and click the picture to see where a query looks."
)
LIMITS = f"Up to {MAX_BYTES // 2**20} MB, {MAX_PIXELS / 1e6:g} megapixels"
LEGEND = """<p class="legend">Colour is the weight of a place, <i></i> from low to high; a marker
stands for a scale. The star is the query, and boxes are the objects found.</p>"""
TOKENS = """<p class="legend">Each bar has all tokens of the image. A layer updates those in colour,
and only reads the others.</p>"""
ALONE = (
    "One detector is loaded. To see another one beside it, such as one with the full encoder, "
    "start the page with --compare CONFIG WEIGHTS."
)


class Seen(NamedTuple):
    """The image and the views that a visitor sees.

    Attributes:
        name: of the image's file.
        views: one for each detector.
        point: the one that was clicked, in the image's ``[0, 1]`` frame.
    """

    name: str
    views: list[View]
    point: Point


class Page:
    """The page of one or two detectors. Methods take what the page has, and return what it shows.

    Args:
        explorers: objects of the first one can be clicked.
        examples: image files to choose from, with their thumbnails.
    """

    def __init__(self, explorers: Sequence[Explorer], examples: Mapping[Path, Image.Image]):
        self.explorers = explorers
        self.examples = dict(examples)

    def open(self, path: str | None, threshold: float, scope: str, *titles: str) -> list[Any]:
        """Show another image; one that cannot be used leaves the page as it is, with a notice."""
        rest = [gr.skip()] * (4 + len(self.explorers))
        if path is None:
            return [gr.skip(), *rest]
        name = printable(Path(path).name)
        try:
            check_upload(path)
            views = [explorer.view(path) for explorer in self.explorers]
        except LiteDetrError as error:
            return [notice(f"{name} cannot be shown: {error}", "alert"), *rest]
        seen = Seen(name, views, best_point(views[0]))
        looks = self.look(seen, threshold, scope, *titles)
        return [*self.redraw(seen, threshold), seen, self.tokens(seen), *looks]

    def open_example(self, index: int, *values: Any) -> list[Any]:
        """Show one of the examples; nothing if there is none."""
        paths = [str(path) for path in self.examples]
        return self.open(paths[index] if paths else None, *values)

    def redraw(self, seen: Seen | None, threshold: float) -> list[Any]:
        """Return the status, the picture and the comparison at a threshold; no model runs."""
        if seen is None:
            return [gr.skip()] * 3
        shown = [
            explorer.draw(view, threshold) for explorer, view in zip(self.explorers, seen.views)
        ]
        picture, count = shown[0]
        text = f"{seen.name}: {objects(count)} with a score of {threshold:.0%} or more"
        scores = seen.views[0].instances.scores
        if not count and len(scores):
            text += f". The best has {scores[0].item():.0%}: lower the threshold to see it"
        pictures = [
            Picture(f"{explorer.title}: {objects(number)}", pixels)
            for explorer, (pixels, number) in zip(self.explorers, shown)
        ]
        return [notice(text), picture, figures(pictures, "wide") if len(pictures) > 1 else ""]

    def click(
        self, point: Sequence[float], seen: Seen | None, threshold: float, scope: str, *titles: str
    ) -> list[Any]:
        """Move the query to a point in pixels of the picture."""
        if seen is None:
            return [gr.skip()] * (1 + len(self.explorers))
        height, width = seen.views[0].image.shape[:2]
        seen = seen._replace(point=(point[0] / width, point[1] / height))
        return [seen, *self.look(seen, threshold, scope, *titles)]

    def look(self, seen: Seen | None, threshold: float, scope: str, *titles: str) -> list[Any]:
        """Return where the query looks, for each detector."""
        if seen is None:
            return [gr.skip()] * len(self.explorers)
        looks = []
        for explorer, view, title in zip(self.explorers, seen.views, titles):
            if not explorer.attentions:
                looks.append(notice("This detector has no deformable attention."))
                continue
            query = None if scope == ALL else explorer.query(view, title, seen.point, threshold)
            text, pictures = explorer.look(view, title, query, threshold)
            looks.append(f"<p>{escape(text)}</p>{figures(pictures)}")
        return looks

    def tokens(self, seen: Seen) -> str:
        """Return which scales each encoder layer updates, and the cells of each scale."""
        parts = []
        for explorer, view in zip(self.explorers, seen.views):
            parts.append(f"<h3>{escape(explorer.title)}</h3>")
            if explorer.updates is None:
                parts.append(notice("This encoder has no multi-scale tokens."))
                continue
            tokens = [grid.tokens for grid in explorer.grids(view)]
            bars = "".join(
                bar(f"Layer {number}", tokens, levels)
                for number, levels in enumerate(explorer.layers, start=1)
            )
            # Layers that choose their tokens are not counted.
            if all(explorer.layers):
                parts.append(
                    f"<p>{explorer.updates.share(tokens):.0%} of the updates of a full encoder "
                    f"with as many layers ({sum(tokens):,} tokens)</p>"
                )
            parts.append(f'<div class="bars">{bars}</div>')
        return "".join(parts) + TOKENS + figures(self.explorers[0].draw_grids(seen.views[0]))

    def measure(self, seen: Seen | None) -> Any:
        """Return the time that each detector takes for the image."""
        if seen is None:
            return gr.skip()
        times = time_in_turns(self.explorers, seen.views)
        rows = "".join(
            f"<tr><td>{escape(explorer.title)}</td><td>{1000 * seconds:.0f} ms</td>"
            f"<td>{seconds / times[0]:.2f} ×</td></tr>"
            for explorer, seconds in zip(self.explorers, times)
        )
        return (
            f'<table class="times">{rows}</table><p class="legend">Medians of up to {ROUNDS} runs '
            "in turns, with the image already resized.</p>"
        )

    def build(self) -> gr.Blocks:
        """Return the page's layout with its events."""
        names = " beside ".join(escape(explorer.title) for explorer in self.explorers)
        device = self.explorers[0].detector.model.device.type.upper()
        # One at a time, however many visitors there are.
        model = {"concurrency_id": "model", "concurrency_limit": 1, "api_visibility": "private"}
        with gr.Blocks(
            title="Lite DETR", analytics_enabled=False, delete_cache=(600, FORGET_AFTER)
        ) as blocks:
            gr.HTML(f"<h1>Lite DETR</h1><p>{INTRODUCTION}</p><small>{names}, on {device}</small>")
            seen = gr.State(time_to_live=FORGET_AFTER)
            with gr.Row():
                upload = gr.File(label=LIMITS, file_types=["image"], height=150, min_width=260)
                examples = gr.Gallery(
                    list(self.examples.values()),
                    label="Examples",
                    columns=max(1, len(self.examples)),
                    allow_preview=False,
                    buttons=[],
                    interactive=False,
                    visible=bool(self.examples),
                    elem_id="examples",
                    scale=3,
                    min_width=300,
                )
            with gr.Row():
                with gr.Column(min_width=320):
                    threshold = gr.Slider(
                        0, 1, THRESHOLD, step=0.01, label="Lowest score shown", buttons=[]
                    )
                    status = gr.HTML(notice("Choose an image."), elem_id="status")
                    picture = gr.Image(
                        show_label=False,
                        interactive=False,
                        buttons=[],
                        elem_id="picture",
                    )
                with gr.Column(min_width=320):
                    with gr.Tab("Attention"):
                        scope = gr.Radio([ONE, ALL], value=ONE, label="Query")
                        titles, looks = [], []
                        for explorer in self.explorers:
                            titles.append(
                                gr.Dropdown(
                                    list(explorer.attentions),
                                    value=explorer.default_attention,
                                    label=explorer.title,
                                )
                            )
                            looks.append(gr.HTML(elem_classes="look"))
                        gr.HTML(LEGEND)
                    with gr.Tab("Tokens"):
                        tokens = gr.HTML(elem_id="tokens")
                    with gr.Tab("Full and lite"):
                        if len(self.explorers) == 1:
                            gr.HTML(notice(ALONE))
                        compared = gr.HTML(elem_id="compared")
                        times = gr.HTML(elem_id="times")
                        timer = gr.Button("Measure the time that this image takes", size="sm")

            def click(event: gr.SelectData, *values: Any) -> list[Any]:
                return self.click(event.index, *values)

            def choose(event: gr.SelectData, *values: Any) -> list[Any]:
                return self.open_example(event.index, *values)

            def begin(*values: Any) -> list[Any]:
                return self.open_example(0, *values)

            asked = [threshold, scope, *titles]
            shown = [status, picture, compared]
            everything = [*shown, seen, tokens, *looks]
            blocks.load(begin, asked, everything, **model)
            examples.select(choose, asked, everything, **model)
            opened = upload.upload(self.open, [upload, *asked], everything, **model)
            # Another image can be dropped there, and the times are those of the one before.
            opened.then(lambda: (None, None), None, [upload, times], api_visibility="private")
            picture.select(click, [seen, *asked], [seen, *looks], **model)
            for choice in (scope, *titles):
                choice.change(self.look, [seen, *asked], looks, **model)
            threshold.change(
                self.redraw,
                [seen, threshold],
                shown,
                show_progress="hidden",
                trigger_mode="always_last",
                api_visibility="private",
            )
            timer.click(self.measure, seen, times, **model)
        return blocks


def best_point(view: View) -> Point:
    """Return the centre of the best detection, or else of the image, in its ``[0, 1]`` frame."""
    if not len(view.instances):
        return 0.5, 0.5
    height, width = view.image.shape[:2]
    x, y = view.instances.pred_boxes.get_centers()[0].tolist()
    return x / width, y / height


def objects(count: int) -> str:
    return "1 object" if count == 1 else f"{count} objects"


def notice(text: str, role: str = "status") -> str:
    return f'<p class="notice" role="{role}">{escape(text)}</p>'


def figures(pictures: Sequence[Picture], kind: str = "") -> str:
    """Return pictures with captions, beside each other where there is room."""
    parts = []
    for caption, pixels in pictures:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=90)
        data = base64.b64encode(file.getvalue()).decode()
        parts.append(
            f'<figure><img alt="" src="data:image/jpeg;base64,{data}">'
            f"<figcaption>{escape(caption)}</figcaption></figure>"
        )
    return f'<div class="figures {kind}">{"".join(parts)}</div>'


def bar(name: str, tokens: Sequence[int], levels: Sequence[int]) -> str:
    """Return a bar of all tokens, in which those of some scales are coloured."""
    parts = "".join(
        f'<i style="flex-grow:{number};'
        f'{f"background:{COLOURS[level]}" if level in levels else ""}"></i>'
        for level, number in enumerate(tokens)
    )
    share = sum(tokens[level] for level in levels) / sum(tokens)
    text = f"{share:.0%} of the tokens" if levels else "those it chooses"
    return f"<span>{name}</span><div>{parts}</div><span>{text}</span>"
