"""Prepared folders: what is written is read, by row, from several files, and a folder that is not whole is refused."""

from __future__ import annotations

import dataclasses
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from prepared_folder import sample, write_prepared

from nemo_bard.data.prepared.layout import MANIFEST, is_prepared, load_manifest
from nemo_bard.data.prepared.source import PreparedSource
from nemo_bard.data.prepared.writer import PartWriter


@pytest.fixture
def folder(tmp_path):
    charts = [sample(f"c{i}", answer=f"answer {i}", sizes=[(8 + i, 6)] * (i % 3)) for i in range(8)]
    write_prepared(tmp_path, {"charts": charts, "text": [sample("t0", sizes=())]}, leave_out=[("charts", 2)])
    return tmp_path


def answers(source):
    return [source.read(i)["conversation"][-1]["content"][0]["text"] for i in range(len(source))]


def test_samples_come_back_in_order_without_those_left_out(folder):
    manifest = load_manifest(folder)
    charts, text = (PreparedSource(folder, entry) for entry in manifest.sources)
    assert answers(charts) == [f"answer {i}" for i in (0, 1, 3, 4, 5, 6, 7)]
    assert (len(text), answers(text)) == (1, ["A picture."])
    item = charts.read(4)  # row 5, two images
    images = [part["image"] for part in item["conversation"][0]["content"] if part["type"] == "image"]
    assert [(image.size, image.mode) for image in images] == [((13, 6), "RGB")] * 2
    assert item["meta"] == {"id": "c5", "source": "charts"}
    assert charts.describe(4) == {"source": f"{folder / 'charts' / 'part-00001.arrow'}:2", "id": "c5"}
    with pytest.raises(IndexError, match="index 7 is outside the source charts of 7 samples"):
        charts.read(7)


def test_peek_knows_sizes_without_reading_images(folder, monkeypatch):
    charts = PreparedSource(folder, load_manifest(folder).source("charts"))
    monkeypatch.setattr(Image, "open", lambda *_: pytest.fail("an image was read"))
    images = [part["image"] for part in charts.peek(4)["conversation"][0]["content"] if part["type"] == "image"]
    assert [image.size for image in images] == [(13, 6)] * 2


def test_a_source_travels_to_other_processes(folder):
    charts = PreparedSource(folder, load_manifest(folder).source("charts"))
    charts.read(0)
    assert answers(pickle.loads(pickle.dumps(charts))) == answers(charts)


def test_digest_changes_with_samples_alone(tmp_path):
    def digest(name, **settings):
        samples = [sample(f"a{i}", **settings) for i in range(4)]
        return write_prepared(tmp_path / name, {"a": samples}).digest

    assert digest("one") == digest("two")
    assert digest("one") != digest("three", answer="Another.")
    assert load_manifest(tmp_path / "one").digest == digest("one")


@pytest.mark.parametrize("damage", ["no_manifest", "edited", "missing", "short", "no_folder", "format"])
def test_a_folder_that_is_not_whole_is_refused(folder, damage):
    part = folder / "charts" / "part-00001.arrow"
    told = {
        "no_manifest": "is not a prepared folder, it has no manifest.json",
        "edited": "was changed after it was written",
        "missing": "part-00001.arrow is missing",
        "short": rf"part-00001.arrow has 10 bytes instead of {part.stat().st_size}",
        "no_folder": "nowhere does not exist",
        "format": "format must be 1, got 99",
    }[damage]
    raw = json.loads((folder / MANIFEST).read_text())
    if damage == "no_manifest":
        (folder / MANIFEST).unlink()
    elif damage == "edited":
        (folder / MANIFEST).write_text(json.dumps({**raw, "version": "other"}))
    elif damage == "missing":
        part.unlink()
    elif damage == "short":
        part.write_bytes(part.read_bytes()[:10])
    elif damage == "format":
        (folder / MANIFEST).write_text(json.dumps({**raw, "format": 99}))
    assert is_prepared(folder) == (damage != "no_manifest")
    with pytest.raises(ValueError, match=told):
        load_manifest(folder / "nowhere" if damage == "no_folder" else folder)


def test_a_part_that_fails_leaves_nothing_behind(tmp_path):
    def write():
        with PartWriter(tmp_path / "a" / "part-00000.arrow", "a") as part:
            part.add(sample("one"))
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write()
    assert list((tmp_path / "a").iterdir()) == []


def test_a_part_may_be_empty(tmp_path):
    manifest = write_prepared(tmp_path, {"a": [sample("one")]}, leave_out=[("a", 0)])
    assert len(PreparedSource(tmp_path, manifest.source("a"))) == 0
    with PartWriter(tmp_path / "a" / "part-00009.arrow", "a") as part:
        pass
    assert part.file.rows == 0


def mapped_bytes(path):
    """Pages of a file that are in this process, by the system's account."""
    found = 0
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    for line in lines:
        if line.endswith(str(path)):
            found += next(int(own.split()[1]) for own in lines if own.startswith("Rss:"))
    return 1024 * found


@pytest.mark.skipif(not Path("/proc/self/smaps").is_file(), reason="needs Linux")
def test_pages_that_were_read_do_not_stay_in_the_process(tmp_path):
    dice = np.random.default_rng(0)
    large = [dataclasses.replace(sample(f"a{i}"), images=[dice.bytes(1_000_000)]) for i in range(12)]
    manifest = write_prepared(tmp_path, {"a": large}, rows_per_part=12)
    source = PreparedSource(tmp_path, manifest.source("a"))
    rows = [source.raw(i) for i in range(12)]
    assert [row["images"][0]["bytes"] for row in rows] == [one.images[0] for one in large]
    assert source.peek(3)["meta"]["id"] == "a3"
    path = tmp_path / "a" / "part-00000.arrow"
    assert path.stat().st_size > 12_000_000
    assert mapped_bytes(path) < 1_000_000
