"""Image files of every kind and defect, made here."""

from __future__ import annotations

import functools
import io
import struct
import zlib

import numpy as np
from PIL import Image

CUT = ("JPEG", "PNG", "WEBP", "GIF")


def encode(image: Image.Image, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=form, **options)
    return buffer.getvalue()


@functools.cache
def photo(width: int = 160, height: int = 120) -> Image.Image:
    """A part of a photograph; the same object for the same size."""
    from sklearn.datasets import load_sample_images

    return Image.fromarray(load_sample_images().images[0]).resize((width, height))


def flat(colour: object = (200, 30, 10), mode: str = "RGB", size: tuple[int, int] = (40, 24)) -> Image.Image:
    return Image.new(mode, size, colour)


def quarters() -> Image.Image:
    """64 x 48 pixels in four colours, by which orientations are told."""
    image = flat("red", size=(64, 48))
    for box, colour in (((32, 0), "lime"), ((0, 24), "blue"), ((32, 24), "white")):
        image.paste(flat(colour, size=(32, 24)), box)
    return image


def grey16(value: int = 40000) -> Image.Image:
    return Image.fromarray(np.full((24, 40), value, np.uint16))


def animated(form: str) -> bytes:
    frames = [flat((tint, 0, 0)) for tint in (0, 100, 200)]
    return encode(frames[0], form, save_all=True, append_images=frames[1:])


def turned(form: str, orientation: int) -> bytes:
    """``quarters`` stored so that the tag turns it upright."""
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # numbers of Image.Transpose
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = quarters() if orientation == 1 else quarters().transpose(Image.Transpose(undo[orientation]))
    return encode(stored, form, exif=exif, **({"quality": 95} if form in ("JPEG", "WEBP") else {}))


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(side: int = 100_000) -> bytes:
    """A PNG file of some bytes whose header promises ``side`` x ``side`` pixels."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" * 1000)
    chunks = (png_chunk(b"IHDR", header), png_chunk(b"IDAT", pixels), png_chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def late_exif() -> bytes:
    """A PNG file whose EXIF tag stands behind the pixels, as ImageMagick writes it."""
    plain, tagged = turned("PNG", 6), io.BytesIO(turned("PNG", 6))
    with Image.open(tagged) as image:
        exif = image.info["exif"].removeprefix(b"Exif\0\0")
    end = png_chunk(b"IEND", b"")
    chunk = png_chunk(b"eXIf", exif)
    assert chunk in plain
    return plain.replace(chunk, b"").removesuffix(end) + chunk + end
