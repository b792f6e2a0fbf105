"""The schema of a chain as Hydra's structured configuration, and what Hydra refuses as one line that users can act on.

The schema is a node of Hydra's ConfigStore under the name ``schema``, the first in the defaults of ``conf/config.yaml``, so
that Hydra itself refuses wrong types and unknown keys, in files as on the command line. Which sections there are depends on
the kinds of the stages and on the launcher: ``register`` is called again once they are known.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from nemo_bard.base.errors import nearest, short
from nemo_bard.base.settings import Check
from nemo_bard.launch.launchers import LAUNCHERS
from nemo_bard.pipeline.job import find_kind
from nemo_bard.pipeline.schema import ChainSettings, EvaluationSettings, ModelSettings

SCHEMA = "schema"
CHECKED_LATER = ("data.recipe.",)
"""Free sections of ``data``, whose other keys are those of its file."""


@dataclasses.dataclass(frozen=True)
class Schema:
    """The settings class of every section that has one, by its dotted name; the top is the empty name."""

    classes: Mapping[str, type]

    def fields(self) -> Iterator[tuple[str, dataclasses.Field[Any]]]:
        """All settings with their dotted keys."""
        for section, cls in self.classes.items():
            for field in dataclasses.fields(cls):
                yield (f"{section}.{field.name}" if section else field.name), field

    def checks(self) -> dict[str, Check]:
        """What each key may be."""
        found = {key: field.metadata.get("check") for key, field in self.fields()}
        return {key: check for key, check in found.items() if check is not None}

    def free(self) -> tuple[str, ...]:
        """What the keys of free sections begin with: dictionaries whose keys something else checks."""
        sections = {key for key, field in self.fields() if "dict[" in str(field.type)}
        return (*(f"{key}." for key in sections if key not in ("data", "stage")), *CHECKED_LATER)


def schema_of(composed: Mapping[str, Any] | None) -> Schema:
    """The schema of a chain whose kinds and launcher are known from a first, untyped composition; of any chain if None.

    Raises:
        ValueError: For an unknown stage kind or launcher.
    """
    classes: dict[str, type] = {"": ChainSettings, "model": ModelSettings, "evaluation": EvaluationSettings}
    if composed is None:
        return Schema(classes)
    classes["launch"] = LAUNCHERS.get((composed.get("launch") or {}).get("name")).Settings
    stages, order = composed.get("stage") or {}, composed.get("order")
    for name in order if isinstance(order, list) else stages:
        section = stages.get(name)
        if isinstance(section, Mapping) and "kind" in section:
            classes[f"stage.{name}"] = find_kind(name, section).settings_for(section)
    return Schema(classes)


def register(schema: Schema) -> None:
    """Put a schema into Hydra's ConfigStore.

    Raises:
        ValueError: If a settings class has a field of a type that OmegaConf does not know.
    """
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    root = _node("the configuration", schema.classes[""])
    for section, cls in schema.classes.items():
        if section:
            OmegaConf.update(root, section, _node(section, cls), merge=False, force_add=True)
    ConfigStore.instance().store(name=SCHEMA, node=root)


def _node(section: str, cls: type) -> Any:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        node = OmegaConf.structured(cls)
    except OmegaConfBaseException as error:
        raise ValueError(f"{section}: {cls.__qualname__}: {' '.join(str(error).split())}") from error
    _let_compose(node)
    return node


def _let_compose(node: Any) -> None:
    """Take the read-only flag away, which OmegaConf gives to frozen dataclasses."""
    from omegaconf import DictConfig, OmegaConf

    if isinstance(node, DictConfig):
        OmegaConf.set_readonly(node, None)
        for key in map(str, node):
            if not OmegaConf.is_missing(node, key) and not OmegaConf.is_interpolation(node, key):
                _let_compose(node[key])


def explain(
    error: Exception, overrides: Iterable[str], known: Iterable[str], checks: Mapping[str, Check]
) -> ValueError:
    """Say on one line what Hydra refuses.

    Args:
        error: What Hydra or OmegaConf raised.
        overrides: The words of the command line and of the recipe file.
        known: Dotted keys that there are.
        checks: What the values of keys may be.
    """
    from omegaconf.errors import ConfigAttributeError, ConfigKeyError, MissingMandatoryValue, ValidationError

    cause = next((one for one in _causes(error) if getattr(one, "full_key", None)), error)
    key = str(getattr(cause, "full_key", "") or "")
    if isinstance(error, MissingMandatoryValue):
        key = key or str(error).rpartition(": ")[2]
        return ValueError(f"{key} must be set, for example {key}=VALUE on the command line")
    word = _word_of(error, key, overrides)
    if key and isinstance(cause, (ConfigKeyError, ConfigAttributeError)) and not _is_interpolation(cause):
        asked = word.partition("=")[0].lstrip("+~") if word else key
        near = nearest(asked, [name for name in known if name != asked])
        top = ", ".join(name for name in known if "." not in name)
        hint = f"did you mean {near}?" if near else f"known at the top: {top}"
        return ValueError(f"unknown key {asked}{_place(error, word)}; {hint}")
    if key in checks and isinstance(cause, ValidationError):
        check = checks[key]
        allowed = f"one of {', '.join(check.choices())}" if check.choices else check.allowed
        null = " or null" if check.optional else ""
        return ValueError(f"{key} must be {allowed}{null}, got {_value(cause, word)}{_place(error, '')}")
    return ValueError(" ".join(str(error).split()))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_interpolation(error: BaseException) -> bool:
    from omegaconf.errors import InterpolationResolutionError

    return any(isinstance(one, InterpolationResolutionError) for one in _causes(error)) or "nterpolation" in str(error)


def _word_of(error: Exception, key: str, overrides: Iterable[str]) -> str:
    """The override that is at fault; empty if a file is."""
    named = re.match(r"Could not override '([^']+)'", str(error))
    wanted = named[1] if named else key
    for word in reversed(list(overrides)):
        name = word.partition("=")[0].lstrip("+~")
        if name == wanted or (str(error).startswith("Error merging override") and key.startswith(name)):
            return word
    return ""


def _place(error: Exception, word: str) -> str:
    if word:
        return f" in {word!r}"
    file = re.match(r"In '([^']+)'", str(error))
    return f" in conf/{file[1]}.yaml" if file else ""


def _value(cause: BaseException, word: str) -> str:
    told = re.search(r"Value '(.*)' of type '(\w+)'", str(cause), re.S)
    if told:
        return short(told[1]) if told[2] == "str" else told[1]
    if "is not Optional" in str(cause):
        return "None"
    return short(word.partition("=")[2]) if word else "something else"
