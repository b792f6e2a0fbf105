"""Readers: what opens a data set by name, the same for training, evaluation and resuming.

A reader is anything that can be called and returns a sized, map-style data set. An item is ``{"conversation",
"sample_index", ...}`` as in ``nemo_bard.data.conversation``. A data set may have ``fingerprint()`` (a text that changes with
its samples: lengths are measured once), ``identity()`` (what a run that goes on has to find again, see
``data.stream.identity_of``), ``ordered`` (true: nobody shuffles it), ``peek(index)`` (an item whose images need to know their
``size`` only), ``describe(index)`` (``source`` and ``id`` for the list of rejected samples) and ``score`` (how answers are
compared). A reader may have ``input_files(**settings)``, which names the files that it will read.

All ranks of a recipe open their data sets at the same time, so that opening has to be quick: a data set that checks its
samples has ``check(index)`` and calls ``data.checks.check_samples`` at its end, which a recipe deals out over its ranks.
"""

from __future__ import annotations

import glob
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, cast

from nemo_bard.base.errors import nearest
from nemo_bard.base.registry import Registry, import_dotted
from nemo_bard.data.json_text import load_json
from nemo_bard.data.prepared.layout import is_prepared
from nemo_bard.data.raw.files import FORMATS

Reader = Callable[..., Any]

_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
_FILE_ENDS = tuple(FORMATS)
_LOOK_AT = 1 << 20
"""Bytes of a first line by which its layout is found; those of a longer one are taken as our JSONL."""


def _check(name: str, reader: Any) -> None:
    if not callable(reader):
        raise ValueError(f"data: the reader {name} must be callable, got {type(reader).__name__}")


READERS: Registry[Reader] = Registry(
    "data",
    "nemo_bard.readers",
    {
        "jsonl": "nemo_bard.data.jsonl.make_jsonl",
        "digits": "nemo_bard.data.digits.read_digits",
        "rows": "nemo_bard.data.rows.RowsDataset",
        "prepared": "nemo_bard.data.prepared.dataset.PreparedDataset",
    },
    check=_check,
)
"""Name -> reader; ``NAME:FIRST,key=value`` calls it with ``FIRST`` and the keys."""


class FirstSamples:
    """The first samples of a data set.

    Args:
        dataset: Sized and map-style.
        limit: How many at most.
    """

    def __init__(self, dataset: Any, limit: int) -> None:
        self.dataset, self.limit = dataset, min(limit, len(dataset))
        self.score = own_scorer(dataset)

    def __len__(self) -> int:
        return self.limit

    def __getitem__(self, index: int) -> Any:
        """Return an item.

        Raises:
            IndexError: If ``index`` is outside.
        """
        if not 0 <= index < self.limit:
            raise IndexError(f"index {index} is outside a data set of {self.limit} samples")
        return self.dataset[index]


def own_scorer(dataset: Any) -> Callable[[str, str], Any] | None:
    """The scorer that a data set brings: its ``score``, or the function ``score`` of the module of its class."""
    own = getattr(dataset, "score", None) or getattr(sys.modules.get(type(dataset).__module__), "score", None)
    return own if callable(own) else None


def open_dataset(spec: str | Mapping[str, Any], *, limit: int | None = None, validate: bool = True) -> Any:
    """Open a data set by what users write.

    Args:
        spec: A path: a JSONL file, a prepared folder, or raw data of any layout; ``NAME`` or ``NAME:FIRST,key=value,...`` with a registered reader (``digits:test,rows=2``) or
            the dotted name of one; or a section ``{"_target_": dotted name, ...}`` as in a recipe.
        limit: Samples to open; all if None.
        validate: Check all samples at the start, where the reader can.

    Returns:
        A sized, map-style data set.

    Raises:
        ValueError: If there is no such file or reader (names the known ones), or as the reader raises.
    """
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise ValueError(f"limit must be an integer >= 1, got {limit!r}")
    reader, words, settings = find_reader(spec)
    signature = inspect.signature(reader)
    if limit is not None and "limit" in signature.parameters:
        settings = {**settings, "limit": limit}
    if "validate" in signature.parameters:
        settings = {"validate": validate, **settings}
    try:
        signature.bind(*words, **settings)
    except TypeError as error:
        raise ValueError(f"data {spec!r}: the reader {error}") from error
    dataset = reader(*words, **settings)
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise ValueError(f"data {spec!r}: the reader must return a sized, map-style data set, got {type(dataset)}")
    return FirstSamples(dataset, limit) if limit is not None and len(dataset) > limit else dataset


