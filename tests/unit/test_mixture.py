"""Mixtures: exact proportions at every prefix, every row as often as asked for, the same order whatever runs read it."""

from __future__ import annotations

import pickle
from collections import Counter

import numpy as np
import pytest
from prepared_folder import sample, write_prepared

from nemo_bard.data import MixtureDataset
from nemo_bard.data.mixture.dataset import permutation
from nemo_bard.data.mixture.order import blend
from nemo_bard.data.prepared.layout import Manifest, SourceEntry


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("mix")
    sources = {
        name: [sample(f"{name}{i}", answer=f"{name} {i}", sizes=[(8 + i, 6)]) for i in range(rows)]
        for name, rows in (("charts", 7), ("docs", 4), ("text", 5))
    }
    write_prepared(path, {**sources, "nothing": []})
    return path


def largest_error(weights, samples):
    order = blend(weights, samples)
    assert (len(order), order.dtype) == (samples, np.uint16)
    total, prefix = sum(weights), np.arange(1, samples + 1)
    return max(np.abs(np.cumsum(order == i) - prefix * (w / total)).max() for i, w in enumerate(weights))


# ---------------------------------------------------------------- order


def some_weights():
    dice = np.random.default_rng(0)
    for sources in (1, 2, 3, 4, 5, 8, 13, 40):
        for spread in (0, 1, 6):
            yield (10 ** -dice.uniform(0, spread, sources)).tolist()
    yield [1e-6, 1, 1]
    yield [1, 1e-6]
    yield [1e6, 1, 2, 3]
    yield [5, 1, 1, 1, 1, 1]  # where taking what lags most is off by more than one
    yield [1 / 3, 1 / 7, 1 - 1 / 3 - 1 / 7]


@pytest.mark.parametrize("weights", list(some_weights()), ids=lambda weights: str(len(weights)))
def test_every_prefix_is_less_than_one_draw_off(weights):
    assert largest_error(weights, 4000) < 1


def test_every_prefix_of_many_sources_is_less_than_one_draw_off():
    dice = np.random.default_rng(1)
    for weights in (np.ones(230), 10 ** -dice.uniform(0, 5, 230), dice.pareto(1, 230) + 1e-3):
        assert largest_error(weights.tolist(), 20000) < 1


def test_more_samples_go_on_with_the_same_order():
    for weights in some_weights():
        assert (blend(weights, 3000)[:1234] == blend(weights, 1234)).all()


def test_a_long_order_is_exact_too():
    weights = [2, 1, 0.7]
    order = blend(weights, 300_000)
    assert np.abs(np.bincount(order) - 300_000 * np.array(weights) / sum(weights)).max() < 1
    assert largest_error(weights, 300_000) < 1


# ---------------------------------------------------------------- rows


