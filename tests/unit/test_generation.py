"""Settings of ``generate``: what is refused and how, token revision, stopping, streaming, the output object."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch

MASK, IMAGE, END, VOCAB = 509, 500, 505, 512
SETTINGS = {"max_new_tokens": 8, "block_size": 4, "mask_token_id": MASK, "eos_token_id": END}
PROMPT = torch.tensor([[5, 6, 7, 8]])


@pytest.fixture
def model(golden_model):
    return golden_model("tiny_untied")


def image_prompt(tokens: int = 6, **overrides) -> dict:
    """A prompt with one image of 24 patches, 6 tokens."""
    prompt = {
        "input_ids": torch.tensor([[502, *[IMAGE] * tokens, 503, 5]]),
        "pixel_values": torch.zeros(24, 1536),
        "image_grid_thw": torch.tensor([[1, 4, 6]]),
        **overrides,
    }
    return {name: value for name, value in prompt.items() if value is not None}


@contextlib.contextmanager
def no_forward(model):
    """Fails if the language model or the vision tower runs."""
    calls = []
    handles = [
        part.register_forward_pre_hook(lambda *_: calls.append(1))
        for part in (model.model.language_model, model.model.visual)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    assert not calls


class TestRefused:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"max_new_tokens": 0}, "max_new_tokens must be an integer >= 1, got 0"),
            ({"max_new_tokens": 2.0}, "max_new_tokens must be an integer >= 1, got 2.0"),
            ({"block_size": 0}, "block_size must be an integer >= 1, got 0"),
            ({"denoising_steps": 0}, "denoising_steps must be an integer >= 1, got 0"),
            ({"confidence_threshold": 0.0}, r"confidence_threshold must be in \(0, 1\], got 0.0"),
            ({"confidence_threshold": 1.5}, r"confidence_threshold must be in \(0, 1\], got 1.5"),
            ({"confidence_threshold": math.nan}, r"confidence_threshold must be in \(0, 1\], got nan"),
            ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
            ({"top_p": 1.01}, r"top_p must be in \(0, 1\], got 1.01"),
            ({"top_k": -1}, "top_k must be an integer >= 0, got -1"),
            ({"temperature": -0.1}, "temperature must be a finite number >= 0, got -0.1"),
            ({"temperature": math.nan}, "temperature must be a finite number >= 0, got nan"),
            ({"temperature": math.inf}, "temperature must be a finite number >= 0, got inf"),
            ({"entropy_bound": -1.0}, "entropy_bound must be a finite number >= 0, got -1.0"),
            ({"edit_threshold": 0.0}, r"edit_threshold must be in \(0, 1\], got 0.0"),
            ({"max_post_edit_steps": 2}, r"max_post_edit_steps=2 needs edit_threshold in \(0, 1\]"),
            ({"edit_threshold": 0.9, "max_post_edit_steps": -1}, "max_post_edit_steps must be an integer >= 0, got -1"),
            (
                {"remasking_strategy": "low_confidence_dynmic"},
                r"remasking_strategy must be one of low_confidence_static, low_confidence_dynamic, entropy_bound, autoregressive, "
                r"self_speculative, got 'low_confidence_dynmic' \(did you mean 'low_confidence_dynamic'\?\)",
            ),
            ({"decode_path": "slow"}, "decode_path must be one of fast, graph, plain, got 'slow'"),
            ({"suppress_mask_token": "yes"}, "suppress_mask_token must be true or false, got 'yes'"),
            ({"mask_token_id": VOCAB}, "mask_token_id must be a row of the embedding, 0 to 511, got 512"),
            ({"mask_token_id": -1}, "mask_token_id must be a token id >= 0, got -1"),
            ({"mask_token_id": None}, "mask_token_id is set neither in the call nor in the model's config.json"),
            ({"mask_token_id": END}, "mask_token_id 505 is also an eos_token_id"),
            ({"mask_token_id": 3, "eos_token_id": [7, 3]}, "mask_token_id 3 is also an eos_token_id"),
            ({"eos_token_id": [END, -2]}, r"eos_token_id must be a token id >= 0, got \[505, -2\]"),
            ({"block_size": None}, "block_size is set neither in the call nor in the model's config.json"),
            ({"max_new_tokens": 4093}, "max_new_tokens=4093 .* would reach 4100, but max_position_embeddings is 4096"),
            ({"blok_size": 4}, "unknown argument of generate 'blok_size'; did you mean 'block_size'?"),
            ({"num_beams": 2}, "num_beams must be 1, got 2"),
            ({"do_sample": True}, "do_sample must be False, got True; use temperature > 0"),
            ({"mask_token_id": 500}, "mask_token_id 500 is the model's image_token_id"),
            ({"eos_token_id": VOCAB}, "eos_token_id 512 is outside the vocabulary, 0 to 511"),
            ({"pad_token_id": VOCAB}, "pad_token_id 512 is outside the vocabulary, 0 to 511"),
        ],
        ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
    )
    def test_settings(self, settings, message, model):
        with no_forward(model), pytest.raises(ValueError, match=message):
            model.generate(PROMPT, **{**SETTINGS, **settings})

    @pytest.mark.parametrize(
        ("prompt", "message"),
        [
            ({}, "generate needs input_ids"),
            ({"input_ids": torch.zeros(1, 0, dtype=torch.int64)}, "input_ids must be .* got torch.int64 \\(1, 0\\)"),
            ({"input_ids": torch.tensor([1, 2])}, "input_ids must be .* got torch.int64 \\(2,\\)"),
            (
                {"input_ids": PROMPT, "attention_mask": torch.ones(1, 3)},
                "attention_mask must have the shape of input_ids",
            ),
            ({"input_ids": PROMPT, "attention_mask": torch.zeros(1, 4)}, "row 0 of input_ids is empty"),
            ({"input_ids": PROMPT, "pixels": torch.zeros(1)}, "unknown model input 'pixels'"),
            ({"input_ids": PROMPT.tolist()}, "input_ids must be a tensor, got list"),
            ({"input_ids": PROMPT + VOCAB}, "row 0 of input_ids holds [0-9]+; ids must be 0 to 511"),
            (image_prompt(pixel_values=None), "pixel_values is missing although image_grid_thw is given"),
            (image_prompt(image_grid_thw=None), "image_grid_thw is missing although pixel_values is given"),
            (
                image_prompt(pixel_values=None, image_grid_thw=None),
                r"the prompt has 6 image tokens \(id 500\) but pixel_values is missing",
            ),
            (image_prompt(tokens=0), "the prompt has 0 image tokens .* but image_grid_thw needs 6"),
            (
                image_prompt(
                    input_ids=torch.tensor([[502, *[IMAGE] * 6, 503, 502, *[IMAGE] * 6, 503]]),
                    pixel_values=torch.zeros(48, 1536),
                    image_grid_thw=torch.tensor([[1, 4, 4], [1, 4, 8]]),
                ),
                r"runs of image tokens in the prompt are \[6, 6\] long but image_grid_thw needs \[4, 8\]",
            ),
            (image_prompt(tokens=5), "the prompt has 5 image tokens .* but image_grid_thw needs 6"),
            (
                image_prompt(pixel_values=torch.zeros(20, 1536)),
                "pixel_values has 20 patches but image_grid_thw needs 24",
            ),
        ],
        ids=lambda value: "" if isinstance(value, str) else "-".join(value),
    )
    def test_prompts(self, prompt, message, model):
        with no_forward(model), pytest.raises(ValueError, match=message):
            model.generate(prompt, **SETTINGS)

    def test_a_name_given_twice(self, model):
        with no_forward(model), pytest.raises(ValueError, match="input_ids is given twice"):
            model.generate({"input_ids": PROMPT}, input_ids=PROMPT, **SETTINGS)

    def test_no_prompt_at_all(self, model):
        with no_forward(model), pytest.raises(ValueError, match="generate needs input_ids"):
            model.generate(**SETTINGS)

    def test_a_prompt_that_is_text(self, model):
        with no_forward(model), pytest.raises(ValueError, match="must be a processor's output or input_ids, got str"):
            model.generate("what is this?", **SETTINGS)

    def test_another_generation_config(self, model):
        from transformers import GenerationConfig

        with no_forward(model), pytest.raises(ValueError, match="must be a BardGenerationConfig, got GenerationConfig"):
            model.generate(PROMPT, GenerationConfig())

    def test_a_streamer_for_several_rows(self, model):
        class Streamer:
            def put(self, ids):
                raise AssertionError

            def end(self):
                raise AssertionError

        with no_forward(model), pytest.raises(ValueError, match="a streamer takes a batch of one, got 2 rows"):
            model.generate(PROMPT.expand(2, -1), streamer=Streamer(), **SETTINGS)


def test_more_steps_than_the_block_has_tokens_mean_one_token_each(model):
    many = model.generate(PROMPT, denoising_steps=99, return_step_stats=True, **SETTINGS)
    exact = model.generate(PROMPT, denoising_steps=4, return_step_stats=True, **SETTINGS)
    assert torch.equal(many[0], exact[0])
    assert torch.equal(many[1]["block_step_counts"], exact[1]["block_step_counts"])


class TestBlockSizeOfTheCheckpoint:
    def test_is_the_default(self, golden_model, recwarn):
        trained = golden_model("tiny_untied", block_size=4, mask_token_id=MASK, eos_token_id=END)
        ids, stats = trained.generate(PROMPT, max_new_tokens=8, return_step_stats=True)
        assert stats["block_step_counts"].shape == (1, 2)
        assert torch.equal(ids, golden_model("tiny_untied").generate(PROMPT, **SETTINGS))
        assert not [w for w in recwarn if "block_size" in str(w.message)]

    def test_another_one_gives_one_warning_naming_both(self, golden_model):
        trained = golden_model("tiny_untied", block_size=4, mask_token_id=MASK, eos_token_id=END)
        with pytest.warns(UserWarning, match="block_size=8 differs from 4") as caught:
            trained.generate(PROMPT, max_new_tokens=8, block_size=8)
        assert len([w for w in caught if "block_size" in str(w.message)]) == 1


def test_generate_leaves_the_model_as_it_was(model):
    before = model.config.text_config._attn_implementation
    model.train()
    try:
        model.generate(PROMPT, **SETTINGS)
        assert model.training
        with pytest.raises(ValueError, match="block_size"):
            model.generate(PROMPT, **{**SETTINGS, "block_size": 0})
        assert model.training
    finally:
        model.eval()
    assert model.config.text_config._attn_implementation == before
    assert all(p.grad is None for p in model.parameters())


class Script:
    """Makes a model's LM head say, in each denoising step, one id and its probability at each position of the block."""

    def __init__(self, model, *steps: list[tuple[int, float]]) -> None:
        self.model, self.steps, self.seen = model, list(steps), 0

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        step = self.steps[min(self.seen, len(self.steps) - 1)]
        self.seen += 1
        assert hidden.shape[0] == len(step), "revision looks at every position of the block"
        logits = torch.empty(len(step), VOCAB)
        for row, (token, probability) in zip(logits, step, strict=True):
            row.fill_(math.log((1 - probability) / (VOCAB - 2)))  # the mask id is suppressed
            row[token] = math.log(probability)
        return logits

    def __enter__(self):
        self.model.lm_head.forward = self.head
        return self

    def __exit__(self, *_):
        del self.model.lm_head.forward


