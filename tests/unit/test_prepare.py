"""``data prepare``: which rows are kept, which are not and why, for every number of workers."""

from __future__ import annotations

import errno
import json

import numpy as np
import pytest
from prepare_sources import ids, prepare_one, rejects, row, tree, two_sources, write_mix, write_source

from nemo_bard.cli.app import main
from nemo_bard.data.prepare import duplicates
from nemo_bard.data.prepare.mix import read_mix
from nemo_bard.data.prepare.run import prepare
from nemo_bard.data.prepared.layout import is_prepared, load_manifest
from nemo_bard.data.prepared.writer import PartWriter


def test_every_row_is_kept_or_accounted_for(tmp_path):
    manifest = prepare(two_sources(tmp_path), tmp_path / "out")
    charts, docs = load_manifest(tmp_path / "out").sources
    assert [charts, docs] == manifest.sources
    # questions q0 .. q32, q0 .. q6; every fourth row is filtered, so that q0 and q4 are new when they come again
    assert (charts.read, charts.filtered) == (40, {"filter.rating": 10})
    assert charts.rejected == {"bad_json": 1, "duplicate": 4, "empty_answer": 1}
    kept = ids(tmp_path / "out", "charts")
    assert (charts.rows, len(kept), kept[0], kept[-1]) == (24, 24, "c0-1", "c4-5")
    # q30 .. q47, of which q30 alone is a sample of charts; reading ends with the eleventh sample
    assert (docs.read, docs.rows, docs.rejected) == (12, 11, {"duplicate": 1})
    assert ids(tmp_path / "out", "docs") == [f"d{n // 6}-{n % 6}" for n in range(1, 12)]


def test_rejects_say_where_and_why(tmp_path):
    prepare(two_sources(tmp_path), tmp_path / "out")
    lines = rejects(tmp_path / "out")
    assert [(line["source"], line["row"], line["id"], line["kind"]) for line in lines[:2]] == [
        ("charts", 3, "empty", "empty_answer"),
        ("charts", 7, None, "bad_json"),
    ]
    assert lines[0]["file"] == str(tmp_path / "charts" / "rows-1.jsonl")
    assert list(lines[0]) == ["source", "file", "row", "id", "kind", "reason"]
    twins = {line["id"]: line["reason"] for line in lines if line["kind"] == "duplicate"}
    assert list(twins) == ["c4-2", "c4-3", "c4-6", "c4-7", "d0-0"]
    assert twins["c4-2"] == f"the same images and text as {tmp_path / 'charts' / 'rows-0.jsonl'}:1"
    assert twins["d0-0"] == f"the same images and text as {tmp_path / 'charts' / 'rows-3.jsonl'}:6 of source charts"
    counted = {}
    for line in lines:
        counted.setdefault(line["source"], {}).setdefault(line["kind"], []).append(line)
    for entry in load_manifest(tmp_path / "out").sources:
        assert entry.rejected == {kind: len(of) for kind, of in counted[entry.name].items()}


def test_the_tree_is_the_same_for_every_number_of_workers(tmp_path):
    mix = two_sources(tmp_path)
    for jobs in (0, 1, 2):
        prepare(mix, tmp_path / f"out{jobs}", jobs=jobs)
    assert tree(tmp_path / "out0") == tree(tmp_path / "out1") == tree(tmp_path / "out2")
    assert ".prepare/plan.json" in tree(tmp_path / "out0")
    assert not [name for name in tree(tmp_path / "out2") if "units" in name or "unfinished" in name]


def test_limit_ends_reading_with_the_last_sample_that_it_allows(tmp_path):
    rows = [row(f"r{i}", question=f"q{i}", answer="" if i in (1, 8) else "yes") for i in range(10)]
    out, entry = prepare_one(tmp_path, rows, limit=5, max_reject_ratio=0.5)
    assert (ids(out, "a"), entry.read) == (["r0", "r2", "r3", "r4", "r5"], 6)
    assert entry.rejected == {"empty_answer": 1}  # row 8 has not been read


def test_limit_beyond_the_rows_gives_all(tmp_path):
    out, entry = prepare_one(tmp_path, [row(f"r{i}") for i in range(4)], limit=9)
    assert (entry.read, entry.kept, len(ids(out, "a"))) == (4, None, 4)


