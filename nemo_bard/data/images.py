"""Image files to pixels: the only place that decodes, so that preparing, training and evaluating read alike."""

from __future__ import annotations

import contextlib
import io
import math
import struct
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps, PngImagePlugin, UnidentifiedImageError

from nemo_bard.base.errors import one_line
from nemo_bard.data.sample import RejectedError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "ICO")
"""What is read, by content and not by the name's ending. Formats that need another program (EPS) are left out."""
MAX_PIXELS = 100_000_000
"""Images with more are refused; decoded, this many take 300 MB."""
MAX_RATIO = 200
"""Longer side to shorter one: ``smart_resize`` of qwen-vl-utils 0.0.14 and of transformers refuse more."""
PATCH = 32
"""Pixels a side of what becomes one token of Qwen3-VL: sizes that are a multiple of it are not resized again."""
JPEG_QUALITY = 95

_MODES = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV"}
_SIXTEEN_BITS = {"I;16", "I;16L", "I;16B", "I;16N"}
_BAD_EXIF = (SyntaxError, struct.error, ValueError, TypeError, LookupError, OSError, EOFError, ArithmeticError)
_LOCK = threading.Lock()
_GLOBALS = (
    (ImageFile, "LOAD_TRUNCATED_IMAGES", False),
    (Image, "MAX_IMAGE_PIXELS", MAX_PIXELS // 2),  # twice as many are an error
    (PngImagePlugin, "MAX_TEXT_CHUNK", 64 * 1024 * 1024),  # 1 MB refuses images for the metadata of Photoshop
)
_LOSSY = {"JPEG", "MPO", "WEBP", "AVIF", "JPEG2000"}
_BYTES = "given as bytes"

Size = tuple[int, int]


class SizeOnly(Image.Image):
    """An image of which the size is known and nothing else.

    Args:
        size: Width and height.
    """

    def __init__(self, size: Size) -> None:
        super().__init__()
        self._known = size

    @property
    def size(self) -> Size:
        """Width and height."""
        return self._known

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._known,)


class _Decoded(NamedTuple):
    image: Image.Image
    format: str
    transparent: bool


def read_bytes(path: Path) -> bytes:
    """The bytes of an image file.

    Raises:
        RejectedError: If there is no such file or it cannot be read.
    """
    with _stream_of(path) as stream:
        return stream.read()


def read_image(source: bytes | Path, *, name: str = _BYTES) -> Image.Image:
    """Decode an image to its end.

    Grey of 16 bits keeps the upper 8, transparent parts become white (as qwen-vl-utils does it), CMYK is converted; colour
    profiles are not applied. What Pillow decodes without an error counts as readable: a JPEG file of the right length may
    hold wrong bits.

    Args:
        source: Bytes of an image file, or its path.
        name: What errors call it, if it is bytes.

    Returns:
        RGB, turned upright by its EXIF tag, which is gone.

    Raises:
        RejectedError: If it is missing, empty, damaged, animated, too large or too narrow, or has pixels without an eight-bit
            meaning.
    """
    if isinstance(source, Path):
        return _decode(read_bytes(source), str(source)).image
    return _decode(source, name).image


def as_rgb(image: Image.Image, *, name: str = "that was decoded before") -> Image.Image:
    """An image that somebody else has opened, with the colours that ``read_image`` gives; not turned.

    Raises:
        RejectedError: If it is too narrow, animated, or has pixels without an eight-bit meaning.
    """
    _check(image, name)
    return image if image.mode == "RGB" and not image.has_transparency_data else _to_rgb(image)


def image_size(source: bytes | Path, *, name: str = _BYTES) -> Size:
    """Width and height of what ``read_image`` gives, in pixels, from the header: damaged pixels are not seen.

    Raises:
        RejectedError: As ``read_image``, for what a header tells.
    """
    stream = _stream_of(source) if isinstance(source, Path) else io.BytesIO(source)
    name = str(source) if isinstance(source, Path) else name
    with stream, _opened(stream, name) as image:
        if image.format == "ICO" or (image.format == "PNG" and _has_late_text(stream)):
            image.load()  # else the size, or which way is up, is not yet known
        width, height = image.size
        return (height, width) if _orientation(image) >= 5 else (width, height)