def test_rows_come_once_before_they_come_again(folder):
    mixture = MixtureDataset(folder, {"charts": {"weight": 2}, "docs": {"weight": 1}}, samples=60)
    assert mixture.draws_per_source() == {"charts": 40, "docs": 20}
    places = [mixture.place(i) for i in range(60)]
    for number, rows in enumerate((7, 4)):
        own = [place[1:] for place in places if place[0] == number]
        for start in range(0, len(own), rows):
            block = own[start : start + rows]
            assert len({row for row, _ in block}) == len(block), "no row twice"
            assert {repetition for _, repetition in block} == {start // rows}
        assert own[:rows] != own[rows : 2 * rows], "another order"
    items = [mixture[i] for i in range(60)]
    assert len({item["sample_index"] for item in items}) == 60
    for item, (source, row, repetition) in zip(items, places, strict=True):
        name = ("charts", "docs")[source]
        assert item["meta"] == {"id": f"{name}{row}", "source": name, "repetition": repetition}
        assert item["conversation"][1]["content"][0]["text"] == f"{name} {row}"
    assert mixture.peek(3)["sample_index"] == items[3]["sample_index"]
    assert mixture.describe(3)["id"] == items[3]["meta"]["id"]
    with pytest.raises(IndexError, match="index 60 is outside a mixture of 60 samples"):
        mixture[60]


def test_without_settings_every_row_comes_once(folder):
    mixture = MixtureDataset(folder)
    assert Counter(mixture[i]["meta"]["id"] for i in range(len(mixture))) == Counter(
        [f"{name}{i}" for name, rows in (("charts", 7), ("docs", 4), ("text", 5)) for i in range(rows)]
    )
    assert mixture.ordered


def test_repetitions_may_be_fractions(folder):
    mixture = MixtureDataset(folder, {"charts": {"repetitions": 2.5}, "docs": {"repetitions": 0.5}, "text": {}})
    assert mixture.draws_per_source() == {"charts": 18, "docs": 2, "text": 5}
    charts = Counter(row for source, row, _ in map(mixture.place, range(25)) if source == 0)
    assert sorted(charts.values()) == [2, 2, 2, 3, 3, 3, 3]


def test_order_depends_on_the_seed_and_not_on_samples_or_processes(folder):
    sources = {"charts": {"weight": 3}, "text": {"weight": 1}}

    def drawn(samples=40, **settings):
        return [
            mixture[i]["sample_index"]
            for mixture in [MixtureDataset(folder, sources, samples, **settings)]
            for i in range(samples)
        ]

    assert drawn() == drawn()
    assert drawn(17) == drawn()[:17]
    assert drawn(seed=1) != drawn()
    mixture = pickle.loads(pickle.dumps(MixtureDataset(folder, sources, 40)))
    assert [mixture[i]["sample_index"] for i in range(40)] == drawn()
    other = MixtureDataset(folder, dict(reversed(sources.items())), 40)
    assert [other[i]["sample_index"] for i in range(40)] == drawn(), "the order of the section is no setting"


def test_permutations_differ_by_source_seed_and_repetition():
    orders = [permutation(50, *key).tolist() for key in ((0, "a", 0), (0, "a", 1), (0, "b", 0), (1, "a", 0))]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert permutation(6, 0, "a", 0).tolist() == GOLDEN


GOLDEN = [2, 3, 0, 4, 1, 5]


def test_sample_indices_of_a_row_are_the_same_in_every_mixture(folder):
    def by_place(mixture):
        return {
            (m["source"], m["id"], m["repetition"]): item["sample_index"]
            for item in map(mixture.__getitem__, range(len(mixture)))
            for m in [item["meta"]]
        }

    everything = by_place(MixtureDataset(folder))
    assert everything.items() >= by_place(MixtureDataset(folder, {"docs": {"weight": 1}}, 4, seed=7)).items()


def test_the_mixture_file_may_say_how_much(tmp_path):
    manifest = write_prepared(tmp_path, {name: [sample(f"{name}{i}") for i in range(3)] for name in "ab"})
    for settings, samples, drawn in (
        ({"a": {"repetitions": 3}}, None, {"a": 9, "b": 3}),
        ({"a": {"weight": 3}, "b": {"weight": 1}}, 8, {"a": 6, "b": 2}),
    ):
        entries = [
            SourceEntry(**{**vars_of(entry), "settings": settings.get(entry.name, {})}) for entry in manifest.sources
        ]
        Manifest(sources=entries, version="test").write(tmp_path)
        assert MixtureDataset(tmp_path, samples=samples).draws_per_source() == drawn


def vars_of(entry):
    return {name: getattr(entry, name) for name in ("name", "layout", "parts", "kept", "read")}


# ---------------------------------------------------------------- identity


def test_identity_names_what_changed(folder, tmp_path):
    sources = {"charts": {"weight": 2}, "docs": {"weight": 1}}
    first = MixtureDataset(folder, sources, 30)
    assert first.identity() == MixtureDataset(folder, sources, 50).identity()
    assert first.fingerprint() != MixtureDataset(folder, sources, 50).fingerprint()
    assert first.identity()["sources"] == "charts: weight 2, docs: weight 1"

    def changed(other):
        one, two = first.identity(), other.identity()
        return {key for key in {*one, *two} if one.get(key) != two.get(key)}

    assert changed(MixtureDataset(folder, sources, 30, seed=1)) == {"seed"}
    assert changed(MixtureDataset(folder, {**sources, "docs": {"weight": 2}}, 30)) == {"sources"}
    write_prepared(tmp_path, {"charts": [sample("other")], "docs": [sample(f"docs{i}") for i in range(4)]})
    assert "rows of charts" in changed(MixtureDataset(tmp_path, sources, 30))
    assert MixtureDataset.input_files(str(folder), samples=3) == {"path": folder / "manifest.json"}


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"sources": {"chart": {"weight": 1}}, "samples": 3}, "sources: {} has no source chart; did you mean charts?"),
        ({"sources": {"zzz": {}}}, "sources: {} has no source zzz; it has charts, docs, text, nothing"),
        ({"sources": {"charts": {"weight": 0}}, "samples": 3}, "sources.charts.weight must be a finite number > 0, got 0"),
        ({"sources": {"charts": {"weight": -1.5}}, "samples": 3}, "sources.charts.weight must be a finite number > 0, got -1.5"),
        ({"sources": {"charts": {"weight": float("nan")}}, "samples": 3}, "sources.charts.weight must be a finite number > 0, got nan"),
        ({"sources": {"charts": {"weight": "2"}}, "samples": 3}, "sources.charts.weight must be a finite number > 0, got '2'"),
        ({"sources": {"charts": {"repetitions": True}}}, "sources.charts.repetitions must be a finite number > 0, got True"),
        ({"sources": {"charts": {"wieght": 1}}}, "unknown key sources.charts.wieght; did you mean sources.charts.weight?"),
        ({"sources": {"charts": {"weight": 1, "repetitions": 1}}}, "sources.charts must have a weight or repetitions, not both"),
        ({"sources": {"charts": 2}}, "sources.charts must be a section such as {{weight: 2}}, got 2"),
        ({"sources": ["charts"]}, "sources must be a section such as"),
        ({"sources": {}}, "sources must be a section such as"),
        ({"sources": {"charts": {"weight": 1}, "docs": {"repetitions": 1}}, "samples": 3}, "sources must all have a weight or all have repetitions; charts has a weight, docs has repetitions"),
        ({"sources": {"charts": {"weight": 1}, "docs": {}}, "samples": 3}, "sources must all have a weight or all have repetitions; charts has a weight, docs has neither"),
        ({"sources": {"charts": {"weight": 1}}}, "samples must be given where sources have a weight"),
        ({"sources": {"charts": {"weight": 1}, "nothing": {"weight": 1}}, "samples": 3}, "sources.nothing has a weight but no rows in {}"),
        ({"sources": {"nothing": {}}}, "the repetitions of nothing give no sample of {}"),
        ({"sources": {"charts": {"repetitions": 2}, "docs": {}}, "samples": 19}, "samples must be at most 18, which is what the repetitions give (charts: 14, docs: 4), got 19"),
        ({"samples": 0}, "samples must be an integer >= 1 or null, got 0"),
        ({"samples": "many"}, "samples must be an integer >= 1 or null, got 'many'"),
        ({"seed": -1}, "seed must be an integer >= 0, got -1"),
    ],
)  # fmt: skip
def test_bad_settings_end_in_one_line(folder, settings, line):
    with pytest.raises(ValueError, match=".") as error:
        MixtureDataset(folder, **settings)
    assert str(error.value).startswith(line.format(folder))
    assert "\n" not in str(error.value)


def test_a_folder_that_is_not_prepared_is_named(tmp_path):
    with pytest.raises(ValueError, match="is not a prepared folder"):
        MixtureDataset(tmp_path)
