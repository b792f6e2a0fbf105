"""One home per setting: dataclass fields whose metadata give checks, flags and reference documentation.

``setting(default, check, help)`` makes such a field. Everything else is derived from the fields of a class:
``check_settings`` (values), ``from_mapping`` (unknown keys, with the nearest name), ``add_flags`` and ``given_flags``
(command line), ``reference`` (documentation).
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from nemo_bard.base.errors import nearest, not_one_of

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")


@dataclass(frozen=True)
class Check:
    """What a value may be."""

    allowed: str
    """Ends the sentence "must be ..."."""
    test: Callable[[Any], bool]
    parse: Callable[[str], Any]
    """Reads a value from the command line."""
    metavar: str
    optional: bool = False
    """Whether None is allowed too."""
    choices: Callable[[], Iterable[str]] | None = None
    """Names that are allowed, where the value is one of them."""

    def __call__(self, key: str, value: Any) -> None:
        """Raise ValueError, naming ``key``, unless the value is allowed."""
        if value is None and self.optional:
            return
        if self.choices is not None:
            known = list(self.choices())
            if value not in known and not (isinstance(value, str) and "." in value and self.test(value)):
                raise not_one_of(key, value, known)
        elif not self.test(value):
            raise ValueError(f"{key} must be {self.allowed}{' or null' if self.optional else ''}, got {value!r}")


def _is_number(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, (int, float)) and math.isfinite(value)


def integer(least: int = 1, *, optional: bool = False) -> Check:
    """An integer of at least ``least``."""
    return Check(
        f"an integer >= {least}",
        lambda v: not isinstance(v, bool) and isinstance(v, int) and v >= least,
        int,
        "N",
        optional,
    )


def fraction(*, optional: bool = False) -> Check:
    """A number in (0, 1]."""
    return Check("in (0, 1]", lambda v: _is_number(v) and 0 < v <= 1, float, "X", optional)


def number(least: float = 0.0, *, optional: bool = False) -> Check:
    """A finite number of at least ``least``."""
    return Check(f"a finite number >= {least:g}", lambda v: _is_number(v) and v >= least, float, "X", optional)


def flag(*, optional: bool = False) -> Check:
    """True or false."""
    return Check("true or false", lambda v: isinstance(v, bool), bool, "", optional)


def text(*, optional: bool = False) -> Check:
    """A text that is not empty."""
    return Check("a text", lambda v: isinstance(v, str) and bool(v), str, "TEXT", optional)


def choice(
    names: Iterable[str] | Callable[[], Iterable[str]], *, optional: bool = False, dotted: bool = False
) -> Check:
    """One of ``names``, which may be a function that lists them; with ``dotted`` also any dotted name."""
    listed = names if callable(names) else (lambda: names)
    return Check("one of its names", lambda v: dotted and isinstance(v, str), str, "NAME", optional, listed)


def setting(
    default: Any = dataclasses.MISSING,
    check: Check | None = None,
    help: str = "",
    *,
    flag: bool = True,
    factory: Callable[[], Any] | None = None,
) -> Any:
    """A dataclass field.

    Args:
        default: Its default; without one it must be given.
        check: What it may be.
        help: One line for users.
        flag: Whether it is an option of the command line.
        factory: Makes the default, where that is a list or a dictionary.
    """
    metadata = {"check": check, "help": help, "flag": flag}
    if factory is not None:
        return dataclasses.field(default_factory=factory, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def check_settings(values: Any, section: str = "") -> None:
    """Check all settings of an instance.

    Raises:
        ValueError: For the first value that is not allowed.
    """
    for field in dataclasses.fields(values):
        if (check := field.metadata.get("check")) is not None:
            check(f"{section}.{field.name}" if section else field.name, getattr(values, field.name))


def check_keys(section: str, keys: Iterable[str], known: Iterable[str], kind: str = "recipe key") -> None:
    """Raise ValueError for the first key that is not known, naming the nearest one; ``section`` may be empty."""
    known = list(known)
    for key in keys:
        if key not in known:
            prefix = f"{section}." if section else ""
            near = nearest(key, known)
            hint = f"; did you mean {prefix}{near}?" if near else f"; known: {', '.join(known)}"
            raise ValueError(f"unknown {kind} {prefix}{key}{hint}")


def from_mapping(cls: type[T], values: Mapping[str, Any] | None, section: str = "") -> T:
    """Build a settings class from a section of a file.

    Raises:
        ValueError: For an unknown key (the nearest one is named), a missing one, or a value that is not allowed.
    """
    values = dict(values or {})
    known = dataclasses.fields(cls)
    check_keys(section, values, [field.name for field in known])
    for field in known:
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and field.name not in values:
            raise ValueError(f"{section}.{field.name} must be given" if section else f"{field.name} must be given")
    return cls(**values)


def add_flags(group: Any, fields: Iterable[dataclasses.Field[Any]], *, show_defaults: bool = False) -> None:
    """Add a ``--kebab-case`` option for every setting that is one; what is not given is None in the result.

    Args:
        group: Parser or group of one.
        fields: Fields of a settings class.
        show_defaults: Tell defaults, and demand what has none.
    """
    for field in fields:
        check, name = field.metadata.get("check"), f"--{field.name.replace('_', '-')}"
        if check is None or not field.metadata["flag"]:
            continue
        words = field.metadata["help"] + (f" ({', '.join(check.choices())})" if check.choices else "")
        required = show_defaults and field.default is dataclasses.MISSING
        if show_defaults and not required:
            words += f" (default: {field.default})"
        if check.parse is bool:
            group.add_argument(name, action=argparse.BooleanOptionalAction, default=None, help=words)
        else:
            group.add_argument(name, type=check.parse, metavar=check.metavar, help=words, required=required)


def given_flags(args: argparse.Namespace, fields: Iterable[dataclasses.Field[Any]]) -> dict[str, Any]:
    """The settings that are on the command line."""
    names = [field.name for field in fields if field.metadata.get("check") and field.metadata["flag"]]
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def reference(fields: Iterable[dataclasses.Field[Any]]) -> str:
    """A Markdown table: name, default, what is allowed, what it means."""
    rows = ["| setting | default | allowed | meaning |", "| --- | --- | --- | --- |"]
    for field in fields:
        check = field.metadata.get("check")
        if check is None:
            continue
        allowed = ", ".join(f"`{name}`" for name in check.choices()) if check.choices else check.allowed
        value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        default = "required" if value is dataclasses.MISSING else f"`{'null' if value is None else value}`"
        null = " or null" if check.optional else ""
        rows.append(f"| `{field.name}` | {default} | {allowed}{null} | {field.metadata['help']} |")
    return "\n".join(rows)
