"""What is to be done: units of all sources, their layouts, and whether a folder was begun with the same."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from nemo_bard import __version__
from nemo_bard.base.errors import nearest
from nemo_bard.base.files import read_json, write_json
from nemo_bard.data.layouts import lay_out
from nemo_bard.data.prepare.folder import OutFolder
from nemo_bard.data.prepare.mix import Mix, Source
from nemo_bard.data.prepare.unit import Piece, UnitTask, file_state
from nemo_bard.data.raw import Unit, choose_layout, find_units, read_unit
from nemo_bard.data.raw.unit import printable
from nemo_bard.data.sample import Record, RejectedError

FORMAT = 1
PIECE_ROWS, PLAIN_PIECE_ROWS = 1024, 65536
"""Most rows of a unit of work where rows name files of images (a unit of raw data may name hundreds of thousands of them), and
where they hold all that belongs to them."""
LOOKED_AT = 32
"""Rows at the start of a source that its layout and the columns of its filters are looked for in."""


@dataclass(frozen=True, kw_only=True)
class PlannedSource:
    """A source and its pieces, which are the units of work."""

    source: Source
    layout: str
    pieces: list[Piece]
    states: Mapping[str, Mapping[str, int]]
    """Size and time of its files."""

    @property
    def rows(self) -> int:
        """Rows of all pieces."""
        return sum(piece.rows for piece in self.pieces)

    def task(self, folder: OutFolder, number: int, *, with_keys: bool) -> UnitTask:
        """What a worker has to know of a unit."""
        options, piece = self.source.options, self.pieces[number]
        return UnitTask(
            out=folder.path,
            source=self.source.name,
            number=number,
            piece=piece,
            state=self.states[piece.unit.file],
            layout=self.layout,
            root_dir=self.source.root_dir,
            filters=self.source.filters,
            settings=self.source.settings,
            with_keys=with_keys,
            most=options.limit if self.source.dedup == "none" else None,
        )


def plan_source(source: Source, out: Path) -> PlannedSource:
    """Find the units of a source, and look at its first rows.

    Raises:
        ValueError: If it cannot be read, lies around ``out``, has no row, its layout does not fit, or a filter's
            column is not there; names the source.
    """
    _check_apart(source, out)
    with naming(source.name):
        units = find_units(source.path, split=source.options.split)
        layout = choose_layout(units, source.options.layout)
        records = _look(source, layout, units)
        most = PIECE_ROWS if any(map(_names_files, records)) else PLAIN_PIECE_ROWS
        states = {file: file_state(file) for file in dict.fromkeys(unit.file for unit in units)}
    pieces = list(chain.from_iterable(Piece.of(unit, most) for unit in units))
    return PlannedSource(source=source, layout=layout, pieces=pieces, states=states)


@contextlib.contextmanager
def naming(source: str) -> Iterator[None]:
    """Put the name of a source before an error."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"source {source}: {error.filename or ''} cannot be read ({error.strerror or error})"
        ) from error
    except ValueError as error:
        raise ValueError(f"source {source}: {error}") from error


def _check_apart(source: Source, out: Path) -> None:
    """OUT is not in a source, whose files it would become."""
    path, target = Path(source.path), out.absolute()
    if not path.is_absolute() or not path.exists():
        return
    path, target = path.resolve(), target.resolve()
    if path.is_dir() and path in (target, *target.parents):
        raise ValueError(f"OUT {out} lies in the folder of source {source.name}, {path}; name a folder outside of it")


def _names_files(record: Record) -> bool:
    """Whether a row has images or videos in files of their own, so that its unit says nothing about how much there is to do."""
    contents = [turn.get("content") for turn in record.messages if isinstance(turn, Mapping)]
    parts = [part for content in contents if isinstance(content, list) for part in content if isinstance(part, Mapping)]
    inside = [image.get("bytes") if isinstance(image, Mapping) else image for image in record.images]
    return (
        bool(record.videos)
        or any(not isinstance(image, bytes) for image in inside)
        or any(part.get("type") != "text" for part in parts)
    )


