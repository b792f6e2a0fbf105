"""WebDataset archives: members that lie together and have the same name up to the first dot are a row."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from functools import cached_property
from typing import Any, NamedTuple

from nemo_bard.base.errors import one_line
from nemo_bard.data.raw import lines
from nemo_bard.data.raw.unit import UNIT_BYTES, ByteRows, Row, Unit, printable
from nemo_bard.data.sample import RejectedError

BLOCK = 512
LINK = -1
"""The size of a member that is no file, such as a link to another one."""
TEXTS = ("txt", "caption", "text")
"""Ends of members that are texts."""


class Member(NamedTuple):
    """A file in an archive."""

    key: str
    end: str
    """What follows the first dot of its name."""
    header: int
    begin: int
    size: int


def units(file: str) -> Iterator[Unit]:
    """Cut an archive between rows; of the members their headers alone are read.

    Raises:
        ValueError: If it is damaged, such as one that was not written to its end.
    """
    keys: set[str] = set()
    begin = start = rows = 0
    repeated: list[int] = []
    stop = 0
    for group in _groups(file, 0):
        header, stop = group[0].header, _behind(group[-1])
        if rows and stop - begin > UNIT_BYTES:
            yield _unit(file, start, rows, (begin, header), repeated)
            begin, start, rows, repeated = header, start + rows, 0, []
        if group[0].key in keys:
            repeated.append(rows)
        keys.add(group[0].key)
        rows += 1
    if rows:
        yield _unit(file, start, rows, (begin, stop), repeated)


def _unit(file: str, start: int, rows: int, span: tuple[int, int], repeated: list[int]) -> Unit:
    place = (*span, tuple(repeated))
    return Unit(file=file, format="tar", start=start, rows=rows, bytes=span[1] - span[0], place=place)


def _behind(member: Member) -> int:
    return member.begin + -(-max(member.size, 0) // BLOCK) * BLOCK


def _groups(file: str, begin: int, end: int | None = None) -> Iterator[list[Member]]:
    """Members of each row, from a header on."""
    group: list[Member] = []
    for member in _members(file, begin, end):
        if group and group[0].key != member.key:
            yield group
            group = []
        group.append(member)
    if group:
        yield group


def _members(file: str, begin: int, end: int | None) -> Iterator[Member]:
    name = printable(file)
    try:
        with open(file, "rb") as stream:
            size = stream.seek(0, 2)
            stream.seek(begin)
            with tarfile.TarFile(fileobj=stream, errorlevel=2) as archive:
                while (found := archive.next()) is not None and (end is None or found.offset < end):
                    archive.members.clear()  # it keeps all of them  # pyright: ignore[reportAttributeAccessIssue]
                    if found.offset_data + found.size > size:
                        raise ValueError(f"{name} ends within its member {found.name}, it is damaged or cut off")
                    if not found.isdir() and (member := _member(found)) is not None:
                        yield member
            if end is None:
                _check_end(stream, archive.offset, name)
    except FileNotFoundError:
        raise
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ValueError(f"{name} cannot be read as a tar archive ({one_line(error)})") from error


def _check_end(stream: Any, at: int, name: str) -> None:
    """See that zeros alone follow the last member: ``tarfile`` takes a damaged header for the end as well."""
    stream.seek(at)
    head = stream.read(BLOCK)
    if len(head) < BLOCK:
        raise ValueError(f"{name} has no mark at its end, it was not written to its end or is cut off")
    while head:
        if head.strip(b"\0"):
            raise ValueError(f"{name} is damaged at byte {at}, or goes on behind the mark at its end")
        head = stream.read(BLOCK * BLOCK)


def _member(found: tarfile.TarInfo) -> Member | None:
    """A member of a row; None for a file that belongs to none: hidden ones, and those whose name has no dot."""
    folder, _, base = found.name.rpartition("/")
    stem, dot, end = base.partition(".")
    if not stem or not dot:
        return None
    key = f"{folder}/{stem}".removeprefix("./") if folder else stem
    key = key.encode("utf-8", "replace").decode()
    return Member(key, end, found.offset, found.offset_data, found.size if found.isfile() else LINK)


class ArchiveRows(ByteRows):
    """Rows of a range of an archive: ``__key__``, and each member by its end; JSON and texts are decoded."""

    def __getitem__(self, number: int) -> Row:
        """Read the members of a row."""
        group = self._rows[number]
        key = group[0].key
        if number in self.unit.place[2]:
            raise RejectedError("bad_member", f"members of {key} lie in two places of the archive")
        row: dict[str, Any] = {"__key__": key}
        for member in group:
            end = member.end if "." in member.end else member.end.lower()
            if member.size == LINK:
                raise RejectedError("bad_member", f"{key}.{end} is no file, a link perhaps")
            if end in row:
                raise RejectedError("bad_member", f"{key}.{end} is there twice")
            row[end] = self._value(member, end)
        return row

    def _value(self, member: Member, end: str) -> Any:
        data = self.read(member.begin, member.begin + member.size)
        if end == "json":
            return lines.json_value(data)
        if end not in TEXTS:
            return data
        try:
            return data.decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            raise RejectedError("not_utf8", f"{member.key}.{end} is not UTF-8 ({one_line(error)})") from error

    @cached_property
    def _rows(self) -> list[list[Member]]:
        begin, end, _ = self.unit.place
        try:
            found = list(_groups(self.unit.file, begin, end))
        except ValueError as error:
            raise RejectedError("unreadable_file", one_line(error)) from error
        if len(found) != len(self):
            raise RejectedError("unreadable_file", "the file was changed since it was opened")
        return found
