"""From a pipeline's recipe file and the words after it to one plain configuration (Hydra)."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from nemo_bard.base.paths import conf_dir
from nemo_bard.train.config import check_keys
from nemo_bard.train.recipe_file import read_yaml

FILE_KEYS = ("recipe", "pipeline", "overrides", "config_dir")
FREE = re.compile(r"(overrides|stage\.\w+\.overrides|data\.recipe|model\.recipe|evaluation\.generation)\.")
"""Keys below these are keys of something else (a recipe, a generation config) and checked there."""
_NAME = re.compile(r"[\w.@/]+")


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
    options: dict[str, Any] = {"config_dir": file.get("config_dir"), "cfg": False, "stage": None}
    overrides, rest = list(before), list(words)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if word == "--cfg":
            options["cfg"] = True
        elif name in ("--config-dir", "--config_dir", "--stage"):
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
    return Words(overrides, [folder.resolve() for folder in dirs], file["pipeline"], options["cfg"], options["stage"])


def compose(words: Words) -> dict[str, Any]:
    """Compose the configuration: plain dictionaries, interpolations filled in.

    Raises:
        ValueError: For an unknown group, name or key (the nearest known one is named), a value that is required and not
            given, or a configuration file that cannot be read.
    """
    groups = known_groups(words.config_dirs)
    picks, values = [f"pipeline={words.pipeline}"], []
    for override in words.overrides:
        key = override.partition("=")[0].lstrip("+~")
        (picks if key.split("@")[0] in groups else values).append(override)
    for override in picks:
        _check_option(override, groups)
    base = _compose(words.config_dirs, picks, resolve=False)
    known = set(dotted_keys(base))
    checked = []
    for override in values:
        key = override.partition("=")[0]
        if FREE.match(key):
            checked.append(f"++{override}")
            continue
        if _NAME.match(key) and key not in known:
            near = difflib.get_close_matches(key, [*known, *groups], n=1)
            hint = f"did you mean {near[0]}?" if near else f"known at the top: {', '.join([*groups, *base])}"
            raise ValueError(f"unknown key {key} in {override!r}; {hint}")
        checked.append(override)
    return _compose(words.config_dirs, [*picks, *checked], resolve=True)


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
        near = difflib.get_close_matches(name, options, n=1)
        hint = f"did you mean {near[0]}?" if near else "known:"
        raise ValueError(f"{key}={name}: unknown; {hint} {'' if near else ', '.join(options)}".rstrip())


def _compose(config_dirs: list[Path], overrides: list[str], *, resolve: bool) -> dict[str, Any]:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

    path = ",".join(f"file://{folder}" for folder in config_dirs)
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            config = hydra_compose("config", overrides=[f"hydra.searchpath=[{path}]", *overrides])
            return OmegaConf.to_container(config, resolve=resolve, throw_on_missing=resolve)
    except MissingMandatoryValue as error:
        key = error.full_key or str(error).rpartition(": ")[2]
        raise ValueError(f"{key} must be set, for example {key}=VALUE on the command line") from error
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(" ".join(str(error).split())) from error


def dotted_keys(node: Mapping[str, Any], prefix: str = "") -> list[str]:
    """All keys of nested dictionaries, sections included, as dotted names."""
    keys = []
    for name, value in node.items():
        keys.append(f"{prefix}{name}")
        if isinstance(value, Mapping):
            keys += dotted_keys(value, f"{prefix}{name}.")
    return keys