class TestRevision:
    """Blocks of four, two steps of the static strategy: positions 0 and 1 are fixed first, then 2 and 3."""

    FIRST = ((10, 0.9), (11, 0.9), (1, 0.5), (1, 0.5))

    def run(self, model, *steps, **settings):
        script = Script(model, list(self.FIRST), *steps)
        with script:
            output = model.generate(
                PROMPT,
                **{
                    **SETTINGS,
                    "max_new_tokens": 4,
                    "denoising_steps": 2,
                    "remasking_strategy": "low_confidence_static",
                    "edit_threshold": 0.8,
                    "return_dict_in_generate": True,
                    "output_history": True,
                    **settings,
                },
            )
        assert int(output.block_step_counts[0, 0]) == output.forwards == script.seen
        return output

    def test_a_visible_token_is_replaced_by_one_with_a_probability_above_the_threshold(self, model):
        output = self.run(model, [(20, 0.81), (21, 0.79), (12, 0.5), (13, 0.5)])
        assert output.sequences.tolist() == [[20, 11, 12, 13]]
        assert output.forwards == 2
        assert output.history[1].fixed.int().tolist() == [[1, 0, 1, 1]]

    def test_a_token_that_stays_preferred_is_no_change(self, model):
        output = self.run(model, [(10, 0.99), (11, 0.99), (12, 0.5), (13, 0.5)])
        assert output.history[1].fixed.int().tolist() == [[0, 0, 1, 1]]

    def test_steps_after_the_last_mask_end_when_nothing_changes(self, model):
        output = self.run(
            model,
            [(10, 0.5), (11, 0.5), (12, 0.5), (13, 0.5)],
            [(10, 0.5), (21, 0.9), (12, 0.5), (13, 0.5)],
            [(10, 0.5), (21, 0.9), (12, 0.5), (13, 0.7)],
            [(30, 0.9)] * 4,
            max_post_edit_steps=9,
        )
        assert output.sequences.tolist() == [[10, 21, 12, 13]]
        assert output.forwards == 4

    def test_a_first_look_at_the_full_block_is_taken_even_if_the_last_step_edited_nothing(self, model):
        quiet = [(10, 0.5), (11, 0.5), (12, 0.5), (13, 0.5)]
        output = self.run(model, quiet, quiet, [(30, 0.9)] * 4, max_post_edit_steps=9)
        assert output.sequences.tolist() == [[10, 11, 12, 13]]
        assert output.forwards == 3

    @pytest.mark.parametrize("allowed", [0, 1, 2, 5])
    def test_a_model_that_cannot_decide_is_stopped(self, allowed, model):
        heads, tails = [(1, 0.9)] * 4, [(2, 0.9)] * 4
        output = self.run(model, *[heads, tails] * 5, max_post_edit_steps=allowed)
        assert output.forwards == 2 + allowed
        assert output.sequences.tolist() == [[1 + allowed % 2] * 4]

    def test_the_mask_id_is_never_edited_in(self, model):
        output = self.run(model, [(MASK, 0.99)] * 4, max_post_edit_steps=3)
        assert not (output.sequences == MASK).any()

    def test_an_end_that_is_edited_away_does_not_end_the_row(self, model):
        output = self.run(
            model,
            [(END, 0.9), (11, 0.5), (12, 0.5), (13, 0.5)],
            [(20, 0.9), (11, 0.5), (12, 0.5), (13, 0.5)],
            max_post_edit_steps=1,
        )
        assert output.sequences.tolist() == [[20, 11, 12, 13]]
        output = self.run(model, [(END, 0.9), (11, 0.5), (12, 0.5), (13, 0.5)])
        assert output.sequences.tolist() == [[END]]

    @pytest.mark.parametrize("strategy", ["low_confidence_static", "low_confidence_dynamic", "entropy_bound"])
    def test_a_threshold_that_nothing_passes_changes_nothing(self, strategy, model):
        settings = {**SETTINGS, "max_new_tokens": 12, "remasking_strategy": strategy, "denoising_steps": 3}
        off = model.generate(PROMPT, return_dict_in_generate=True, **settings)
        on = model.generate(PROMPT, return_dict_in_generate=True, edit_threshold=1.0, **settings)
        assert torch.equal(on.sequences, off.sequences)
        assert torch.equal(on.block_step_counts, off.block_step_counts)

    @pytest.mark.parametrize("path", [{"decode_path": "plain"}, {"cache_implementation": "static"}])
    def test_all_paths_revise_alike(self, path, model):
        settings = {
            **SETTINGS,
            "max_new_tokens": 16,
            "edit_threshold": 0.2,
            "max_post_edit_steps": 3,
            "denoising_steps": 2,
        }
        fast = model.generate(PROMPT, return_dict_in_generate=True, **settings)
        other = model.generate(PROMPT, return_dict_in_generate=True, **settings, **path)
        assert torch.equal(fast.sequences, other.sequences)
        assert torch.equal(fast.block_step_counts, other.block_step_counts)
        off = model.generate(PROMPT, **{**settings, "edit_threshold": None, "max_post_edit_steps": 0})
        assert not torch.equal(fast.sequences, off)  # it did revise something


