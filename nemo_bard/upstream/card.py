"""What the model card of a released checkpoint imports, under the names that it uses.

The released code lived in a fork of NeMo AutoModel, ``nemo_automodel.components.models.bard_vl``; these names lead to ``nemo_bard.model``.
The card reads videos with qwen-vl-utils, whose only reader without further packages is torchvision's, which is gone in 0.27.
Nothing is imported here before it is used.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Sequence
from functools import partial
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

from nemo_bard.base.errors import one_line
from nemo_bard.base.moved import AliasLoader
from nemo_bard.upstream.touched import Touched

if TYPE_CHECKING:
    from torch import Tensor

FORK = "nemo_automodel.components.models.bard_vl"
NAMES = {
    FORK: "nemo_bard.model",
    f"{FORK}.model": "nemo_bard.model.modeling",
    f"{FORK}.modeling_bard_vl": "nemo_bard.model.modeling",
    f"{FORK}.configuration_bard_vl": "nemo_bard.model.configuration",
}
"""Module of the fork -> ours."""
VISION_PROCESS = "qwen_vl_utils.vision_process"

_read = partial(
    Touched,
    version="qwen-vl-utils 0.0.14",
    reason="its torchvision reader calls torchvision.io.read_video, which is gone; PyAV reads in its place",
    until="qwen-vl-utils reads videos with what it requires",
)
TOUCHED = (
    _read(f"{VISION_PROCESS}.VIDEO_READER_BACKENDS"),
    _read(f"{VISION_PROCESS}.smart_nframes", parameters="ele, total_frames, video_fps"),
    _read(f"{VISION_PROCESS}.calculate_video_frame_range", parameters="ele, total_frames, video_fps"),
)


class CardFinder(MetaPathFinder):
    """Finds the modules of the fork, before Python looks for them below ``nemo_automodel`` or ``nemo_bard.model``."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return a spec that leads to our module, None for every other name."""
        del path, target
        if fullname in NAMES:
            return ModuleSpec(fullname, AliasLoader(NAMES[fullname]))
        return None


def add_video_reader(vision_process: ModuleType) -> None:
    """Let ``process_vision_info`` read videos where none of qwen-vl-utils' own readers can."""
    if any(importlib.util.find_spec(name) is not None for name in ("torchcodec", "decord")):
        return
    import torchvision.io

    if not hasattr(torchvision.io, "read_video"):
        vision_process.VIDEO_READER_BACKENDS["torchvision"] = read_video


def read_video(element: dict[str, Any]) -> tuple[Tensor, dict[str, Any], float]:
    """Read a clip with PyAV as qwen-vl-utils' readers do.

    Args:
        element: ``video`` is a path; ``video_start``, ``video_end`` in seconds, ``fps``, ``nframes`` as qwen-vl-utils has them.

    Returns:
        Frames ``[T, C, H, W]`` uint8, metadata as transformers' video processors take it, frames per second that were kept.

    Raises:
        ValueError: If the file cannot be read as a video.
    """
    import av
    import torch
    from av.error import FFmpegError
    from qwen_vl_utils.vision_process import calculate_video_frame_range, smart_nframes

    path = str(element["video"]).removeprefix("file://")
    try:
        with contextlib.closing(av.open(path)) as container:
            stream = container.streams.video[0]
            fps, total = float(stream.average_rate or 1), stream.frames
            if not total:  # WebM and Matroska do not say
                total = sum(packet.size > 0 for packet in container.demux(stream))
        if not total:
            raise ValueError(f"video {path} cannot be read (it has no frames)")
        first, last, whole = calculate_video_frame_range(element, total, fps)
        count = smart_nframes(element, total_frames=whole, video_fps=fps)
        kept = torch.linspace(first, last, count).round().long()
        wanted = set(kept.tolist())
        with contextlib.closing(av.open(path)) as container:
            frames = {
                index: torch.from_numpy(frame.to_ndarray(format="rgb24"))
                for index, frame in enumerate(container.decode(video=0))
                if index in wanted
            }
    except (FFmpegError, OSError, IndexError) as error:
        raise ValueError(f"video {path} cannot be read ({one_line(error)})") from error
    if len(frames) < len(wanted):
        raise ValueError(
            f"video {path} cannot be read (it ends early: {len(frames)} of {len(wanted)} frames are there)"
        )
    video = torch.stack([frames[index] for index in kept.tolist()]).permute(0, 3, 1, 2)
    metadata = {"fps": fps, "frames_indices": kept, "total_num_frames": whole, "video_backend": "pyav"}
    return video, metadata, count / whole * fps