@pytest.mark.parametrize(
    ("conditions", "kept"),
    [
        ({"score": {"min": 2}}, "24"),
        ({"score": {"min": 2, "null": "keep"}}, "2345"),
        ({"score": {"max": 1}}, "1"),
        ({"score": {"min": 1, "max": 2}, "kind": {"equals": "b"}}, "2"),
        ({"kind": {"in": ["a", "c"]}}, "134"),
        ({"ratings": {"min": 3}}, "1"),
        ({"ratings": {"min": 3, "null": "keep"}}, "145"),
        ({"flag": {"equals": True}}, "1"),
    ],
)
def test_filters_keep_rows_that_meet_all_conditions(tmp_path, conditions, kept):
    rows = [
        row("1", score=1, kind="a", ratings=[3, 5], flag=True),
        row("2", score=2, kind="b", ratings=[5, 2], flag=1),
        row("3", score=None, kind="c", ratings=[1]),
        row("4", score=2.5, kind="a", ratings=[]),
        row("5", kind="b", ratings=None),
    ]
    out, entry = prepare_one(tmp_path, rows, filter=conditions)
    assert "".join(ids(out, "a")) == kept
    assert sum(entry.filtered.values()) == 5 - len(kept)


def test_a_value_that_cannot_be_compared_is_rejected(tmp_path):
    rows = [row("1", score=4), row("2", score="four")]
    out, entry = prepare_one(tmp_path, rows, filter={"score": {"min": 2}}, max_reject_ratio=0.5)
    assert entry.rejected == {"layout": 1}
    assert "column score must be a number for min or max, got 'four'" in rejects(out)[0]["reason"]


@pytest.mark.parametrize(("dedup", "a", "b"), [("none", 4, 4), ("source", 3, 3), ("all", 3, 1)])
def test_duplicates_within_and_across_sources(tmp_path, dedup, a, b):
    write_source(tmp_path / "in", [[row("1"), row("2", image="blue.png"), row("3", question="Why?"), row("4")]])
    mix = write_mix(
        tmp_path / "mix.yaml",
        {"a": {"path": "in/rows-0.jsonl"}, "b": {"path": "in/rows-0.jsonl", "system": None, "think": "keep"}},
        dedup=dedup,
    )
    if dedup == "all":
        with pytest.raises(ValueError, match=r"source b: none of its 4 rows is kept \(duplicate 4\)"):
            prepare(mix, tmp_path / "none")
        write_source(tmp_path / "more", [[row("1"), row("9", question="New?"), row("3", question="Why?"), row("4")]])
        mix = write_mix(
            tmp_path / "mix.yaml",
            {"a": {"path": "in/rows-0.jsonl"}, "b": {"path": "more/rows-0.jsonl"}},
            dedup=dedup,
        )
    manifest = prepare(mix, tmp_path / "out")
    assert [entry.rows for entry in manifest.sources] == [a, b]


def test_a_source_may_have_a_dedup_of_its_own(tmp_path):
    write_source(tmp_path / "in", [[row("1"), row("2"), row("3", question="Why?")]])
    path = {"path": "in/rows-0.jsonl"}
    mix = write_mix(
        tmp_path / "mix.yaml", {"a": path, "b": {**path, "dedup": "source"}, "c": {"path": "in", "split": None}}
    )
    assert [entry.rows for entry in prepare(mix, tmp_path / "out").sources] == [3, 2, 3]


def test_seen_keys_against_a_dictionary():
    chance, seen, known = np.random.default_rng(0), duplicates.Seen(), {}
    for unit in range(60):
        keys = np.array([bytes([0, n % 7, n // 7]) + b"\0" * 13 for n in chance.integers(0, 900, 25)], dtype="S16")
        rows = np.arange(25, dtype=np.int64)
        found = seen.find(keys)
        assert found.tolist() == [known.get(key, -1) for key in keys.tolist()]
        first = duplicates.first_of_each(keys) == rows
        new = first & (found < 0)
        places = duplicates.pack_place(3, unit, rows)
        seen.add(keys[new], places[new])
        known.update(zip(keys[new].tolist(), places[new].tolist(), strict=True))
    assert duplicates.unpack_place(int(places[24])) == (3, 59, 24)


def test_too_many_rejects_end_it_and_a_higher_ratio_goes_on(tmp_path):
    write_source(
        tmp_path / "in", [[row(f"{i}-{j}", answer="" if j == 2 else "yes") for j in range(5)] for i in range(3)]
    )
    section = {"path": "in/*.jsonl"}
    with pytest.raises(ValueError, match=r"3 of 15 rows cannot be used \(empty_answer 3\)") as error:
        prepare(write_mix(tmp_path / "mix.yaml", {"a": section}), tmp_path / "out")
    assert f"the first is {tmp_path / 'in' / 'rows-0.jsonl'}:2: messages[1]" in str(error.value)
    assert "raise sources.a.max_reject_ratio" in str(error.value)
    assert not is_prepared(tmp_path / "out")
    assert len(rejects(tmp_path / "out")) == 3
    parts = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "a").iterdir()}
    mix = write_mix(tmp_path / "mix.yaml", {"a": {**section, "max_reject_ratio": 0.2}})
    assert prepare(mix, tmp_path / "out").source("a").rows == 12
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "a").iterdir()} == parts


