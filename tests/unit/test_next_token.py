"""Answers of ``autoregressive`` are transformers' greedy ones, those of ``self_speculative`` are the same, whatever the drafts."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from golden_data import GOLDEN, mixed_batch
from torch.nn.functional import pad

MASK, IMAGE, END, PAD = 509, 500, 505, 506
HEADER = [504, 507, 508]
SETTINGS = {"mask_token_id": MASK, "eos_token_id": END, "pad_token_id": PAD, "return_dict_in_generate": True}


@pytest.fixture(scope="module")
def model():
    """A causal model whose tokens are few, so that drafts are right now and then."""
    from nemo_bard import BardVLForConditionalGeneration

    model = BardVLForConditionalGeneration.from_pretrained(
        GOLDEN / "models/tiny_untied", context_attention="causal", dtype=torch.float32
    ).eval()
    model.config.assistant_header_ids = HEADER
    with torch.no_grad():
        model.lm_head.weight[8:] = 0.0  # a token above these is the best one only if all of them are below 0
    return model


def ragged(rows, seed=0, longest=20):
    """Text of several lengths, padded on the left."""
    g = torch.Generator().manual_seed(seed)
    texts = [
        torch.randint(IMAGE, (int(torch.randint(1, longest, (1,), generator=g)),), generator=g) for _ in range(rows)
    ]
    width = max(len(text) for text in texts)
    return {
        "input_ids": torch.stack([pad(text, (width - len(text), 0), value=PAD) for text in texts]),
        "attention_mask": torch.stack([pad(torch.ones_like(text), (width - len(text), 0)) for text in texts]),
    }


@pytest.fixture(scope="module")
def with_images():
    return mixed_batch(image=IMAGE, header=HEADER, end=END, padding=PAD)


def decode(model, batch, strategy, *, seed=3, **settings):
    generator = torch.Generator().manual_seed(seed)
    settings = {**SETTINGS, "max_new_tokens": 30, "block_size": 8, **settings}
    return model.generate(batch, remasking_strategy=strategy, generator=generator, **settings)


def some_end(model, batch, **settings):
    """A token that an answer has in its middle."""
    free = decode(model, batch, "autoregressive", eos_token_id=-1, **settings).sequences[0].tolist()
    return free[len(free) // 2]


def assert_equal(found, expected):
    assert found.lengths.tolist() == expected.lengths.tolist()
    assert found.sequences.tolist() == expected.sequences.tolist()


@pytest.mark.parametrize("kind", ["text", "with_images"])
def test_equals_transformers_greedy_generate(kind, model, with_images, tmp_path):
    """The folder's weights, with another ``model_type`` in its config.json; one row at a time."""
    from transformers import Qwen3VLForConditionalGeneration

    folder = shutil.copytree(GOLDEN / "models/tiny_untied", tmp_path / "source")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "qwen3_vl"}))
    theirs = Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    with torch.no_grad():
        theirs.lm_head.weight[8:] = 0.0
    batch = ragged(3) if kind == "text" else with_images
    end = some_end(model, batch)
    greedy = {"do_sample": False, "eos_token_id": end, "pad_token_id": PAD, "max_new_tokens": 30}
    ours = [decode(model, batch, name, eos_token_id=end) for name in ("autoregressive", "self_speculative")]
    for row, (ids, real) in enumerate(zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True)):
        alone = {
            "input_ids": ids[real].unsqueeze(0),
            "attention_mask": torch.ones(1, int(real.sum()), dtype=torch.int64),
        }
        if IMAGE in ids.tolist():
            alone |= {name: batch[name] for name in ("pixel_values", "image_grid_thw")}
            alone["mm_token_type_ids"] = (alone["input_ids"] == IMAGE).int()
        expected = theirs.eval().generate(**alone, **greedy)[0, int(real.sum()) :].tolist()
        for output in ours:
            assert output.sequences[row, : output.lengths[row]].tolist() == expected


