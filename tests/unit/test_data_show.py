"""What ``nemo-bard data show`` tells: draws, lengths, what limits keep, pages and pictures."""

from __future__ import annotations

import html
import io
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from prepared_folder import png, sample, write_prepared

from nemo_bard.cli import main
from nemo_bard.data.lengths import SampleSizes, measured_once
from nemo_bard.data.mixture.dataset import MixtureDataset
from nemo_bard.data.survey import measure as measuring
from nemo_bard.data.survey.draws import plan_draws
from nemo_bard.data.survey.margins import ratio, share_of_rows
from nemo_bard.data.survey.measure import choose
from nemo_bard.data.survey.processor import load_collator
from nemo_bard.data.survey.sources import open_sources
from nemo_bard.data.survey.survey import choose_sizes
from nemo_bard.method.layout import CONTEXT, NOISY, TokenIds, attention_mask, sample_layout
from nemo_bard.report.data.histogram import ASCII, edges, short_number, spark
from nemo_bard.report.data.mask import CONTEXT_COLOR, EARLIER_COLOR, OWN_COLOR, draw_mask
from nemo_bard.report.data.samples import pick_samples


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("show") / "prepared"
    charts = [sample(f"c{i}", answer="word " * (1 + 8 * i), sizes=[(40 + i, 32)]) for i in range(9)]
    text = [sample(f"t{i}", answer="<script>alert('&')</script>", sizes=()) for i in range(4)]
    write_prepared(folder, {"charts": charts, "text": text})
    return folder


def show(capsys, *words):
    assert main(["data", "show", *map(str, words)]) == 0
    return capsys.readouterr().out


def test_draws_and_epochs(folder, capsys):
    words = ("--samples", "100", "--weights", "text=3,charts=1", "--json")
    charts, text = json.loads(show(capsys, folder, *words))["sources"]
    assert [charts["draws"], text["draws"]] == [
        {"weight": 0.25, "samples": 25, "epochs": 25 / 9},
        {"weight": 0.75, "samples": 75, "epochs": 75 / 4},
    ]
    told = show(capsys, folder, "--repetitions", "charts=2.5")
    assert re.search(r"charts +9 +100 % +22 +2.44 ", told)
    assert re.search(r"text +4 +0 % +0 +0 ", told)


@pytest.mark.parametrize(
    ("asked", "samples"),
    [
        (None, None),
        ({"charts": {"weight": 1}, "text": {"weight": 3.7}}, 1003),
        ({"text": {"repetitions": 0.6}, "charts": {"repetitions": 3.3}}, None),
        ({"text": {"repetitions": 20}}, 17),
    ],
)
def test_draws_are_those_of_the_mixture(folder, asked, samples):
    drawn = MixtureDataset(folder, asked, samples).draws_per_source()
    planned = plan_draws(open_sources(str(folder)), folder, asked=asked, samples=samples)
    assert sum(one.samples for one in planned.values()) == sum(drawn.values())
    assert all(abs(one.samples - drawn.get(name, 0)) <= 1 for name, one in planned.items())


def test_a_config_says_what_is_drawn(folder, start, capsys, tmp_path):
    section = f"path: {folder}\nsources: {{charts: {{weight: 1}}, text: {{weight: 4}}}}\nsamples: 50\nmax_length: 777\n"
    (tmp_path / "mine.yaml").write_text(section)
    words = ("--config", tmp_path / "mine.yaml", "--model", start)
    told = json.loads(show(capsys, folder, *words, "--json"))
    assert [one["draws"]["samples"] for one in told["sources"]] == [10, 40]
    assert (told["max_length"], told["run_samples"]) == (777, 50)
    lines = [f"  {line}" for line in section.splitlines()[:3]]
    recipe = "\n".join(["dataset:", *lines, "dataloader: {collate_fn: {max_length: 777}}"])
    (tmp_path / "recipe.yaml").write_text(recipe)
    words = ("--config", tmp_path / "recipe.yaml", "--model", start)
    assert json.loads(show(capsys, folder, *words, "--json")) == told
    assert json.loads(show(capsys, folder, *words, "--samples", "5", "--json"))["run_samples"] == 5


