"""``data prepare`` that is killed, started twice, or started on a folder of something else."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from prepare_sources import ids, row, tree, two_sources, write_mix, write_source

from nemo_bard.cli.app import main
from nemo_bard.data.prepare import fold, lengths, run
from nemo_bard.data.prepare.folder import OutFolder
from nemo_bard.data.prepare.mix import read_mix
from nemo_bard.data.prepare.run import prepare
from nemo_bard.data.prepared.layout import Manifest, is_prepared
from nemo_bard.data.prepared.writer import PartWriter

MOMENTS = {
    "within a part": (PartWriter, "add", 5),
    "before a record": (OutFolder, "write_unit", 3),
    "before the arrays of a record": ("nemo_bard.data.prepare.folder", "save_arrays", 4),
    "between arrays and record": ("nemo_bard.data.prepare.folder", "write_json", 3),
    "before kept rows": ("nemo_bard.data.prepare.fold", "save_arrays", 1),
    "before the list of rejects": (fold.RejectsFile, "publish", 1),
    "before parts beyond the limit go": (OutFolder, "keep_parts", 2),
    "before the manifest": (Manifest, "write", 1),
    "before records go": (OutFolder, "forget_units", 1),
}
LENGTHS = {"between lengths": ("nemo_bard.data.prepare.lengths", "save_arrays", 3)}


def die_at(moment, call, file, out):
    """Prepare, and kill this process at a call of a function."""
    where, name, _ = {**MOMENTS, **LENGTHS}[moment]
    where = sys.modules[where] if isinstance(where, str) else where
    function, calls = getattr(where, name), []

    def counted(*args, **kwargs):
        calls.append(name)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    setattr(where, name, counted)
    prepare(read_mix(file), out)


def killed(moment, call, file, out):
    process = multiprocessing.get_context("fork").Process(target=die_at, args=(moment, call, file, out))
    process.start()
    process.join()
    return process.exitcode == -signal.SIGKILL


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """A mixture file and the tree that an undisturbed run makes of it."""
    folder = tmp_path_factory.mktemp("mixture")
    prepare(two_sources(folder), folder / "out")
    return folder / "mix.yaml", tree(folder / "out")


@pytest.mark.parametrize("moment", list(MOMENTS))
def test_killed_at_any_moment_it_goes_on_to_the_same_tree(mixture, tmp_path, moment):
    file, wanted = mixture
    out = tmp_path / "out"
    assert killed(moment, MOMENTS[moment][2], file, out)
    assert is_prepared(out) == (moment == "before records go")
    prepare(read_mix(file), out)
    assert tree(out) == wanted


def test_killed_again_and_again_it_gets_there_and_redoes_no_unit(mixture, tmp_path):
    file, wanted = mixture
    out, kills = tmp_path / "out", 0
    while killed("before a record", 3, file, out):  # two units are done each time
        kills += 1
        done = {path: path.stat().st_mtime_ns for path in out.glob(".prepare/units/*/*.json")}
        assert len(done) == 2 * kills
    assert kills == 3  # 5 units of charts, 2 of docs
    prepare(read_mix(file), out)
    assert tree(out) == wanted


def test_killed_while_it_measures_lengths_it_goes_on(mixture, start, tmp_path, monkeypatch):
    file, wanted = mixture
    raw = yaml.safe_load(file.read_text())
    sources = {name: {**one, "path": str(file.parent / one["path"])} for name, one in raw["sources"].items()}
    write_mix(tmp_path / "mix.yaml", sources, dedup="all", model=str(start))
    monkeypatch.setattr(lengths, "CHUNK", 10)
    assert killed("between lengths", 3, tmp_path / "mix.yaml", tmp_path / "out")
    assert len(list(tmp_path.glob("out/.prepare/lengths/*/*/*.npz"))) == 2
    measured, measure = [], lengths._measure
    monkeypatch.setattr(lengths, "_measure", lambda task, stop: (measured.append(task), measure(task, stop)))
    prepare(read_mix(tmp_path / "mix.yaml"), tmp_path / "out")
    assert len(measured) == 3 + 2 - 2  # 24 and 11 samples, tens of them at a time
    found = {name: digest for name, digest in tree(tmp_path / "out").items() if "lengths" not in name}
    same = {name for name in wanted if name != "manifest.json"}
    assert {name: found[name] for name in same} == {name: wanted[name] for name in same}


def workers_of(pid):
    """Processes whose parent is ``pid``, but for those that keep books of shared memory."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
            command = (stat.parent / "cmdline").read_bytes()
        except OSError:
            continue
        if int(fields[1]) == pid and b"spawn_main" in command:
            found.append(int(stat.parent.name))
    return found


def slow_mixture(folder):
    """Enough units that a run can be met in the middle."""
    write_source(folder / "in", [[row(f"{i}-{j}", question=f"{i} {j}") for j in range(40)] for i in range(60)])
    write_mix(folder / "mix.yaml", {"a": {"path": "in/*.jsonl"}})
    return folder / "mix.yaml"