@pytest.mark.parametrize("temperature", [0.0, 3.0])
@pytest.mark.parametrize("block_size", [1, 2, 4, 8, 32])
def test_any_draft_gives_the_same_answer(block_size, temperature, model):
    """Lengths, batches, numbers of drafts and ends, fast and plain; at a high temperature most drafts are accepted."""
    saved = 0
    for seed, rows, length in ((0, 1, 33), (1, 3, 17), (2, 4, 1), (3, 2, 2)):
        batch = ragged(rows, seed)
        settings = {"max_new_tokens": length, "block_size": block_size, "temperature": temperature, "seed": seed}
        settings["eos_token_id"] = some_end(model, batch, **settings)
        expected = decode(model, batch, "autoregressive", **settings)
        assert expected.tokens_per_forward.tolist() == [1.0] * rows
        assert_equal(decode(model, batch, "autoregressive", decode_path="plain", **settings), expected)
        for drafts in (1, 3):
            fast = decode(model, batch, "self_speculative", drafts=drafts, **settings)
            plain = decode(model, batch, "self_speculative", drafts=drafts, decode_path="plain", **settings)
            assert_equal(fast, expected)
            assert_equal(plain, expected)
            assert fast.accepted_tokens.tolist() == plain.accepted_tokens.tolist()
            assert fast.accepted_tokens.sum(1).tolist() == expected.lengths.tolist()
            assert fast.forwards <= expected.forwards
            saved += expected.forwards - fast.forwards
    assert saved > 0 or block_size == 1 or not temperature


@pytest.mark.parametrize("temperature", [0.0, 3.0])
def test_a_row_alone_does_what_it_does_in_a_batch(temperature, model, with_images):
    settings = {"temperature": temperature, "top_k": 40, "top_p": 0.95}
    seeds = {"seed": 11}
    together = decode(model, with_images, "self_speculative", **settings, **seeds)
    drawn = decode(model, with_images, "autoregressive", **settings, **seeds)
    assert_equal(together, drawn)
    if temperature:
        return  # rows of a batch draw seeds of their own
    for row, (ids, real) in enumerate(zip(with_images["input_ids"], with_images["attention_mask"].bool(), strict=True)):
        media = {
            k: v for k, v in with_images.items() if k.startswith(("pixel", "image_grid")) and IMAGE in ids.tolist()
        }
        alone = decode(model, {"input_ids": ids[real].unsqueeze(0), **media}, "self_speculative", **settings)
        assert alone.sequences[0].tolist() == together.sequences[row, : together.lengths[row]].tolist()
        steps = together.accepted_tokens[row]
        assert alone.accepted_tokens[0].tolist() == steps[steps > 0].tolist()


@pytest.mark.parametrize("path", ["fast", "plain"])
def test_what_is_plugged_in_sees_what_it_sees_token_by_token(path, model):
    """A processor that looks back, and a criterion that ends in the middle of an accepted block."""
    from transformers import RepetitionPenaltyLogitsProcessor

    batch = ragged(2, seed=5)
    plugged = {"logits_processor": RepetitionPenaltyLogitsProcessor(1.3), "temperature": 3.0, "decode_path": path}

    def ends(ids, scores):
        assert scores is None
        return torch.tensor([ids[0, -3:].sum().item() % 7 == 0])

    free = decode(model, batch, "autoregressive", **{**plugged, "logits_processor": None})
    expected = decode(model, batch, "autoregressive", **plugged)
    assert free.sequences.tolist() != expected.sequences.tolist()
    assert_equal(decode(model, batch, "self_speculative", **plugged), expected)
    expected = decode(model, batch, "autoregressive", stopping_criteria=ends, **plugged)
    assert expected.lengths.max() < 30
    assert_equal(decode(model, batch, "self_speculative", stopping_criteria=ends, **plugged), expected)


class Streamer:
    def __init__(self):
        self.parts, self.drafts, self.steps, self.ended = [], [], [], False

    def put(self, ids):
        self.parts.append(ids.flatten().tolist())

    def put_draft(self, ids):
        assert ids.ndim == 2
        self.drafts.append(ids[0].tolist())

    def put_step(self, record):
        self.steps.append(record)

    def end(self):
        self.ended = True