def test_the_entropy_bound_trades_steps_for_certainty(model):
    settings = {**SETTINGS, "max_new_tokens": 16, "block_size": 8, "remasking_strategy": "entropy_bound"}
    steps = [
        model.generate(PROMPT, return_dict_in_generate=True, entropy_bound=bound, **settings).forwards
        for bound in (0.0, 3.0, 1e6)
    ]
    assert steps[0] == 16  # one token a step: no two of these tokens are certain
    assert steps[0] > steps[1] > steps[2]
    assert steps[2] == 2  # every block in one step


class TestOutput:
    def test_all_forms_agree(self, model):
        ids = model.generate(PROMPT, **SETTINGS)
        same, stats = model.generate(PROMPT, return_step_stats=True, **SETTINGS)
        output = model.generate(PROMPT, return_dict_in_generate=True, **SETTINGS)
        assert torch.equal(ids, same)
        assert torch.equal(ids, output.sequences)
        assert torch.equal(stats["block_step_counts"], output.block_step_counts)
        assert stats["forwards"] == output.forwards
        assert stats["tpf_with_commits"] == output.tokens_per_forward.tolist()
        assert output.history is None
        assert set(output.seconds) == {"vision", "prefill", "decode"}
        assert all(seconds >= 0 for seconds in output.seconds.values())

    def test_history_replays_the_response(self, model):
        output = model.generate(PROMPT.repeat(2, 1), return_dict_in_generate=True, output_history=True, **SETTINGS)
        final = {
            (row, record.block): ids
            for record in output.history
            for row, ids in zip(record.rows, record.ids, strict=True)
        }
        for row in range(2):
            assert torch.cat([final[row, block] for block in range(2)]).tolist() == output.sequences[row].tolist()
        assert sum(len(record.rows) for record in output.history) == int(output.block_step_counts.sum())


