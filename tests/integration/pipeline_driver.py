"""Runs ``bard_tiny`` several times in one process (or one per rank): ``pipeline_driver.py JOBS.json``.

A job is ``{"words": [...], "kill": {"rank", "block_size", "step", "place"} or null}``. The kill is SIGKILL: at ``step`` it
comes before an optimizer step, at ``publish`` when everything of a checkpoint but its publication is written.
"""

import gc
import json
import os
import signal
import sys
import weakref

from nemo_automodel.components.checkpoint.lifecycle import CheckpointLifecycle

from nemo_bard.paths import find_recipe
from nemo_bard.pipeline import Pipeline
from nemo_bard.train.pbm import PBMRecipe

held, wanted, running = [], {}, {}
setup, step, publish = PBMRecipe.setup, PBMRecipe._run_train_optim_step, CheckpointLifecycle.publish


def watched_setup(self):
    setup(self)
    held.extend(weakref.ref(thing) for thing in (self.model_parts[0], self.optimizer[0], self.dataloader))
    running.update(recipe=weakref.ref(self))


def happen(place):
    recipe = running["recipe"]()
    here = {
        "rank": int(os.environ.get("RANK", 0)),
        "block_size": recipe.model_parts[0].config.block_size,
        "step": recipe.step_scheduler.step,
        "place": place,
    }
    if here == wanted:
        os.kill(os.getpid(), signal.SIGKILL)


def watched_step(self, batches, max_grad_norm=None):
    happen("step")
    return step(self, batches, max_grad_norm)


def watched_publish(self, path, **kwargs):
    happen("publish")
    return publish(self, path, **kwargs)


PBMRecipe.setup, PBMRecipe._run_train_optim_step = watched_setup, watched_step
CheckpointLifecycle.publish = watched_publish

if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        jobs = json.load(file)
    for job in jobs:
        wanted.clear()
        wanted.update(job.get("kill") or {})
        pipeline = Pipeline.from_overrides(find_recipe("bard_tiny"), job["words"])
        pipeline.setup()
        assert pipeline.run_train_validation_loop() == 0
        gc.collect()
        assert held, "no stage was trained"
        assert [ref() for ref in held if ref() is not None] == [], "a finished stage is still in memory"
        held.clear()
