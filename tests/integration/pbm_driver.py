"""Runs ``recipes/pbm.yaml`` several times in one process: ``pbm_driver.py JOBS.json``.

A job is ``{"overrides": {dotted key: value}, "sigterm_at": step or null}``. Importing AutoModel takes longer than a run.
"""

import gc
import json
import os
import signal
import sys

from nemo_automodel.components.config.loader import load_yaml_config

from nemo_bard.paths import recipes_dir
from nemo_bard.train import cpu_compat
from nemo_bard.train.pbm import PBMRecipe


def run(overrides, sigterm_at):
    cfg = load_yaml_config(recipes_dir() / "pbm.yaml")
    for key, value in overrides.items():
        cfg.set_by_dotted(key, value)

    class Interrupted(PBMRecipe):
        def _run_train_optim_step(self, batches, max_grad_norm=None):
            if self.step_scheduler.step == sigterm_at:
                os.kill(os.getpid(), signal.SIGTERM)
            return super()._run_train_optim_step(batches, max_grad_norm)

    recipe = Interrupted(cfg)
    recipe.setup()
    recipe.run_train_validation_loop()
    assert recipe.step_scheduler.sigterm_flag == (sigterm_at is not None)
    recipe.step_scheduler.sig_handler.release()
    recipe.__dict__.clear()
    gc.collect()


if __name__ == "__main__":
    cpu_compat.apply()
    with open(sys.argv[1]) as file:
        jobs = json.load(file)
    for job in jobs:
        run(job["overrides"], job.get("sigterm_at"))
