"""Work on samples is dealt out over ranks that wait for progress, not for an end; a start after the first does none."""

from __future__ import annotations

import datetime
import logging
import multiprocessing
import os
import socket
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from nemo_automodel.components.config.loader import load_yaml_config
from nemo_automodel.components.distributed.utils import FirstRankPerNode
from PIL import Image
from torch.distributed import distributed_c10d

from nemo_bard.base.errors import RunError
from nemo_bard.base.paths import recipes_dir
from nemo_bard.data import checks, ranks
from nemo_bard.data.checks import check_once, checks_put_off
from nemo_bard.data.jsonl import JsonlDataset
from nemo_bard.data.lengths import UNKNOWN_LENGTH, measured_once
from nemo_bard.data.ranks import Ranks, deal_out
from nemo_bard.model.configuration import BardVLConfig
from nemo_bard.train.pbm import PBMRecipe
from nemo_bard.train.settings import PackingSettings
from nemo_bard.upstream import automodel

SECOND = datetime.timedelta(seconds=1)


def on_ranks(function, size: int = 2, allowed: tuple[int, ...] = ()) -> list:
    """What ``function(rank)`` returns in each of ``size`` processes of a group; those ``allowed`` to may just end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()

    def body(rank: int) -> None:
        try:
            store = dist.TCPStore("127.0.0.1", port, size, rank == 0)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
            queue.put((rank, True, function(rank)))
        except BaseException:
            queue.put((rank, False, traceback.format_exc()))
        os._exit(0)

    processes = [context.Process(target=body, args=(rank,)) for rank in range(size)]
    for process in processes:
        process.start()
    results = dict.fromkeys(range(size))
    for _ in range(size - len(allowed)):
        rank, fine, value = queue.get()
        assert fine, value
        results[rank] = value
    for process in processes:
        process.join()
    return list(results.values())


def raised(function) -> tuple[str, str]:
    try:
        function()
    except (ValueError, RunError) as error:
        return type(error).__name__, str(error)
    return "", ""


@pytest.mark.parametrize("workers", [0, 2])
def test_every_sample_is_worked_on_once_and_all_ranks_have_all_results(workers, monkeypatch, tmp_path):
    monkeypatch.setattr(ranks, "ROUND_SECONDS", 0.01)
    monkeypatch.setattr(ranks, "LINE_SECONDS", 0.0)

    def square(index):
        (tmp_path / f"{index}").touch(exist_ok=False)
        return index * index

    def work(rank):
        with Ranks.together(10 * SECOND) as together:
            return deal_out(square, 300, join=list, ranks=together, num_workers=workers, doing="squaring")

    for parts in on_ranks(work):
        assert [value for part in parts for value in part] == [index * index for index in range(300)]
    assert len(list(tmp_path.iterdir())) == 300


def test_a_wrong_sample_is_the_same_error_on_all_ranks():
    def check(index):
        if index in (70, 140):
            raise ValueError(f"file:{index} is\nwrong")

    def work(rank):
        with Ranks.together(10 * SECOND) as together:
            return raised(lambda: deal_out(check, 200, ranks=together, doing="checking"))

    assert on_ranks(work) == [("ValueError", "file:70 is wrong")] * 2
    with pytest.raises(ValueError, match=r"^file:70 is wrong$"):
        deal_out(check, 200, doing="checking")


def test_what_one_rank_cannot_open_ends_all():
    def work(rank):
        with Ranks.together(10 * SECOND) as together:

            def opened():
                if rank == 1:
                    raise PermissionError(13, "Permission denied", "/data")

            on_all = raised(lambda: together.on_all(opened, "opening"))
            return on_all, raised(lambda: together.on_first(lambda: Path("/none/x").read_text(), "reading"))

    for on_all, on_first in on_ranks(work):
        assert on_all == ("ValueError", "[Errno 13] Permission denied: '/data'")
        assert on_first == ("ValueError", "[Errno 2] No such file or directory: '/none/x'")


def test_a_rank_that_stands_still_or_is_gone_ends_the_run_in_one_line(capfd):
    def stuck(rank):
        with Ranks.together(2 * SECOND) as together:
            if rank == 2:
                time.sleep(5)
            return raised(lambda: deal_out(lambda index: None, 400, ranks=together, doing="checking samples"))

    def gone(rank):
        with Ranks.together(30 * SECOND) as together:
            if rank == 2:
                os._exit(1)
            return raised(lambda: deal_out(lambda index: None, 400, ranks=together, doing="checking samples"))

    for results in (on_ranks(stuck, 3), on_ranks(gone, 3, allowed=(2,))):
        name, text = results[0]
        assert name == "RunError"
        assert text.startswith("checking samples: a rank is gone or stands still")
        assert "Ranks 2 failed" in text
        assert "\n" not in text
        assert results[1][0] == "RunError"


def test_a_line_says_how_far_all_are_and_who_is_waited_for():
    states = [(40, True, None), (9, False, None), (10, True, None)]
    assert ranks._line(states, 80, "checking") == "checking: 59 of 80 samples (73.8 %), waiting for rank 1"
    assert ranks._line([(8, False, None)] * 2, 64, "checking") == "checking: 16 of 64 samples (25.0 %)"


# ---------------------------------------------------------------- the start of a recipe


def write_data(folder: Path, samples: int) -> Path:
    folder.mkdir()
    Image.new("RGB", (64, 64)).save(folder / "a.png")
    turns = '[{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "Black."}]'
    (folder / "train.jsonl").write_text(f'{{"messages": {turns}, "images": ["a.png"]}}\n' * samples)
    return folder / "train.jsonl"


def recipe_of(start: Path, data: Path, cache: Path, *, pack: bool, patience_seconds: float) -> PBMRecipe:
    """A recipe as it is when upstream builds its loaders."""
    config = load_yaml_config(recipes_dir() / "pbm.yaml")
    config.set_by_dotted("dataset.path", str(data))
    config.set_by_dotted("dist_env.timeout_minutes", patience_seconds / 60)
    config.set_by_dotted("dataloader.num_workers", 1)
    recipe = PBMRecipe(config)
    recipe.packing = PackingSettings(max_length=512 if pack else None, cache_dir=str(cache))
    recipe.model_parts = [SimpleNamespace(config=BardVLConfig.from_pretrained(start))]
    recipe.dist_env = SimpleNamespace(device=torch.device("cpu"))
    recipe.seed = 0
    automodel.replace_loaders(recipe.cfg, recipe._opened_together)
    return recipe


@pytest.mark.parametrize("pack", [False, True])
def test_slow_data_outlasts_every_timeout_and_is_not_looked_at_again(start, tmp_path, monkeypatch, pack):
    """Each rank works longer than gloo waits by default, and than a rank may be silent; its caches are its node's own."""
    from nemo_bard.train import pbm

    monkeypatch.setattr(ranks, "ROUND_SECONDS", 0.2)
    data, looked = write_data(tmp_path / "data", 512), tmp_path / "looked"
    looked.mkdir()

    def slowed(method):
        def slow(self, index):
            time.sleep(0.006 if index // 64 % 2 else 0.02)
            with (looked / str(os.getpid())).open("a") as file:
                file.write(f"{index}\n")
            return method(self, index)

        return slow

    for name in ("check", "peek"):
        monkeypatch.setattr(JsonlDataset, name, slowed(getattr(JsonlDataset, name)))

    def begin(rank):
        distributed_c10d._get_default_timeout = lambda backend: SECOND  # gloo's, 30 minutes
        warned: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: warned.append(record.getMessage())
        logging.getLogger("nemo_automodel").addHandler(handler)
        recipe = recipe_of(start, data, tmp_path / f"cache{rank}", pack=pack, patience_seconds=4)
        recipe.noise = pbm.NoiseSettings()
        recipe.settings = pbm.RecipeSettings()
        recipe.pixel_dtype = torch.float32
        recipe.on_bad_sample = pbm.check_on_bad_sample(None)
        context, begun = FirstRankPerNode(), time.monotonic()
        built = recipe.cfg.vlm_dataloader.build(
            pretrained_model_name_or_path=str(start),
            dp_rank=rank,
            dp_world_size=2,
            batch_size=1,
            dataset_build_context=context,
        )
        rows = built.dataloader.dataset
        members = rows.packs.members.tolist() if pack else list(range(len(rows)))
        return time.monotonic() - begun, sorted(members), warned

    def numbers():
        files = list(looked.iterdir())
        return sorted(int(line) for file in files for line in file.read_text().split())

    results = on_ranks(begin)
    assert max(seconds for seconds, _, _ in results) > 4.0
    for _, members, warned in results:
        assert members == list(range(512))
        assert warned == []
    assert numbers() == list(range(512)), "each sample once, whoever works on it"
    assert [bool(list(folder.iterdir())) for folder in sorted(tmp_path.glob("cache*"))] == [True]
    on_ranks(begin)
    assert len(numbers()) == 512


def test_samples_are_checked_once_and_again_when_they_change(tmp_path, monkeypatch):
    data = write_data(tmp_path / "data", 3)
    with checks_put_off() as unchecked:
        dataset = JsonlDataset(data)
    assert unchecked == [dataset]
    check_once(dataset, tmp_path / "cache")
    monkeypatch.setattr(checks, "deal_out", None)
    check_once(JsonlDataset(data, validate=False), tmp_path / "cache")
    (tmp_path / "data" / "a.png").unlink()
    check_once(dataset, tmp_path / "cache")
    monkeypatch.undo()
    data.write_text(data.read_text() * 2)
    with pytest.raises(ValueError, match=r"train.jsonl:1: image file .*a.png does not exist$"):
        check_once(JsonlDataset(data, validate=False), tmp_path / "cache")
    with pytest.raises(ValueError, match=r"train.jsonl:1: image file .*a.png does not exist$"):
        JsonlDataset(data)


def test_lengths_of_a_run_that_drops_do_not_hide_bad_samples_from_one_that_does_not(start, tmp_path):
    from transformers import AutoProcessor

    from nemo_bard.data.collate import BlockDiffusionCollator

    data = write_data(tmp_path / "data", 3)
    data.write_text(data.read_text().replace("a.png", "b.png", 1))
    dataset = JsonlDataset(data, validate=False)
    make = BlockDiffusionCollator(AutoProcessor.from_pretrained(start), BardVLConfig.from_pretrained(start))
    for _ in range(2):
        sizes, _ = measured_once(dataset, make, tmp_path, drop_bad=True)
        assert sizes.responses[:, 1].max() == UNKNOWN_LENGTH
    with pytest.raises(ValueError, match=r"train.jsonl:1: image file .*b.png does not exist"):
        measured_once(dataset, make, tmp_path)


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    dataset = JsonlDataset(write_data(tmp_path / "data", 1), validate=False)
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(ValueError, match=r"cache"):
        check_once(dataset, tmp_path / "cache")
