"""``docs/settings.md`` is what ``nemo-bard settings`` prints, and that follows what is registered."""

from pathlib import Path

import pytest

from nemo_bard.cli import main
from nemo_bard.cli.commands.settings import PARTS, settings_page

PAGE = Path(__file__).parents[2] / "docs" / "settings.md"


def test_the_page_is_current():
    assert PAGE.read_text() == settings_page(list(PARTS)), "write it with nemo-bard settings > docs/settings.md"


@pytest.mark.parametrize(
    ("part", "rows"),
    [
        ("recipe", ["`loss_chunk_tokens`", "`max_t`", "`max_length`"]),
        ("chain", ["`allow_version_change`", "`learning_rate`", "`gpus_per_node`", "`mask_token_id`"]),
        ("generation", ["`confidence_threshold`", "`entropy_bound`", "low_confidence_static"]),
        ("harness", ["`likelihood_draws`", "`system_prompt`", "`max_frames`"]),
    ],
)
def test_a_part(part, rows, capsys):
    assert main(["settings", part]) == 0
    printed = capsys.readouterr().out
    assert all(row in printed for row in rows)


def test_a_strategy_of_ones_own_is_listed(capsys):
    from dataclasses import dataclass

    from nemo_bard.base.settings import number, setting
    from nemo_bard.generation.parameters import STRATEGIES
    from nemo_bard.generation.strategies import LowConfidenceStatic

    @dataclass(frozen=True, kw_only=True)
    class Patient(LowConfidenceStatic):
        """Waits."""

        patience: float = setting(0.25, number(), "how long it waits")

    STRATEGIES.register("patient", Patient)
    try:
        assert main(["settings", "generation"]) == 0
        assert "| `patience` | `0.25` | a finite number >= 0 | how long it waits |" in capsys.readouterr().out
    finally:
        STRATEGIES.unregister("patient")
