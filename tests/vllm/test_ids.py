"""The plugin of vLLM gives the ids of ``model.generate``, however vLLM schedules."""

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


def check(cases, answers):
    """All prompts and answers are equal, and end as they should."""
    wrong = [
        (case["name"], index)
        for index, (case, answer) in enumerate(zip(cases, answers, strict=True))
        if case["ids"] != answer["ids"] or case["prompt_ids"] != answer["prompt_ids"]
    ]
    assert wrong == []
    for case, answer in zip(cases, answers, strict=True):
        most = case["settings"].get("max_new_tokens", 64)
        assert answer["finish_reason"] == ("length" if len(answer["ids"]) == most else "stop")


@pytest.mark.parametrize(("block_size", "causal"), [(8, False), (32, False), (8, True)])
def test_every_setting_at_once(reference, drive, block_size, causal):
    """24 images, several images and turns, clips, text only, every strategy, draws and revision, in batches of 8."""
    [(cases, answers)], metrics = drive(reference(block_size, causal), disable_log_stats=False)
    assert len({case["name"] for case in cases}) == 24
    check(cases, answers)
    blocks = sum(-(-len(answer["ids"]) // block_size) for answer in answers)
    # One commit for each block that another one follows, none for the last.
    assert metrics["vllm:diffusion_num_committed_tokens"] == blocks * block_size


@pytest.mark.parametrize(
    ("block_size", "causal", "more"),
    [
        (8, False, {"async": True, "max_num_batched_tokens": 64}),
        (32, False, {"num_gpu_blocks_override": 16, "max_model_len": 320, "max_num_batched_tokens": 256}),
        (8, True, {"async": True, "max_num_batched_tokens": 64}),
    ],
)
def test_prefix_cache_with_small_steps(reference, drive, block_size, causal, more):
    """A second round reads the cache; so do conversations that go on, and prompts that go on within a block.

    Steps of 64 tokens leave room for the features of one clip or picture, while blocks that lie between two need both.
    """
    rounds, metrics = drive(
        reference(block_size, causal),
        rounds=[["first", "raw", "video_first"], ["grown", "raw_grown", "video_turns"], None],
        enable_prefix_caching=True,
        block_size=32,
        disable_log_stats=False,
        **more,
    )
    for cases, answers in rounds:
        check(cases, answers)
    for name in (
        () if "num_gpu_blocks_override" in more else ("grown", "raw_grown", "video_turns")
    ):  # few pages are soon others'
        cached = [answer["cached"] for case, answer in zip(*rounds[1], strict=True) if case["name"] == name]
        assert sum(cached) > 0, name
    if "num_gpu_blocks_override" in more:
        assert metrics["vllm:num_preemptions"] > 0
