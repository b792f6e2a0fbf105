"""What a stage is made from, and whether that is what it was made from before: configuration, versions, inputs."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_bard.base.files import read_json
from nemo_bard.base.moved import PACKAGE, new_name
from nemo_bard.base.registry import import_dotted
from nemo_bard.pipeline import manifest
from nemo_bard.pipeline.job import RUN_DIR, Job, Stage

PACKAGES = ("nemo-bard", "nemo-automodel", "torch", "transformers")
PLAIN = (type(None), bool, int, float, str)


def versions() -> dict[str, str]:
    """Installed versions of what a result depends on."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def compared_config(stage: Stage, job: Job) -> dict[str, Any]:
    """What decides the result of a stage, with the run directory as a placeholder."""
    config: dict[str, Any] = {"kind": stage.kind, **stage.compared()}
    config["named"] = {  # what cannot be compared by its content
        use: value for use, value in stage.inputs.items() if value not in job.names and not Path(value).is_dir()
    }
    return json.loads(json.dumps(config, sort_keys=True, default=str).replace(str(job.run_dir), RUN_DIR))


def external_inputs(stage: Stage, job: Job) -> dict[str, Path]:
    """Files and folders that a stage reads and that no stage of the chain writes, by use."""
    found: dict[str, Path] = {}
    for use, value in stage.inputs.items():
        path = job.input_path(value)
        if value not in job.names and isinstance(path, Path):
            found[use] = path
    return found | stage.reads()


def input_digests(stage: Stage, job: Job, known: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Digests of everything a stage reads: ``{use: {"content": ..., "files": ...}}``.

    Args:
        stage: The stage; earlier stages that it reads from are finished.
        job: Its chain.
        known: The result of an earlier run, to save reading unchanged files.

    Raises:
        ValueError: If a stage that it reads from is not finished.
    """
    result: dict[str, Any] = {}
    for use, value in stage.inputs.items():
        if value in job.names:
            record = read_json(job.stage(value).folder / manifest.MANIFEST)
            if record is None:
                raise ValueError(f"stage {stage.name} needs the export of stage {value}, which is not finished")
            result[use] = {"content": record["content"]}
    for use, path in external_inputs(stage, job).items():
        files = manifest.fingerprint(path, ((known or {}).get(use) or {}).get("files"))
        result[use] = {"content": manifest.content(files), "files": files}
    return result


def ingredients(stage: Stage, job: Job, known: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What a stage would be made from now: configuration, versions and inputs."""
    return {
        "config": compared_config(stage, job),
        "versions": versions(),
        "inputs": input_digests(stage, job, (known or {}).get("inputs")),
    }


def check_same(stage: Stage, job: Job, old: Mapping[str, Any], new: Mapping[str, Any], state: str) -> None:
    """Refuse to go on from something that was made from something else.

    Raises:
        ValueError: Names the first key, version or input that differs.
    """
    advice = f"use another run_dir, or delete {stage.folder} to train this stage again"
    difference = first_difference(completed(old["config"], stage), new["config"])
    if difference:
        key, before, now = difference
        raise ValueError(f"stage {stage.name} was {state} with {key}={before!r}, now it is {now!r}; {advice}")
    if not job.allow_version_change:
        for package, version in new["versions"].items():
            if old["versions"].get(package) != version:
                raise ValueError(
                    f"stage {stage.name} was {state} with {package} {old['versions'].get(package)}, now {version};"
                    f" set allow_version_change=true, {advice}"
                )
    for use in sorted(old["inputs"].keys() | new["inputs"].keys()):
        before, now = old["inputs"].get(use, {}), new["inputs"].get(use, {})
        if before.get("content") != now.get("content"):
            name = stage.inputs.get(use) or external_inputs(stage, job).get(use) or use
            raise ValueError(f"stage {stage.name} was {state} with another content of its {use} {name}; {advice}")


def finished(stage: Stage, job: Job) -> dict[str, Any] | None:
    """Return the manifest of a finished stage after checking it, or None if the stage is not finished.

    Raises:
        ValueError: If the stage was made from something else, or its export is damaged.
    """
    record = read_json(stage.folder / manifest.MANIFEST)
    if record is None:
        return None
    check_same(stage, job, record, ingredients(stage, job, record), "finished")
    export = manifest.export_of(job, record)
    if not export.is_dir():
        raise ValueError(f"stage {stage.name} is finished, but its export {export} is missing; delete {stage.folder}")
    now = manifest.fingerprint(export, record["files"])
    for name, entry in record["files"].items():
        if name not in now or now[name]["sha256"] != entry["sha256"]:
            state = "missing" if name not in now else "not what the stage wrote"
            raise ValueError(
                f"stage {stage.name} is finished, but {export / name} is {state}; delete {stage.folder} to make it again"
            )
    return record


def completed(config: Mapping[str, Any], stage: Stage) -> dict[str, Any]:
    """What a stage was made from, with the defaults of settings that did not exist then."""
    full, compared = stage.comparable(config), stage.compared()
    for one in dataclasses.fields(stage.settings):
        if one.name in compared and one.name not in full:
            if one.default is not dataclasses.MISSING:
                full[one.name] = one.default
            elif one.default_factory is not dataclasses.MISSING:
                full[one.name] = one.default_factory()
    return full


def first_difference(old: object, new: object, prefix: str = "") -> tuple[str, object, object] | None:
    """Return the first dotted key at which two nested values differ, with both values.

    Two dotted names of one thing are equal, and a section with ``_target_`` equals one in which a parameter of the target
    is written with its default.
    """
    if isinstance(old or {}, Mapping) and isinstance(new or {}, Mapping) and (old or new):
        before, now = with_defaults(old or {}, new or {})
        for key in [*now, *(key for key in before if key not in now)]:
            found = first_difference(before.get(key), now.get(key), f"{prefix}.{key}" if prefix else str(key))
            if found:
                return found
        return None
    same = old == new or (old in (None, {}) and new in (None, {}))  # a section may have lost all its compared keys
    return None if same or same_thing(old, new) else (prefix.removeprefix("recipe."), old, new)


def same_thing(old: object, new: object) -> bool:
    """Whether two values are dotted names, below ``nemo_bard``, of one thing, which may have moved."""
    if isinstance(old, list) and isinstance(new, list):
        return len(old) == len(new) and all(first_difference(*pair) is None for pair in zip(old, new, strict=True))
    if not all(isinstance(name, str) and name.startswith(f"{PACKAGE}.") for name in (old, new)):
        return False
    things = [_named(str(name)) for name in (old, new)]
    return things[0] is not None and things[0] is things[1]


def _named(name: str) -> Any:
    """What a dotted name stands for; None if it cannot be imported."""
    try:
        return import_dotted(new_name(name))
    except ValueError:
        return None


def with_defaults(old: Any, new: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fill each of two sections with what the other one writes and its ``_target_``'s own default is."""
    sections = dict(old), dict(new)
    for section, other in (sections, sections[::-1]):
        missing = [key for key in other if key not in section]
        target = section.get("_target_")
        if missing and isinstance(target, str) and target.startswith(f"{PACKAGE}."):
            parameters = _parameters(_named(target))
            for key in missing:
                if key in parameters and isinstance(parameters[key].default, PLAIN):
                    section[key] = parameters[key].default
    return sections


def _parameters(thing: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(thing).parameters if callable(thing) else {}