def find_reader(spec: str | Mapping[str, Any]) -> tuple[Reader, list[str], dict[str, Any]]:
    """The reader that a text or a section means, and what to call it with.

    Raises:
        ValueError: If it means none.
    """
    if isinstance(spec, Mapping):
        settings = {key: value for key, value in spec.items() if key != "_target_"}
        target = spec.get("_target_")
        if not target:
            raise ValueError(f"data must have _target_, such as nemo_bard.data.JsonlDataset, got {dict(spec)!r}")
        return (READERS.get(target) if isinstance(target, str) else target), [], settings
    if not isinstance(spec, str) or not spec:
        raise ValueError(f"data must be a text or a section with _target_, got {spec!r}")
    if Path(spec).exists():
        return READERS.get(reader_of(Path(spec))), [spec], {}
    name, colon, rest = spec.partition(":")
    dotted = bool(_DOTTED.fullmatch(name)) and not name.endswith(_FILE_ENDS)
    if name in READERS or dotted:
        return READERS.get(name), *_arguments(spec, rest)
    if not colon:
        return READERS.get("rows" if glob.has_magic(spec) else "jsonl"), [spec], {}
    near = nearest(name, READERS.names())
    hint = f" (did you mean {near}:{rest}?)" if near else ""
    raise ValueError(
        f"data set must be a file, a folder, NAME:... with one of {', '.join(READERS.names())}, or a dotted name, got"
        f" {spec!r}{hint}"
    )


def reader_of(path: Path) -> str:
    """The name of the reader of a path that exists: of a prepared folder, of our JSONL, or of any other layout."""
    if path.is_dir():
        return "prepared" if is_prepared(path) else "rows"
    kind = FORMATS.get(path.suffix.lower(), "jsonl")
    if kind not in ("jsonl", "json"):
        return "rows"
    with path.open("rb") as file:
        first = file.readline(_LOOK_AT)
    if kind == "json" and first.removeprefix(b"\xef\xbb\xbf").strip() in (b"", b"[", b"{"):
        return "rows"
    try:
        row = load_json(first)
    except (ValueError, RecursionError):
        return "rows" if kind == "json" and first.lstrip().startswith(b"[") else "jsonl"
    return "jsonl" if isinstance(row, dict) and "messages" in row else "rows"


def _arguments(spec: str, rest: str) -> tuple[list[str], dict[str, Any]]:
    """``FIRST,key=value,...`` as arguments; whole numbers and true/false are read as such."""
    first, *fields = rest.split(",")
    if "=" in first:
        first, fields = "", [first, *fields]
    settings: dict[str, Any] = {}
    for text in fields:
        key, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"data set {spec!r}: {text!r} is not key=value")
        words = {"true": True, "false": False}
        settings[key] = int(value) if value.lstrip("-").isdigit() else words.get(value, value)
    return ([first] if first else []), settings


def input_files(section: Mapping[str, Any]) -> dict[str, Path]:
    """Files and folders that a data set reads, by the key of its section of a recipe: what resuming compares.

    A reader with ``input_files(**settings)`` says so itself (paths, or paths by name). Of others, ``path`` counts, and
    every other key that names a file; folders, such as those of images, are not read through.

    Args:
        section: ``dataset`` or ``validation_dataset`` of a recipe; may be empty.

    Raises:
        ValueError: If its reader cannot be imported.
    """
    settings: Mapping[str, Any] = {key: value for key, value in section.items() if key != "_target_"}
    if isinstance(spec := settings.get("spec"), (str, Mapping)):
        reader, words, settings = find_reader(spec)
        settings = {**dict(zip(inspect.signature(reader).parameters, words, strict=False)), **settings}
    else:
        target = section.get("_target_")
        reader = import_dotted(target) if isinstance(target, str) else target
    own = getattr(reader, "input_files", None)
    if callable(own):
        found = cast("Mapping[str, Any] | Iterable[Any]", own(**settings))
        if not isinstance(found, Mapping):
            found = {str(number): path for number, path in enumerate(found)}
        return {str(name): Path(path) for name, path in found.items()}
    paths = {key: Path(value) for key, value in settings.items() if isinstance(value, str) and value}
    return {key: path for key, path in paths.items() if (path.exists() if key == "path" else path.is_file())}
