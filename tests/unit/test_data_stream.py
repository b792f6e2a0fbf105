"""The stream of samples: a function of the step, whatever the ranks, local batches and loader workers; refused if another."""

import functools
import json
import os
from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from nemo_automodel.components.datasets.vlm.loader import VlmCollatorConfig
from nemo_automodel.components.training.rng import StatefulRNG
from nemo_automodel.components.training.step_scheduler import StepScheduler
from prepared_folder import sample, write_prepared

from nemo_bard.data.chosen import ChosenSamples
from nemo_bard.data.digits import DigitsDataset
from nemo_bard.data.jsonl import JsonlDataset
from nemo_bard.data.packing import PackedDataset
from nemo_bard.data.packs import Packs
from nemo_bard.data.prepared.dataset import PreparedDataset
from nemo_bard.data.rows import RowsDataset
from nemo_bard.data.stream import StreamSampler, identity_of, is_ordered
from nemo_bard.train.resume import DataStream, ResumedTraining, _reader_of
from nemo_bard.upstream.recipe import OpenedDataloaderConfig

GLOBAL, STEPS = 8, 12
SIZE = 43
"""Samples: five whole global batches and three more in every epoch."""


class Numbers:
    """Items are their indices."""

    def __init__(self, size, *, ordered=False):
        self.size, self.ordered = size, ordered

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return index

    def fingerprint(self):
        return f"numbers {self.size}"


def as_they_are(examples, processor):
    return list(examples)


def loader_of(dataset, *, ranks, rank, local, workers=0, **settings):
    """AutoModel's loader with our sampler."""
    settings = {"shuffle": True, "drop_last": False, **settings}
    sample = functools.partial(ResumedTraining.stream_sampler, recipe(ranks), SimpleNamespace(**settings))
    config = OpenedDataloaderConfig(
        dataset_config=None,
        collator=VlmCollatorConfig(as_they_are),
        num_workers=workers,
        open=lambda build: (dataset, None),
        sampler=sample,
    )
    built = config.build(dp_rank=rank, dp_world_size=ranks, pretrained_model_name_or_path="none", batch_size=local)
    return built.dataloader


def recipe(ranks, **attributes):
    """What a recipe that resumes looks at."""
    return SimpleNamespace(cfg={"step_scheduler.global_batch_size": GLOBAL}, **attributes)


def steps_of(dataset, *, ranks=1, local=1, workers=0, first=0, last=STEPS, **settings):
    """Samples of each step ``first`` to ``last``: those of all ranks, by their place in the global batch."""
    dealt = []
    for rank in range(ranks):
        loader = loader_of(dataset, ranks=ranks, rank=rank, local=local, workers=workers, **settings)
        scheduler = StepScheduler(
            GLOBAL, local, ranks, loader, max_steps=last, num_epochs=100, start_step=first, preemption_signal=None
        )
        place = SimpleNamespace(step_scheduler=scheduler, dataloader=loader, _restored=False)
        ResumedTraining._find_place(place)
        own = []
        for epoch in scheduler.epochs:
            scheduler.set_epoch(epoch)
            for batches in scheduler:
                step = scheduler.step % scheduler.epoch_len
                places = (step * GLOBAL + i * ranks + rank for i in range(GLOBAL))
                # as `TrainingStep._without_repeats` leaves out what the sampler repeats
                own.append([one for one, at in zip(chain(*batches), places, strict=False) if at < len(dataset)])
        dealt.append(own)
    return [[part[i] for i in range(GLOBAL) for part in parts if i < len(part)] for parts in zip(*dealt, strict=True)]


@pytest.fixture(scope="module")
def undisturbed():
    return steps_of(Numbers(SIZE))


def test_an_epoch_holds_every_sample_once_and_every_epoch_has_an_order_of_its_own(undisturbed):
    epochs = [list(chain(*undisturbed[first : first + 6])) for first in (0, 6)]
    assert [len(step) for step in undisturbed] == [8, 8, 8, 8, 8, 3] * 2
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(SIZE))
    assert epochs[0] != epochs[1]
    order = torch.utils.data.DistributedSampler(Numbers(SIZE), 1, 0)
    assert list(order) == epochs[0], "the order of runs that began before"


