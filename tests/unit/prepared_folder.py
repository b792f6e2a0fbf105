"""Prepared folders for tests, written without ``nemo-bard data prepare``."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from nemo_bard.data.prepared.layout import KEPT, File, Manifest, SourceEntry
from nemo_bard.data.prepared.writer import PartWriter
from nemo_bard.data.sample import Sample


def png(width=8, height=6, color=(200, 30, 40)):
    """Bytes of an image."""
    stream = io.BytesIO()
    Image.new("RGB", (width, height), color).save(stream, "PNG")
    return stream.getvalue()


def sample(name, question="What is it?", answer="A picture.", sizes=((8, 6),)):
    """A sample of one turn with an image of each size."""
    parts = [*({"type": "image"} for _ in sizes), {"type": "text", "text": question}]
    return Sample(
        id=name,
        messages=[
            {"role": "user", "content": parts},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ],
        images=[png(*size) for size in sizes],
        sizes=[tuple(size) for size in sizes],
    )


def write_prepared(folder, sources, *, rows_per_part=3, leave_out=()):
    """Write a folder.

    Args:
        folder: Where.
        sources: Name of a source -> its samples.
        rows_per_part: Samples in a file.
        leave_out: ``(source, row)`` that are in a file and no samples.
    """
    entries = []
    for name, samples in sources.items():
        parts = []
        for number, start in enumerate(range(0, len(samples), rows_per_part)):
            with PartWriter(folder / name / f"part-{number:05d}.arrow", name) as part:
                for one in samples[start : start + rows_per_part]:
                    part.add(one)
            parts.append(part.file)
        left = {row for source, row in leave_out if source == name}
        kept = None
        if left:
            rows = np.array([row for row in range(len(samples)) if row not in left], dtype=np.int64)
            np.save(folder / name / KEPT, rows)
            kept = File.of(folder / name / KEPT, len(rows))
        entries.append(SourceEntry(name=name, layout="messages", parts=parts, kept=kept, read=len(samples)))
    manifest = Manifest(sources=entries, version="test")
    manifest.write(folder)
    return manifest
