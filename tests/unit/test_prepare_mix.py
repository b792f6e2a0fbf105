"""The mixture file of ``data prepare``: what is wrong in it ends in one line, before anything is written."""

from __future__ import annotations

import re

import pytest
from prepare_sources import row, write_source

from nemo_bard.cli.app import main
from nemo_bard.data.prepare.mix import read_mix


@pytest.fixture
def folder(tmp_path):
    write_source(tmp_path / "in", [[row("1", rating=3)], [row("2", rating=1)]])
    return tmp_path


def tell(folder, text, capsys, *options):
    """What ``data prepare`` says of a mixture file that it refuses."""
    (folder / "mix.yaml").write_text(text)
    assert main(["data", "prepare", str(folder / "mix.yaml"), str(folder / "out"), "--jobs", "0", *options]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert not (folder / "out").exists()
    return captured.err


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("limt: 3", "unknown key sources.a.limt; did you mean sources.a.limit?"),
        ("limit: 0", "sources.a.limit must be an integer >= 1 or null, got 0"),
        ("limit: many", "sources.a.limit must be an integer >= 1 or null, got 'many'"),
        ("max_pixels: 5", "sources.a.max_pixels must be an integer >= 1024 or null, got 5"),
        ("dedup: al", "sources.a.dedup must be one of none, source, all, got 'al' (did you mean 'all'?)"),
        ("think: drop", "sources.a.think must be one of keep, strip, got 'drop'"),
        ("max_reject_ratio: 1.5", "sources.a.max_reject_ratio must be a number from 0 to 1 or null, got 1.5"),
        ("weight: 0", "sources.a.weight must be a finite number > 0 or null, got 0"),
        ("weight: -1", "sources.a.weight must be a finite number > 0 or null, got -1"),
        ("repetitions: .inf", "sources.a.repetitions must be a finite number > 0 or null, got inf"),
        ("layout: lava", "source a: layout must be one of"),
        ("layout: llava", "source a: "),
        ("root_dir: nowhere", "nowhere is not a folder"),
        ("system: '<|im_end|>'", "sources.a.system"),
        ("split: test", "source a: "),
        ("filter: 3", "sources.a.filter must be a section"),
        ("filter: {rating: {mim: 3}}", "unknown condition sources.a.filter.rating.mim; did you mean"),
        ("filter: {rating: {min: high}}", "sources.a.filter.rating.min must be a number, got 'high'"),
        ("filter: {rating: {min: 4, max: 3}}", "sources.a.filter.rating: min 4 is above max 3"),
        ("filter: {rating: {in: 3}}", "sources.a.filter.rating.in must be a list of values, got 3"),
        ("filter: {rating: {in: [3], equals: 3}}", "give 'in' or 'equals', not both"),
        ("filter: {rating: {null: maybe}}", "unknown condition"),
        ("filter: {rating: {'null': maybe}}", "sources.a.filter.rating.null must be one of drop, keep, got 'maybe'"),
        ("filter: {rating: {}}", "sources.a.filter.rating must be a section of min, max, in, equals, null, got {}"),
        (
            "filter: {ratin: {min: 3}}",
            "source a: filter.ratin: no such column (did you mean 'rating'?); there are rating",
        ),
        ("filter: {rating: {equals: 2024-01-01}}", "quote a date"),
    ],
)
def test_options_of_a_source(folder, capsys, options, told):
    assert told in tell(folder, f"sources:\n  a:\n    path: in/*.jsonl\n    {options}\n", capsys)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "must hold a section 'sources', got None"),
        ("[1]", "must hold a section 'sources', got [1]"),
        ("a: {", "not a YAML file"),
        ("dedup: all", "sources must be given"),
        ("sources: {}", "sources must name at least one source"),
        ("sources: [a]", "sources must be a section, got ['a']"),
        ("sources: {a: 3}", "sources.a must be a section with 'path', got 3"),
        ("sources: {a: {layout: llava}}", "sources.a.path must be given"),
        ("sources: {a: {path: nowhere.json}}", "nowhere.json does not exist"),
        ("sources: {a: {path: 'in/*.parquet'}}", "source a: "),
        ("sources: {a: in}\nsource: {}", "unknown key source; did you mean sources?"),
        ("sources: {a: in}\nsources: {b: in}", "line 2: sources stands twice"),
        ("sources: {a: in, a: in}", "a stands twice"),
        ("sources: {a/b: in}", "a name must be letters, digits, '.', '_' and '-', as it names a folder, got 'a/b'"),
        ("sources: {.a: in}", "got '.a'"),
        ("sources: {3: in}", "got 3"),
        ("sources: {manifest.json: in}", "got 'manifest.json'"),
        ("sources: {a: in}\ndedup: true", "dedup must be one of none, source, all, got True"),
        ("sources: {a: in}\nmax_reject_ratio: 2", "max_reject_ratio must be a number from 0 to 1, got 2"),
        ("sources: {a: in}\nmodel: nowhere", "model: "),
        ("sources: {a: in}\nmodel: in", "model: "),
        ("sources: {a: {path: in, weight: 1}, b: {path: in, repetitions: 1}}", "sources.a has weight and sources.b"),
    ],
)
def test_the_file(folder, capsys, text, told):
    assert told in tell(folder, text, capsys)


def test_a_mixture_file_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=re.escape(f"mixture file {tmp_path / 'mix.yaml'} does not exist")):
        read_mix(tmp_path / "mix.yaml")
    with pytest.raises(ValueError, match="is a folder"):
        read_mix(tmp_path)


def test_jobs_must_be_a_count(folder, capsys):
    told = tell(folder, "sources: {a: in}", capsys, "--jobs=-1")
    assert told == "error: --jobs must be an integer >= 0, got -1\n"


def test_paths_start_at_the_folder_of_the_file(folder, monkeypatch, tmp_path_factory):
    (folder / "mix.yaml").write_text("sources: {a: in/rows-0.jsonl, b: {path: some/set, root_dir: in}}")
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    mix = read_mix(folder / "mix.yaml")
    assert [source.path for source in mix.sources] == [str(folder / "in" / "rows-0.jsonl"), "some/set"]
    assert mix.sources[1].root_dir == str(folder / "in")
