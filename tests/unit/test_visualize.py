"""The trace of a decoding, its page and its GIF."""

import importlib
import json
import re
import types
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image

from nemo_bard.generation.decode import StepRecord
from nemo_bard.report.colors import blend, ink_on
from nemo_bard.report.trace import Trace, make_trace
from nemo_bard.report.visualize import write_visualization

MASK = 99
WORDS = {0: "Hello", 1: " w\u00f6rld", 2: "</script><b>", 3: "\n", 4: "<end>", 5: " wrong", 6: "&"}
NAN = float("nan")


class Tokenizer:
    def decode(self, ids, skip_special_tokens=False):
        return "".join(WORDS[int(i)] for i in ids if not (skip_special_tokens and int(i) == 4))


def record(block, step, ids, confidence, fixed, rows=(0,)):
    count = len(rows)
    return StepRecord(
        block=block,
        step=step,
        rows=list(rows),
        ids=torch.tensor(ids).view(count, 3),
        confidence=torch.tensor(confidence).view(count, 3),
        fixed=torch.tensor(fixed).view(count, 3),
    )


@pytest.fixture
def trace() -> Trace:
    """Two blocks of three; row 0 revises its second token and ends at the fifth, row 1 ends in the first block."""
    history = [
        record(
            0,
            0,
            [[0, MASK, MASK], [4, 4, 4]],
            [[0.9, 0.2, 0.3], [1.0, 1.0, 1.0]],
            [[True, False, False], [True] * 3],
            rows=(0, 1),
        ),
        record(0, 1, [0, 5, 2], [NAN, 0.6, 0.7], [False, True, True]),
        record(0, 2, [0, 1, 2], [0.99, 0.8, 0.7], [False, True, False]),
        record(1, 0, [3, 4, 6], [0.5, 0.6, 0.7], [True, True, True]),
    ]
    output = types.SimpleNamespace(
        history=history,
        block_step_counts=torch.tensor([[3, 1], [1, 0]]),
        lengths=torch.tensor([5, 1]),
        sequences=torch.tensor([[0, 1, 2, 3, 4], [4, 4, 4, 4, 4]]),
    )
    conversation = [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": Image.new("RGB", (40, 20), "red")},
                {"type": "text", "text": "What <is> it?"},
            ],
        }
    ]
    return make_trace(output, Tokenizer(), conversation=conversation)


def test_trace_follows_the_history(trace):
    assert trace.tokens == ["Hello", " w\u00f6rld", "</script><b>", "\n", "<end>", "&"]
    assert (trace.length, trace.block_size, trace.max_steps, trace.tpf) == (5, 3, 3, 5 / 4)
    assert [[change.position for change in step.changes] for step in trace.steps] == [[0], [1, 2], [1], [3, 4, 5]]
    assert [change.revised for step in trace.steps for change in step.changes] == [False] * 3 + [True] + [False] * 3
    assert trace.steps[0].proposals == pytest.approx({1: 0.2, 2: 0.3})
    assert all(not step.proposals for step in trace.steps[1:])
    assert [step.text for step in trace.steps] == [
        "Hello\u2592\u2592",
        "Hello wrong</script><b>",
        "Hello w\u00f6rld</script><b>",
        "Hello w\u00f6rld</script><b>\n",
    ]
    assert trace.prompt == [("user", "<image>What <is> it?")]


class Parts(HTMLParser):
    """Elements, and the text of each script."""

    def __init__(self):
        super().__init__()
        self.tags, self.attributes, self.scripts, self.inside = [], [], [], False

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes.append((tag, dict(attrs)))
        self.inside = tag == "script"
        if self.inside:
            self.scripts.append("")

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, data):
        if self.inside:
            self.scripts[-1] += data


def test_page_is_self_contained_and_escaped(trace, tmp_path):
    write_visualization(trace, tmp_path / "t.html")
    text = (tmp_path / "t.html").read_text(encoding="utf-8")
    parts = Parts()
    parts.feed(text)
    assert "b" not in parts.tags  # the token "</script><b>" stays text
    assert "What &lt;is&gt; it?" in text
    data = json.loads(parts.scripts[0])
    assert data["tokens"] == trace.tokens
    assert [len(step["changes"]) for step in data["steps"]] == [1, 2, 1, 3]
    assert len(parts.scripts) == 2
    for tag, attributes in parts.attributes:
        for name in ("src", "href"):
            assert attributes.get(name, "data:").startswith("data:"), (tag, attributes)
    assert not re.search(r"https?://|@import|url\(", text)


def test_page_can_be_used_without_a_mouse_or_colours(trace, tmp_path):
    write_visualization(trace, tmp_path / "t.html")
    text = (tmp_path / "t.html").read_text(encoding="utf-8")
    parts = Parts()
    parts.feed(text)
    named = dict(parts.attributes)
    assert named["html"]["lang"] == "en"
    assert named["img"]["alt"]
    sliders = [a for tag, a in parts.attributes if tag == "input"]
    assert sliders
    assert all("aria-label" in a for a in sliders)
    assert "prefers-color-scheme: dark" in text
    assert parts.tags.count("tr") == 1 + len(trace.steps)


def test_gif_has_a_frame_for_every_step(trace, tmp_path):
    write_visualization(trace, tmp_path / "t.gif")
    with Image.open(tmp_path / "t.gif") as image:
        assert image.n_frames == 1 + len(trace.steps)
        frames = []
        for number in range(image.n_frames):
            image.seek(number)
            frames.append(image.convert("RGB").tobytes())
            assert image.info["duration"] >= 100
    assert len(set(frames)) == len(frames)


def test_long_responses_fit_into_the_gif(trace, tmp_path):
    import dataclasses

    tokens = ["word"] * 600
    step = dataclasses.replace(trace.steps[-1], block=199)
    write_visualization(dataclasses.replace(trace, tokens=tokens, length=600, steps=[step]), tmp_path / "t.gif")
    with Image.open(tmp_path / "t.gif") as image:
        assert image.height < 1100


def test_wrong_input(trace, tmp_path):
    with pytest.raises(ValueError, match=r"\.png"):
        write_visualization(trace, tmp_path / "t.png")
    with pytest.raises(ValueError, match="output_history=True"):
        make_trace(types.SimpleNamespace(history=None, lengths=torch.tensor([1])), Tokenizer())
    one = types.SimpleNamespace(history=[record(0, 0, [0, 1, 4], [0.5] * 3, [True] * 3)], lengths=torch.tensor([3]))
    with pytest.raises(ValueError, match="row must be 0 to 0"):
        make_trace(one, Tokenizer(), row=1)


def test_every_colour_has_readable_ink():
    def luminance(color):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in color)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    from nemo_bard.report.colors import CONFIDENCE_COLORS, STEP_COLORS

    for colors in (STEP_COLORS, CONFIDENCE_COLORS):
        assert blend(colors, 0) == colors[0]
        assert blend(colors, 1) == colors[-1]
        for share in range(101):
            color = blend(colors, share / 100)
            low, high = sorted((luminance(color), luminance(ink_on(color))))
            assert (high + 0.05) / (low + 0.05) >= 4.5  # WCAG AA


def test_the_old_module_has_the_public_names():
    old = importlib.import_module("nemo_bard.visualize")  # tests/unit/test_moved.py looks at the warning
    assert old.write_visualization is write_visualization
    assert old.make_trace is make_trace
