"""Runs ``recipes/pbm.yaml`` or ``swd.yaml`` several times in one process: ``pbm_driver.py JOBS.json``.

A job is ``{"overrides": {dotted key: value}, "sigterm_at": step or null, "recipe": "pbm" or "swd", "leave_out": sample
indices that do not count}``. Importing AutoModel takes longer than a run.
"""

import gc
import json
import os
import signal
import sys

import torch
from nemo_automodel.components.config.loader import load_yaml_config

from nemo_bard.base.paths import recipes_dir
from nemo_bard.method.corruption import without_samples
from nemo_bard.train.pbm import PBMRecipe
from nemo_bard.train.swd import SWDRecipe
from nemo_bard.upstream import cpu as cpu_compat

RECIPES = {"pbm": PBMRecipe, "swd": SWDRecipe}


def weights(model):
    """This rank's part of every parameter."""
    return [getattr(p, "to_local", lambda p=p: p)().detach().clone() for p in model.parameters()]


def run(overrides, sigterm_at, recipe_name, leave_out=()):
    cfg = load_yaml_config(recipes_dir() / f"{recipe_name}.yaml")
    for key, value in overrides.items():
        cfg.set_by_dotted(key, value)

    class Interrupted(RECIPES[recipe_name]):
        def _run_train_optim_step(self, batches, max_grad_norm=None):
            if self.step_scheduler.step == sigterm_at:
                os.kill(os.getpid(), signal.SIGTERM)
            return super()._run_train_optim_step(batches, max_grad_norm)

        @staticmethod
        def _without_repeats(batch, loader, position):
            batch = RECIPES[recipe_name]._without_repeats(batch, loader, position)
            numbered = zip(batch["slots"], batch["noise_keys"], strict=True)
            return without_samples(batch, {slot for slot, key in numbered if key[2] in leave_out})

    recipe = Interrupted(cfg)
    recipe.setup()
    anchor = recipe.anchor if recipe_name == "swd" else None
    before = weights(anchor) if anchor is not None else []
    recipe.run_train_validation_loop()
    if anchor is not None:
        assert all(torch.equal(a, b) for a, b in zip(before, weights(anchor), strict=True)), "the anchor is frozen"
        assert all(p.grad is None for p in anchor.parameters())
        assert not anchor.training
    assert recipe.step_scheduler.sigterm_flag == (sigterm_at is not None)
    recipe.step_scheduler.sig_handler.release()
    recipe.__dict__.clear()
    gc.collect()


if __name__ == "__main__":
    cpu_compat.apply()
    with open(sys.argv[1]) as file:
        jobs = json.load(file)
    for job in jobs:
        run(job["overrides"], job.get("sigterm_at"), job.get("recipe", "pbm"), job.get("leave_out", ()))
