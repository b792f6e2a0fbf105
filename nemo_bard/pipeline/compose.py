"""From a pipeline's recipe file and the words after it to one plain configuration (Hydra)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from nemo_bard.base.errors import nearest
from nemo_bard.base.paths import conf_dir
from nemo_bard.base.settings import check_keys
from nemo_bard.pipeline.structured import explain, register, schema_of
from nemo_bard.train.recipe_file import read_yaml

FILE_KEYS = ("recipe", "pipeline", "overrides", "config_dir")
LOOKED_AT_FIRST = re.compile(r"(stage|launch)\.|order$")
"""Keys that say, or may say, which sections there are."""


class Words(NamedTuple):
    """What a command line asks for."""

    overrides: list[str]
    """Hydra overrides, those of the recipe file first."""
    config_dirs: list[Path]
    pipeline: str
    cfg: bool = False
    """Print instead of running."""
    stage: str | None = None
    """Run this stage only; what ``launch.mode=per_stage`` passes to its workers."""
    scratch: str | None = None
    """Folder of a rehearsal; what the process that starts its workers passes to them."""


def read_words(config_path: Path, words: Iterable[str]) -> Words:
    """Split a command line, and put what the recipe file says before it.

    Raises:
        ValueError: For a word that is no option and no override, or a wrong recipe file.
    """
    file = read_yaml(config_path)
    check_keys("", file, FILE_KEYS)
    if not isinstance(file.get("pipeline"), str):
        raise ValueError(f"{config_path}: pipeline: must name a file of conf/pipeline, got {file.get('pipeline')!r}")
    before = file.get("overrides") or []
    if not isinstance(before, list) or not all(isinstance(item, str) for item in before):
        raise ValueError(f"{config_path}: overrides: must be a list of overrides such as data=my_data, got {before!r}")
    options: dict[str, Any] = {"config_dir": file.get("config_dir"), "cfg": False, "stage": None, "scratch": None}
    overrides, rest = list(before), list(words)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if word == "--cfg":
            options["cfg"] = True
        elif name in ("--config-dir", "--config_dir", "--stage", "--scratch"):
            if not equals and not rest:
                raise ValueError(f"{word} needs a value")
            options[name.removeprefix("--").replace("-", "_")] = value if equals else rest.pop(0)
        elif equals and re.fullmatch(r"(--|~|\+{1,2})?[\w.@/]+", name):
            overrides.append(word.removeprefix("--"))
        elif re.fullmatch(r"~[\w.@/]+", word):
            overrides.append(word)
        else:
            raise ValueError(
                f"unexpected argument {word!r}; known are --cfg, --config-dir DIR and overrides: GROUP=NAME, KEY=VALUE"
            )
    dirs = [Path(options["config_dir"])] if options["config_dir"] else []
    for folder in dirs:
        if not folder.is_dir():
            raise ValueError(f"--config-dir: {folder} is not a folder")
    local = Path("conf")
    if local.is_dir() and not local.samefile(conf_dir()) and not any(local.samefile(folder) for folder in dirs):
        dirs.append(local)
    dirs = [folder.resolve() for folder in dirs]
    return Words(overrides, dirs, file["pipeline"], options["cfg"], options["stage"], options["scratch"])


def compose(words: Words) -> dict[str, Any]:
    """Compose the configuration: plain dictionaries, interpolations filled in.

    Raises:
        ValueError: For an unknown group, name or key (the nearest known one is named), a value of a wrong type or that is
            required and not given, or a configuration file that cannot be read.
    """
    groups = known_groups(words.config_dirs)
    picks, values = [f"pipeline={words.pipeline}"], []
    for override in words.overrides:
        (picks if _key(override).split("@")[0] in groups else values).append(override)
    for override in picks:
        _check_option(override, groups)
    first = [
        override if override[0] in "+~" else f"++{override}"
        for override in values
        if LOOKED_AT_FIRST.match(_key(override))
    ]
    schema, untyped = schema_of(None), None
    try:
        register(schema)
        untyped = _compose(words.config_dirs, [*picks, *first])
        schema = schema_of(untyped)
        register(schema)
        free = schema.free()
        forced = [f"++{one}" if one[0] not in "+~" and f"{_key(one)}.".startswith(free) else one for one in values]
        return _compose(words.config_dirs, [*picks, *forced], resolve=True)
    except _hydra_errors() as error:
        known = [*groups, *(key for key, _ in schema.fields())]
        if untyped is not None:
            register(schema_of(None))
            known += dotted_keys(_compose(words.config_dirs, picks))
        raise explain(error, words.overrides, known, schema.checks()) from error


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def _hydra_errors() -> tuple[type[Exception], ...]:
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    return HydraException, OmegaConfBaseException


def known_groups(config_dirs: Iterable[Path]) -> dict[str, list[str]]:
    """Names in each group, the shipped ones first.

    Raises:
        ValueError: If a folder of the user's has another file of the same name as a shipped one, which would never be read.
    """
    groups: dict[str, list[str]] = {}
    where: dict[tuple[str, str], Path] = {}
    for root in (conf_dir(), *config_dirs):
        for file in sorted(root.glob("*/*.yaml")):
            group, name = file.parent.name, file.stem
            if root != conf_dir() and group not in groups:
                continue
            if (shipped := where.setdefault((group, name), file)) != file:
                if shipped.read_bytes() != file.read_bytes():
                    raise ValueError(f"{file} differs from {shipped}, which is read instead; rename it")
                continue  # a checkout as the working directory of an installed package
            groups.setdefault(group, []).append(name)
    return groups


def _check_option(override: str, groups: Mapping[str, list[str]]) -> None:
    key, equals, name = override.partition("=")
    options = groups[key.lstrip("+~").split("@")[0]]
    if equals and name not in options:
        near = nearest(name, options)
        raise ValueError(
            f"{key}={name}: unknown; {f'did you mean {near}?' if near else 'known: ' + ', '.join(options)}"
        )


def _compose(config_dirs: list[Path], overrides: list[str], *, resolve: bool = False) -> dict[str, Any]:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    path = ",".join(f"file://{folder}" for folder in config_dirs)
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = hydra_compose("config", overrides=[f"hydra.searchpath=[{path}]", *overrides])
        composed = OmegaConf.to_container(config, resolve=resolve, throw_on_missing=resolve)
    assert isinstance(composed, dict)
    return {str(key): value for key, value in composed.items()}


def dotted_keys(node: Mapping[str, Any], prefix: str = "") -> list[str]:
    """All keys of nested dictionaries, sections included, as dotted names."""
    keys = []
    for name, value in node.items():
        keys.append(f"{prefix}{name}")
        if isinstance(value, Mapping):
            keys += dotted_keys(value, f"{prefix}{name}.")
    return keys