def start_command(file, out, jobs):
    command = [sys.executable, "-m", "nemo_bard.cli", "data", "prepare", str(file), str(out), "--jobs", str(jobs)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_workers_end_with_the_process_that_is_killed(tmp_path):
    file, out = slow_mixture(tmp_path), tmp_path / "out"
    process = start_command(file, out, 2)
    wait_for(lambda: len(list(out.glob(".prepare/units/a/*.json"))) >= 2)
    workers = workers_of(process.pid)
    process.kill()
    process.wait()
    assert workers
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers), 5)
    done = {path: path.stat().st_mtime_ns for path in out.glob(".prepare/units/a/*.json")}
    assert not is_prepared(out)
    assert len(done) < 60

    def redone(folder, source, number, *_):
        assert folder.record_file(source, number) not in done
        return write(folder, source, number, *_)

    write = OutFolder.write_unit
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OutFolder, "write_unit", redone)
        prepare(read_mix(file), out)
    assert len(set(ids(out, "a"))) == 2400
    prepare(read_mix(file), tmp_path / "whole")
    assert tree(out) == tree(tmp_path / "whole")


def test_a_signal_ends_it_in_one_line_and_a_second_run_is_kept_out(tmp_path):
    file, out = slow_mixture(tmp_path), tmp_path / "out"
    process = start_command(file, out, 0)
    wait_for(lambda: len(list(out.glob(".prepare/units/a/*.json"))) >= 2)
    with pytest.raises(ValueError, match=rf"OUT {out} is in use by another run"):
        prepare(read_mix(file), out)
    process.send_signal(signal.SIGTERM)
    printed, told = process.communicate()
    assert (process.returncode, printed) == (128 + signal.SIGTERM, "")
    assert told == "stopped by SIGTERM; the same command goes on where it was\n"
    assert not is_prepared(out)
    prepare(read_mix(file), out)
    assert len(ids(out, "a")) == 2400


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"think": "strip"}, "sources.charts.think was 'keep', now 'strip'"),
        ({"filter": {"rating": {"min": 2}}}, "sources.charts.filter was"),
        ({"limit": 5}, "sources.charts.limit was None, now 5"),
        ("touched", r"file .*rows-1.jsonl of source charts has changed"),
        ("new file", r"file .*rows-9.jsonl of source charts is new"),
        ("gone file", r"file .*rows-4.jsonl of source charts is gone"),
        ("new source", "source more is new"),
        ("gone source", "source docs is no longer there"),
        ("order", "the order of sources was charts, docs, now docs, charts"),
        ("dedup", "sources.charts.dedup was 'all', now 'none'"),
    ],
)
def test_another_mixture_is_refused_by_name(tmp_path, change, told):
    prepare(two_sources(tmp_path), tmp_path / "out")
    before = tree(tmp_path / "out")
    raw = yaml.safe_load((tmp_path / "mix.yaml").read_text())
    sources, charts = raw["sources"], tmp_path / "charts"
    if isinstance(change, dict):
        sources["charts"].update(change)
    elif change == "touched":
        os.utime(charts / "rows-1.jsonl", (1, 1))
    elif change == "new file":
        (charts / "rows-9.jsonl").write_text((charts / "rows-0.jsonl").read_text())
    elif change == "gone file":
        (charts / "rows-4.jsonl").unlink()
    elif change == "new source":
        sources["more"] = sources["docs"]
    elif change == "gone source":
        del sources["docs"]
    elif change == "order":
        sources = {"docs": sources["docs"], "charts": sources["charts"]}
    elif change == "dedup":
        raw["dedup"] = "none"
    del raw["sources"]
    mix = write_mix(tmp_path / "mix.yaml", sources, **raw)
    with pytest.raises(ValueError, match=told):
        prepare(mix, tmp_path / "out")
    assert tree(tmp_path / "out") == before


@pytest.mark.parametrize("where", ["notes.txt", "charts/mine.arrow", "other/file"])
def test_a_folder_with_files_of_others_is_refused(tmp_path, where):
    mix, out = two_sources(tmp_path), tmp_path / "out"
    if where == "charts/mine.arrow":
        prepare(mix, out)
    file = out / where
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("mine")
    named = re.escape(where.split("/")[0] if where == "other/file" else where)
    with pytest.raises(ValueError, match=rf"did not write: {named}; name a new or empty folder"):
        prepare(mix, out)
    assert file.read_text() == "mine"


def test_out_lies_in_no_source(tmp_path):
    mix = write_mix(tmp_path / "mix.yaml", {"a": {"path": str(write_source(tmp_path / "in", [[row("1")]]))}})
    with pytest.raises(ValueError, match="lies in the folder of source a"):
        prepare(mix, tmp_path / "in" / "out")
    assert not (tmp_path / "in" / "out").exists()


def test_a_whole_folder_is_left_as_it_is(tmp_path, capsys):
    two_sources(tmp_path)
    command = ["data", "prepare", str(tmp_path / "mix.yaml"), str(tmp_path / "out"), "--jobs", "0"]
    assert main(command) == 0
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("[!.]*.*")}
    assert main(command) == 0
    assert {path: path.stat().st_mtime_ns for path in times} == times
    captured = capsys.readouterr()
    assert captured.out.splitlines()[-1] == f"{tmp_path / 'out'}: 35 samples"
    assert "is whole already" in captured.err


def test_a_part_that_is_damaged_meanwhile_is_made_again(mixture, tmp_path, monkeypatch):
    file, wanted = mixture
    out = tmp_path / "out"
    monkeypatch.setattr(run._Schedule, "_finish", lambda *_: pytest.fail("stop here"))
    with pytest.raises(pytest.fail.Exception):
        prepare(read_mix(file), out)
    monkeypatch.undo()
    (out / "charts" / "part-00002.arrow").write_bytes(b"short")
    prepare(read_mix(file), out)
    assert tree(out) == wanted