def test_counts_without_a_model_are_of_words(folder, capsys):
    told = show(capsys, folder)
    assert "Lengths are in words: tokens, max_length and padding need --model FOLDER." in told
    assert told.isascii()  # not a terminal
    charts, text = json.loads(show(capsys, folder, "--json"))["sources"]
    words = charts["distributions"]["words of its responses"]
    assert (words["max"], words["mean"]) == (65, np.mean([1 + 8 * i for i in range(9)]))
    assert charts["distributions"]["pixels of an image"]["max"] == 48 * 32
    assert text["distributions"]["pixels of an image"] == {}
    assert (charts["kept"], charts["padding"], charts["lengths_of_all"]) == (None, None, False)
    assert text["characters"]["max"] == len("What is it?") + len("<script>alert('&')</script>")


def test_what_limits_keep_is_what_the_collator_makes(folder, start, capsys):
    told = json.loads(show(capsys, folder, "--model", start, "--max-length", "100", "--block-size", "8", "--json"))
    collator = load_collator(start, block_size=8)
    lengths, filled = {}, {}
    for source in open_sources(str(folder)):
        rows = [collator.encode(source.data[i]) for i in range(source.rows)]
        lengths[source.name] = np.array([len(row) for row in rows])
        filled[source.name] = sum(int(row.padding.sum()) for row in rows)
    assert (lengths["charts"] > 100).any()
    for one in told["sources"]:
        own = lengths[one["name"]]
        share = (own <= 100).mean()
        assert one["kept"]["100"] == {"value": share, "low": share, "high": share}  # all rows: nothing is estimated
        assert one["padding"]["8"]["value"] == pytest.approx(filled[one["name"]] / own.sum())
        assert one["distributions"]["tokens of a training row"]["max"] == own.max()
    shares = [(own <= 100).sum() for own in lengths.values()]
    assert told["kept_of_draws"]["100"] == pytest.approx(sum(shares) / 13)
    table = show(capsys, folder, "--model", start, "--max-length", "100", "--block-size", "8")
    lost = (lengths["charts"] > 100).sum()
    assert re.search(rf"rows lost +-{lost} ", table)
    assert re.search(r"max_length +100\* +1024 .* 32768\n", table)


def test_kept_lengths_are_used_for_every_sample(folder, start, capsys, monkeypatch, tmp_path):
    collator = load_collator(start)
    source = open_sources(str(folder))[0]
    sizes, path = measured_once(source.data, collator, folder / source.name)
    try:
        monkeypatch.setattr(type(collator), "outline", lambda *_: pytest.fail("a sample was measured"))
        seen = measuring.measure(source, collator, most=2, seed=0)
    finally:
        path.unlink()
    assert (seen.looked, seen.sizes_of_all, len(seen.sizes)) == (2, True, 9)
    assert np.array_equal(seen.sizes.responses, sizes.responses)


def test_a_seeded_part_of_the_rows(folder, capsys):
    assert choose(1000, 50, 3).tolist() == choose(1000, 50, 3).tolist() != choose(1000, 50, 4).tolist()
    assert len(set(choose(1000, 50, 3).tolist())) == 50
    told = json.loads(show(capsys, folder, "--rows", "2", "--json"))["sources"]
    assert [one["looked_at"] for one in told] == [2, 2]
    told = json.loads(show(capsys, folder, "--rows", "all", "--json"))["sources"]
    assert [one["looked_at"] for one in told] == [9, 4]


def test_margins_hold_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(5, 1, 20_000)
    padding = rng.integers(0, 8, 20_000)
    rare, truth = lengths > np.quantile(lengths, 0.97), padding.sum() / lengths.sum()
    hits = np.zeros(2)
    for seed in range(400):
        rows = choose(20_000, 300, seed)
        shares = [share_of_rows(rare[rows], 20_000), ratio(padding[rows], lengths[rows], 20_000)]
        hits += [s.low <= t <= s.high for s, t in zip(shares, (rare.mean(), truth), strict=True)]
    assert ((hits > 360) & (hits < 398)).all(), hits  # 380 of 400 is 95 %
    none = share_of_rows(np.zeros(100, dtype=bool), 10_000)
    assert none.low == none.value == 0
    assert 0.02 < none.high < 0.06
    assert share_of_rows(np.array([True, False]), 2).exact


