"""What a stage was made from against what it would be made from now: names that moved, defaults, real differences."""

import json
import re
from pathlib import Path

import pytest

from nemo_bard.base.paths import recipes_dir
from nemo_bard.pipeline import compare
from nemo_bard.pipeline.compose import compose, read_words
from nemo_bard.pipeline.evaluation import request
from nemo_bard.pipeline.job import make_job

OLD = Path(__file__).parents[1] / "golden" / "run_directory"
WORDS = (OLD / "words.txt").read_text().split()


def check(stage_name, *more):
    """Compare a stage of the old run directory with what its words, and ``more``, ask for today."""
    job = make_job(compose(read_words(recipes_dir() / "bard_tiny.yaml", [*WORDS, *more])))
    stage = job.stage(stage_name)
    finished = OLD / stage_name / "manifest.json"
    old = json.loads((finished if finished.is_file() else OLD / stage_name / "started.json").read_text())
    new = {"config": compare.compared_config(stage, job), "versions": old["versions"], "inputs": old["inputs"]}
    compare.check_same(stage, job, old, new, "finished")


@pytest.mark.parametrize("stage", ["tiny", "source", "start", "pbm_b4", "pbm_b8"])
def test_a_run_directory_from_before_the_move_goes_on(stage):
    check(stage)


@pytest.mark.parametrize(
    ("stage", "word", "message"),
    [
        (
            "pbm_b4",
            "stage.pbm_b4.overrides.loss_fn._target_=nemo_bard.method.MixturePathKL",
            "stage pbm_b4 was finished with loss_fn._target_='nemo_bard.losses.BlockDiffusionCrossEntropy',"
            " now it is 'nemo_bard.method.MixturePathKL'",
        ),
        ("pbm_b8", "data.jitter=3", "dataset.jitter=2, now it is 3"),
        ("source", "overrides.seed=1", "seed=42, now it is 1"),
        ("start", "model.context_attention=causal", "context_attention='block', now it is 'causal'"),
        ("tiny", "stage.tiny.seed=1", "seed=0, now it is 1"),
    ],
)
def test_a_real_difference_is_still_named(stage, word, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        check(stage, word)


COLLATOR = "nemo_bard.data.BlockDiffusionCollator"


@pytest.mark.parametrize(
    ("old", "new", "difference"),
    [
        ("nemo_bard.losses.MixturePathKL", "nemo_bard.method.losses.MixturePathKL", False),
        ("nemo_bard.method.MixturePathKL", "nemo_bard.method.DistillationLoss", True),
        ("nemo_bard.losses.Gone", "nemo_bard.method.Gone", True),
        ("torch.optim.AdamW", "torch.optim.adamw.AdamW", True),
        (["nemo_bard.digits.make_digits", 1], ["nemo_bard.data.make_digits", 1], False),
        (["nemo_bard.digits.make_digits", 1], ["nemo_bard.data.make_digits", 2], True),
        ({"_target_": COLLATOR, "max_length": 8}, {"_target_": COLLATOR, "max_length": 8, "turns": "all"}, False),
        ({"_target_": COLLATOR, "max_length": 8, "turns": "all"}, {"_target_": COLLATOR, "max_length": 8}, False),
        ({"_target_": COLLATOR, "max_length": 8}, {"_target_": COLLATOR, "max_length": 8, "turns": "last"}, True),
        ({"a": None}, {}, False),
        ({"a": 1}, {}, True),
    ],
)
def test_same_and_different(old, new, difference):
    assert (compare.first_difference({"x": old}, {"x": new}) is not None) == difference


def test_scores_from_before_the_move_are_not_made_again():
    job = make_job(compose(read_words(recipes_dir() / "bard_tiny.yaml", WORDS)))
    content = json.loads((OLD / "pbm_b4" / "manifest.json").read_text())["content"]
    assert (
        request(job.stage("pbm_b4"), job, content) == json.loads((OLD / "pbm_b4" / "eval.json").read_text())["request"]
    )