@pytest.mark.parametrize("local", [1, 2, 4])
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_global_batches_are_the_same_whoever_goes_on_from_wherever(undisturbed, ranks, local):
    if ranks * local > GLOBAL:
        pytest.skip("more than the global batch")
    for first in (0, 1, 5, 6, 7, 11):
        assert steps_of(Numbers(SIZE), ranks=ranks, local=local, first=first) == undisturbed[first:], first


@pytest.mark.parametrize(("ranks", "local", "first"), [(1, 4, 0), (2, 2, 3), (1, 8, 6)])
def test_loader_workers_change_nothing(undisturbed, ranks, local, first):
    assert steps_of(Numbers(SIZE), ranks=ranks, local=local, workers=2, first=first) == undisturbed[first:]


def test_ranks_that_change_three_times_see_one_stream(undisturbed):
    goes = [(1, 8, 0, 2), (2, 1, 2, 5), (4, 2, 5, 9), (1, 2, 9, STEPS)]
    seen = [steps_of(Numbers(SIZE), ranks=r, local=b, first=first, last=last) for r, b, first, last in goes]
    assert list(chain(*seen)) == undisturbed


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_drop_last_drops_what_is_behind_the_last_whole_global_batch(undisturbed, ranks):
    for local in (1, 2):
        seen = steps_of(Numbers(SIZE), ranks=ranks, local=local, last=10, drop_last=True)
        assert seen == undisturbed[:5] + undisturbed[6:11]
        assert steps_of(Numbers(SIZE), ranks=ranks, local=local, first=7, last=10, drop_last=True) == seen[7:]


def test_drop_last_that_leaves_no_step_is_refused():
    with pytest.raises(ValueError, match=r"dataloader.drop_last leaves no step of a data set of 7, fewer than .*=8; "):
        loader_of(Numbers(7), ranks=2, rank=0, local=1, drop_last=True)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_fewer_samples_than_a_global_batch(ranks):
    for size in (1, 3, 7):
        seen = steps_of(Numbers(size), ranks=ranks, last=3)
        assert [sorted(step) for step in seen] == [list(range(size))] * 3


@pytest.mark.parametrize("ranks", [1, 4])
def test_a_data_set_that_is_ordered_is_not_shuffled(ranks):
    dataset = Numbers(SIZE, ordered=True)
    seen = steps_of(dataset, ranks=ranks, first=2, last=6)
    assert list(chain(*seen)) == list(range(16, SIZE))
    rows = PackedDataset(dataset, Packs(edges=np.arange(SIZE + 1), members=np.arange(SIZE)))
    assert rows.ordered
    assert not is_ordered(Numbers(SIZE))
    assert list(chain(*steps_of(rows, ranks=ranks, last=6))) == [[one] for one in range(SIZE)]


def test_a_large_data_set_is_dealt_out_without_lists_of_it():
    sampler = StreamSampler(range(4_400_000), ranks=8, rank=3, global_batch_size=256)
    sampler.begin_at(0, 1000)
    order = torch.randperm(4_400_000, generator=torch.Generator().manual_seed(0))
    assert list(sampler) == order[256_000:][3::8].tolist()
    assert len(sampler) == 550_000


# ------------------ what it depends on ------------------
def prepared_of(folder, sources):
    write_prepared(folder, sources)
    return PreparedDataset(folder)