def _look(source: Source, layout: str, units: list[Unit]) -> list[Record]:
    """Lay the first rows out, and see that the layout fits some of the first rows, and that the columns of filters are there.

    A wrong layout would reject all rows, a misspelt column leave them out.
    """
    misfits, records, columns = [], list[Record](), dict[str, None]()
    rows = [row for _, row in islice(chain.from_iterable(map(read_unit, units)), LOOKED_AT)]
    rows = [row for row in rows if not isinstance(row, RejectedError)]
    for row in rows:
        try:
            records.append(lay_out(layout, row))
            columns.update(dict.fromkeys(records[-1].facts))
        except RejectedError as error:
            misfits += [error] if error.kind == "layout" else []
    if rows and len(misfits) == len(rows):
        raise ValueError(str(misfits[0]))
    for one in source.filters:
        if len(misfits) < len(rows) and one.column not in columns:
            near = nearest(one.column, columns)
            hint = f" (did you mean {near!r}?)" if near else ""
            there = f"there are {', '.join(columns)}" if columns else f"the layout {layout} tells of none"
            raise ValueError(f"filter.{one.column}: no such column{hint}; {there}")
    return records


# ------------------ the folder's own plan ------------------
def describe(mix: Mix, planned: list[PlannedSource]) -> dict[str, Any]:
    """All that a prepared folder depends on."""
    return {
        "format": FORMAT,
        "version": __version__,
        "sources": {
            one.source.name: {
                "settings": {**one.source.identity(), "layout": one.layout},
                "units": _digest(one.pieces),
                "files": {printable(file): dict(state) for file, state in one.states.items()},
            }
            for one in planned
        },
    }


def settle(folder: OutFolder, plan: dict[str, Any], *, finished: bool) -> None:
    """See that a folder was begun with the same plan, or write it into a new one.

    Args:
        folder: The folder; held by this process.
        plan: See ``describe``.
        finished: Whether it is whole, so that it does not matter which version of the package made it.

    Raises:
        ValueError: If it was begun with another plan; names the first thing that differs.
    """
    begun = read_json(folder.plan_file)
    if begun is None:
        write_json(folder.plan_file, plan)
        return
    change = _difference(begun, plan, finished=finished)
    if change:
        raise ValueError(
            f"OUT {folder.path} was begun with other inputs: {change}; put that back, or prepare into another folder"
        )


def _difference(old: Mapping[str, Any], new: Mapping[str, Any], *, finished: bool) -> str:
    """What differs first, empty if nothing does."""
    for key in ("format", *(() if finished else ("version",))):
        if old.get(key) != new[key]:
            return f"{key} of nemo_bard was {old.get(key)}, now {new[key]}"
    before, after = list(old["sources"]), list(new["sources"])
    if gone := [name for name in before if name not in after]:
        return f"source {gone[0]} is no longer there"
    if added := [name for name in after if name not in before]:
        return f"source {added[0]} is new"
    if before != after:
        return f"the order of sources was {', '.join(before)}, now {', '.join(after)}"
    for name in after:
        if change := _source_difference(name, old["sources"][name], new["sources"][name]):
            return change
    return ""


def _source_difference(name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    for key, value in new["settings"].items():
        if (was := old["settings"].get(key)) != value:
            return f"sources.{name}.{key} was {was!r}, now {value!r}"
    for file, state in new["files"].items():
        if file not in old["files"]:
            return f"file {file} of source {name} is new"
        if old["files"][file] != state:
            return f"file {file} of source {name} has changed (size or time)"
    if gone := [file for file in old["files"] if file not in new["files"]]:
        return f"file {gone[0]} of source {name} is gone"
    if old["units"] != new["units"]:
        return f"the rows of source {name} have changed"
    return ""


def _digest(pieces: list[Piece]) -> str:
    """A text that changes with the rows of every piece, and with names and sizes of images in a folder."""
    text = "\n".join(repr(piece) for piece in pieces)
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()
