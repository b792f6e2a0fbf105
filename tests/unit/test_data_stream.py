"""The stream of samples: a function of the step, whatever the ranks, local batches and loader workers; refused if another."""

import functools
from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from nemo_automodel.components.datasets.vlm.loader import VlmCollatorConfig
from nemo_automodel.components.training.step_scheduler import StepScheduler

from nemo_bard.data.chosen import ChosenSamples
from nemo_bard.data.digits import DigitsDataset
from nemo_bard.data.jsonl import JsonlDataset
from nemo_bard.data.packing import PackedDataset, Packs
from nemo_bard.data.stream import StreamSampler, identity_of, is_ordered
from nemo_bard.train.resume import DataStream, ResumedTraining
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
def test_identity_of_data_sets(tmp_path):
    file = tmp_path / "a.jsonl"
    lines = ['{"messages": [{"role": "user", "content": "%d"}]}\n' % number for number in range(600)]  # noqa: UP031
    file.write_text("".join(lines))
    first = identity_of(JsonlDataset(file, validate=False))
    assert first["dataset"].startswith("600 lines, ")
    (tmp_path / "elsewhere").mkdir()
    moved = file.rename(tmp_path / "elsewhere" / "b.jsonl")
    assert identity_of(JsonlDataset(moved, validate=False)) == first, "the file may move"
    assert identity_of(JsonlDataset(moved, validate=False, limit=599)) != first
    moved.write_text("".join([*lines[:-1], lines[-1].replace("599", "598")]))
    assert identity_of(JsonlDataset(moved, validate=False)) != first
    digits = DigitsDataset("train", 5)
    assert identity_of(digits) == {"dataset": digits.fingerprint(), "samples": "5"}
    assert identity_of([1, 2]) == {"dataset": "builtins.list", "samples": "2"}
    chosen = [identity_of(ChosenSamples(digits, indices)) for indices in ([1, 2], [2, 1])]
    assert chosen[0].keys() == {"dataset", "samples", "chosen"}
    assert chosen[0] != chosen[1]
    rows = [
        identity_of(PackedDataset(digits, Packs(edges=np.array(edges), members=np.arange(5))))
        for edges in ([0, 2, 5], [0, 3, 5])
    ]
    assert rows[0].keys() == {"dataset", "samples", "packed rows"}
    assert rows[0] != rows[1]
    own = SimpleNamespace(identity=lambda: {"weights": "1 2", "samples": 7})
    assert identity_of(own) == {"weights": "1 2", "samples": "7"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": "43"}, "seed differs from that of the checkpoint's run: '42' then, '43' now"),
        ({"dataset": "b"}, "dataset differs from that of the checkpoint's run: 'a' then, 'b' now"),
        ({"weights": "1"}, "weights differs from that of the checkpoint's run: 'not there' then, '1' now"),
        (
            {"seed": "1", "dataset": "b", "samples": "2"},
            r"seed .* run \(and so do dataset, samples\): '42' then, '1' now",
        ),
    ],
)
def test_another_stream_is_refused_by_name(changes, said):
    old = {"seed": "42", "dataset": "a", "samples": "1"}
    DataStream(old).load_state_dict(dict(old))
    with pytest.raises(ValueError, match=said) as caught:
        DataStream({**old, **changes}).load_state_dict(old)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="packing .*: 'x' then, 'not there' now"):
        DataStream(old).load_state_dict({**old, "packing": "x"})
