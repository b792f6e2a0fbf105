"""Image files become RGB pixels, and what cannot is refused by its kind."""

from __future__ import annotations

import io
import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor

import image_files as files
import numpy as np
import pytest
from PIL import Image, ImageFile, PngImagePlugin

from nemo_bard.data import images
from nemo_bard.data.images import MAX_RATIO, SizeOnly, image_size, read_bytes, read_image, shrink, shrunk_size
from nemo_bard.data.sample import RejectedError


def kind_of(data, read=read_image):
    with pytest.raises(RejectedError) as error:
        read(data)
    assert "\n" not in str(error.value)
    return error.value.kind


def colour(data, place=(3, 3)):
    return read_image(data).getpixel(place)


def near(found, wanted, least=6):
    return max(abs(a - b) for a, b in zip(found, wanted, strict=True)) <= least


@pytest.mark.parametrize("form", [*files.CUT, "BMP", "TIFF", "AVIF", "JPEG2000"])
def test_a_truncated_file_is_refused(form):
    data = files.encode(files.photo(), form)
    assert read_image(data).size == (160, 120)
    for end in (20, len(data) // 2, len(data) * 9 // 10, len(data) - 40):
        assert kind_of(data[:end]) == "corrupt_image", (form, end, len(data))


def test_truncated_files_are_refused_whatever_others_have_set(monkeypatch):
    """Importing AutoModel's multimodal data sets sets both."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    data = files.encode(files.photo(), "JPEG")
    assert kind_of(data[: len(data) // 2]) == "corrupt_image"
    assert kind_of(files.bomb()) == "too_many_pixels"
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True
    assert Image.MAX_IMAGE_PIXELS is None


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"", "empty_image"),
        (b"<html>not found</html>" * 20, "corrupt_image"),
        (bytes(5000), "corrupt_image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "corrupt_image"),
        (files.animated("GIF"), "animated_image"),
        (files.animated("PNG"), "animated_image"),
        (files.animated("WEBP"), "animated_image"),
        (files.animated("TIFF"), "animated_image"),
        (files.encode(Image.new("F", (9, 9)), "TIFF"), "pixel_format"),
        (files.encode(Image.new("I", (9, 9)), "TIFF"), "pixel_format"),
        (files.encode(Image.new("LAB", (9, 9)), "TIFF"), "pixel_format"),
        (files.encode(Image.new("RGB", (1, 201)), "PNG"), "too_narrow"),
        (files.encode(Image.new("RGB", (2010, 10)), "PNG"), "too_narrow"),
        (files.bomb(), "too_many_pixels"),
        (files.bomb(10_001), "too_many_pixels"),
    ],
)
def test_what_cannot_be_used_is_refused_by_the_header_alone(data, kind):
    assert kind_of(data) == kind
    assert kind_of(data, image_size) == kind


def test_a_hundred_million_pixels_are_the_limit():
    assert images.MAX_PIXELS == 100_000_000
    assert image_size(files.bomb(10_000)) == (10_000, 10_000)
    assert kind_of(files.bomb(10_000)) == "corrupt_image", "the pixels are not there"


def test_large_images_warn_nobody():
    """Pillow warns from 89 megapixels on."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert image_size(files.bomb(9_900)) == (9_900, 9_900)
        assert read_image(files.encode(Image.new("P", (9, 9)), "PNG", transparency=b"\0\x7f")).mode == "RGB"


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (files.encode(files.flat().convert("CMYK"), "JPEG", quality=95), (200, 30, 10)),
        (files.encode(files.flat().convert("CMYK"), "TIFF"), (200, 30, 10)),
        (files.encode(files.flat().convert("YCbCr"), "JPEG", quality=95), (200, 30, 10)),
        (files.encode(files.flat().quantize(4), "PNG"), (200, 30, 10)),
        (files.encode(files.flat(77, "L"), "PNG"), (77,) * 3),
        (files.encode(files.flat(1, "1"), "PNG"), (255,) * 3),
        (files.encode(files.flat(0, "1"), "TIFF"), (0,) * 3),
        (files.encode(files.grey16(), "PNG"), (156,) * 3),
        (files.encode(files.grey16(), "TIFF"), (156,) * 3),
        (files.encode(files.grey16(65535), "PNG"), (255,) * 3),
        (files.encode(files.grey16(), "PNG", transparency=40000), (255,) * 3),
        (b"P5 40 24 65535\n" + np.full((24, 40), 40000, ">u2").tobytes(), (156,) * 3),
        (files.encode(files.flat((9, 9, 9, 0), "RGBA"), "PNG"), (255,) * 3),
        (files.encode(files.flat((0, 0, 0, 128), "RGBA"), "PNG"), (127,) * 3),
        (files.encode(files.flat((9, 9, 9, 0), "RGBA"), "WEBP", exact=True), (255,) * 3),
        (files.encode(files.flat((50, 0), "LA"), "PNG"), (255,) * 3),
        (files.encode(files.flat((50, 255), "LA"), "PNG"), (50,) * 3),
        (files.encode(files.flat(0, "P"), "PNG", transparency=0), (255,) * 3),
        (files.encode(files.flat(0, "P"), "GIF", transparency=0), (255,) * 3),
        (files.encode(files.flat((1, 2, 3)), "PNG", transparency=(1, 2, 3)), (255,) * 3),
    ],
)
def test_every_mode_becomes_rgb(data, expected):
    image = read_image(data)
    assert image.mode == "RGB"
    assert image.size == image_size(data)
    assert near(image.getpixel((3, 3)), expected, 3)


