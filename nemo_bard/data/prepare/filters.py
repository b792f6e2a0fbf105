"""Which rows to keep, by columns that a layout passes on as facts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nemo_bard.base.errors import short
from nemo_bard.base.settings import check_keys
from nemo_bard.data.sample import RejectedError

CONDITIONS = ("min", "max", "in", "equals", "null")
NULL = ("drop", "keep")


@dataclass(frozen=True, kw_only=True)
class Filter:
    """Conditions on a column; a row has to meet all of them, with every value if the column holds a list."""

    column: str
    min: float | None = None
    max: float | None = None
    choices: tuple[Any, ...] | None = None
    """``in`` and ``equals``."""
    keep_null: bool = False
    """Whether rows without a value are kept."""

    def keeps(self, facts: Mapping[str, Any]) -> bool:
        """Whether a row is kept.

        Raises:
            RejectedError: If its value cannot be compared.
        """
        value = facts.get(self.column)
        values = list(value) if isinstance(value, Sequence) and not isinstance(value, (str, bytes)) else [value]
        values = [one for one in values if one is not None]
        return self.keep_null if not values else all(self._meets(one) for one in values)

    def _meets(self, value: Any) -> bool:
        if self.choices is not None and not any(_equal(value, one) for one in self.choices):
            return False
        if self.min is None and self.max is None:
            return True
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise RejectedError("layout", f"column {self.column} must be a number for min or max, got {short(value)}")
        return (self.min is None or value >= self.min) and (self.max is None or value <= self.max)


def _equal(value: Any, wanted: Any) -> bool:
    """Whether they are the same; true and 1 are not."""
    return isinstance(value, bool) == isinstance(wanted, bool) and value == wanted


def read_filters(section: Mapping[str, Any], where: str) -> tuple[Filter, ...]:
    """Read ``{column: {min, max, in, equals, null}}``.

    Raises:
        ValueError: If a condition is not known or its value not allowed.
    """
    return tuple(_read(column, conditions, f"{where}.{column}") for column, conditions in section.items())


def _read(column: object, conditions: object, where: str) -> Filter:
    if not isinstance(column, str) or not isinstance(conditions, Mapping) or not conditions:
        raise ValueError(f"{where} must be a section of {', '.join(CONDITIONS)}, got {short(conditions)}")
    check_keys(where, [str(key) for key in conditions], CONDITIONS, "condition")
    for key in ("min", "max"):
        value = conditions.get(key, 0)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
            raise ValueError(f"{where}.{key} must be a number, got {value!r}")
    if conditions.get("min", float("-inf")) > conditions.get("max", float("inf")):
        raise ValueError(f"{where}: min {conditions['min']} is above max {conditions['max']}")
    null = conditions.get("null", "drop")
    if null not in NULL:
        raise ValueError(f"{where}.null must be one of {', '.join(NULL)}, got {null!r}")
    if not set(conditions) & {"min", "max", "in", "equals"}:
        raise ValueError(f"{where} must have one of min, max, in, equals")
    if {"in", "equals"} <= set(conditions):
        raise ValueError(f"{where}: give 'in' or 'equals', not both")
    choices = None
    if "in" in conditions:
        if not isinstance(conditions["in"], list) or not conditions["in"]:
            raise ValueError(f"{where}.in must be a list of values, got {short(conditions['in'])}")
        choices = tuple(conditions["in"])
    if "equals" in conditions:
        if conditions["equals"] is None or isinstance(conditions["equals"], (list, dict)):
            raise ValueError(f"{where}.equals must be a value, got {short(conditions['equals'])}")
        choices = (conditions["equals"],)
    return Filter(
        column=column,
        min=conditions.get("min"),
        max=conditions.get("max"),
        choices=choices,
        keep_null=null == "keep",
    )
