"""The mixture file: which sources, and what is done with their rows."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from nemo_bard.base.errors import short
from nemo_bard.base.settings import Check, check_keys, check_settings, choice, from_mapping, integer, setting, text
from nemo_bard.data.prepare.filters import Filter, read_filters
from nemo_bard.data.prepared.layout import MANIFEST, REJECTS
from nemo_bard.data.vetting import VetSettings

DEDUP = ("none", "source", "all")
THINK = ("keep", "strip")
FREE = ("weight", "repetitions", "max_reject_ratio")
"""Options of a source that change nothing in its files."""
MAX_REJECT_RATIO = 0.01

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")
_GLOB = re.compile(r"[*?\[]")


def _real(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, (int, float))


_RATIO = Check("a number from 0 to 1", lambda v: _real(v) and 0 <= v <= 1, float, "X")
_POSITIVE = Check("a finite number > 0", lambda v: _real(v) and 0 < v < float("inf"), float, "X", optional=True)
_SECTION = Check("a section {column: {min, max, in, equals, null}}", lambda v: isinstance(v, Mapping), str, "", True)


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """A section of ``sources``."""

    path: str = setting(check=text(), help="File, folder, pattern (`*.parquet`) or hub name (`owner/name:config`).")
    layout: str | None = setting(None, text(optional=True), "Layout of the rows; found by their columns if not given.")
    split: str | None = setting(None, text(optional=True), "Split to read, where the source has several.")
    root_dir: str | None = setting(
        None,
        text(optional=True),
        "Folder that relative paths of media start from; the folder of each file if not given.",
    )
    filter: Mapping[str, Any] | None = setting(
        None, _SECTION, "Rows to keep, by column: `{rating: {min: 3}}`. A row has to meet all conditions."
    )
    limit: int | None = setting(None, integer(1, optional=True), "Stop reading when so many samples are kept.")
    max_pixels: int | None = setting(None, integer(optional=True), "Make images that have more pixels smaller.")
    dedup: str | None = setting(
        None, choice(DEDUP, optional=True), "Leave out repetitions of earlier rows of this source, or of all; as above."
    )
    think: str = setting("keep", choice(THINK), "Keep or strip `<think>...</think>` in answers.")
    system: str | None = setting(None, text(optional=True), "System prompt of rows without one.")
    max_reject_ratio: float | None = setting(
        None, Check(_RATIO.allowed, _RATIO.test, float, "X", optional=True), "As above, for this source."
    )
    weight: float | None = setting(None, _POSITIVE, "Share in a mixture, if a run says nothing else.")
    repetitions: float | None = setting(None, _POSITIVE, "Likewise, as epochs of the source.")


@dataclass(frozen=True, kw_only=True)
class MixOptions:
    """The top of the file."""

    sources: Mapping[str, Any] = setting(
        check=Check("a section", lambda v: isinstance(v, Mapping), str, ""),
        help="Name -> path, or a section of options.",
    )
    dedup: str = setting("none", choice(DEDUP), "Leave out repetitions: of no row, within a source, or of all sources.")
    max_reject_ratio: float = setting(MAX_REJECT_RATIO, _RATIO, "Largest part of a source's rows that may be unusable.")
    model: str | None = setting(
        None, text(optional=True), "Checkpoint folder or hub name, whose processor measures lengths in tokens."
    )


@dataclass(frozen=True, kw_only=True)
class Source:
    """A source, its paths absolute and its defaults filled in."""

    name: str
    path: str
    """Absolute path or pattern, or a hub name."""
    root_dir: str | None
    options: SourceOptions
    settings: VetSettings
    filters: tuple[Filter, ...]
    dedup: str
    max_reject_ratio: float
    section: Mapping[str, Any]
    """As it stands in the file."""

    def identity(self) -> dict[str, Any]:
        """All that its files depend on, but for the input files themselves."""
        own = {f.name: getattr(self.options, f.name) for f in fields(SourceOptions) if f.name not in FREE}
        return {**own, "path": self.path, "root_dir": self.root_dir, "dedup": self.dedup}


@dataclass(frozen=True, kw_only=True)
class Mix:
    """A mixture file."""

    file: Path
    sources: list[Source]
    model: str | None = None
    """Absolute path of a folder, or a hub name."""
    section: Mapping[str, Any] = field(default_factory=dict)
    """The file without its sources."""


def read_mix(file: Path) -> Mix:
    """Read a mixture file and check all that can be checked without opening a source.

    Args:
        file: YAML; relative paths in it start from its folder.

    Raises:
        ValueError: If a key is not known or a value not allowed, or a path does not exist; names it.
    """
    raw = _load(file)
    try:
        check_keys("", raw, [f.name for f in fields(MixOptions)], "key")
        top = from_mapping(MixOptions, raw)
        check_settings(top)
        if not top.sources:
            raise ValueError("sources must name at least one source")
        folder = file.parent.resolve()
        sources = [_read_source(name, section, top, folder) for name, section in top.sources.items()]
        _check_shares(sources)
        model = None if top.model is None else _locate(top.model, folder, "model")
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    section = {key: value for key, value in raw.items() if key != "sources"}
    return Mix(file=file, sources=sources, model=model, section=section)


def _load(file: Path) -> dict[str, Any]:
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses a key that stands twice in a section, of which YAML would take the last."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != _MERGE]
            for number, key in enumerate(keys):
                if key in keys[:number]:
                    raise ValueError(f"line {node.value[number][0].start_mark.line + 1}: {key} stands twice")
            return super().construct_mapping(node, deep)

    try:
        raw = yaml.load(file.read_text(encoding="utf-8"), Loader)  # a SafeLoader
    except FileNotFoundError as error:
        raise ValueError(f"mixture file {file} does not exist") from error
    except IsADirectoryError as error:
        raise ValueError(f"mixture file {file} is a folder") from error
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, TypeError) as error:
        raise ValueError(f"{file}: not a YAML file: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{file}: must hold a section 'sources', got {short(raw)}")
    try:
        json.dumps(raw)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: values must be texts, numbers, true or false ({error}); quote a date") from error
    return raw


_MERGE = "tag:yaml.org,2002:merge"


def _read_source(name: object, section: object, top: MixOptions, folder: Path) -> Source:
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name in (MANIFEST, REJECTS):
        raise ValueError(
            f"sources: a name must be letters, digits, '.', '_' and '-', as it names a folder, got {name!r}"
        )
    where = f"sources.{name}"
    if isinstance(section, str):
        section = {"path": section}
    if not isinstance(section, Mapping):
        raise ValueError(f"{where} must be a section with 'path', got {short(section)}")
    check_keys(where, map(str, section), [f.name for f in fields(SourceOptions)], "key")
    options = from_mapping(SourceOptions, section, where)
    check_settings(options, where)
    with _prefixed(where):
        settings = VetSettings(max_pixels=options.max_pixels, think=options.think, system=options.system)
    root_dir = None
    if options.root_dir is not None:
        root_dir = str((folder / Path(options.root_dir).expanduser()).resolve())
        if not Path(root_dir).is_dir():
            raise ValueError(f"{where}.root_dir: {root_dir} is not a folder")
    return Source(
        name=name,
        path=_locate(options.path, folder, f"{where}.path"),
        root_dir=root_dir,
        options=options,
        settings=settings,
        filters=read_filters(options.filter or {}, f"{where}.filter"),
        dedup=options.dedup or top.dedup,
        max_reject_ratio=top.max_reject_ratio if options.max_reject_ratio is None else options.max_reject_ratio,
        section=section,
    )


@contextlib.contextmanager
def _prefixed(where: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}.{error}") from error


def _locate(path: str, folder: Path, key: str) -> str:
    """A path as an absolute one; what is none and may be a hub name as it is."""
    found = folder / Path(path).expanduser()
    if found.exists():
        return str(found.absolute())
    if _GLOB.search(path):
        return str(found)
    if _HUB_NAME.fullmatch(path) and not path.startswith((".", "/")):
        return path
    raise ValueError(f"{key}: {found} does not exist")


def _check_shares(sources: list[Source]) -> None:
    """Weights and repetitions are two ways to say the same."""
    by = {key: [s.name for s in sources if getattr(s.options, key) is not None] for key in ("weight", "repetitions")}
    if by["weight"] and by["repetitions"]:
        raise ValueError(
            f"sources.{by['weight'][0]} has weight and sources.{by['repetitions'][0]} repetitions: give one kind only"
        )