def test_sixteen_bits_keep_their_shades():
    """Pillow's own conversion makes white of all above 255."""
    values = np.linspace(0, 65535, 40 * 24).astype(np.uint16).reshape(24, 40)
    found = np.asarray(read_image(files.encode(Image.fromarray(values), "PNG")))[..., 0]
    assert np.array_equal(found, values >> 8)


def test_alpha_is_drawn_as_qwen_draws_it():
    from qwen_vl_utils.vision_process import to_rgb

    image = files.photo().convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    assert read_image(files.encode(image, "PNG")).tobytes() == to_rgb(image).tobytes()


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "MPO"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_upright_and_headers_know_it(form, orientation):
    data = files.turned(form, orientation)
    assert image_size(data) == (64, 48)
    image = read_image(data)
    assert image.size == (64, 48)
    for place, wanted in (
        ((8, 8), (255, 0, 0)),
        ((56, 8), (0, 255, 0)),
        ((8, 40), (0, 0, 255)),
        ((56, 40), (255,) * 3),
    ):
        assert near(image.getpixel(place), wanted, 30)
    assert not image.getexif(), "or another reader turns it once more"


def test_a_tag_behind_the_pixels_counts():
    data = files.late_exif()
    assert image_size(data) == read_image(data).size == (64, 48)


def test_a_damaged_tag_leaves_an_image_as_it_is():
    exif = b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12"
    data = files.encode(files.quarters(), "JPEG", exif=exif)
    assert image_size(data) == read_image(data).size == (64, 48)
    assert pickle.loads(pickle.dumps(read_image(data))).getexif() == {}


def test_metadata_may_be_long():
    """Pillow allows a megabyte, and refuses the image for more."""
    info = PngImagePlugin.PngInfo()
    info.add_text("XML:com.adobe.xmp", "<x/>" * 500_000, zip=True)
    assert read_image(files.encode(files.flat(), "PNG", pnginfo=info)).size == (40, 24)


def test_threads_may_decode_at_once():
    data = [files.encode(files.photo(40 + i, 30), "PNG") for i in range(24)]
    before = ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK
    with ThreadPoolExecutor(8) as pool:
        assert [image.width for image in pool.map(read_image, data)] == [40 + i for i in range(24)]
    assert before == (ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK)


def test_the_first_picture_of_a_camera_is_taken():
    data = files.encode(files.photo(), "MPO", save_all=True, append_images=[files.photo(16, 12)])
    with Image.open(io.BytesIO(data)) as image:
        assert image.n_frames == 2
    assert read_image(data).size == image_size(data) == (160, 120)


def test_a_gif_of_one_frame_is_an_image():
    assert near(colour(files.encode(files.flat(), "GIF")), (200, 30, 10))


@pytest.mark.parametrize("size", [(1, 1), (1, MAX_RATIO), (2 * MAX_RATIO, 2), (3, 5)])
def test_what_is_accepted_can_be_processed(start, size):
    """Qwen's processor resizes the smallest images, and has the same limit for narrow ones."""
    from transformers import AutoProcessor

    image = read_image(files.encode(Image.new("RGB", size), "PNG"))
    processor = AutoProcessor.from_pretrained(start).image_processor
    assert processor(images=[image], return_tensors="pt")["image_grid_thw"].prod() >= 4
    narrow = Image.new("RGB", (size[0], size[0] * MAX_RATIO + 1))
    with pytest.raises(ValueError, match="aspect ratio"):
        processor(images=[narrow], return_tensors="pt")


