"""Clips of digits for the tests of the vLLM plugin: files as cameras write them, and what ``generate`` reads of them."""

import json
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

CLIPS = (  # frames of the file, frames per second, frames that one picture stays
    (8, 2, 2),  # every frame is taken
    (8, 2, 2),  # other pictures, the same prompt
    (24, 8, 6),  # six of 24
    (45, 15, 9),  # six, at seconds that are no multiples
    (25, 10, 5),  # five, so that the last one counts twice
    (3, 2, 1),  # shorter than what is taken at least
    (80, 4, 10),  # more than the processor takes at most
)
SHORT = 6
"""Clips that leave room for a second one."""


class Video(NamedTuple):
    """A clip in a turn."""

    number: int


def write(path, frames, rate):
    """A video file of frames ``[height, width, 3]``."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())


def write_clips(folder, images):
    """The files of ``CLIPS``; pictures change from clip to clip."""
    frames = [np.asarray(image) for image in images]
    paths = []
    for number, (count, rate, stay) in enumerate(CLIPS):
        paths.append(folder / f"{number}.mp4")
        write(paths[-1], [frames[(3 * number + index // stay) % len(frames)] for index in range(count)], rate)
    return paths


def encoded(count):
    """The bytes of a file of so many grey frames."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "grey.mp4"
        write(path, [np.full((64, 64, 3), 100 + index, np.uint8) for index in range(count)], 2)
        return path.read_bytes()


def save_read(path, video_processor):
    """Beside a clip, what ``generate`` reads of it: frames as ``.npy``, their times as ``.json``."""
    from nemo_bard.data.video import read_video

    frames, metadata = read_video(path, video_processor)
    np.save(path.with_suffix(".npy"), np.asarray(frames))
    described = {
        "total_num_frames": metadata.total_num_frames,
        "fps": metadata.fps,
        "duration": metadata.duration,
        "video_backend": metadata.video_backend,
        "frames_indices": np.asarray(metadata.frames_indices).tolist(),
    }
    path.with_suffix(".json").write_text(json.dumps(described))


def load_read(folder, number):
    """Frames and metadata of ``save_read``, as vLLM takes them."""
    described = json.loads((folder / f"{number}.json").read_text())
    return np.load(folder / f"{number}.npy"), {**described, "do_sample_frames": False}