def test_identity_of_data_sets(tmp_path):
    file = tmp_path / "a.jsonl"
    lines = ['{"messages": [{"role": "user", "content": "%d"}]}\n' % number for number in range(600)]  # noqa: UP031
    file.write_text("".join(lines))
    first = identity_of(JsonlDataset(file, validate=False))
    assert first["content"].startswith("600 lines, ")
    (tmp_path / "elsewhere").mkdir()
    moved = file.rename(tmp_path / "elsewhere" / "b.jsonl")
    assert identity_of(JsonlDataset(moved, validate=False)) == first, "the file may move"
    assert identity_of(JsonlDataset(moved, validate=False, limit=599)) != first
    moved.write_text("".join([*lines[:-1], lines[-1].replace("599", "598")]))
    assert identity_of(JsonlDataset(moved, validate=False)) != first
    digits = DigitsDataset("train", 5)
    assert identity_of(digits) == {"content": digits.fingerprint(), "samples": "5"}
    assert identity_of([1, 2]) == {"content": "builtins.list", "samples": "2"}
    chosen = [identity_of(ChosenSamples(digits, indices)) for indices in ([1, 2], [2, 1])]
    assert chosen[0].keys() == {"content", "samples", "chosen"}
    assert chosen[0] != chosen[1]
    rows = [
        identity_of(PackedDataset(digits, Packs(edges=np.array(edges), members=np.arange(5))))
        for edges in ([0, 2, 5], [0, 3, 5])
    ]
    assert rows[0].keys() == {"content", "samples", "packed rows"}
    assert rows[0] != rows[1]
    raw = tmp_path / "raw.json"
    rows_of = [
        {"conversations": [{"from": "human", "value": str(one)}, {"from": "gpt", "value": "a"}]} for one in (1, 2)
    ]
    raw.write_text(json.dumps(rows_of))
    before = identity_of(RowsDataset(raw, validate=False))
    assert before["content"].startswith("2 rows, layout llava, ")
    os.utime(raw, (1, 1))
    assert identity_of(RowsDataset(raw, validate=False)) == before
    raw.write_text(json.dumps(rows_of).replace("2", "3"))
    assert identity_of(RowsDataset(raw, validate=False)) != before
    sources = {"a": [sample("1")], "b": [sample("2", answer="Another.")]}
    prepared = identity_of(prepared_of(tmp_path / "prepared", sources))
    assert prepared.keys() == {"sources", "rows of a", "rows of b"}
    assert prepared["sources"] == "a, b"
    sources["b"] = [sample("2", answer="One more.")]
    changed = identity_of(prepared_of(tmp_path / "changed", sources))
    assert {name for name in changed if changed[name] != prepared[name]} == {"rows of b"}
    own = SimpleNamespace(identity=lambda: {"weights": "1 2", "samples": 7})
    assert identity_of(own) == {"weights": "1 2", "samples": "7"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": "43"}, "seed differs from that of the checkpoint's run: 42 then, 43 now"),
        ({"dataset": "b"}, "dataset differs from that of the checkpoint's run: a then, b now"),
        ({"weights": "1"}, "weights differs from that of the checkpoint's run: nothing then, 1 now"),
        (
            {"seed": "1", "dataset": "b", "samples": "2"},
            r"seed .* run \(and so do dataset, samples\): 42 then, 1 now",
        ),
    ],
)
def test_another_stream_is_refused_by_name(changes, said):
    old = {"seed": "42", "dataset": "a", "samples": "1"}
    DataStream(old).load_state_dict(dict(old))
    with pytest.raises(ValueError, match=said) as caught:
        DataStream({**old, **changes}).load_state_dict(old)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"dataset differs .*: a{100}\.\.\. \(\w{8}\) then, a now; "):
        DataStream(old).load_state_dict({**old, "dataset": "a" * 5000})
    with pytest.raises(ValueError, match="packing .*: x then, nothing now"):
        DataStream(old).load_state_dict({**old, "packing": "x"})


# ------------------ a recipe that goes on ------------------
CONFIG = {"seed": 7, "step_scheduler": {"global_batch_size": GLOBAL}, "dataloader": {"shuffle": True}}


@pytest.fixture
def go_on(monkeypatch):
    """``go_on(folder, ranks=..., ...)``: a recipe that has loaded what a checkpoint keeps besides weights; ``None`` starts."""
    load = lambda self, folder: folder and self._load_checkpoint_tracked_state(folder)  # noqa: E731
    monkeypatch.setattr("nemo_bard.upstream.recipe.FinetuneRecipeForVLM.load_checkpoint", load)

    def loaded(folder, *, ranks=1, dataset=None, config=CONFIG, **settings):
        recipe = object.__new__(ResumedTraining)
        recipe.cfg = SimpleNamespace(get=_reader_of(config))
        recipe.dist_env = SimpleNamespace(rank=0, world_size=ranks, is_main=True)
        recipe.rng = StatefulRNG(7, ranked=True)
        recipe.dataloader = loader_of(dataset or Numbers(SIZE), ranks=ranks, rank=0, local=1, **settings)
        recipe.step_scheduler = StepScheduler(
            GLOBAL, 1, ranks, recipe.dataloader, max_steps=100, num_epochs=100, preemption_signal=None
        )
        recipe.checkpointer = SimpleNamespace(config=SimpleNamespace(allow_legacy_pickle_restore=False))
        recipe.load_checkpoint(None if folder is None else str(folder))
        return recipe

    return loaded