def test_files_are_named(tmp_path):
    path = tmp_path / "photo.txt"
    path.write_bytes(files.encode(files.flat(), "PNG"))
    assert read_image(path).size == image_size(path) == (40, 24)
    assert read_bytes(path) == path.read_bytes()
    path.write_bytes(b"")
    for read in (read_image, image_size):
        assert kind_of(path, read) == "empty_image"
        assert kind_of(tmp_path, read) == kind_of(tmp_path / "no.png", read) == "missing_image"
        assert kind_of(tmp_path / ("x" * 5000), read) == "unreadable_image"
        with pytest.raises(RejectedError, match=r"photo\.txt cannot be read \(it has 0 bytes\)"):
            read(path)
    with pytest.raises(RejectedError) as error:
        read_image(tmp_path / "a\nb.png")
    assert "\n" not in error.value.reason


def test_a_file_that_the_system_keeps_back_is_no_damaged_one(tmp_path, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "a.png").write_bytes(files.encode(files.flat(), "PNG"))
    monkeypatch.setattr("pathlib.Path.open", refuse)
    assert kind_of(tmp_path / "a.png") == "unreadable_image"


def test_only_larger_images_are_encoded_again():
    data = files.encode(files.photo(400, 300), "JPEG")
    for limit in (None, 400 * 300):
        assert shrink(data, limit) == (data, (400, 300))
        assert shrink(data, limit)[0] is data
    small, size = shrink(data, 100 * 100)
    assert size == image_size(small) == (96, 64)
    wanted = np.asarray(files.photo(400, 300).resize(size, Image.Resampling.BICUBIC), dtype=float)
    assert np.abs(np.asarray(read_image(small), dtype=float) - wanted).mean() < 6


@pytest.mark.parametrize(
    ("image", "form", "becomes"),
    [
        (files.flat(), "JPEG", "JPEG"),
        (files.flat(), "PNG", "PNG"),
        (files.flat(), "WEBP", "JPEG"),
        (files.flat((9, 9, 9, 0), "RGBA"), "WEBP", "PNG"),
        (files.flat(), "BMP", "PNG"),
        (files.flat(), "GIF", "PNG"),
        (files.flat().convert("CMYK"), "JPEG", "JPEG"),
        (files.grey16(), "PNG", "PNG"),
    ],
)
def test_what_a_smaller_image_is(image, form, becomes):
    data = files.encode(image.resize((320, 200)), form)
    small, size = shrink(data, 9600)
    with Image.open(io.BytesIO(small)) as opened:
        assert (opened.format, opened.size) == (becomes, size)
    assert near(colour(small), colour(data))


def test_a_smaller_image_is_upright_and_says_nothing_else():
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    data = files.encode(files.photo(400, 300), "JPEG", exif=exif, icc_profile=b"profile", comment=b"here")
    small, size = shrink(data, 9600)
    assert size == image_size(small) == (64, 96)
    with Image.open(io.BytesIO(small)) as opened:
        assert not opened.getexif()
        assert not {"icc_profile", "comment"} & set(opened.info)


def test_a_smaller_size_is_within_limit_and_ratio():
    """And the one of Qwen's rule, which its processor leaves as it is, but for narrow images."""
    import qwen_vl_utils
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    generator, same = np.random.default_rng(0), 0
    for _ in range(2000):
        width, height = (int(2**x) for x in generator.uniform(0, 14, 2))
        limit = int(2 ** generator.uniform(10, 22))
        if width * height <= limit or max(width, height) > MAX_RATIO * min(width, height):
            continue
        wide, tall = shrunk_size(width, height, limit)
        assert min(wide, tall) >= 1
        assert wide * tall <= limit
        assert max(wide, tall) <= MAX_RATIO * min(wide, tall)
        if min(wide, tall) > 32 and max(width, height) < 100 * min(width, height):
            assert (tall, wide) == smart_resize(height, width, factor=32, min_pixels=0, max_pixels=limit)
            again = {"factor": 32, "min_pixels": 1024, "max_pixels": limit}
            assert smart_resize(tall, wide, **again) == qwen_vl_utils.smart_resize(tall, wide, **again) == (tall, wide)
            same += 1
    assert same > 200
    assert shrunk_size(4000, 3000, 1024 * 1024) == (1152, 864)
    assert shrunk_size(8000, 40, 100_000) == (4347, 23)


def test_an_image_of_known_size_travels():
    assert pickle.loads(pickle.dumps(SizeOnly((7, 5)))).size == (7, 5)
    assert isinstance(SizeOnly((7, 5)), Image.Image)
    assert SizeOnly((7, 5)).width == 7
