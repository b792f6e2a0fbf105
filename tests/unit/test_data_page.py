"""What docs/data.md lists is what the code has."""

import re
from pathlib import Path

from nemo_bard.data.layouts import LAYOUTS
from nemo_bard.data.prepare.mix import SourceOptions
from nemo_bard.data.sample import KINDS

PAGE = (Path(__file__).resolve().parents[2] / "docs/data.md").read_text(encoding="utf-8")


def _first_column(heading: str) -> list[str]:
    table = PAGE[PAGE.index(f"| {heading} |") :].split("\n\n")[0].splitlines()[2:]
    return [word for row in table for word in re.findall(r"`(\w+)`", row.split("|")[1])]


def test_kinds_of_rejects():
    table = PAGE[PAGE.index("| kind | meaning |") :].split("\n\n")[0].splitlines()[2:]
    assert table == [f"| `{kind}` | {meaning} |" for kind, meaning in KINDS.items()]


def test_layouts():
    assert set(_first_column("layout")) == set(LAYOUTS)


def test_keys_of_a_source():
    assert set(_first_column("key of a source")) == set(SourceOptions.__dataclass_fields__)
