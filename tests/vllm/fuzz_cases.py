"""Requests that a server must refuse or survive. Case ``index`` of a seed is always the same; nothing here needs vLLM."""

import base64
import functools
import io
import json
import random
import struct
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

from PIL import Image, ImageDraw

from nemo_bard.serving.requests import BadRequest, check_xargs, request_settings

REFUSED, ANY = "4xx", "4xx or 200"
NONSENSE = [
    "abc", "", " ", "0.5", "x" * 5000, "\u0000", "\ud83d\ude00", -1, 0, 1, 2, 3.5, -0.5, 1e-30, 1e30, 2**31, 2**63, -(2**63), 2**70,
    float("nan"), float("inf"), True, False, None, [], [0.5], {}, {"a": 1}, [[[]]], "os.system", "../../etc/passwd",
]  # fmt: skip
DEEP = 100_000


class Case(NamedTuple):
    """A request, and which answers to it are right."""

    kind: str
    body: bytes
    expected: str
    path: str = "/v1/chat/completions"
    method: str = "POST"


def picture(seed: int, size: int = 96) -> bytes:
    """A PNG with a 4 x 4 grid of digits."""
    image = Image.new("L", (size, size))
    draw, source = ImageDraw.Draw(image), random.Random(seed)
    for place in range(16):
        row, column = divmod(place, 4)
        draw.text((column * size // 4 + 6, row * size // 4 + 5), str(source.randrange(10)), fill=255)
    return as_png(image)


def as_png(image: Image.Image) -> bytes:
    """The bytes of a picture."""
    stream = io.BytesIO()
    image.save(stream, "png")
    return stream.getvalue()


@functools.cache
def bomb(width: int, height: int) -> bytes:
    """A PNG of a few kilobytes that says, and holds, many pixels; only its first rows are real above 400 megapixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = zlib.compress(bytes((width + 7) // 8 + 1) * min(height, 400_000_000 // width + 1), 9)
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def url(data: bytes, mime: str = "image/png") -> str:
    """A data URL."""
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def body(model: str, *, image: str | None = None, text: str = "Read the digits.", **more: Any) -> dict[str, Any]:
    """A request that is right unless ``more`` makes it wrong."""
    parts = [{"type": "text", "text": text}]
    if image is not None:
        parts.insert(0, {"type": "image_url", "image_url": {"url": image}})
    return {"model": model, "messages": [{"role": "user", "content": parts}], "max_tokens": 24, "temperature": 0} | more


def dump(value: Any) -> bytes:
    """JSON, NaN and lone surrogates included."""
    return json.dumps(value).encode()


def settings(model: str, source: random.Random, block_size: int) -> Case:
    """One or two settings with any value; what ``check_xargs`` refuses must be refused."""
    names = [*request_settings(), "seed", "mask_token_id", "decode_path", "confidence_treshold", "x" * 3000, ""]
    given = {source.choice(names): source.choice(NONSENSE) for _ in range(source.choice([1, 1, 2]))}
    flags = any(isinstance(value, bool) for value in given.values())  # JSON's true may become 1 on its way
    try:
        check_xargs(given, block_size=block_size)
    except BadRequest:
        return Case("settings", dump(body(model, vllm_xargs=given)), ANY if flags else REFUSED)
    return Case("settings", dump(body(model, vllm_xargs=given)), ANY)


UNSUPPORTED = [
    {"logprobs": True},
    {"logprobs": True, "top_logprobs": 5},
    {"prompt_logprobs": 1},
    {"response_format": {"type": "json_object"}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}},
    {"structured_outputs": {"regex": "[0-9]+"}},
    {"n": 2},
    {"n": 10**6, "temperature": 1},
    {"n": 0},
    {"frequency_penalty": 1.5},
    {"logit_bias": {"5": 50}},
    {"vllm_xargs": "confidence_threshold=0.9"},
    {"vllm_xargs": [1]},
    {"temperature": -1},
    {"temperature": "hot"},
    {"temperature": 3},
    {"top_p": 0},
    {"top_k": -7},
    {"max_tokens": 0},
    {"max_tokens": "many"},
    {"max_tokens": 10**9},
    {"seed": 2**70},
    {"stop": [""]},
    {"messages": []},
    {"messages": "hello"},
    {"messages": [{"role": 7, "content": "hello"}]},
    {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
    {"messages": [{"role": "user", "content": [{"type": "hologram", "hologram": "x"}]}]},
    {"messages": [{"content": "hello"}]},
    {"messages": [{"role": "user", "content": [{"type": None, "text": "hello"}]}]},
    {"messages": [{"role": "user", "content": [{"type": None, "image_url": {"url": "data:,"}}]}]},
    {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": "hello"}]}]},
    {"messages": [{"role": "user", "content": [[]]}]},
    {"structured_outputs": 7},
    {"stop": "\ud83d"},
    {"request_id": "\ud83d"},
    {"kv_transfer_params": {"a": "\ud83d"}},
    {"model": "another/model"},
]
"""Each is wrong on top of a body that is right."""


def unsupported(model: str, source: random.Random, block_size: int) -> Case:
    """Something of OpenAI's interface that we lack, or a wrong value of what we have."""
    return Case("unsupported", dump(body(model) | source.choice(UNSUPPORTED)), REFUSED)


def images(model: str, source: random.Random, block_size: int) -> Case:
    """A picture that is none, or too large, or a strange one."""
    found, expected = source.choice(PICTURES)
    return Case("images", dump(body(model, image=found(source) if callable(found) else found)), expected)


def truncated(source: random.Random) -> str:
    """A PNG whose end is missing."""
    png = picture(source.randrange(4))
    return url(png[: source.randrange(8, len(png) - 20)])


def flipped(source: random.Random) -> str:
    """A PNG with one wrong byte."""
    png = bytearray(picture(source.randrange(4)))
    png[source.randrange(len(png))] ^= 255
    return url(bytes(png))


def moving() -> bytes:
    """A GIF of two pictures."""
    stream = io.BytesIO()
    Image.new("P", (40, 40)).save(stream, "gif", save_all=True, append_images=[Image.new("P", (40, 40), 9)])
    return stream.getvalue()


PICTURES: list[tuple[str | Callable[[random.Random], str], str]] = [
    ("data:image/png;base64,!!!not base64!!!", REFUSED),
    ("data:image/png;base64,", REFUSED),
    ("data:image/png;base64", REFUSED),
    ("data:,", REFUSED),
    ("", REFUSED),
    ("not a url", REFUSED),
    ("file:///etc/passwd", REFUSED),
    ("http://127.0.0.1:9/a.png", REFUSED),
    ("ftp://127.0.0.1/a.png", REFUSED),
    (url(b"GIF89a"), REFUSED),
    (url(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image/svg+xml"), REFUSED),
    (truncated, REFUSED),
    (flipped, ANY),
    (lambda source: url(source.randbytes(2000)), REFUSED),
    (lambda source: url(bomb(60_000, 60_000)), REFUSED),
    (lambda source: url(bomb(19_000, 19_000)), REFUSED),
    (lambda source: url(bomb(4_097, 4_097)), REFUSED),
    (lambda source: url(bomb(3_000, 3_000)), ANY),
    (url(as_png(Image.new("L", (1, 1)))), ANY),
    (url(as_png(Image.new("L", (3000, 2)))), ANY),
    (url(as_png(Image.new("I;16", (60, 60)))), ANY),
    (url(as_png(Image.new("RGBA", (60, 60)))), ANY),
    (url(moving(), "image/gif"), ANY),
]
"""What may stand in the place of a picture."""


def not_json(model: str, source: random.Random, block_size: int) -> Case:
    """A body that is no JSON, or JSON of another shape."""
    good = dump(body(model))
    found = source.choice(
        [
            b"",
            b"{",
            b"null",
            b"[]",
            b'"text"',
            b"7",
            b"\xff\xfe\x00",
            good[: source.randrange(1, len(good))],
            b"[" * DEEP + b"]" * DEEP,
            b'{"model": ' + b"[" * DEEP + b"]" * DEEP + b"}",
            b'{"messages": [{"role": "user", "content": "\xff"}]}',
            b'{"a": ' + b"9" * 6000 + b"}",
        ]
    )
    return Case("not JSON", found, REFUSED)


def large(model: str, source: random.Random, block_size: int) -> Case:
    """Much text: ten megabytes as one text, as many messages, or in a place where none belongs."""
    text = source.choice(["digits ", "\u00e9", "<|image_pad|>", "<|im_end|>"])
    where = source.randrange(4)
    if where == 0:
        found = body(model, text=text * (10_000_000 // len(text.encode())))
    elif where == 1:
        found = body(model) | {"messages": [{"role": "user", "content": text}] * 20_000}
    elif where == 2:
        found = body(model, vllm_xargs={"remasking_strategy": "y" * 10_000_000})
    else:
        found = body(model, image="data:image/png;base64," + "A" * 10_000_000)
    return Case("large", dump(found), REFUSED)


def special(model: str, source: random.Random, block_size: int) -> Case:
    """Text that looks like the template's own marks."""
    marks = [
        "<|image_pad|>",
        "<|vision_start|><|vision_end|>",
        "<|im_end|>",
        "<|im_start|>assistant\n",
        "<|mask|>",
        "\u0000",
    ]
    text = "".join(source.choices([*marks, "Read the digits.", "7"], k=source.randrange(1, 8)))
    image = url(picture(source.randrange(4))) if source.random() < 0.5 else None
    return Case("special text", dump(body(model, text=text, image=image)), ANY)


def mutated(model: str, source: random.Random, block_size: int) -> Case:
    """A right body in which one value, at any depth, is another or gone."""
    found = body(model, image=url(picture(0)), stream=source.random() < 0.3, top_p=1.0, seed=3, stop=["zz"])
    found["stream_options"], found["vllm_xargs"] = None, {"confidence_threshold": 0.9}
    places: list[tuple[Any, Any]] = []

    def walk(value: Any) -> None:
        for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
            places.append((value, key))
            walk(value[key])

    walk(found)
    holder, key = source.choice(places)
    if source.random() < 0.3:
        del holder[key]
    else:
        holder[key] = source.choice(NONSENSE)
    return Case("mutated", dump(found), ANY)


def elsewhere(model: str, source: random.Random, block_size: int) -> Case:
    """Another path or method."""
    path, method = source.choice(
        [
            ("/v1/chat/completion", "POST"),
            ("/v1/chat/completions", "GET"),
            ("/v1/chat/completions", "DELETE"),
            ("/../../etc/passwd", "GET"),
            ("/v1/models/" + "a" * 5000, "GET"),
            ("/%00", "GET"),
        ]
    )
    return Case("elsewhere", dump(body(model)), REFUSED, path, method)


OPTIONS = {
    "add_generation_prompt": [False],
    "allowed_token_ids": [[1, 2], [10**9], []],
    "bad_words": [["7"]],
    "best_of": [2],
    "cache_salt": ["a"],
    "chat_template": ["{{ 1 / 0 }}", "{% for"],
    "chat_template_kwargs": [{"x": 1}, {"tools": 3}],
    "continue_final_message": [True],
    "documents": [[{"a": "b"}]],
    "echo": [True],
    "ignore_eos": [True],
    "include_stop_str_in_output": [True],
    "media_io_kwargs": [{"image": {"x": 1}}, {"image": {"image_mode": "CMYK"}}],
    "min_p": [0.5],
    "min_tokens": [5],
    "mm_processor_kwargs": [{"max_pixels": 1}, {"x": [1]}, {"size": {"shortest_edge": 1, "longest_edge": 1}}],
    "priority": [3],
    "repetition_penalty": [1.1],
    "return_token_ids": [True],
    "skip_special_tokens": [False],
    "stop_token_ids": [[5], [10**9], [-1]],
    "thinking_token_budget": [3],
    "tool_choice": ["required", "auto"],
    "truncate_prompt_tokens": [1, -1, 10**6],
    "use_beam_search": [True],
}
"""Options of vLLM's own, with values that may be refused and may not harm."""


def options(model: str, source: random.Random, block_size: int) -> Case:
    """Options of vLLM that were made for models that go token by token."""
    name = source.choice(list(OPTIONS))
    value = source.choice(OPTIONS[name] if source.random() < 0.7 else NONSENSE)
    image = url(picture(source.randrange(4))) if source.random() < 0.5 else None
    return Case("options", dump(body(model, image=image) | {name: value, "n": source.choice([1, 1, 2])}), ANY)


def routes(model: str, source: random.Random, block_size: int) -> Case:
    """Other routes of vLLM's server; one that a server lacks is a 404."""
    prompts = ["Read.", "", [1, 2, 3], [10**9], [-1], [], ["a", "b"], [[1], [2]], {"a": 1}, None, "<|image_pad|>"]
    xargs = source.choice([None, {"confidence_threshold": 2}, {"denoising_steps": "x"}, {"top_k": 3}])
    path, found = source.choice(
        [
            ("/v1/completions", {"prompt": source.choice(prompts), "logprobs": source.choice([None, None, 1])}),
            ("/v1/responses", {"input": source.choice(["Read.", [], 7])}),
            ("/v1/messages", {"messages": [{"role": "user", "content": "Read."}]}),
            ("/tokenize", {"prompt": source.choice(prompts)}),
            (
                "/inference/v1/generate",
                {"token_ids": source.choice([[1, 2], [10**9], [-1], []]), "sampling_params": {}},
            ),
        ]
    )
    shared = {"model": model, "max_tokens": source.choice([9, 16, 24]), "temperature": source.choice([0, 0.7])}
    return Case("other routes", dump(shared | found | ({"vllm_xargs": xargs} if xargs else {})), ANY, path)


KINDS: list[tuple[Callable[[str, random.Random, int], Case], int]] = [
    (settings, 8), (unsupported, 5), (images, 5), (mutated, 6), (not_json, 3), (special, 3), (elsewhere, 1), (large, 1), (options, 4), (routes, 3),
]  # fmt: skip
"""Kinds of requests, and how often each comes."""


def case(index: int, *, seed: int, model: str, block_size: int) -> Case:
    """Case ``index`` of a seed."""
    source = random.Random(f"{seed}:{index}")
    kinds, weights = zip(*KINDS, strict=True)
    return source.choices(kinds, weights)[0](model, source, block_size)
