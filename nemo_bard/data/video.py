"""Videos of a conversation: frames read with whatever decoder is installed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import numpy as np

from nemo_bard.base.errors import one_line

DECODERS = {"torchcodec": "torchcodec", "pyav": "av", "torchvision": "torchvision"}
"""Decoder of transformers -> module that it needs, the preferred one first."""


def find_decoder() -> str:
    """Return the name of the video decoder to use.

    Raises:
        ValueError: If none is installed; says what to install.
    """
    from transformers.video_utils import is_torchvision_video_decoding_available

    for name, module in DECODERS.items():
        if find_spec(module) is None or (name == "torchvision" and not is_torchvision_video_decoding_available()):
            continue
        return name
    raise ValueError("no video decoder is installed; run `pip install av` (or torchcodec), or pass images")


def read_video(path: str | os.PathLike, video_processor: Any) -> tuple[Any, Any]:
    """Read the frames that a processor samples.

    Args:
        path: Video file.
        video_processor: Its ``sample_frames`` picks the frames, its ``fps`` says how many.

    Returns:
        Frames ``[frames, height, width, 3]`` (or channels first, as the decoder gives them), upright, and their metadata.

    Raises:
        ValueError: If the file does not exist, is no video, ends early or is shorter than a temporal patch, or no decoder is installed.
    """
    from transformers.video_utils import load_video

    if not Path(path).is_file():
        raise ValueError(f"video file {path} does not exist")
    decoder = find_decoder()

    def sample(metadata: Any, **_: Any) -> Any:
        if not metadata.total_num_frames and decoder == "pyav":
            metadata.total_num_frames = _count_frames(path)
        if not metadata.total_num_frames:
            raise ValueError("it holds no frame")
        return video_processor.sample_frames(metadata=metadata, fps=video_processor.fps)

    try:
        frames, metadata = load_video(cast("Any", str(path)), backend=decoder, sample_indices_fn=sample)
    except Exception as error:  # the decoders' own exception classes have no common base
        raise ValueError(f"video {path} cannot be read with {decoder} ({one_line(error)})") from error
    if len(frames) != len(metadata.frames_indices):
        raise ValueError(
            f"video {path} cannot be read with {decoder} (it ends early: {len(frames)} of"
            f" {len(metadata.frames_indices)} sampled frames are there)"
        )
    if len(frames) < (least := video_processor.temporal_patch_size):
        raise ValueError(f"video {path} has {len(frames)} frame(s), at least {least} are needed; pass it as an image")
    return upright(frames, quarter_turns(path)) if decoder == "pyav" else frames, metadata


def quarter_turns(path: str | os.PathLike) -> int:
    """How often a file's frames are to be turned counter-clockwise by 90 degrees to stand upright: phones write that beside them."""
    import av

    container = av.open(os.fspath(path))
    with contextlib.closing(container):
        return next(container.decode(video=0)).rotation // 90 % 4


def upright(frames: np.ndarray, turns: int) -> np.ndarray:
    """Turn frames ``[frames, height, width, 3]`` counter-clockwise."""
    return np.ascontiguousarray(np.rot90(frames, turns, axes=(1, 2))) if turns else frames


def _count_frames(path: str | os.PathLike) -> int:
    """Frames of a file whose header does not say how many (WebM, Matroska), without decoding them."""
    import av

    container = av.open(os.fspath(path))
    with contextlib.closing(container):
        return sum(packet.size > 0 for packet in container.demux(video=0))


def prepare_videos(
    processor: Any,
    conversations: Sequence[list[dict[str, Any]]],
) -> tuple[list[list[dict[str, Any]]], dict[str, Any]]:
    """Replace the paths of videos by frames.

    Args:
        processor: A Qwen3-VL processor.
        conversations: Turns with typed parts; not modified.

    Returns:
        The conversations, and keyword arguments for the processor: what it has to know about frames already sampled.

    Raises:
        ValueError: As ``read_video``.
    """
    metadata: list[Any] = []

    def opened(part: dict[str, Any]) -> dict[str, Any]:
        if part["type"] != "video":
            return part
        frames, info = read_video(part["video"], processor.video_processor)
        metadata.append(info)
        return {**part, "video": frames}

    prepared = [
        [
            message
            if isinstance(message["content"], str)
            else {**message, "content": [opened(part) for part in message["content"]]}
            for message in conversation
        ]
        for conversation in conversations
    ]
    return prepared, {"video_metadata": metadata, "do_sample_frames": False} if metadata else {}
