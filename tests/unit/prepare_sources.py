"""Sources for tests of ``nemo-bard data prepare``: several small files, so that there are several units."""

from __future__ import annotations

import hashlib
import json

import yaml
from prepared_folder import png

from nemo_bard.data.prepare.mix import read_mix
from nemo_bard.data.prepare.run import prepare
from nemo_bard.data.prepared.layout import load_manifest
from nemo_bard.data.prepared.source import PreparedSource


def row(name, question="What is it?", answer="A picture.", image="red.png", **columns):
    """A line of our own layout."""
    content = f"<image>{question}" if image else question
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return {"id": name, "messages": messages, "images": [image] if image else [], **columns}


def write_source(folder, files):
    """Write files of rows and the images that they name; returns the folder."""
    folder.mkdir(parents=True)
    for color, value in (("red", (200, 30, 40)), ("green", (20, 200, 40)), ("blue", (20, 30, 200))):
        (folder / f"{color}.png").write_bytes(png(color=value))
    for number, rows in enumerate(files):
        lines = [json.dumps(one) if isinstance(one, dict) else one for one in rows]
        (folder / f"rows-{number}.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return folder


def write_mix(file, sources, **top):
    """Write a mixture file and read it."""
    file.write_text(yaml.safe_dump({**top, "sources": sources}, sort_keys=False))
    return read_mix(file)


def two_sources(folder):
    """A mixture of charts (5 files of 8 rows, two of them unusable, some repeated) and docs (3 files of 6, a limit of 11)."""
    charts = [[row(f"c{i}-{j}", question=f"q{(8 * i + j) % 33}", rating=j % 4) for j in range(8)] for i in range(5)]
    charts[1][3] = row("empty", answer=" ", rating=3)
    charts[3][7] = "{not json"
    docs = [[row(f"d{i}-{j}", question=f"q{30 + 6 * i + j}") for j in range(6)] for i in range(3)]
    write_source(folder / "charts", charts)
    write_source(folder / "docs", docs)
    return write_mix(
        folder / "mix.yaml",
        {
            "charts": {"path": "charts/*.jsonl", "filter": {"rating": {"min": 1}}, "max_reject_ratio": 0.1},
            "docs": {"path": "docs/*.jsonl", "limit": 11},
        },
        dedup="all",
    )


def ids(out, name):
    """Ids of a source's samples."""
    source = PreparedSource(out, load_manifest(out).source(name))
    return [source.raw(index)["id"] for index in range(len(source))]


def rejects(out):
    """The list of rejected rows."""
    return [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]


def tree(out):
    """Digest of every file but the lock, which names a process."""
    files = sorted(path for path in out.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def prepare_one(folder, rows, **options):
    """Prepare a source of one file; returns its folder and entry."""
    write_source(folder / "in", [rows])
    top = {key: options.pop(key) for key in ("dedup",) if key in options}
    mix = write_mix(folder / "mix.yaml", {"a": {"path": "in/rows-0.jsonl", **options}}, **top)
    manifest = prepare(mix, folder / "out")
    return folder / "out", manifest.source("a")