def test_a_hopeless_source_is_not_read_to_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr("nemo_bard.data.prepare.fold.HOPELESS", 2)
    write_source(tmp_path / "in", [[row(f"{i}-{j}", answer="") for j in range(5)] for i in range(4)])
    with pytest.raises(ValueError, match="5 of 5 rows cannot be used"):
        prepare(
            write_mix(tmp_path / "mix.yaml", {"a": {"path": "in/*.jsonl", "max_reject_ratio": 0.2}}), tmp_path / "o"
        )
    assert len(rejects(tmp_path / "o")) == 5


def test_retry_reads_rejected_rows_again(tmp_path):
    write_source(tmp_path / "in", [[row("1"), row("2", image="late.png")], [row("3")]])
    mix = write_mix(tmp_path / "mix.yaml", {"a": {"path": "in/*.jsonl"}})
    with pytest.raises(ValueError, match="missing_image 1"):
        prepare(mix, tmp_path / "out")
    (tmp_path / "in" / "late.png").write_bytes((tmp_path / "in" / "red.png").read_bytes())
    with pytest.raises(ValueError, match="missing_image 1"):
        prepare(mix, tmp_path / "out")
    assert prepare(mix, tmp_path / "out", retry=True).source("a").rows == 3
    with pytest.raises(ValueError, match="is whole already, --retry is for one that is not"):
        prepare(mix, tmp_path / "out", retry=True)


def test_options_reach_the_rows(tmp_path):
    rows = [row("1", answer="<think>so</think>Yes.", image="red.png")]
    out, _ = prepare_one(tmp_path, rows, think="strip", system="Be brief.")
    from nemo_bard.data.prepared.source import PreparedSource

    raw = PreparedSource(out, load_manifest(out).source("a")).raw(0)
    turns = [(turn["role"], turn["content"][-1]["text"]) for turn in json.loads(raw["messages"])]
    assert turns == [("system", "Be brief."), ("user", "What is it?"), ("assistant", "Yes.")]
    assert raw["images"][0]["bytes"] == (tmp_path / "in" / "red.png").read_bytes()


def test_weights_may_change_afterwards_and_samples_not(tmp_path):
    write_source(tmp_path / "in", [[row("1")]])
    prepare(write_mix(tmp_path / "mix.yaml", {"a": {"path": "in/rows-0.jsonl", "weight": 1}}), tmp_path / "out")
    digest = load_manifest(tmp_path / "out").digest
    prepare(write_mix(tmp_path / "mix.yaml", {"a": {"path": "in/rows-0.jsonl", "weight": 2}}), tmp_path / "out")
    manifest = load_manifest(tmp_path / "out")
    assert (manifest.source("a").settings["weight"], manifest.digest) == (2, digest)


def test_lengths_are_where_training_looks_for_them(tmp_path, start, monkeypatch):
    from nemo_bard.data import MixtureDataset, row_lengths
    from nemo_bard.data.prepare.lengths import make_collator

    def rows(name):
        return [row(f"{name}{i}", question=name * i + "why", image=("red.png", None)[i % 2]) for i in range(7)]

    write_source(tmp_path / "in", [rows("a"), rows("b")])
    sources = {name: {"path": f"in/rows-{i}.jsonl", "limit": 6, "repetitions": 2} for i, name in enumerate("ab")}
    monkeypatch.setattr("nemo_bard.data.prepare.lengths.CHUNK", 4)
    collator = make_collator(str(start))
    prepare(write_mix(tmp_path / "mix.yaml", sources), tmp_path / "bare")
    wanted = row_lengths.measured_rows(MixtureDataset(tmp_path / "bare"), collator, tmp_path / "cache").lengths
    prepare(write_mix(tmp_path / "mix.yaml", sources, model=str(start)), tmp_path / "out")
    monkeypatch.setattr(row_lengths, "measure", lambda *_, **__: pytest.fail("measured again"))
    found = row_lengths.measured_rows(MixtureDataset(tmp_path / "out"), collator, tmp_path / "cache").lengths
    assert found.tolist() == wanted.tolist()
    assert len(found) == 24


