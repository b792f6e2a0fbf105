"""The plugin of vLLM, as far as it goes without vLLM: edges of blocks, checks of requests and of an engine's room."""

import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from nemo_bard.checkpoints.tiny import make_processor, make_tokenizer
from nemo_bard.generation.sampling import draw_seeds
from nemo_bard.generation.settings import BardGenerationConfig
from nemo_bard.serving.vllm import checks, config
from nemo_bard.serving.vllm.edges import Edges, segments
from nemo_bard.serving.vllm.frames import fill_sampling
from nemo_bard.serving.vllm.rules import Rules, row_seed
from nemo_bard.upstream import vllm as room

HEADER, END, MASK = [7, 8], 9, 60
PROMPT = [1, 2, 3, 4, 5, *HEADER, 11, 12, 13, 14, END, 1, 2, *HEADER]


@pytest.fixture(scope="module")
def hf_config():
    made = config.ServedBardVLConfig(
        block_size=4,
        mask_token_id=MASK,
        eos_token_id=END,
        assistant_header_ids=HEADER,
        image_token_id=50,
        video_token_id=51,
        text_config={"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
    )
    defaults = BardGenerationConfig(confidence_threshold=0.8)
    made.served_defaults = {name: getattr(defaults, name) for name in BardGenerationConfig.known_keys()}
    return made


def test_blocks_end_where_training_counts_them_and_behind_the_prompt_every_block(hf_config):
    edges = Edges(PROMPT, hf_config)
    expected = [4, 7, 11, 12, 16, 20, 24, 28]  # prompt, response, its end, the second turn, and what is generated
    assert edges.between(0, 28).tolist() == expected
    for begin in range(29):
        for end in range(begin, 29):
            assert edges.between(begin, end).tolist() == [edge for edge in expected if begin < edge <= end]
    for position in range(1, 29):
        assert edges.last(position) == max([0, *(edge for edge in expected if edge <= position)])
        assert edges.next(position) == min(edge for edge in expected if edge >= position)


def test_segments_are_whole_blocks_with_what_is_behind_them(hf_config):
    edges = Edges(PROMPT, hf_config)
    row, size, behind = segments([edges, None, edges], [4, 20, 12], [8, 4, 8])
    assert row.tolist() == [0, 0, 0, 1, 2, 2]
    assert size.tolist() == [3, 4, 1, 4, 4, 4]
    assert behind.tolist() == [5, 1, 0, 0, 4, 0]
    assert size.dtype == np.int32
    with pytest.raises(AssertionError, match="ends within a block"):
        segments([edges], [0], [6])


def parameters(**given):
    """What vLLM's SamplingParams have that we read."""
    neutral = dict.fromkeys([*checks.LOGPROBS, *checks.ABSENT])
    own = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "seed": None, "n": 1, "extra_args": None, "max_tokens": 9}
    stops = {"stop_token_ids": [], "all_stop_token_ids": set(), "ignore_eos": False, "eos_token_id": None}
    return SimpleNamespace(**{**neutral, **checks.NEUTRAL, **own, **stops, **given})


@pytest.fixture(autouse=True)
def _exceptions(monkeypatch):
    """vLLM's error, where vLLM is not."""

    class VLLMValidationError(ValueError):
        def __init__(self, message, parameter=None):
            super().__init__(message)
            self.parameter = parameter

    module = ModuleType("vllm.exceptions")
    module.VLLMValidationError = VLLMValidationError
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    monkeypatch.setitem(sys.modules, "vllm.exceptions", module)


@pytest.mark.parametrize(
    ("given", "key", "line"),
    [
        ({"logprobs": 1}, "logprobs", "logprobs is not supported"),
        ({"presence_penalty": 0.5}, "presence_penalty", "must be 0, got 0.5"),
        ({"logit_bias": {3: 1.0}}, "logit_bias", "leave it out"),
        ({"temperature": 3.0}, "vllm_xargs", "temperature must be 0, or from"),
        (
            {"extra_args": {"confidence_treshold": 1}},
            "vllm_xargs.confidence_treshold",
            "did you mean confidence_threshold?",
        ),
        ({"extra_args": {"denoising_steps": "two"}}, "vllm_xargs.denoising_steps", "got 'two'"),
        ({"extra_args": {"diffusion_canvas_length": 2}}, "vllm_xargs.diffusion_canvas_length", "unknown setting"),
        ({"n": 2}, "vllm_xargs", "n must be 1 with temperature 0"),
        ({"n": 2, "temperature": 1.0, "extra_args": {"seed": 1}}, "vllm_xargs", "n must be 1 with seed in vllm_xargs"),
    ],
)
def test_a_wrong_request_is_one_line_before_the_engine(hf_config, given, key, line):
    asked = []
    with pytest.raises(ValueError, match=re.escape(line)) as caught:
        checks.check_request(parameters(**given), SimpleNamespace(hf_config=hf_config), lambda: asked.append(1))
    assert caught.value.parameter == key
    assert "\n" not in str(caught.value)
    assert asked == []


