"""What ``nemo-bard data check`` finds: damaged parts, changed manifests, and rows of raw data that cannot be trained on."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pyarrow as pa
import pytest
from prepared_folder import png, sample, write_prepared

from nemo_bard.cli import main
from nemo_bard.data.audit.findings import ALL_KINDS, MOST_LISTED, Defect, Findings
from nemo_bard.data.prepared.layout import KEPT, MANIFEST, REJECTS, File, read_manifest


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("check") / "prepared"
    charts = [sample(f"c{i}", answer=f"answer {i}", sizes=[(40 + i, 32)] * (1 + i % 2)) for i in range(8)]
    write_prepared(folder, {"charts": charts, "text": [sample("t0", sizes=())]}, leave_out=[("charts", 2)])
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "prepared")


def check(capsys, *words):
    """Exit code and report of a check."""
    code = main(["data", "check", *map(str, words), "--json"])
    out = capsys.readouterr()
    assert out.err == ""
    report = json.loads(out.out)
    assert code == (1 if report["defects"] else 0)
    assert sum(report["kinds"].values()) == report["defects"]
    assert set(report["kinds"]) <= set(ALL_KINDS)
    return report


def places(report):
    return [(one["kind"], one["file"].rpartition("/")[2], one["row"], one["id"]) for one in report["found"]]


def flip(path, place):
    """Change a byte, and leave the size."""
    content = bytearray(path.read_bytes())
    content[place] ^= 0x55
    path.write_bytes(content)


@pytest.mark.parametrize("words", [(), ("--all",), ("--all", "--jobs", "2")])
def test_nothing_is_wrong_with_what_was_written(folder, capsys, words):
    report = check(capsys, folder, *words)
    assert (report["form"], report["rows"], report["checked"], report["defects"]) == ("prepared", 8, 8, 0)
    assert report["all"] == bool(words)


def test_a_flipped_byte_of_an_image_is_found_with_its_row(folder, capsys):
    part = folder / "charts" / "part-00001.arrow"  # rows 3 to 5
    place = part.read_bytes().index(b"IDAT", part.read_bytes().index(b"IDAT") + 4)  # the second image: of row 3, too
    flip(part, place + 6)
    report = check(capsys, folder, "--all")
    assert places(report) == [("sha256", part.name, None, None), ("corrupt_image", part.name, 0, "c3")]
    assert report["found"][1]["reason"].startswith("image 2 of the row: ")
    assert report["found"][1]["source"] == "charts"


def test_every_flipped_byte_is_found(folder, capsys):
    part = folder / "text" / "part-00000.arrow"
    content = part.read_bytes()
    rng = np.random.default_rng(0)
    for place in rng.choice(len(content), size=40, replace=False).tolist():
        flip(part, place)
        check(capsys, folder)  # what is wrong with Arrow's own data is a defect, and no end of the process
        assert "sha256" in check(capsys, folder, "--all")["kinds"]
        part.write_bytes(content)


def test_a_part_is_validated_before_it_is_read(folder, capsys):
    part = folder / "charts" / "part-00000.arrow"
    with pa.memory_map(str(part)) as file, pa.ipc.open_stream(file) as reader:
        offsets = reader.read_next_batch().column("id").buffers()[1].to_pybytes()
    content = bytearray(part.read_bytes())
    place = content.index(offsets[:16])
    content[place + 4 : place + 8] = (2**31 - 5).to_bytes(4, "little")  # would be read far behind the file
    part.write_bytes(content)
    for words in ((), ("--all",)):
        report = check(capsys, folder, *words)
        damage = [one for one in report["found"] if one["kind"] == "arrow"]
        assert [(one["row"], one["source"]) for one in damage] == [(0, "charts")]
        assert "the batch of rows 0 to 2 is damaged" in damage[0]["reason"]


def test_columns_of_another_type(folder, capsys):
    part = folder / "text" / "part-00000.arrow"
    with pa.OSFile(str(part), "wb") as file, pa.ipc.new_stream(file, pa.schema([("id", pa.int64())])):
        pass
    rewrite(folder, "text", parts=[File.of(part, 0)])
    report = check(capsys, folder, "--all")
    assert report["kinds"] == {"columns": 1}
    assert report["found"][0]["reason"].startswith("its columns are 'id int64', needed are 'id string, source string,")


def test_missing_and_cut_parts(folder, capsys):
    (folder / "charts" / "part-00001.arrow").unlink()
    cut = folder / "charts" / "part-00000.arrow"
    cut.write_bytes(cut.read_bytes()[:-200])
    report = check(capsys, folder)
    assert places(report) == [("file_size", cut.name, None, None), ("missing_file", "part-00001.arrow", None, None)]
    report = check(capsys, folder, "--all")
    assert {"file_size", "missing_file", "sha256", "arrow"} <= set(report["kinds"])


def test_a_changed_manifest(folder, capsys):
    raw = json.loads((folder / MANIFEST).read_text())
    raw["sources"][0]["read"] = 9
    (folder / MANIFEST).write_text(json.dumps(raw))
    report = check(capsys, folder)
    assert (report["rows"], places(report)) == (None, [("manifest", MANIFEST, None, None)])
    assert "was changed after it was written" in report["found"][0]["reason"]
    (folder / MANIFEST).write_text("{")
    assert check(capsys, folder)["kinds"] == {"manifest": 1}


def rewrite(folder, name, **changes):
    """Write the manifest with other facts of a source."""
    manifest = read_manifest(folder)
    sources = [dataclasses.replace(one, **changes) if one.name == name else one for one in manifest.sources]
    dataclasses.replace(manifest, sources=sources).write(folder)


def test_a_list_of_kept_rows_that_does_not_fit(folder, capsys):
    np.save(folder / "charts" / KEPT, np.array([0, 1, 3, 3, 5, 6, 99]))
    rewrite(folder, "charts", kept=File.of(folder / "charts" / KEPT, 7))
    report = check(capsys, folder, "--all")
    assert report["found"][0]["reason"] == "its rows must rise and be 0 to 7"
    assert report["kinds"] == {"kept_rows": 1}


def test_rejects_and_manifest_must_agree(folder, capsys):
    rewrite(folder, "charts", read=9, rejected={"corrupt_image": 1})
    assert check(capsys, folder)["kinds"] == {"rejects_list": 1}
    line = {"source": "charts", "file": "a.parquet", "row": 8, "id": "c8", "kind": "corrupt_image", "reason": "..."}
    (folder / REJECTS).write_text(json.dumps(line) + "\n")
    assert check(capsys, folder)["defects"] == 0
    (folder / REJECTS).write_text(json.dumps(line) + "\nno json\n")
    assert places(check(capsys, folder)) == [("rejects_list", REJECTS, 1, None)]


@pytest.mark.parametrize(
    ("changes", "kind", "reason"),
    [
        ({"id": ""}, "row", "it has no id"),
        ({"sizes": [(9, 9)]}, "image_size", "image 1 of the row has 8 x 6 pixels, not [9, 9] as its size says"),
        ({"sizes": []}, "row", "it has 1 images and 0 sizes"),
        ({"images": []}, "placeholders", "1 image placeholders in 'messages' but 0 entries in 'images'"),
        ({"images": [b""]}, "empty_image", "image 1 of the row: "),
        ({"images": [png()[:45]]}, "corrupt_image", "image 1 of the row: "),
        ({"messages": []}, "messages", "'messages' must be a non-empty list"),
        ({"videos": ["/nowhere/a.mp4"]}, "placeholders", "0 video placeholders"),
    ],
)
def test_rows_that_do_not_fit(tmp_path, capsys, changes, kind, reason):
    write_prepared(tmp_path, {"a": [sample("one"), dataclasses.replace(sample("two"), **changes)]})
    report = check(capsys, tmp_path)
    found = [one for one in report["found"] if one["kind"] == kind]
    assert [one["row"] for one in found] == [1]
    assert found[0]["reason"].startswith(reason)
    assert found[0]["id"] == changes.get("id", "two")


def line(answer="Yes.", role="assistant", **extra):
    messages = [{"role": "user", "content": "<image>What?"}, {"role": role, "content": answer}]
    return json.dumps({"id": f"id {answer}", "messages": messages, "images": ["a.png"], **extra})


@pytest.fixture
def raw(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "cut.png").write_bytes(png()[:45])
    lines = [line(), line(images=["cut.png"]), line(role="robot"), "no json", line(answer=" "), line(images=["no.png"])]
    (tmp_path / "mine.jsonl").write_text("\n".join([*lines, line()]) + "\n")
    return tmp_path / "mine.jsonl"


def test_rows_of_raw_data(raw, capsys):
    report = check(capsys, raw)
    assert (report["form"], report["rows"], report["checked"]) == ("raw", 7, 7)
    assert places(report) == [
        ("corrupt_image", "mine.jsonl", 1, "id Yes."),
        ("unknown_role", "mine.jsonl", 2, "id Yes."),
        ("bad_json", "mine.jsonl", 3, None),
        ("empty_answer", "mine.jsonl", 4, "id  "),
        ("missing_image", "mine.jsonl", 5, "id Yes."),
    ]


def test_lines_for_a_person(raw, capsys):
    assert main(["data", "check", str(raw)]) == 1
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith(f"{raw}:1 corrupt_image: ")
    assert told[5] == f"{raw}: 7 rows checked, 5 defects"
    assert "1  empty_answer" in [text.strip() for text in told]
    raw.write_text("no json\n" * 30 + line() + "\n")
    assert main(["data", "check", str(raw)]) == 1
    told = capsys.readouterr().out.splitlines()
    assert [text.partition(" ")[0] for text in told[:20]] == [f"{raw}:{row}" for row in range(20)]
    assert told[20:] == [
        "... and 10 more (--json lists them)",
        f"{raw}: 31 rows checked, 30 defects",
        "        30  bad_json",
    ]


def test_a_terminal_does_not_act_on_what_files_say(tmp_path, capsys):
    (tmp_path / "mine.jsonl").write_text(
        line(role="\x1b[2Jrobot") + "\n" + line(images=["\x1b[31m\u202ered.png"]) + "\n"
    )
    assert main(["data", "check", str(tmp_path / "mine.jsonl")]) == 1
    told = capsys.readouterr().out
    assert "\x1b" not in told
    assert "\u202e" not in told
    assert "\\x1b[31m\\u202ered.png does not exist" in told


def test_a_folder_that_is_being_prepared_is_no_data(tmp_path, capsys):
    write_prepared(tmp_path, {"a": [sample("one")]})
    for command in ("check", "show"):
        assert main(["data", command, str(tmp_path / "a")]) == 2
        assert "is a source of a prepared folder" in capsys.readouterr().err
    (tmp_path / MANIFEST).unlink()
    (tmp_path / ".prepare").mkdir()
    for command in ("check", "show"):
        assert main(["data", command, str(tmp_path)]) == 2
        assert "`nemo-bard data prepare` has not finished it" in capsys.readouterr().err


def test_images_elsewhere(raw, tmp_path, capsys):
    (tmp_path / "other").mkdir()
    moved = raw.rename(tmp_path / "other" / "mine.jsonl")
    assert check(capsys, moved)["kinds"]["missing_image"] == 4
    assert check(capsys, moved, "--root-dir", tmp_path)["kinds"]["missing_image"] == 1


def test_what_a_reader_opens(capsys):
    report = check(capsys, "digits:test,rows=1,columns=1")
    assert report["form"] == "reader"
    assert report["checked"] == report["rows"] > 0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("/nowhere/x.jsonl",), "data set file /nowhere/x.jsonl does not exist"),
        (("mine.jsonl", "--layout", "mesages"), "layout must be one of messages"),
        (("mine.jsonl", "--root-dir", "/nowhere"), "root_dir /nowhere is not a folder"),
        (("mine.jsonl", "--jobs", "0"), "argument --jobs: must be >= 1, got 0"),
    ],
)
def test_wrong_input_is_one_line(raw, capsys, monkeypatch, words, told):
    monkeypatch.chdir(raw.parent)
    assert main(["data", "check", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {told}")
    assert error.count("\n") == 1


def test_defects_without_end_are_counted():
    found = Findings()
    for _ in range(2):
        other = Findings(checked=MOST_LISTED)
        for row in range(MOST_LISTED - 1):
            other.add(Defect("bad_json", "no", "a.jsonl", row))
        found.join(other)
    assert (found.total, len(found.listed), found.checked) == (2 * MOST_LISTED - 2, MOST_LISTED, 2 * MOST_LISTED)
