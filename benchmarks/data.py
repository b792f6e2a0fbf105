"""Data: how soon a large mixture is ready, what loader workers feed and how much memory they take.

python benchmarks/data.py ready               # 4.4M draws of 3 sources: opened, blended, packed
python benchmarks/data.py workers             # 1-megapixel JPEGs through data set and collator, 0, 1 and 2 workers
python benchmarks/data.py memory              # 40,000 samples read: how much a worker's own memory grows
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from _measure import peak_resident_bytes
from _report import Results, Row, attempt, environment, table

from nemo_bard.base.memory import keep_freed_memory
from nemo_bard.data import BlockDiffusionCollator, MixtureDataset

COLUMNS = {
    "section": "section|s",
    "workers": "workers|d",
    "draws": "draws|d",
    "sources": "sources|d",
    "open_s": "open s|.2f",
    "pack_s": "pack s|.2f",
    "ready_s": "ready s|.2f",
    "import_s": "import s|.2f",
    "rows": "rows|d",
    "filled": "filled|.4f",
    "peak_mib": "peak MiB|.0f",
    "cpu_s": "CPU s|.2f",
    "base_mib": "imports MiB|.0f",
    "samples_per_second": "samples/s|.2f",
    "per_worker": "per worker|.2f",
    "cpu_ms": "CPU ms a sample|.1f",
    "mb_per_second": "JPEG MB/s per worker|.2f",
    "first_mib": "own MiB, first|.1f",
    "last_mib": "own MiB, last|.1f",
    "grown_mib": "grown MiB|.1f",
}
MAX_LENGTH = 8192


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", default=list(SECTIONS), choices=[*SECTIONS, []], metavar="SECTION")
    parser.add_argument("--draws", type=int, default=4_400_000, help="of `ready`")
    parser.add_argument("--sources", type=int, default=3, help="of `ready`")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="of `workers` and `memory`")
    parser.add_argument("--samples", type=int, default=200, help="images of `workers`")
    parser.add_argument("--read", type=int, default=40_000, help="samples of `memory`")
    parser.add_argument("--side", type=int, default=1024, help="of an image of `workers`, in pixels")
    parser.add_argument("--scratch", type=Path, default=None, help="folder for the data made; a temporary one")
    parser.add_argument("--output", type=Path, default=None, help="result file")
    return parser.parse_args(argv)


# ------------------ folders ------------------
def write_source(folder: Path, name: str, rows: int, samples: list[dict[str, Any]]) -> Any:
    """Write a source of ``rows`` rows that repeat a few samples; returns its entry."""
    import pyarrow as pa

    from nemo_bard.data.prepared.layout import File, SourceEntry, features

    schema = features().arrow_schema
    (folder / name).mkdir(parents=True)
    path = folder / name / "part-00000.arrow"
    batch = pa.RecordBatch.from_pylist([{**one, "source": name} for one in samples], schema=schema)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for start in range(0, rows, len(batch)):
            writer.write_batch(batch.slice(0, min(len(batch), rows - start)))
    return SourceEntry(name=name, layout="messages", parts=[File.of(path, rows)], read=rows)


def sample(number: int, image: bytes | None, side: int) -> dict[str, Any]:
    """A row of a prepared folder."""
    user = [*([{"type": "image"}] if image else []), {"type": "text", "text": f"What is in picture {number}?"}]
    turns = [
        {"role": "user", "content": user},
        {"role": "assistant", "content": [{"type": "text", "text": f"A picture with the number {number}."}]},
    ]
    return {
        "id": str(number),
        "messages": json.dumps(turns),
        "images": [{"bytes": image, "path": None}] if image else [],
        "size": [[side, side]] if image else [],
        "videos": [],
    }


def jpeg(side: int, seed: int) -> bytes:
    """A picture whose file is as large as that of a photograph, some 0.3 bytes a pixel."""
    from PIL import Image

    dice = np.random.default_rng(seed)
    coarse = Image.fromarray(dice.integers(0, 256, (side // 32, side // 32, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC), dtype=np.int16)
    noisy = np.clip(smooth + dice.normal(0, 6, smooth.shape), 0, 255).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noisy).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def write_folder(folder: Path, sources: dict[str, tuple[int, list[dict[str, Any]]]]) -> None:
    """Write a prepared folder."""
    from nemo_bard.data.prepared.layout import Manifest

    entries = [write_source(folder, name, rows, samples) for name, (rows, samples) in sources.items()]
    Manifest(sources=entries, version="benchmark").write(folder)


def make_collator(model: Path) -> BlockDiffusionCollator:
    """The collator of a tiny model, whose images are resized as Qwen3-VL's."""
    from transformers import AutoProcessor

    from nemo_bard.checkpoints.convert import convert
    from nemo_bard.checkpoints.tiny import make_tiny_qwen3_vl
    from nemo_bard.model.configuration import BardVLConfig

    if not model.is_dir():
        convert(make_tiny_qwen3_vl(model.with_name("source")), model, block_size=4)
    processor = AutoProcessor.from_pretrained(model)
    processor.image_processor.size = {"shortest_edge": 65536, "longest_edge": 16777216}
    return BlockDiffusionCollator(processor, BardVLConfig.from_pretrained(model), max_length=MAX_LENGTH)


