"""Packing of a mixture: lengths measured once per row of a source, rows in the order of the draws."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from prepared_folder import sample, write_prepared
from test_packing import ROW, collator, like_llava_onevision, tiny  # noqa: F401 the fixture

from nemo_bard.data import MixtureDataset
from nemo_bard.data.mixture.order import blend
from nemo_bard.data.packing import pack_dataset
from nemo_bard.data.prepared.dataset import PreparedDataset
from nemo_bard.data.row_lengths import measured_rows
from nemo_bard.data.windows import pack_window, plan_in_order

SOURCES = {"charts": {"weight": 2}, "docs": {"weight": 1}}


@pytest.fixture
def folder(tmp_path):
    def rows(name, count):
        return [
            sample(f"{name}{i}", answer="word " * (1 + i * 3), sizes=[(40 + 30 * i, 60)] * (i % 3))
            for i in range(count)
        ]

    write_prepared(tmp_path / "out", {"charts": rows("charts", 6), "docs": rows("docs", 4), "other": rows("other", 2)})
    return tmp_path / "out"


# ---------------------------------------------------------------- lengths


def test_lengths_are_those_of_the_rows_and_measured_once_per_source(tiny, folder, tmp_path, monkeypatch):  # noqa: F811
    mixture, make = MixtureDataset(folder, SOURCES, 25), collator(tiny)
    encoded = [make.encode(mixture[i]) for i in range(25)]
    for _ in range(2):
        rows = measured_rows(mixture, make, tmp_path / "cache")
        assert rows.lengths.tolist() == [len(one) for one in encoded]
        assert rows.vision_tokens.tolist() == [
            0 if one.grid_thw is None else int(one.grid_thw.prod(-1).sum()) // 4 for one in encoded
        ]
        monkeypatch.setattr("nemo_bard.data.row_lengths.measure", None)
    assert len(list(folder.glob("*/lengths-*.npz"))) == 2, "the source that is not drawn from is not measured"
    assert not (tmp_path / "cache").exists()
    other = measured_rows(MixtureDataset(folder, {"docs": {}}, seed=4), collator(tiny, 8), tmp_path / "cache")
    assert len(other.lengths) == 4
    monkeypatch.undo()
    everything = PreparedDataset(folder)
    assert measured_rows(everything, make, tmp_path / "cache").lengths.tolist() == [
        len(make.encode(everything[i])) for i in range(12)
    ]


def test_a_folder_that_cannot_be_written_keeps_its_lengths_elsewhere(tiny, folder, tmp_path, monkeypatch, caplog):  # noqa: F811
    from nemo_bard.data.lengths import SampleSizes

    save = SampleSizes.save

    def refuse(sizes, path):
        if folder in path.parents:
            raise PermissionError(13, "Permission denied", str(path))
        save(sizes, path)

    monkeypatch.setattr(SampleSizes, "save", refuse)
    mixture, make = MixtureDataset(folder, SOURCES, 9), collator(tiny)
    with caplog.at_level(logging.INFO):
        rows = measured_rows(mixture, make, tmp_path / "cache")
    assert "cannot be written" in caplog.text
    assert len(list((tmp_path / "cache").iterdir())) == 2
    monkeypatch.setattr("nemo_bard.data.row_lengths.measure", None)
    assert measured_rows(mixture, make, tmp_path / "cache").lengths.tolist() == rows.lengths.tolist()


def test_a_row_that_cannot_be_trained_on_is_named_by_its_file(tiny, tmp_path):  # noqa: F811
    write_prepared(tmp_path, {"a": [sample("one"), sample("two", answer="")]})
    with pytest.raises(ValueError, match=r"a/part-00000.arrow:1: .* is empty"):
        measured_rows(MixtureDataset(tmp_path), collator(tiny), tmp_path / "cache")


# ---------------------------------------------------------------- rows


def test_every_draw_is_in_one_row_whatever_the_loader_shuffles(tiny, folder, tmp_path):  # noqa: F811
    mixture, make = MixtureDataset(folder, SOURCES, 40), collator(tiny, max_length=300, max_row_length=300)
    packed = [
        pack_dataset(mixture, make, cache_dir=tmp_path, seed=1, shuffle=shuffle).packs for shuffle in (True, False)
    ]
    assert (packed[0].members == packed[1].members).all()
    assert (packed[0].edges == packed[1].edges).all()
    assert sorted(packed[0].members.tolist()) == list(range(40))
    rows = pack_dataset(mixture, make, cache_dir=tmp_path, seed=1, shuffle=True)
    assert rows.ordered
    assert [item["sample_index"] for item in rows[0]] == [mixture[i]["sample_index"] for i in rows.packs[0]]


def planned(count, window=1000, **settings):
    lengths, vision = like_llava_onevision(count)
    return lengths, plan_in_order(lengths, vision, ROW, window=window, **settings)


def test_rows_keep_the_proportions_of_the_order():
    """No sample waits for long, not even the shortest ones, and what a step holds does not depend on lengths."""
    lengths, packs = planned(20_000)
    drawn = np.cumsum(np.diff(packs.edges))
    late = np.arange(20_000) - packs.members
    assert late[lengths[packs.members] <= ROW].max() < 2.1 * 1000
    source = blend([5, 3, 2], 20_000)
    for number, share in enumerate((0.5, 0.3, 0.2)):
        counts = np.add.reduceat(source[packs.members] == number, packs.edges[:-1])
        assert np.abs(np.cumsum(counts) - share * drawn).max() < 0.1 * 1000
    longest = np.maximum.reduceat(lengths[packs.members] * (lengths[packs.members] <= ROW), packs.edges[:-1])
    halves = [longest[start : start + 60].mean() for start in (0, 60)]  # of the first window
    assert 0.7 < halves[0] / halves[1] < 1.4


def test_more_samples_go_on_with_the_same_rows():
    _, short = planned(5500)
    lengths, vision = like_llava_onevision(5500)
    extended = plan_in_order(np.concatenate([lengths, lengths]), np.concatenate([vision, vision]), ROW, window=1000)
    same = int(short.edges[np.searchsorted(short.edges, 4500)])
    assert (extended.members[:same] == short.members[:same]).all()


@pytest.mark.parametrize("leave_over", [True, False])
@pytest.mark.parametrize("kind", ["text", "images", "tiny", "wide", "long", "equal", "one", "exact"])
def test_a_window_is_full_and_no_row_is_too_long(kind, leave_over):
    dice = np.random.default_rng(0)
    lengths = {
        "text": lambda: np.exp(dice.normal(6.5, 0.8, 3000)),
        "images": lambda: np.exp(dice.normal(6.5, 0.8, 3000)) + 64,
        "tiny": lambda: dice.integers(20, 40, 4096),
        "wide": lambda: np.exp(dice.normal(4.5, 2, 3000)),
        "long": lambda: dice.integers(4000, ROW + 1, 500),
        "equal": lambda: np.full(1000, 3000),
        "one": lambda: np.full(1, 50),
        "exact": lambda: np.full(20, ROW),
    }[kind]()
    lengths = np.clip(lengths.astype(np.int64), 2, ROW)
    vision = np.where(dice.random(len(lengths)) < 0.7, lengths // 2, 0) if kind == "images" else np.zeros_like(lengths)
    row_of = pack_window(lengths, vision, ROW, leave_over=leave_over)
    assert leave_over or (row_of >= 0).all()
    inside = row_of >= 0
    filled = np.bincount(row_of[inside], weights=lengths[inside])
    seen = np.bincount(row_of[inside], weights=vision[inside])
    members = np.bincount(row_of[inside])
    assert (filled <= np.where((seen > 0) | (members == 1), ROW, ROW - 1)).all()
    least = {"long": 0.6, "equal": 0.7, "one": 0, "exact": 1}.get(kind, 0.97)
    assert filled.sum() / (ROW * len(filled)) >= least