def test_a_row_that_cannot_be_used_is_told(tmp_path, capsys):
    lines = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}]}] * 3
    lines[1] = {"messages": [{"role": "user", "content": "Hi"}]}
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    told = json.loads(show(capsys, tmp_path / "mine.jsonl", "--json"))["sources"][0]
    assert (told["name"], told["rows"], told["looked_at"]) == ("mine", 3, 3)
    assert len(told["unusable"]) == 1
    assert "no assistant turn" in told["unusable"][0]["reason"]
    assert "no assistant turn" in show(capsys, tmp_path / "mine.jsonl")


def test_the_page_escapes_and_marks_supervised_tokens(folder, start, capsys, tmp_path):
    page_file = tmp_path / "page.html"
    told = show(capsys, folder, "--model", start, "--html", page_file, "--examples", "4", "--png", tmp_path / "h.png")
    assert f"wrote {page_file}" in told
    page = page_file.read_text()
    assert "<script" not in page
    assert "http" not in page.replace("http-equiv", "")  # nothing is fetched
    collator = load_collator(start)
    shown = pick_samples(open_sources(str(folder)), collator, number=4, seed=0)
    sections = page.split('<section class="card sample">')[1:]
    assert len(sections) == len(shown) == 4
    assert {one.source for one in shown} == {"charts", "text"}
    tokenizer = collator.processor.tokenizer
    for section, one in zip(sections, shown, strict=True):
        item = next(s for s in open_sources(str(folder)) if s.name == one.source)
        index = next(i for i in range(item.rows) if item.data[i]["meta"]["id"] == one.id)
        row = collator.encode(item.data[index])
        supervised = row.labels[(row.branch == NOISY) & ~row.padding]
        marked = "".join(
            html.unescape(text) for text in re.findall(r'<span class="s(?: odd)?">(.*?)</span>', section, re.S)
        )
        assert marked == tokenizer.decode(supervised.tolist())
        assert section.count('class="mask"') == 1
        assert section.count('class="images"') == (one.source == "charts")
        changes = re.findall(r'<span class="(s|s odd)">', section)
        assert len({*changes}) == (2 if len(changes) > 4 else 1)
    assert Image.open(tmp_path / "h.png").size[0] > 1000


def test_characters_of_several_tokens_stay_whole(start, tmp_path):
    write_prepared(tmp_path, {"a": [sample("one", answer="\u4e2d\u6587 \U0001f600 ok", sizes=())]})
    shown = pick_samples(open_sources(str(tmp_path)), load_collator(start), number=1, seed=0)[0]
    pieces = [piece for piece in shown.pieces if piece.supervised]
    assert "".join(piece.text for piece in pieces).startswith("\u4e2d\u6587 \U0001f600 ok")
    assert not any("\ufffd" in piece.text for piece in pieces)
    assert pieces[0].tokens == 3


