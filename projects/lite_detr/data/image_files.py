"""Reading of image files as Detectron2 reads them, with an error for each file that it cannot."""

import os

import numpy as np
from detectron2.data.detection_utils import convert_PIL_to_numpy
from detectron2.utils.file_io import PathManager
from PIL import Image, ImageOps

from ..errors import ImageError

# The earlier name, for programs that catch it.
UnusableImage = ImageError

# The formats of photographs and of screenshots. Pillow knows forty, some of which start other
# programs (EPS starts Ghostscript) or are read by code that few files test.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
Image.init()
# Those that this version of Pillow knows.
IMAGE_FORMATS = tuple(name for name in FORMATS if name in Image.OPEN)

# An image that is more times as long as it is wide loses its shorter side when it is resized: at
# 1 : 500 one pixel is left of it where the longer side is limited to 250 or more.
MAX_ASPECT_RATIO = 500

# Kinds of images that cannot be used, as docs/data_faults.md and tools/check_dataset.py name them.
UNREADABLE = "unreadable image"
TOO_LARGE = "image of too many pixels"
WIDE_PIXELS = "image of 32-bit pixels"
OTHER_SIZE = "image of another size"
TOO_THIN = "image too thin to resize"


def read_image(file_name: str, image_format: str) -> np.ndarray:
    """Read a file as Detectron2's ``read_image`` does: upright, in the given order of channels.

    It differs for grey images of 16 bits, of which Detectron2 clips everything above 255 to
    white: they keep their upper eight bits, as in Pillow's reading of colour images of 16 bits.

    Args:
        file_name: a path, or what iopath's handlers accept.
        image_format: a mode of Pillow, "BGR" or "YUV-BT.601".

    Returns:
        ``[H, W, C]``, uint8 in 0 to 255 (float for YUV).

    Raises:
        ImageError: the file cannot be decoded, or its pixels have no defined range.
    """
    try:
        # To open a named pipe would wait for another program to write into it.
        if os.path.exists(file_name) and not os.path.isfile(file_name):
            raise ImageError(UNREADABLE, "it is not a regular file")
        with (
            PathManager.open(file_name, "rb") as file,
            Image.open(file, formats=IMAGE_FORMATS) as image,
        ):
            is_grey_16 = is_grey_16_bits(image)
            if image.mode in ("I", "F") and not is_grey_16:
                raise ImageError(
                    WIDE_PIXELS,
                    "32 bits do not say what is black and what is white: save it with 8 or 16",
                )
            turn_upright(image)
            if is_grey_16:
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            return convert_PIL_to_numpy(image, image_format)
    except ImageError:
        raise
    except Image.DecompressionBombError:
        raise ImageError(
            TOO_LARGE, f"it has more than {2 * Image.MAX_IMAGE_PIXELS} pixels, Pillow's limit"
        ) from None
    # Pillow's readers raise anything on a broken file, from EOFError to SyntaxError.
    except Exception as error:
        raise ImageError(UNREADABLE, _describe(error)) from None


def turn_upright(image: Image.Image) -> None:
    """Turn an opened image in place as its EXIF orientation says, if that can be read."""
    image.load()
    try:
        ImageOps.exif_transpose(image, in_place=True)
    # Broken metadata raise anything; the pixels have been read.
    except Exception:
        return


def read_record(record: dict, image_format: str) -> np.ndarray:
    """Read the image of a record of Detectron2, and check its size.

    Args:
        record: ``file_name``, and optionally ``width`` and ``height`` in pixels.
        image_format: see :func:`read_image`.

    Raises:
        ImageError: as :func:`read_image`; also for an image of another size than the record says,
            whose boxes cannot be trusted, and for one too thin to resize.
    """
    image = read_image(record["file_name"], image_format)
    height, width = image.shape[:2]
    given = (record.get("width", width), record.get("height", height))
    if given != (width, height):
        turned = " (turned by its EXIF orientation?)" if given == (height, width) else ""
        raise ImageError(
            OTHER_SIZE,
            f"it is {width} x {height} pixels, the annotation file says "
            f"{given[0]} x {given[1]}{turned}",
        )
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise ImageError(
            TOO_THIN, f"{width} x {height} pixels are thinner than 1 : {MAX_ASPECT_RATIO}"
        )
    return image


def is_grey_16_bits(image: Image.Image) -> bool:
    """Return whether an opened image is grey with 16 bits a pixel, which has several modes."""
    # PGM files, and PNG files with older versions of Pillow, come as 32-bit integers.
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))


def _describe(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return f"not an image of the formats {', '.join(IMAGE_FORMATS)}"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()) or type(error).__name__
