"""The body of a chat completion becomes a conversation with decoded images, and a prompt with its settings."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_bard.base.errors import not_one_of, one_line, short
from nemo_bard.data.conversation import check_encodable, parse_record
from nemo_bard.data.encode import encode_prompts
from nemo_bard.data.images import image_size, read_image
from nemo_bard.data.media import MediaSource, media_source
from nemo_bard.generation.resolve import DecodeSettings, resolve_settings
from nemo_bard.generation.settings import BardGenerationConfig
from nemo_bard.serving.body import Asked, check_body
from nemo_bard.serving.requests import BadRequest
from nemo_bard.serving.server.errors import ApiError
from nemo_bard.serving.server.fetch import fetch
from nemo_bard.serving.server.served import Served, served_models
from nemo_bard.serving.server.settings import ServerSettings

DRAFTS = "bard_drafts"
"""Key of our own: true adds events with every denoising step to a stream, and numbers of the decoding."""
LONGEST_TOKEN = 64
"""Characters a token stands for at most on average; longer texts are refused before they are tokenised."""
_MESSAGE_KEYS = ("role", "content", "name")
_ROLES = {"developer": "system"}


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A request that can be decoded."""

    asked: Asked
    drafts: bool
    batch: Any
    """What the processor returned."""
    prompt_tokens: int
    served: Served
    """What it asks."""
    config: BardGenerationConfig
    settings: DecodeSettings


class Preparer:
    """Turns bodies into prompts, in any thread.

    Args:
        model: ``BardVLForConditionalGeneration``.
        processor: Its processor.
        name: Name of the model in requests; an adapter ``b32`` of its folder is ``NAME:b32``.
        settings: Limits.
    """

    def __init__(self, model: Any, processor: Any, name: str, settings: ServerSettings) -> None:
        self.model, self.processor, self.settings = model, processor, settings
        self._lock = threading.Lock()
        self.served = served_models(model, name, settings)
        self.first = next(iter(self.served.values()))
        """For requests that name none."""

    def prepare(self, raw: bytes) -> Prepared:
        """Check a body and encode its prompt.

        Raises:
            ApiError: For whatever is wrong with it.
        """
        try:
            body = parse_json(raw)
            name = body.get("model") if isinstance(body, Mapping) else None
            served = self.served.get(name, self.first) if isinstance(name, str) else self.first
            defaults = vars(served.config)
            asked = check_body(body, block_size=served.block_size, defaults=defaults, extensions=(DRAFTS,))
            drafts = self._check_keys(body, asked)
            config = self._config(asked, served)
            resolved = resolve_settings(self.model, config)
            conversation = self._conversation(body)
            with self._lock:  # what tokenizers write is the state of one
                batch = encode_prompts(self.processor, [conversation])
        except ApiError:
            raise
        except ValueError as error:
            param = error.param if isinstance(error, BadRequest) else None
            raise ApiError(400, one_line(error), param=param) from error
        tokens = batch["input_ids"].shape[1]
        self._check_length(tokens)
        return Prepared(
            asked=asked,
            drafts=drafts,
            batch=batch,
            prompt_tokens=tokens,
            served=served,
            config=config,
            settings=resolved,
        )

    def _check_keys(self, body: Mapping[str, Any], asked: Asked) -> bool:
        """Check what only this server has to say something to; returns whether drafts are wanted."""
        name = body.get("model", self.first.name)
        if not isinstance(name, str) or name not in self.served:
            has = ", ".join(repr(one) for one in self.served)
            message = f"the model {short(name)} is not here; this server has {has}"
            raise ApiError(404, message, param="model", code="model_not_found")
        if asked.n != 1:
            raise BadRequest(f"n must be 1, this server gives one answer a request, got {asked.n}", "n")
        drafts = body.get(DRAFTS)
        if drafts is not None and not isinstance(drafts, bool):
            raise BadRequest(f"{DRAFTS} must be true or false, got {short(drafts)}", DRAFTS)
        return bool(drafts)

    def _config(self, asked: Asked, served: Served) -> BardGenerationConfig:
        wanted = served.max_tokens if asked.max_tokens is None else asked.max_tokens
        if wanted > self.settings.max_tokens:
            most = self.settings.max_tokens
            raise BadRequest(f"max_tokens must be at most {most} here (--max-tokens), got {wanted}", "max_tokens")
        return served.config.updated(**asked.settings, max_new_tokens=wanted)

    def _check_length(self, tokens: int) -> None:
        most = self.settings.max_prompt_tokens
        if tokens > most:
            raise ApiError(
                400,
                f"the prompt has {tokens} tokens, images included; at most {most} are taken here (--max-prompt-tokens)",
                param="messages",
                code="context_length_exceeded",
            )

    def _conversation(self, body: Mapping[str, Any]) -> list[dict[str, Any]]:
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages:
            raise BadRequest(f"messages must be a list of at least one message, got {short(messages)}", "messages")
        turns = [_turn(message, f"messages[{i}]") for i, message in enumerate(messages)]
        parts = [part for turn in turns for part in turn["content"]]
        self._check_text(sum(len(part["text"]) for part in parts if part["type"] == "text"))
        urls = [part for part in parts if part["type"] == "image_url"]
        if len(urls) > self.settings.max_images:
            raise BadRequest(f"{len(urls)} images, at most {self.settings.max_images} are taken here", "messages")
        left = self.settings.max_pixels
        for number, part in enumerate(urls):
            left = self._read(part, f"image {number + 1}", left)
        try:
            conversation, _ = parse_record({"messages": turns}, Path(), needs_answer=False)
        except ValueError as error:
            raise BadRequest(str(error), "messages") from error
        if conversation[-1]["role"] != "user":
            raise BadRequest("the last message must be the user's", "messages")
        last = conversation[-1]["content"]
        if all(part["type"] == "text" and not part["text"].strip() for part in last):
            raise BadRequest("the last message is empty", "messages")
        images = [part for turn in conversation for part in turn["content"] if part["type"] == "image"]
        for part, image in zip(urls, images, strict=True):
            image["image"] = part["decoded"]
        return conversation

    def _check_text(self, characters: int) -> None:
        most = LONGEST_TOKEN * self.settings.max_prompt_tokens
        if characters > most:
            raise ApiError(
                400,
                f"the messages have {characters} characters; no more than {most} are looked at here"
                f" (--max-prompt-tokens {self.settings.max_prompt_tokens})",
                param="messages",
                code="context_length_exceeded",
            )

    def _read(self, part: dict[str, Any], name: str, left: int) -> int:
        """Decode an image in its place; returns the pixels that others may have."""
        data = self._bytes(part["image_url"], name)
        width, height = image_size(data, name=name)
        if width * height > left:
            most = self.settings.max_pixels
            raise BadRequest(
                f"{name} has {width} x {height} pixels; the images of a request may have {most:,} together"
                " (--max-pixels)",
                "messages",
            )
        part["decoded"] = read_image(data, name=name)
        part["image_url"] = MediaSource("image", data=data)
        return left - width * height

    def _bytes(self, url: str, name: str) -> bytes:
        if url.startswith("data:"):
            return media_source("image", url, Path()).image_bytes()
        if not url.lower().startswith(("http://", "https://")):
            raise BadRequest(f"{name}: url must be a data: URL, got {short(url)}", "messages")
        if not self.settings.allow_urls:
            raise BadRequest(
                f"{name}: this server fetches no addresses (--allow-urls), send a data: URL; got {short(url)}",
                "messages",
            )
        return fetch(url, max_bytes=self.settings.max_body, name=name)