class TestHooks:
    def test_logits_processor_sees_context_and_masked_positions(self, model):
        from transformers import LogitsProcessorList

        banned = model.generate(PROMPT, **SETTINGS)[0, 0].item()
        shapes = []

        def ban(input_ids, logits):
            shapes.append((tuple(input_ids.shape), tuple(logits.shape)))
            assert torch.equal(input_ids[:, :4], PROMPT.expand(len(input_ids), -1))
            return logits.index_fill(1, torch.tensor([banned]), float("-inf"))

        ids = model.generate(PROMPT, logits_processor=LogitsProcessorList([ban]), **SETTINGS)
        assert banned not in ids
        assert shapes[0] == ((4, 8), (4, VOCAB))
        assert all(context[0] == logits[0] for context, logits in shapes)

    def test_stopping_criteria_end_rows_after_a_block(self, model):
        from transformers import StoppingCriteriaList

        prompts, lengths = torch.stack([PROMPT[0], PROMPT[0] + 100]), []

        def end_the_first(input_ids, scores, **kwargs):
            lengths.append(input_ids.shape[1])
            return input_ids[:, 0] == PROMPT[0, 0]

        settings = {**SETTINGS, "max_new_tokens": 12}
        whole = model.generate(prompts, **settings)
        output = model.generate(
            prompts,
            stopping_criteria=StoppingCriteriaList([end_the_first]),
            return_dict_in_generate=True,
            **settings,
        )
        assert output.lengths.tolist() == [4, 12]
        assert torch.equal(output.sequences[0, :4], whole[0, :4])
        assert torch.equal(output.sequences[1], whole[1])
        assert lengths[:2] == [8, 12]

    def test_streamers_get_prompt_then_blocks_then_the_end(self, model):
        events = []

        class Streamer:
            def put(self, ids):
                events.append(("put", ids.tolist()))

            def put_draft(self, ids):
                events.append(("draft", ids.tolist()))

            def end(self):
                events.append(("end", None))

        ids = model.generate(PROMPT, streamer=Streamer(), **{**SETTINGS, "max_new_tokens": 7})
        assert events[0] == ("put", PROMPT.tolist())
        assert events[-1] == ("end", None)
        blocks = [value for kind, value in events[1:] if kind == "put"]
        assert [len(block) for block in blocks] == [4, 3]
        assert sum(blocks, []) == ids[0].tolist()
        drafts = [value for kind, value in events if kind == "draft"]
        assert len(drafts) == int(
            model.generate(PROMPT, return_step_stats=True, **SETTINGS)[1]["block_step_counts"].sum()
        )

    def test_a_streamer_gets_the_records_of_the_history_and_can_end_the_call(self, model):
        class Enough(Exception):
            pass

        class Streamer:
            def __init__(self, most):
                self.records, self.most, self.ended = [], most, False

            def put(self, ids):
                pass

            def put_step(self, record):
                self.records.append(record)
                if len(self.records) == self.most:
                    raise Enough

            def end(self):
                self.ended = True

        history = model.generate(PROMPT, return_dict_in_generate=True, output_history=True, **SETTINGS).history
        whole, cut = Streamer(None), Streamer(2)
        ids = model.generate(PROMPT, streamer=whole, **SETTINGS)
        assert len(whole.records) == len(history)
        for record, expected in zip(whole.records, history, strict=True):
            assert torch.equal(record.ids, expected.ids)
            masked = record.ids == SETTINGS["mask_token_id"]
            assert torch.equal(record.draft[~masked], record.ids[~masked])
            assert not (record.draft == SETTINGS["mask_token_id"]).any()
        with pytest.raises(Enough):
            model.generate(PROMPT, streamer=cut, **SETTINGS)
        assert (len(cut.records), cut.ended) == (2, True)
        assert torch.equal(model.generate(PROMPT, **SETTINGS), ids)