def test_lengths_may_be_measured_afterwards(tmp_path, start):
    out, entry = prepare_one(tmp_path, [row("1")])
    mix = write_mix(tmp_path / "mix.yaml", {"a": {"path": "in/rows-0.jsonl"}}, model=str(start))
    assert prepare(mix, out).source("a") == entry
    assert [path.suffix for path in (out / "a").glob("lengths-*")] == [".npz"]


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(tmp_path, monkeypatch, capsys):
    two_sources(tmp_path)
    command = ["data", "prepare", str(tmp_path / "mix.yaml"), str(tmp_path / "out"), "--jobs", "0"]
    add, written = PartWriter.add, []

    def full(self, sample):
        written.append(sample)
        if len(written) > 12:
            raise OSError(errno.ENOSPC, "No space left on device", str(self.path))
        add(self, sample)

    monkeypatch.setattr(PartWriter, "add", full)
    assert main(command) == 1
    told = capsys.readouterr().err.strip().splitlines()
    assert told[-1].startswith("error: No space left on device (")
    assert told[-1].endswith("make room and run the same command again")
    assert not is_prepared(tmp_path / "out")
    monkeypatch.setattr(PartWriter, "add", add)
    assert main(command) == 0
    assert "samples" in capsys.readouterr().out
    prepare(read_mix(tmp_path / "mix.yaml"), tmp_path / "other")
    assert tree(tmp_path / "out") == tree(tmp_path / "other")


def test_a_file_that_vanishes_is_named(tmp_path, monkeypatch):
    mix = two_sources(tmp_path)
    from nemo_bard.data.prepare import unit

    read, units = unit.read_unit, []

    def vanish(one):
        units.append(one)
        if len(units) == 3:
            (tmp_path / "charts" / "rows-2.jsonl").unlink()
        return read(one)

    monkeypatch.setattr(unit, "read_unit", vanish)
    with pytest.raises(ValueError, match=r"source charts: .*rows-2.jsonl") as error:
        prepare(mix, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not is_prepared(tmp_path / "out")


@pytest.mark.parametrize("form", ["jsonl", "json", "csv", "parquet"])
def test_many_rows_of_a_unit_are_several_pieces(tmp_path, monkeypatch, form):
    from datasets import Dataset

    from nemo_bard.data.prepare import plan

    monkeypatch.setattr(plan, "PIECE_ROWS", 3)
    write_source(tmp_path / "in", [])
    rows = [{"image": "red.png", "text": f"A caption, {i}." if i != 4 else ""} for i in range(10)]
    file = tmp_path / "in" / f"rows.{form}"
    if form == "jsonl":
        file.write_text("".join(json.dumps(one) + "\n" for one in rows))
    elif form == "json":
        file.write_text(json.dumps(rows))
    else:
        table = Dataset.from_list(rows)
        (table.to_csv if form == "csv" else table.to_parquet)(file)
    mix = write_mix(tmp_path / "mix.yaml", {"a": {"path": f"in/rows.{form}", "max_reject_ratio": 0.1}})
    entry = prepare(mix, tmp_path / "out").source("a")
    assert (entry.layout, entry.read, [part.rows for part in entry.parts]) == ("captions", 10, [3, 2, 3, 1])
    assert ids(tmp_path / "out", "a") == [f"rows.{form}:{i}" for i in range(10) if i != 4]
    assert [line["row"] for line in rejects(tmp_path / "out")] == [4]


def test_rows_that_hold_their_images_are_one_piece(tmp_path, monkeypatch):
    from datasets import Dataset
    from prepared_folder import png

    from nemo_bard.data.prepare import plan

    monkeypatch.setattr(plan, "PIECE_ROWS", 3)
    (tmp_path / "in").mkdir()
    texts = [{"user": "What?", "assistant": "That."}]
    rows = [{"images": [{"bytes": png(8 + i), "path": None}], "texts": texts} for i in range(10)]
    Dataset.from_list(rows).to_parquet(tmp_path / "in" / "rows.parquet")
    entry = prepare(write_mix(tmp_path / "mix.yaml", {"a": "in"}), tmp_path / "out").source("a")
    assert (entry.layout, [part.rows for part in entry.parts]) == ("finevision", [10])


def test_rejected_images_of_a_folder_are_named(tmp_path):
    folder = write_source(tmp_path / "in", [])
    (folder / "rows-0.jsonl").unlink(missing_ok=True)
    for name in ("red", "green", "blue"):
        (folder / f"{name}.txt").write_text(f"It is {name}.")
    (folder / "green.png").write_bytes((folder / "green.png").read_bytes()[:40])
    mix = write_mix(tmp_path / "mix.yaml", {"a": {"path": "in", "max_reject_ratio": 0.5}})
    assert prepare(mix, tmp_path / "out").source("a").rows == 2
    assert [(line["file"], line["row"]) for line in rejects(tmp_path / "out")] == [(str(folder / "green.png"), 1)]
    (folder / "red.png").write_bytes((folder / "blue.png").read_bytes() + b"more")
    with pytest.raises(ValueError, match="the rows of source a have changed"):
        prepare(mix, tmp_path / "out")