def test_streams_what_is_accepted_and_tells_steps(model):
    batch, streamer = ragged(1, seed=7), Streamer()
    output = decode(model, batch, "self_speculative", temperature=3.0, streamer=streamer, output_history=True)
    answer = output.sequences[0].tolist()
    assert streamer.parts[0] == batch["input_ids"][0].tolist()
    assert [len(part) for part in streamer.parts[1:]] == output.accepted_tokens[0].tolist()
    assert sum(streamer.parts[1:], []) == answer
    assert streamer.ended
    assert streamer.drafts
    assert all(0 < len(draft) < 8 for draft in streamer.drafts)
    seen = {}
    for record in streamer.steps:
        for column in record.fixed[0].nonzero().flatten().tolist():
            assert seen.setdefault(record.block * 8 + column, int(record.ids[0, column])) == record.ids[0, column]
            assert 0 < record.confidence[0, column] <= 1
    assert [seen[place] for place in range(len(answer))] == answer
    assert len(output.history) == len(streamer.steps)
    by_block = [record.step for record in output.history if record.block == 1]
    assert by_block == list(range(len(by_block)))


def test_statistics(model):
    ids, stats = decode(
        model, ragged(2), "self_speculative", temperature=3.0, return_dict_in_generate=False, return_step_stats=True
    )
    assert stats["accepted_tokens"].sum(1).tolist() == stats["num_response_tokens"] == [ids.shape[1]] * 2
    assert stats["num_denoising_steps"] == (stats["accepted_tokens"] > 0).sum(1).tolist()
    assert stats["forwards"] == max(stats["num_denoising_steps"])
    assert stats["tpf"] == stats["tpf_with_commits"]
    assert max(stats["tpf"]) > 1


def test_a_trace_counts_forwards(model):
    from nemo_bard.checkpoints.tiny import make_tokenizer
    from nemo_bard.report.trace import make_trace

    output = decode(model, ragged(1), "self_speculative", temperature=3.0, output_history=True)
    trace = make_trace(output, make_tokenizer())
    assert trace.num_forwards == output.forwards
    assert trace.tpf == pytest.approx(float(output.tokens_per_forward[0]))


class TestRefused:
    def test_a_context_of_blocks(self, golden_model):
        for name in ("autoregressive", "self_speculative"):
            with pytest.raises(
                ValueError, match=f"remasking_strategy={name} needs .*context_attention: causal.* block$"
            ):
                decode(golden_model("tiny_untied"), ragged(1), name)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"edit_threshold": 0.5}, "edit_threshold=0.5: remasking_strategy=self_speculative never replaces a token"),
            ({"drafts": 0}, "drafts must be an integer >= 1, got 0"),
            (
                {"decode_path": "nemo_bard.generation.engines.FastEngine"},
                "decode_path must be one of fast, graph, plain",
            ),
        ],
    )
    def test_settings(self, settings, message, model):
        with pytest.raises(ValueError, match=message):
            decode(model, ragged(1), "self_speculative", **settings)


def test_static_caches_are_decoded_by_the_loop_and_say_so(model, caplog):
    from nemo_bard.generation.decode import say_once

    say_once.cache_clear()
    expected = decode(model, ragged(2), "self_speculative")
    assert not caplog.messages
    static = decode(model, ragged(2), "self_speculative", cache_implementation="static", compile_step=True)
    assert_equal(static, expected)
    said = "decoding goes step by step from the host, without CUDA graphs, for remasking_strategy=self_speculative"
    assert caplog.messages == [said]


class TestWhereToDraft:
    def test_the_likely_ends_of_a_draft(self):
        from nemo_bard.generation.drafts import likely_ends

        def ends(confidence, *, draft=(1, 2, 3), left=99, most=4):
            return likely_ends(draft, confidence, left=left, end_ids={9}, most=most)

        assert ends([0.9, 0.5, 0.8]) == [2, 4, 1, 3]  # 0.1, 0.45, 0.09, 0.36
        assert ends([0.9, 0.5, 0.8], most=2) == [2, 4]
        assert ends([0.99, 0.99, 0.99]) == [4]  # the others have less than 0.02 each
        assert ends([0.9, 0.5, 0.8], draft=(1, 9, 3)) == [2, 1]  # nothing comes behind the end
        assert ends([0.9, 0.5, 0.8], left=4) == [2, 1]
        assert ends([0.9, 0.5, 0.8], left=2) == []
        assert ends([], draft=()) == [1]
        assert ends([0.9, 0.5, 0.8], most=0) == []
