"""Layouts by name: the registry, finding one by the columns of a row, and using one on a row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from nemo_bard.base.errors import one_line
from nemo_bard.base.registry import Registry
from nemo_bard.data.sample import Record, RejectedError

Layout = Callable[[Mapping[str, Any]], Record]

_FAULTS = (ValueError, TypeError, LookupError, AttributeError)
"""What a layout raises on a row that is not as it expects."""
_MOST_COLUMNS = 12


def _check(name: str, layout: Any) -> None:
    if not callable(layout):
        raise ValueError(f"layout: {name} must be a function from a row to a Record, got {type(layout).__name__}")


LAYOUTS: Registry[Layout] = Registry(
    "layout",
    "nemo_bard.layouts",
    {
        "messages": "nemo_bard.data.layouts.own.messages",
        "webdataset": "nemo_bard.data.layouts.own.webdataset",
        "cauldron": "nemo_bard.data.layouts.published.cauldron",
        "finevision": "nemo_bard.data.layouts.published.finevision",
        "mmfinereason": "nemo_bard.data.layouts.published.mmfinereason",
        "onevision": "nemo_bard.data.layouts.published.onevision",
        "llava": "nemo_bard.data.layouts.published.llava",
        "captions": "nemo_bard.data.layouts.own.captions",
    },
    check=_check,
)
"""Name -> function from a row to a ``Record``; a row is found to be of the first whose columns it has."""


def detect(row: Mapping[str, Any]) -> str:
    """The name of the layout that a row is of.

    Raises:
        ValueError: If its columns are those of none; names the columns found, and those that each layout wants.
    """
    for name in LAYOUTS:
        layout = LAYOUTS.get(name)
        wants = getattr(layout, "wants", None)
        if wants and not _missing(wants, row) and getattr(layout, "tells", _any_row)(row):
            return name
    known = {name: getattr(LAYOUTS.get(name), "wants", None) for name in LAYOUTS}
    wanted = "; ".join(f"{name}: {_written(wants)}" for name, wants in known.items() if wants)
    raise ValueError(f"the columns fit no layout: columns found {_found(row)}; wanted {wanted}")


def check_columns(name: str, columns: Iterable[str]) -> None:
    """See that a table has the columns that a layout wants.

    Args:
        name: As ``lay_out``.
        columns: Of all rows; none of them if rows may differ.

    Raises:
        ValueError: If it has not, or there is no such layout.
    """
    wants = getattr(LAYOUTS.get(name), "wants", None)
    columns = list(columns)
    if wants and columns and _missing(wants, columns):
        raise ValueError(_misfit(name, wants, columns))


def lay_out(name: str, row: Mapping[str, Any]) -> Record:
    """Make a record of a row.

    Args:
        name: One of ``LAYOUTS``, or the dotted name of a function.
        row: Columns and their values; not modified.

    Returns:
        What the layout makes of it.

    Raises:
        RejectedError: If the row is not as the layout wants it.
        ValueError: If there is no such layout, or it returns something else.
    """
    layout = LAYOUTS.get(name)
    wants = getattr(layout, "wants", None)
    if wants and _missing(wants, row):
        raise RejectedError("layout", _misfit(name, wants, row))
    try:
        record = layout(row)
    except RejectedError:
        raise
    except _FAULTS as error:
        raise RejectedError("layout", f"layout {name}: {type(error).__name__}: {one_line(error)}") from error
    if not isinstance(record, Record):
        raise ValueError(f"layout {name} must return a Record, got {type(record).__name__}")
    return record


def _any_row(row: Mapping[str, Any]) -> bool:
    return True


def _missing(wants: Iterable[tuple[str, ...]], columns: Any) -> bool:
    return not all(any(name in columns for name in names) for names in wants)


def _misfit(name: str, wants: Iterable[tuple[str, ...]], columns: Iterable[str]) -> str:
    return f"the columns do not fit the layout {name}: columns found {_found(columns)}; wanted {_written(wants)}"


def _found(columns: Iterable[str]) -> str:
    names = [str(column) for column in columns]
    more = f" and {len(names) - _MOST_COLUMNS} more" if len(names) > _MOST_COLUMNS else ""
    return (", ".join(names[:_MOST_COLUMNS]) or "none") + more


def _written(wants: Iterable[tuple[str, ...]]) -> str:
    return " and ".join(" or ".join(names) for names in wants)
