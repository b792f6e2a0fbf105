"""A chain with a causal start of its own: checked before it runs, scored as its stages say, told apart in the table."""

from __future__ import annotations

import pytest

from nemo_bard.base.paths import find_recipe
from nemo_bard.cli.demo import ORDER
from nemo_bard.pipeline import checks
from nemo_bard.pipeline.compose import compose, read_words
from nemo_bard.pipeline.evaluation import decoding, request
from nemo_bard.pipeline.job import make_job
from nemo_bard.report.run import score_rows

WORDS = (f"order=[{','.join(ORDER)}]", "stage.start.init=source")


def demo(folder, *words):
    return make_job(compose(read_words(find_recipe("bard_tiny"), [f"run_dir={folder}", *WORDS, *words])))


def test_the_demo_passes_its_own_checks(tmp_path):
    job = demo(tmp_path)
    checks.check_chain(job)
    assert [job.stage(name).context_attention for name in ("causal", "start")] == ["causal", "block"]
    assert job.stage("start").inputs == {"init": "source"}


def test_joint_training_is_refused_on_a_context_of_blocks(tmp_path):
    message = "stage joint_b8: ar_loss_weight=0.5 needs a model with context_attention: causal .* got 'block'"
    with pytest.raises(ValueError, match=message):
        checks.check_chain(demo(tmp_path, "stage.causal.context_attention=block"))
    with pytest.raises(ValueError, match="stage pbm_b4: ar_loss_weight=1"):
        checks.check_chain(demo(tmp_path, "stage.pbm_b4.overrides={ar_loss_weight: 1.0}"))


def test_blocks_still_grow_from_each_start(tmp_path):
    with pytest.raises(ValueError, match=r"stage.pbm_b8.block_size=4 must be larger than 4, that of stage pbm_b4"):
        checks.check_chain(demo(tmp_path, "stage.pbm_b8.block_size=4"))


def test_a_stage_says_how_it_is_decoded(tmp_path):
    job = demo(tmp_path)
    names = {
        name: decoding(None, job.evaluation, job.stage(name)).remasking_strategy
        for name in ("joint_b8", "speculative_b8", "pbm_b8")
    }
    assert names == {
        "joint_b8": "autoregressive",
        "speculative_b8": "self_speculative",
        "pbm_b8": "low_confidence_dynamic",
    }
    assert len({request(job.stage(name), job, "x") for name in (*names, "pbm_b4")}) == 3
    message = r"stage.pbm_b8.generation: remasking_strategy must be one of .*, got 'greedy'"
    with pytest.raises(ValueError, match=message):
        checks.check_chain(demo(tmp_path, "stage.pbm_b8.generation={remasking_strategy: greedy}"))


def test_the_table_says_how_stages_were_decoded_where_they_differ():
    def row(stage, **generation):
        numbers = {"block_size": 8, "scores": {"exact_match": 0.5}, "tpf": 2.0, "tokens_per_second": 3.0}
        return {"stage": stage, **numbers, "settings": {"generation": generation}}

    source, blocks = row("source", max_new_tokens=64), row("blocks", remasking_strategy="low_confidence_dynamic")
    exact = row("exact", remasking_strategy="self_speculative")
    header, rows = score_rows([source, exact, blocks])
    assert header[:3] == ["stage", "block size", "decoding"]
    assert [cells[2] for cells in rows] == ["token by token", "self speculative", "low confidence dynamic"]
    assert "decoding" not in score_rows([source, blocks])[0]