def shrink(data: bytes, max_pixels: int | None, *, name: str = _BYTES) -> tuple[bytes, Size]:
    """Decode an image to its end, and make it smaller if it is larger than allowed.

    A smaller one has the size of ``shrunk_size`` and no metadata. JPEG stays JPEG and PNG stays PNG; of the others, lossy
    ones without transparency become JPEG and all the rest PNG.

    Args:
        data: Bytes of an image file.
        max_pixels: Most pixels it may have; any number if None.
        name: What errors call it.

    Returns:
        The bytes (``data`` itself unless it had to be made smaller), and width and height upright.

    Raises:
        RejectedError: As ``read_image``.
    """
    image, form, transparent = _decode(data, name)
    if max_pixels is None or image.width * image.height <= max_pixels:
        return data, image.size
    size = shrunk_size(*image.size, max_pixels)
    small = image.resize(size, Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    if form in _LOSSY and not transparent:
        small.save(buffer, format="JPEG", quality=JPEG_QUALITY)
    else:
        small.save(buffer, format="PNG")
    return buffer.getvalue(), size


def shrunk_size(width: int, height: int, max_pixels: int) -> Size:
    """The size an image gets under a limit of pixels.

    It is the one that ``smart_resize`` of qwen-vl-utils and of Qwen's processor would choose (multiples of 32 pixels), so
    that training does not resize the image a second time; importing either takes 600 MB, and this module is for many
    processes. Where that makes an image vanish or too narrow, both sides shrink alike.

    Args:
        width: In pixels.
        height: Likewise.
        max_pixels: Most pixels, fewer than the image has.

    Returns:
        Width and height.
    """
    excess = math.sqrt(width * height / max_pixels)
    wide, tall = (round(side / PATCH) * PATCH for side in (width, height))
    if wide * tall > max_pixels:
        wide, tall = (math.floor(side / excess / PATCH) * PATCH for side in (width, height))
    if wide and tall and max(wide, tall) <= MAX_RATIO * min(wide, tall):
        return wide, tall
    short = min(math.ceil(min(width, height) / excess), math.isqrt(max_pixels))
    long = max_pixels // short
    return (long, short) if width > height else (short, long)


def _stream_of(path: Path) -> IO[bytes]:
    name = clipped(str(path))
    try:
        if not path.is_file():
            raise RejectedError("missing_image", f"image file {name} does not exist")
        return path.open("rb")
    except OSError as error:
        raise RejectedError("unreadable_image", f"image {name} cannot be read ({error.strerror})") from error


def _decode(data: bytes, name: str) -> _Decoded:
    with _opened(io.BytesIO(data), name) as image:
        image.load()
        orientation = _orientation(image)
        transparent = image.has_transparency_data
        rgb = _to_rgb(image)
        rgb.info.clear()  # a tag that is left there, or damaged, would be followed once more by others
        if orientation != 1:
            rgb.getexif()[ExifTags.Base.Orientation] = orientation
            ImageOps.exif_transpose(rgb, in_place=True)
        return _Decoded(rgb, image.format or "", transparent)


@contextlib.contextmanager
def _opened(stream: IO[bytes], name: str) -> Iterator[Image.Image]:
    """Open and check a header; whatever goes wrong inside becomes a ``RejectedError``."""
    name = clipped(name)
    try:
        if not stream.read(1):
            raise RejectedError("empty_image", f"image {name} cannot be read (it has 0 bytes)")
        stream.seek(0)
        with _strict(), Image.open(stream, formats=FORMATS) as image:
            _check(image, name)
            yield image
    except (RejectedError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise RejectedError("too_many_pixels", f"image {name} has more than {MAX_PIXELS:,} pixels") from error
    except UnidentifiedImageError as error:
        reason = f"its header is damaged, or it is none of {', '.join(FORMATS)}"
        raise RejectedError("corrupt_image", f"image {name} cannot be read ({reason})") from error
    except Exception as error:  # on damaged files Pillow's readers raise whatever their parsing runs into
        kind = "unreadable_image" if isinstance(error, OSError) and error.errno is not None else "corrupt_image"
        raise RejectedError(kind, f"image {name} cannot be read ({one_line(error)})") from error


@contextlib.contextmanager
def _strict() -> Iterator[None]:
    """Pillow as it must be here: importing AutoModel's multimodal data sets, for one, lets truncated files pass.

    Its warnings (large images, odd metadata) are not for the terminal. All these are globals of a process, hence the lock.
    """
    with _LOCK, warnings.catch_warnings():
        before = [getattr(module, name) for module, name, _ in _GLOBALS]
        for module, name, value in _GLOBALS:
            setattr(module, name, value)
        try:
            warnings.simplefilter("ignore")
            yield
        finally:
            for (module, name, _), value in zip(_GLOBALS, before, strict=True):
                setattr(module, name, value)


def _check(image: Image.Image, name: str) -> None:
    """Refuse what a header tells."""
    width, height = image.size
    if not width or not height:
        raise RejectedError("corrupt_image", f"image {name} cannot be read (it is {width} x {height} pixels)")
    if max(width, height) > MAX_RATIO * min(width, height):
        reason = f"{width} x {height} pixels, one side may be {MAX_RATIO} times the other at most"
        raise RejectedError("too_narrow", f"image {name} is too narrow ({reason})")
    if image.format != "MPO" and (frames := getattr(image, "n_frames", 1)) > 1:  # cameras add previews to a JPEG
        raise RejectedError("animated_image", f"image {name} has {frames} frames, one is needed")
    scaled = image.mode in _SIXTEEN_BITS or (image.mode == "I" and image.format in ("PNG", "PPM"))
    if image.mode not in _MODES and not scaled:
        reason = f"pixels of mode {image.mode}, which have no meaning in 8 bits"
        raise RejectedError("pixel_format", f"image {name} has {reason}")


def _to_rgb(image: Image.Image) -> Image.Image:
    """Eight bits a colour, transparent parts on white."""
    if image.mode.startswith("I"):
        return _sixteen_to_rgb(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image.getchannel("A"))
        return white
    return image.convert("RGB")


def _sixteen_to_rgb(image: Image.Image) -> Image.Image:
    """The upper eight of sixteen bits, as Pillow reads colours of 16 bits; its own conversion of grey would clip."""
    values = np.asarray(image)
    grey = (values >> 8).astype(np.uint8)
    if (clear := image.info.get("transparency")) is not None:
        grey[values == clear] = 255
    return Image.fromarray(grey).convert("RGB")


def _orientation(image: Image.Image) -> int:
    """The EXIF tag, 1 to 8; 1 (upright) where there is none or it is damaged. Pillow itself turns TIFF files."""
    if image.format == "TIFF":
        return 1
    try:
        found = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)  # PNG's own one would decode
    except _BAD_EXIF:
        return 1
    return int(found) if found in range(1, 9) else 1


def _has_late_text(stream: IO[bytes]) -> bool:
    """Whether a PNG file has metadata behind its pixels, which Pillow knows only after decoding."""
    position, pixels_seen = stream.tell(), False
    stream.seek(8)
    try:
        while len(head := stream.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            if pixels_seen and kind in (b"eXIf", b"tEXt", b"zTXt", b"iTXt"):
                return True
            pixels_seen = pixels_seen or kind == b"IDAT"
            stream.seek(length + 4, io.SEEK_CUR)
    finally:
        stream.seek(position)
    return False


def clipped(name: str) -> str:
    """A name that fits on a line; what is taken for a path may be anything."""
    name = name.encode("unicode_escape").decode() if not name.isprintable() else name
    return name if len(name) <= 300 else f"{name[:297]}..."
