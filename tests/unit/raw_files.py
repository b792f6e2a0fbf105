"""Files of published formats for tests, written as other tools write them."""

from __future__ import annotations

import csv
import io
import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def picture(color=(200, 30, 40), size=(8, 6), kind="JPEG"):
    """Bytes of an image file."""
    stream = io.BytesIO()
    Image.new("RGB", size, color).save(stream, kind)
    return stream.getvalue()


def write_tar(path, members):
    """Write ``[(name, bytes | text | value for JSON)]``."""
    with tarfile.open(path, "w") as archive:
        for name, value in members:
            data = value if isinstance(value, bytes) else value if isinstance(value, str) else json.dumps(value)
            data = data.encode() if isinstance(data, str) else data
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def write_csv(path, rows, delimiter=","):
    """Write a table; its first row names the columns."""
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)


def write_rows(path, rows):
    """Write rows in the format that the end of the name tells."""
    path.parent.mkdir(parents=True, exist_ok=True)
    end = path.suffix
    if end == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif end == ".json":
        path.write_text(json.dumps(rows, indent=2, ensure_ascii=False), encoding="utf-8")
    elif end == ".parquet":
        pq.write_table(_table(rows), path, row_group_size=2)
    elif end == ".arrow":
        table = _table(rows)
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    else:
        raise AssertionError(end)
    return path


def _table(rows):
    columns = dict.fromkeys(name for row in rows for name in row)
    return pa.Table.from_pylist([{name: row.get(name) for name in columns} for row in rows])