# ------------------ ready ------------------
def like_photographs(rows: int, seed: int) -> Any:
    """Lengths of samples with an image or none and one answer: log-normal, half of them between 200 and 1,300 tokens."""
    from nemo_bard.data.lengths import SampleSizes

    dice = np.random.default_rng(seed)
    images = np.where(dice.random(rows) < 0.8, np.clip(np.exp(dice.normal(6.2, 0.7, rows)), 64, 3000), 0).astype(
        np.int32
    )
    starts = images + dice.integers(20, 60, rows, dtype=np.int32)
    ends = starts + np.exp(dice.normal(4.5, 1, rows)).astype(np.int32) + 2
    has = images > 0
    return SampleSizes(
        response_edges=np.arange(rows + 1),
        responses=np.stack([starts, ends], axis=1).astype(np.int32),
        media_edges=np.concatenate([[0], np.cumsum(has)]),
        media=np.stack([np.full(has.sum(), 4), images[has]], axis=1).astype(np.int32),
    )


def ready(args: argparse.Namespace, scratch: Path) -> Iterator[Row]:
    """Make a large folder, and open, blend and pack it in a fresh process."""
    from nemo_bard.data.lengths import lengths_name, processor_digest
    from nemo_bard.data.prepared.layout import load_manifest
    from nemo_bard.data.prepared.source import PreparedSource

    folder, collator = scratch / "large", make_collator(scratch / "model")
    rows = -(-args.draws // args.sources)
    tiny = [sample(number, None, 0) for number in range(2000)]
    write_folder(folder, {f"source{number}": (rows, tiny) for number in range(args.sources)})
    digest = processor_digest(collator)
    for number, entry in enumerate(load_manifest(folder).sources):
        source = PreparedSource(folder, entry)
        name = lengths_name(source.fingerprint(), collator, processor=digest)
        like_photographs(rows, number).save(source.folder / name)
    shared: Any = {"section": "ready", "draws": args.draws, "sources": args.sources}
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        yield attempt(shared, lambda: pool.apply(get_ready, (folder, scratch, args.draws, args.sources)))


def get_ready(folder: Path, scratch: Path, draws: int, sources: int) -> Row:
    """What a rank does before its first step, timed; called in a fresh process."""
    from nemo_bard.data.packing import pack_dataset

    imported = time.perf_counter()
    collator = make_collator(scratch / "model")
    base = peak_resident_bytes()
    start, cpu = time.perf_counter(), time.process_time()
    weights = {f"source{number}": {"weight": 1.0 + 0.37 * number} for number in range(sources)}
    mixture = MixtureDataset(folder, weights, draws)
    opened = time.perf_counter()
    packed = pack_dataset(mixture, collator, cache_dir=scratch / "cache", seed=0, shuffle=True)
    end = time.perf_counter()
    return {
        "import_s": start - imported,
        "open_s": opened - start,
        "pack_s": end - opened,
        "ready_s": end - start,
        "cpu_s": time.process_time() - cpu,
        "rows": len(packed),
        "base_mib": base / 2**20,
        "peak_mib": peak_resident_bytes() / 2**20,
    }


# ------------------ workers ------------------
def loader_of(dataset: Any, collate: Any, workers: int) -> Any:
    """AutoModel's loader, as a recipe builds it."""
    from torchdata.stateful_dataloader import StatefulDataLoader

    return StatefulDataLoader(
        dataset, batch_size=1, collate_fn=collate, num_workers=workers, worker_init_fn=keep_freed_memory
    )


def workers(args: argparse.Namespace, scratch: Path) -> Iterator[Row]:
    """Images through the data set and the collator."""
    collator = make_collator(scratch / "model")
    collator.pixel_dtype = torch.bfloat16
    folder = scratch / f"images-{args.side}"
    pictures = [jpeg(args.side, seed) for seed in range(16)]
    write_folder(folder, {"images": (2000, [sample(n, one, args.side) for n, one in enumerate(pictures)])})
    megabytes = sum(map(len, pictures)) / len(pictures) / 1e6
    for number in args.workers:
        yield attempt(
            {"section": "workers", "workers": number}, lambda n=number: feed(args, folder, collator, n, megabytes)
        )


def feed(args: argparse.Namespace, folder: Path, collator: Any, number: int, megabytes: float) -> Row:
    """Samples a second of a loader whose batches are thrown away."""
    warm_up = 4 * max(number, 1)
    mixture = MixtureDataset(folder, {"images": {"weight": 1}}, args.samples + warm_up)
    start, cpu = 0.0, cpu_seconds()
    batches = iter(loader_of(mixture, collator, number))
    for place, _ in enumerate(batches):
        if place == warm_up - 1:
            start = time.perf_counter()
    rate = args.samples / (time.perf_counter() - start)
    del batches  # the system counts what workers took when they have ended
    cpu_ms = 1000 * (cpu_seconds() - cpu) / len(mixture)
    per_worker = rate / max(number, 1)
    megabytes *= per_worker
    return {"samples_per_second": rate, "per_worker": per_worker, "mb_per_second": megabytes, "cpu_ms": cpu_ms}


def cpu_seconds() -> float:
    """Of this process and those that it started and that have ended."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


# ------------------ memory ------------------
class Watched:
    """A data set that gives only what the process that reads it has as its own memory, in bytes."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> int:
        """Read a sample; return the private bytes every now and then, 0 else."""
        self.dataset[index]
        return own_bytes() if index % 500 < 8 else 0


def own_bytes() -> int:
    """Memory that this process shares with no other one, by the operating system's account."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(("Private_Clean:", "Private_Dirty:")))


def memory(args: argparse.Namespace, scratch: Path) -> Iterator[Row]:
    """Read many samples of small images from several parts."""
    folder = scratch / "small"
    pictures = [sample(number, jpeg(64, number), 64) for number in range(500)]
    write_folder(folder, dict.fromkeys(("one", "two", "three"), (200000, pictures)))
    for number in args.workers:
        yield attempt({"section": "memory", "workers": number}, lambda n=number: grow(args, folder, n))


def grow(args: argparse.Namespace, folder: Path, number: int) -> Row:
    """Own memory of the process with most of it, at the start and at the end."""
    mixture = MixtureDataset(folder, {name: {"weight": 1} for name in ("one", "two", "three")}, args.read)
    found = [int(batch[0]) for batch in loader_of(Watched(mixture), list, number)]
    seen = [value / 2**20 for value in found if value]
    first, last = max(seen[: 2 * max(number, 1)]), max(seen[-2 * max(number, 1) :])
    return {"first_mib": first, "last_mib": last, "grown_mib": last - first}


SECTIONS = {"ready": ready, "workers": workers, "memory": memory}


def main(argv: list[str] | None = None) -> int:
    """Measure and report; 1 if a row failed."""
    args = parse_args(argv)
    results = Results("data_cpu", args.output, COLUMNS, environment(torch.device("cpu"), torch.float32))
    scratch = Path(tempfile.mkdtemp(prefix="bench-data-", dir=args.scratch))
    try:
        for name in args.sections:
            for row in SECTIONS[name](args, scratch):
                results.add(row)
                sys.stdout.write(table([row], COLUMNS) + "\n\n")
                sys.stdout.flush()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return int(any("failed" in row for row in results.rows))


if __name__ == "__main__":
    raise SystemExit(main())