def save(recipe, folder, *, step, epoch, config=CONFIG):
    """What upstream's ``save_checkpoint`` does with what a recipe tracks."""
    tracked = recipe.__dict__["__state_tracked"]
    assert tracked == {"data_stream", "rng", "step_scheduler"}
    (folder / "rng").mkdir(parents=True)
    for rank in range(recipe.dist_env.world_size):
        torch.save(recipe.rng.state_dict(), folder / "rng" / f"rng_global_rank_{rank}.pt")
    torch.save(recipe.data_stream.state_dict(), folder / "data_stream.pt")
    torch.save({"step": step, "epoch": epoch}, folder / "step_scheduler.pt")
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.mark.parametrize(
    ("step", "stored", "epoch", "places"), [(4, 0, 0, 32), (6, 0, 1, 0), (6, 1, 1, 0), (13, 2, 2, 8)]
)
def test_epoch_and_place_follow_from_the_step(go_on, tmp_path, step, stored, epoch, places):
    folder = save(go_on(None, ranks=2), tmp_path / "a", step=step, epoch=stored)
    for ranks in (1, 2, 4):
        recipe = go_on(folder, ranks=ranks)
        assert (recipe.step_scheduler.step, recipe.step_scheduler.epoch) == (step, epoch)
        recipe.step_scheduler.set_epoch(epoch)
        order = torch.randperm(SIZE, generator=torch.Generator().manual_seed(epoch))[places:]
        assert list(recipe.dataloader.sampler)[:5] == order[::ranks][:5].tolist()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"config": {**CONFIG, "seed": 8}}, "seed differs .*: 7 then, 8 now; "),
        (
            {"config": {**CONFIG, "step_scheduler": {"global_batch_size": 16}}},
            "step_scheduler.global_batch_size differs .*: 8 then, 16 now; ",
        ),
        ({"config": {**CONFIG, "packing": {"max_length": 64}}}, "packing.max_length differs .*: None then, 64 now; "),
        (
            {"config": {**CONFIG, "dataloader": {"shuffle": False}}},
            "dataloader.shuffle differs .*: True then, False now; ",
        ),
        (
            {"config": {**CONFIG, "dataloader": {"drop_last": True}}},
            "dataloader.drop_last differs .*: False then, True now",
        ),
        (
            {"dataset": Numbers(44)},
            r"dataset.content differs .* \(and so does dataset.samples\): numbers 43 then, numbers 44 now; ",
        ),
    ],
)
def test_a_checkpoint_of_another_stream_is_refused(go_on, tmp_path, changes, said):
    folder = save(go_on(None), tmp_path / "a", step=2, epoch=0)
    with pytest.raises(ValueError, match=f"^{folder}: {said}") as caught:
        go_on(folder, **changes)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_of_an_earlier_version_goes_on_and_is_compared_by_its_recipe(go_on, tmp_path, caplog):
    folder = save(go_on(None), tmp_path / "a", step=8, epoch=1)
    (folder / "data_stream.pt").unlink()
    (folder / "dataloader").mkdir()
    assert go_on(folder, ranks=4).step_scheduler.step == 8
    assert f"{folder} does not say what its samples were; they are taken to be those of now" in caplog.text
    with pytest.raises(ValueError, match=f"^{folder}: seed differs .*: 7 then, 8 now; "):
        go_on(folder, config={**CONFIG, "seed": 8})
    with pytest.raises(
        ValueError, match="step 8 of the checkpoint was in epoch 1, now it would be in epoch 2: the data set"
    ):
        go_on(folder, dataset=Numbers(20))
    (folder / "config.yaml").write_text(yaml.safe_dump({**CONFIG, "seed": "${SEED,7}"}))
    assert go_on(folder, config={**CONFIG, "seed": 8}).step_scheduler.step == 8, (
        "what the environment said is not known"
    )


def test_random_states_are_taken_up_on_as_many_ranks_and_follow_from_the_step_on_others(go_on, tmp_path):
    first = go_on(None, ranks=2)
    torch.rand(3)
    folder = save(first, tmp_path / "a", step=2, epoch=0)
    expected = torch.rand(3)
    go_on(folder, ranks=2)
    assert torch.equal(torch.rand(3), expected)
    others = []
    for ranks in (1, 4, 4):
        go_on(folder, ranks=ranks)
        others.append(torch.rand(3))
    assert torch.equal(others[0], others[2])
    assert not torch.equal(others[0], expected)
    later = save(first, tmp_path / "b", step=3, epoch=0)
    go_on(later, ranks=1)
    assert not torch.equal(torch.rand(3), others[0])
