"""Reading of image files of every kind."""

import struct
import warnings
import zlib

import numpy as np
import pytest
from detectron2.data import detection_utils
from PIL import Image

from lite_detr.data import image_files
from lite_detr.data.image_files import ImageError, read_image, read_record

EXIF_ORIENTATION = 274


@pytest.fixture
def save(tmp_path):
    def save_image(image, name="image.png", **options):
        image.save(tmp_path / name, **options)
        return str(tmp_path / name)

    return save_image


@pytest.fixture
def photo():
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def error_of(function, *args):
    with pytest.raises(ImageError) as info:
        function(*args)
    return info.value


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "LA", "RGBA"])
@pytest.mark.parametrize("image_format", ["RGB", "BGR", "L"])
def test_what_detectron2_reads_well_is_read_as_it_does(mode, image_format, photo, save):
    path = save(photo.convert(mode))
    expected = detection_utils.read_image(path, image_format)
    np.testing.assert_array_equal(read_image(path, image_format), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_exif_orientation_is_applied_as_detectron2_does(orientation, photo, save):
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    path = save(photo, "image.jpg", exif=exif)
    expected = detection_utils.read_image(path, "RGB")
    np.testing.assert_array_equal(read_image(path, "RGB"), expected)
    assert expected.shape[:2] == ((20, 30) if orientation < 5 else (30, 20))


@pytest.mark.parametrize("name", ["grey.png", "grey.tiff", "grey.pgm"])
def test_grey_images_of_16_bits_keep_their_upper_eight(name, save):
    values = np.array([[0, 255, 256, 1000], [30000, 40000, 65279, 65535]], dtype=np.uint16)
    path = save(Image.fromarray(values), name)
    image = read_image(path, "RGB")
    assert image.dtype == np.uint8 and image.shape == (2, 4, 3)
    assert (image == (values >> 8)[..., None]).all()
    # What makes it needed: all but the darkest 256 greys of 65536 would be white.
    clipped = detection_utils.read_image(path, "RGB")[..., 0]
    assert (clipped >= 255).sum() == (values >= 255).sum() > 5


def test_colour_images_of_16_bits_keep_their_upper_eight(tmp_path):
    values = np.array([[[0, 255, 256], [1000, 40000, 65535]]], dtype=np.uint16)
    (tmp_path / "colour.png").write_bytes(png(values, bits=16))
    np.testing.assert_array_equal(read_image(str(tmp_path / "colour.png"), "RGB"), values >> 8)


def png(values, bits):
    """The bytes of a PNG with RGB pixels ``[H, W, 3]``, which Pillow cannot write with 16 bits."""

    def chunk(kind, content):
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.tobytes() for row in values.astype(f">u{bits // 8}"))
    header = struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*parts) for parts in chunks)


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_pixels_of_32_bits_are_refused(dtype, save):
    error = error_of(read_image, save(Image.fromarray(np.ones((4, 4), dtype)), "deep.tiff"), "RGB")
    assert error.kind == "image of 32-bit pixels" and "save it with 8 or 16" in error.reason


def test_the_first_frame_of_an_animation_is_read(photo, save):
    other = photo.rotate(180)
    path = save(photo, "moving.webp", save_all=True, append_images=[other], lossless=True)
    np.testing.assert_array_equal(read_image(path, "RGB"), np.asarray(photo))


@pytest.mark.parametrize("name", ["image.jpg", "image.png", "image.webp", "image.gif"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5])
def test_a_truncated_file_is_unreadable(name, share, photo, save, tmp_path):
    path = tmp_path / name
    save(photo, name)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    error = error_of(read_image, str(path), "RGB")
    assert error.kind == "unreadable image" and error.reason


def test_a_file_that_is_gone_or_a_folder_is_unreadable(tmp_path):
    error = error_of(read_image, str(tmp_path / "gone.jpg"), "RGB")
    assert str(error) == "unreadable image: No such file or directory"
    assert error_of(read_image, str(tmp_path), "RGB").reason == "it is not a regular file"


def test_an_image_beyond_pillows_limit_is_not_decoded(photo, save, monkeypatch):
    path = save(photo)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 299)
    error = error_of(read_image, path, "RGB")
    assert error.kind == "image of too many pixels" and "more than 598 pixels" in error.reason
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        assert read_image(path, "RGB").shape == (20, 30, 3)


def test_an_image_of_another_size_than_its_record_says_is_refused(photo, save):
    path = save(photo)
    assert read_record({"file_name": path}, "RGB").shape == (20, 30, 3)
    assert read_record({"file_name": path, "width": 30, "height": 20}, "RGB").shape == (20, 30, 3)
    error = error_of(read_record, {"file_name": path, "width": 31, "height": 20}, "RGB")
    assert error.kind == "image of another size"
    assert error.reason == "it is 30 x 20 pixels, the annotation file says 31 x 20"
    turned = error_of(read_record, {"file_name": path, "width": 20, "height": 30}, "RGB")
    assert turned.reason.endswith("20 x 30 (turned by its EXIF orientation?)")


def test_an_image_too_thin_to_resize_is_refused(save):
    limit = image_files.MAX_ASPECT_RATIO
    path = save(Image.new("RGB", (1, limit)))
    assert read_record({"file_name": path}, "RGB").shape == (limit, 1, 3)
    error = error_of(read_record, {"file_name": save(Image.new("RGB", (limit + 1, 1)))}, "RGB")
    assert error.kind == "image too thin to resize" and "501 x 1" in error.reason
