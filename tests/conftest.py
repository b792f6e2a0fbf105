"""Shared fixtures: the golden data's folder and tiny checkpoints."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from nemo_bard import BardVLForConditionalGeneration

torch.set_num_threads(1)

GOLDEN = Path(__file__).parent / "golden"


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and torch sees none")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what tests have measured and told with ``record_property("measured", line)``."""
    for reports in terminalreporter.stats.values():
        for report in reports:
            for name, line in getattr(report, "user_properties", ()):
                if name == "measured" and report.when == "teardown":
                    terminalreporter.write_line(f"measured: {line}")


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    return GOLDEN


@pytest.fixture(scope="session")
def golden_model() -> Callable[..., BardVLForConditionalGeneration]:
    """Loads a tiny checkpoint, with configuration overrides, once; tests must leave it as they found it."""
    from nemo_bard import BardVLForConditionalGeneration

    loaded: dict[str, BardVLForConditionalGeneration] = {}

    def load(name: str, **overrides: object) -> BardVLForConditionalGeneration:
        key = f"{name} {sorted(overrides.items())}"
        if key not in loaded:
            folder = GOLDEN / "models" / name
            loaded[key] = BardVLForConditionalGeneration.from_pretrained(folder, **overrides).eval()
        return loaded[key]

    return load


@pytest.fixture(scope="session")
def write_clip() -> Callable[..., Path]:
    """Writes a video with a bar that grows: ``write_clip(path, frames=24, codec="mpeg4")``, 8 frames a second."""
    import av
    import numpy as np

    def write(path: Path, frames: int = 24, *, codec: str = "mpeg4", options: dict[str, str] | None = None) -> Path:
        with av.open(str(path), "w", options=options or {}) as container:
            stream = container.add_stream(codec, rate=8)
            stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
            for number in range(frames):
                pixels = np.random.default_rng(number).integers(0, 255, (64, 96, 3), dtype=np.uint8)
                pixels[:, : 4 * number % 96] = (255, 0, 0)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode())
        return path

    return write


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BARD start point with block size 4; tests must leave it as they found it."""
    from nemo_bard.checkpoints.convert import convert
    from nemo_bard.checkpoints.tiny import make_tiny_qwen3_vl

    folder = tmp_path_factory.mktemp("start")
    convert(make_tiny_qwen3_vl(folder / "source"), folder / "start", block_size=4)
    return folder / "start"


@pytest.fixture(scope="session")
def install_package() -> Callable[..., Path]:
    """Writes a package as pip would install it: modules, and metadata with entry points."""

    def install(folder: Path, name: str, modules: dict[str, str], entry_points: str) -> Path:
        info = folder / f"{name}-1.0.dist-info"
        info.mkdir(parents=True, exist_ok=True)
        for module, code in modules.items():
            (folder / f"{module}.py").write_text(code)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(entry_points)
        return folder

    return install
