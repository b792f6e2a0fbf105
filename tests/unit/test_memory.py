"""What has been read of mapped weight files does not count as memory of the process."""

import mmap
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_bard.base.memory import without_read_pages
from nemo_bard.evaluation.responder import _files_to_cast, load_checkpoint

SIZE = 64 * 2**20
needs_maps = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux alone tells what is mapped")


def resident(path):
    """Bytes of a mapped file that count as memory of this process."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            inside = line.endswith(str(path))
        elif inside and line.startswith("Rss:"):
            found += 1024 * int(line.split()[1])
    return found


@needs_maps
def test_pages_that_were_read_are_given_back_and_read_again(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(bytes(range(256)) * (SIZE // 256))
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        before = mapped[:]
        assert resident(path) == SIZE
        with without_read_pages([path]):
            deadline = time.monotonic() + 20
            while resident(path) and time.monotonic() < deadline:
                time.sleep(0.02)
            assert resident(path) == 0
        assert mapped[:] == before
        assert resident(path) == SIZE, "nothing is given back any more"


def test_other_files_stay(tmp_path):
    with without_read_pages([]), without_read_pages([tmp_path / "none.safetensors"]):
        pass


def test_weights_in_the_wanted_dtype_are_left_alone(start, tmp_path):
    """They may be views of the file, into which an optimizer writes."""
    [file] = sorted(start.glob("*.safetensors"))
    weights = load_file(file)
    for name, dtype in (("half", torch.bfloat16), ("full", torch.float32)):
        folder = tmp_path / name
        folder.mkdir()
        for path in start.iterdir():
            if path != file and path.is_file():
                (folder / path.name).symlink_to(path)
        save_file({key: value.to(dtype) for key, value in weights.items()}, folder / file.name, {"format": "pt"})
    assert _files_to_cast(tmp_path / "full", "float32") == []
    assert _files_to_cast(tmp_path / "half", "bfloat16") == []
    assert _files_to_cast(tmp_path / "half", "float32") == [tmp_path / "half" / file.name]
    model, _ = load_checkpoint(tmp_path / "half", device="cpu")
    for name, value in model.state_dict().items():
        if name in weights:
            assert torch.equal(value, weights[name].bfloat16().float()), name
