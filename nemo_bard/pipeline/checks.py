"""What can be wrong with a chain, found before any training starts."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from nemo_bard.base.files import LOCK, read_json
from nemo_bard.base.folders import read_model_type
from nemo_bard.launch.launchers import LAUNCHERS
from nemo_bard.method.layout import check_anchor_block_size
from nemo_bard.pipeline import manifest
from nemo_bard.pipeline.evaluation import open_samples
from nemo_bard.pipeline.job import ANCHOR_KEY, INIT_KEY, Job, Stage
from nemo_bard.train.config import check_batch_sizes, validate_recipe
from nemo_bard.train.recipe_file import load_recipe_class, translate


def check_chain(job: Job) -> None:
    """Check order, inputs and recipes; nothing is written and no process group is needed.

    Raises:
        ValueError: One line that names the stage, the key, its value and what is allowed.
    """
    check_block_sizes(job)
    check_inputs(job)
    for stage in job.stages:
        if stage.recipe is not None:
            check_recipe(stage, job)
    open_samples(job)


def check_block_sizes(job: Job) -> None:
    """Blocks grow from stage to stage; distillation may keep its student's; an anchor's are smaller and divide them."""
    previous: Stage | None = None
    for stage in job.stages:
        if stage.kind != "recipe" or stage.block_size is None:
            continue
        distils = "anchor" in stage.inputs
        if previous is not None and (
            stage.block_size < previous.block_size or (stage.block_size == previous.block_size and not distils)
        ):
            raise ValueError(
                f"stage.{stage.name}.block_size={stage.block_size} must be larger than {previous.block_size}, that of"
                f" stage {previous.name} before it: blocks grow along the chain"
            )
        previous = stage
        if distils:
            _check_anchor(stage, job)


def _check_anchor(stage: Stage, job: Job) -> None:
    name = stage.inputs["anchor"]
    where = f"stage.{stage.name}.anchor={name}"
    if name in {s.name for s in job.stages}:
        anchor = job.stage(name)
        _check_earlier(stage, "anchor", name, job)
        size = anchor.block_size
        if size is None:
            raise ValueError(f"{where}: stage {name} is no block-diffusion stage")
    else:
        folder = Path(name)
        if not folder.is_dir():
            raise ValueError(f"{where} is neither an earlier stage nor a folder")
        if read_model_type(folder) != "bard_vl":
            raise ValueError(f"{where}: an anchor must be a BARD folder; make one with `nemo-bard convert` and PBM")
        size = int(json.loads((folder / "config.json").read_text())["block_size"])
    try:
        check_anchor_block_size(stage.block_size, size)
        source = job.model["source"]
        if source and Path(source).is_dir() and Path(name).is_dir():
            from nemo_bard.train.swd import check_tokenizers

            check_tokenizers(source, name)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _check_earlier(stage: Stage, use: str, name: str, job: Job) -> None:
    names = [s.name for s in job.stages]
    if names.index(name) >= names.index(stage.name):
        raise ValueError(f"stage.{stage.name}.{use}={name} must be an earlier stage of order={names}")


def check_inputs(job: Job) -> None:
    """Every start exists, and is what its stage needs."""
    names = {stage.name: stage for stage in job.stages}
    for stage in job.stages:
        name = stage.inputs.get("init")
        if name is None:
            continue
        key = "model.source" if stage.kind == "convert" and name == job.model["source"] else f"stage.{stage.name}.init"
        if name in names:
            _check_earlier(stage, "init", name, job)
            needs_blocks = stage.kind == "recipe" and stage.block_size is not None
            if needs_blocks and names[name].kind != "convert" and names[name].block_size is None:
                raise ValueError(
                    f"{key}: stage {stage.name} needs a block-diffusion start, stage {name} is autoregressive; put a"
                    " stage of kind convert between them"
                )
            continue
        if not Path(name).is_dir():
            if stage.kind == "convert":
                check_hub_name(key, name)
                continue
            raise ValueError(f"{key}={name} is neither an earlier stage nor a folder")
        kind = read_model_type(name)
        if stage.kind == "convert" and kind == "qwen3_vl":
            from nemo_bard.checkpoints.folder import weight_files

            weight_files(Path(name))


def check_hub_name(key: str, name: str) -> None:
    """Refuse a name that is no folder, and cannot be or has not been downloaded from the Hugging Face Hub."""
    if name.count("/") != 1 or name.startswith((".", "~", "/")):
        raise ValueError(f"{key}={name} is neither a folder nor a Hugging Face name such as Qwen/Qwen3-VL-4B-Instruct")
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        download(key, name)


def download(key: str, name: str) -> Path:
    """Return the folder of a checkpoint on the Hugging Face Hub, downloaded if it is not in the cache.

    Raises:
        ValueError: If it is not there.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja", "LICENSE*"]))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ValueError(
            f"{key}={name}: not in the Hugging Face cache and cannot be downloaded ({_line(error)})"
        ) from error


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def check_recipe(stage: Stage, job: Job) -> None:
    """Let the recipe class check the final recipe of a stage; inputs that are still to be made are stood in for.

    Raises:
        ValueError: What the class says, after the stage's name.
    """
    raw = translate(stage.recipe)
    try:
        recipe_class = load_recipe_class(stage.recipe_path, raw)
        if not hasattr(recipe_class, "validate_config"):
            return
        if all(isinstance(path, Path) and path.is_dir() for path in map(job.input_path, stage.inputs.values())):
            recipe_class.validate_config(raw)
            return
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text('{"model_type": "bard_vl"}')
            for use, dotted in (("init", INIT_KEY), ("anchor", ANCHOR_KEY)):
                section, _, key = dotted.partition(".")
                if use in stage.inputs and not Path(str(job.input_path(stage.inputs[use]))).is_dir():
                    raw[section] = {**raw[section], key: folder}
            # What needs the checkpoints themselves is checked when the stage starts.
            if isinstance(recipe_class, type) and issubclass(recipe_class, _pbm_recipe()):
                validate_recipe(raw, with_anchor="anchor" in stage.inputs)
            else:
                recipe_class.validate_config(raw)
    except ValueError as error:
        raise ValueError(f"stage {stage.name}: {error}") from error


def _pbm_recipe() -> type:
    from nemo_bard.train.pbm import PBMRecipe

    return PBMRecipe


def check_world(job: Job, processes: int) -> None:
    """Check that every stage's global batch is a whole number of local batches on all processes.

    Raises:
        ValueError: Names stage and numbers.
    """
    for stage in job.stages:
        if stage.recipe is not None:
            steps: dict[str, Any] = translate(stage.recipe)["step_scheduler"]
            try:
                check_batch_sizes(steps["global_batch_size"], steps["local_batch_size"], processes)
            except ValueError as error:
                raise ValueError(f"stage {stage.name}: {error}") from error


def check_run_dir(job: Job) -> None:
    """Refuse a run directory that belongs to something else.

    Raises:
        ValueError: If it holds another pipeline's run, or files of no run.
    """
    identity = read_json(job.run_dir / manifest.IDENTITY)
    if identity is None:
        launcher = LAUNCHERS.get(job.launch.name)()
        own = (job.run_dir / LOCK, *launcher.state_folders(job.launch))
        strangers = [p.name for p in job.run_dir.iterdir() if p not in own] if job.run_dir.is_dir() else []
        if strangers:
            raise ValueError(f"run_dir {job.run_dir} holds {strangers[0]} and is no run of a pipeline; use another")
    elif identity["pipeline"] != job.name:
        raise ValueError(
            f"run_dir {job.run_dir} belongs to the pipeline {identity['pipeline']}, not {job.name}; use another"
        )
