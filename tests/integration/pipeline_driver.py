"""Runs ``bard_tiny`` several times in one process (or one per rank): ``pipeline_driver.py JOBS.json``.

A job is ``{"words": [...], "kill": {"rank", "block_size", "step", "place"} or null}``. The kill is SIGKILL: at ``step`` it
comes before an optimizer step, at ``publish`` when everything of a checkpoint but its publication is written. With
``"random_kills": {"count", "seed", "seconds"}`` the chain runs in forks of this process, which are killed after a random
time; a fork that comes to the end counts, the next begins in another run directory.
"""

import gc
import json
import os
import random
import signal
import sys
import time
import traceback
import weakref

from nemo_automodel.components.checkpoint.lifecycle import CheckpointLifecycle

from nemo_bard.base.paths import find_recipe
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


def run(words):
    pipeline = Pipeline.from_overrides(find_recipe("bard_tiny"), words)
    pipeline.setup()
    assert pipeline.run_train_validation_loop() == 0


def run_in_fork(words, seconds):
    """Exit code of a run; None if it was killed after ``seconds``."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            run(words)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def kill_at_random(words, count, seed, seconds):
    chance, kills, directory = random.Random(seed), 0, 0
    folder = next(word for word in words if word.startswith("run_dir="))
    rest = [word for word in words if word != folder]
    while True:
        limit = chance.uniform(0.0, seconds) if kills < count else 1e9
        code = run_in_fork([*rest, f"{folder}{directory}"], limit)
        assert code in (0, None), f"kill {kills}: a run ended with {code}"
        kills += code is None
        directory += code == 0
        if code == 0 and kills >= count:
            sys.stdout.write(f"{kills} kills, {directory} chains complete\n")
            return


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        jobs = json.load(file)
    for job in jobs:
        wanted.clear()
        wanted.update(job.get("kill") or {})
        if "random_kills" in job:
            kill_at_random(job["words"], **job["random_kills"])
            continue
        run(job["words"])
        gc.collect()
        assert held, "no stage was trained"
        assert [ref() for ref in held if ref() is not None] == [], "a finished stage is still in memory"
        held.clear()