def parse_json(raw: bytes) -> Any:
    """What a body holds.

    Raises:
        BadRequest: If it is not JSON, nested too deeply, or holds NaN or Infinity.
    """

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is not JSON")

    try:
        return json.loads(raw, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the body is not JSON ({one_line(error)})") from error


def _turn(message: object, where: str) -> dict[str, Any]:
    """A message with its content as text parts and ``image_url`` parts that hold the address as a text."""
    if not isinstance(message, Mapping):
        raise BadRequest(f"{where} must be an object with 'role' and 'content', got {short(message)}", "messages")
    for key, value in message.items():
        if key not in _MESSAGE_KEYS and value is not None:
            raise BadRequest(f"{where}: {not_one_of('key', key, _MESSAGE_KEYS)}", "messages")
    role, content = message.get("role"), message.get("content")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list) or not content:
        raise BadRequest(f"{where}: content must be a text or a list of parts, got {short(content)}", "messages")
    parts = [_part(part, f"{where}.content[{i}]") for i, part in enumerate(content)]
    return {"role": _ROLES.get(role, role) if isinstance(role, str) else role, "content": parts}


def _part(part: object, where: str) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if not isinstance(part, Mapping) or kind not in ("text", "image_url"):
        raise BadRequest(f"{where}: type must be text or image_url, got {short(kind if kind else part)}", "messages")
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise BadRequest(f"{where}: 'text' must be a text, got {short(part.get('text'))}", "messages")
        check_encodable(part["text"], where)
        return {"type": "text", "text": part["text"]}
    url = part.get("image_url")
    url = url.get("url") if isinstance(url, Mapping) else url
    if not isinstance(url, str) or not url:
        got = short(part.get("image_url"))
        raise BadRequest(f"{where}: image_url must be an object with 'url', got {got}", "messages")
    return {"type": "image_url", "image_url": url}