def test_vllm_sees_what_it_insists_on_and_the_sampler_what_was_asked(hf_config):
    seen = []
    params = parameters(temperature=0.5, seed=3, extra_args={"kv_transfer_params": {}, "suppress_mask_token": 0})
    checks.check_request(
        params, SimpleNamespace(hf_config=hf_config), lambda: seen.append((params.temperature, params.seed))
    )
    assert seen == [(1.0, None)]
    assert (params.temperature, params.seed) == (0.5, 3)
    assert params.extra_args == {"kv_transfer_params": {}, "suppress_mask_token": False}
    assert params.stop_token_ids == [END]
    other = SimpleNamespace(hf_config=SimpleNamespace())
    checks.check_request(parameters(temperature=9.0), other, lambda: seen.append("theirs"))
    assert seen[1:] == ["theirs"]


def test_equal_settings_share_a_rule_and_a_seed_is_that_of_generate(hf_config):
    rules = Rules(hf_config, torch.device("cpu"))
    one, two = (rules.of(parameters(stop_token_ids=[END, 5]), name) for name in "ab")
    assert one.rule is two.rule
    assert one.seed != two.seed
    assert one.stop_ids == (5, END)
    assert one.rule.settings.strategy.confidence_threshold == 0.8
    asked = rules.of(parameters(temperature=0.5, seed=3, extra_args={"denoising_steps": 99, "top_k": 4}), "c")
    assert asked.rule is not one.rule
    assert (asked.rule.settings.denoising_steps, asked.rule.settings.given.top_k) == (4, 4)
    assert asked.seed == row_seed(3) == int(draw_seeds(1, torch.device("cpu"), torch.Generator().manual_seed(3)))
    endless = rules.of(parameters(ignore_eos=True, eos_token_id=END), "d")
    assert endless.stop_ids == ()


@pytest.mark.parametrize(
    ("room", "line"),
    [
        ((16, 63, 0), "16 x 4 = 64, got 63; raise it or lower max_num_seqs to 15"),
        ((1, 3, 0), "1 x 4 = 4, got 3; raise it"),
        ((1, 64, 3), "long_prefill_token_threshold must be 0 or at least the block size 4, got 3"),
    ],
)
def test_an_engine_without_room_is_refused(room, line):
    names = ("max_num_seqs", "max_num_batched_tokens", "long_prefill_token_threshold")
    with pytest.raises(ValueError, match=re.escape(line)):
        checks.check_room(4, **dict(zip(names, room, strict=True)))


@pytest.mark.parametrize(
    ("given", "expected"),
    [((None, None), (32, 128)), ((40, None), (40, 160)), ((None, 64), (16, 64)), ((2, 8), (2, 8))],
)
def test_defaults_leave_room_for_every_block(hf_config, given, expected):
    arguments = SimpleNamespace(max_num_seqs=given[0], max_num_batched_tokens=given[1], long_prefill_token_threshold=0)

    def fill():
        arguments.max_num_seqs = arguments.max_num_seqs or 100
        arguments.max_num_batched_tokens = arguments.max_num_batched_tokens or 128

    checks.check_batch(arguments, SimpleNamespace(hf_config=hf_config), fill)
    assert (arguments.max_num_seqs, arguments.max_num_batched_tokens) == expected


def test_another_vllm_is_one_line():
    assert [room.is_supported(version) for version in ("0.32.0", "0.32.1+cpu", "0.33.0", "0.3.2", "unknown")] == [
        True,
        True,
        False,
        False,
        False,
    ]
    with pytest.raises(ValueError, match=r"on vLLM 0\.32\.x, installed is"):
        config.RefusedConfig()


def test_neither_nemo_automodel_nor_training_is_imported():
    text = """
import sys
import nemo_bard.serving.vllm
import nemo_bard.serving.vllm.checks, nemo_bard.serving.vllm.edges, nemo_bard.serving.vllm.rules
heavy = ("nemo_automodel", "hydra", "omegaconf", "megatron", "nemo_bard.train", "nemo_bard.data", "nemo_bard.model.modeling")
print([name for name in sys.modules if name in heavy])
"""
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", text], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_request_that_has_ended_adds_nothing_to_the_prefix_cache():
    """Its last block has the keys of a denoising step."""
    cached = []
    manager = SimpleNamespace(cache_blocks=lambda request, tokens: cached.append(tokens))
    room.keep_unfinished(manager)
    manager.cache_blocks(SimpleNamespace(is_finished=lambda: False), 32)
    manager.cache_blocks(SimpleNamespace(is_finished=lambda: True), 64)
    assert cached == [32]


def test_files_of_videos_are_sampled_as_the_checkpoint_says(tmp_path):
    processor = make_processor(make_tokenizer()).video_processor
    processor.save_pretrained(tmp_path)
    model_config = SimpleNamespace(model=str(tmp_path), revision=None, multimodal_config=None)
    fill_sampling(model_config)  # text only
    model_config.multimodal_config = SimpleNamespace(media_io_kwargs={})
    fill_sampling(model_config)
    assert processor.max_frames == 16
    expected = {"video_backend": "qwen3_vl", "max_frames": 16}  # fps and min_frames are what vLLM takes by itself
    assert model_config.multimodal_config.media_io_kwargs == {"video": expected}
    given = {"image": {"image_mode": "L"}, "video": {"fps": 1, "max_frames": 8}}
    model_config.multimodal_config.media_io_kwargs = given
    fill_sampling(model_config)
    assert model_config.multimodal_config.media_io_kwargs == {**given, "video": {**expected, **given["video"]}}