@pytest.mark.parametrize("length", [30, 900])
def test_the_mask_is_that_of_the_layout(length):
    layout = sample_layout(length, [(10, 17), (20, length)], 4)
    picture = draw_mask(layout)
    pixels = np.asarray(picture.image)
    ids = TokenIds(torch.zeros_like(layout.block), layout.branch, layout.block, torch.arange(len(layout)))
    mask, noisy = attention_mask(ids, ids), layout.branch == NOISY
    if picture.unit == "block":
        runs = torch.unique_consecutive(torch.stack([layout.branch, layout.block]), dim=1, return_inverse=True)[1]
        places = torch.tensor([int((runs == run).nonzero()[0]) for run in range(int(runs.max()) + 1)])
        mask, noisy = mask[places][:, places], noisy[places]
    assert picture.unit == ("token" if length == 30 else "block")
    scale = len(pixels) // len(mask)
    drawn = pixels[scale // 2 :: scale, scale // 2 :: scale]
    both = noisy[:, None] & noisy[None, :]
    for color, where in (
        (CONTEXT_COLOR, mask & ~noisy[:, None]),
        (EARLIER_COLOR, mask & noisy[:, None] & ~noisy[None, :]),
        (OWN_COLOR, mask & both),
    ):
        assert ((drawn == color).all(-1) == where.numpy()).all()
    assert (layout.branch == CONTEXT).any()


def test_histograms_share_classes():
    few, many = np.array([1, 2, 2]), np.array([1, 5000])
    bounds = edges([few, many])
    assert (bounds[0], bounds[-1]) == (1, 5001)
    assert np.histogram(many, bounds)[0].sum() == 2
    assert edges([few]).tolist() == [1, 2, 3]
    assert edges([np.array([0, 900])])[0] == 0
    line = spark(few, edges([few]), ASCII)
    assert line == f"{ASCII[4]}{ASCII[-1]}"
    assert spark(np.r_[np.zeros(10_000), 1], np.array([0.0, 1, 2]), ASCII) == f"{ASCII[-1]}{ASCII[1]}"
    assert [short_number(n) for n in (0, 3.456, 1234, 45_678, 999_960, 1_234_567)] == [
        "0", "3.46", "1,234", "45.7k", "1000k", "1.23M",
    ]  # fmt: skip


def test_sizes_of_some_samples_are_theirs():
    rng = np.random.default_rng(0)
    counts, media = rng.integers(1, 4, 20), rng.integers(0, 3, 20)
    sizes = SampleSizes(
        response_edges=np.r_[0, np.cumsum(counts)],
        responses=np.sort(rng.integers(0, 99, (counts.sum(), 2)), 1).astype(np.int32),
        media_edges=np.r_[0, np.cumsum(media)],
        media=rng.integers(0, 9, (media.sum(), 2)).astype(np.int32),
    )
    chosen = np.array([0, 3, 4, 19])
    assert choose_sizes(sizes, chosen).row_lengths(4).tolist() == sizes.row_lengths(4)[chosen].tolist()
    assert choose_sizes(sizes, chosen).vision_tokens(4).tolist() == sizes.vision_tokens(4)[chosen].tolist()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--weights", "chart=1"), "sources: {0} has no source chart; did you mean charts?; it has charts, text"),
        (("--weights", "charts=0,text=1"), "sources.charts.weight must be a finite number > 0, got 0.0"),
        (("--weights", "text=1", "--repetitions", "text=1"), "--weights and --repetitions exclude each other"),
        (
            ("--config", "/nowhere.yaml"),
            "--config /nowhere.yaml cannot be read as YAML ([Errno 2] No such file or directory: '/nowhere.yaml')",
        ),
        (("--layout", "llava"), "--layout is of raw data, {0} is a prepared folder"),
        (("--weights", "charts"), "argument --weights: must be SOURCE=NUMBER,..., got 'charts'"),
        (("--block-size", "8"), "--block-size needs --model, whose processor counts tokens"),
        (("--model", "/nowhere"), "model folder /nowhere does not exist"),
        (("--html", "/nowhere/x.html"), "the folder of output /nowhere/x.html does not exist"),
        (("--rows", "0"), "argument --rows: must be >= 1, got 0"),
    ],
)
def test_wrong_input_is_one_line(folder, capsys, words, told):
    assert main(["data", "show", str(folder), *words]) == 2
    assert capsys.readouterr().err == f"error: {told.format(folder)}\n"


def test_an_image_given_twice_is_drawn_twice(start, tmp_path):
    write_prepared(tmp_path, {"a": [sample("one", sizes=((40, 30), (64, 32)))]})
    shown = pick_samples(open_sources(str(tmp_path)), load_collator(start), number=1, seed=0)[0]
    assert [image.size for image in shown.images] == [(40, 30), (64, 32)]
    assert sum(piece.media for piece in shown.pieces) == 2
    assert Image.open(io.BytesIO(png(4, 3))).size == (4, 3)


def test_sources_without_samples_are_told_and_not_drawn(start, tmp_path, capsys):
    write_prepared(tmp_path, {"a": [sample("one")], "none": [], "gone": [sample("two")]}, leave_out=[("gone", 0)])
    told = show(capsys, tmp_path, "--model", start, "--png", tmp_path / "h.png")
    assert re.search(r"none +0 +0 % +0 +0 ", told)
    assert "gone: 1 of the rows read are in none of these columns" in told
    assert "words" not in told
    assert "images of a sample: always 1" in told
    assert (tmp_path / "h.png").is_file()
    (tmp_path / "mine.jsonl").write_text("no json\n")
    assert "No row that was looked at can be used." in show(capsys, tmp_path / "mine.jsonl")
