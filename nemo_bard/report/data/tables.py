"""The tables of a survey, as cells: for the terminal and for the page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from nemo_bard.data.prepared.layout import SourceEntry
from nemo_bard.data.survey.margins import Estimate
from nemo_bard.data.survey.survey import SourceSurvey, Survey


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table with a title and remarks below it."""

    title: str
    header: list[str]
    rows: list[list[str]] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def all_tables(survey: Survey) -> list[Table]:
    """Every table that there is something to say in, in order."""
    tables = [
        run_table(survey),
        left_out_table(survey),
        reasons_table(survey),
        kept_table(survey),
        padding_table(survey),
    ]
    return [table for table in tables if table is not None]


def run_table(survey: Survey) -> Table:
    """Rows, and what the run draws of them."""
    rows = []
    for one in survey.sources:
        epochs = f"{one.draws.epochs:.3g}"
        rows.append(
            [
                one.source.name,
                f"{one.source.rows:,}",
                f"{100 * one.draws.weight:.3g} %",
                f"{one.draws.samples:,}",
                epochs,
                f"{one.measured.looked:,}",
                f"{one.unmeasured:,}",
            ]
        )
    if len(rows) > 1:
        looked = sum(one.measured.looked for one in survey.sources)
        bad = sum(one.unmeasured for one in survey.sources)
        total = sum(one.source.rows for one in survey.sources)
        rows.append(["all", f"{total:,}", "100 %", f"{survey.run_samples:,}", "", f"{looked:,}", f"{bad:,}"])
    remarks = [
        reason if where in reason else f"{where}: {reason}"
        for one in survey.sources
        for _, where, reason in one.measured.unusable[:3]
    ]
    header = ["source", "rows", "weight", "draws", "epochs", "looked at", "unusable"]
    return Table(title="Sources, and what a run draws of them", header=header, rows=rows, remarks=remarks)


def left_out_table(survey: Survey) -> Table | None:
    """How many rows of the sources' files are samples; None unless the folder was prepared."""
    known = _entries(survey)
    if not known:
        return None
    rows, remarks = [], []
    for entry in known:
        duplicates = entry.rejected.get("duplicate", 0)
        filtered, rejected = sum(entry.filtered.values()), sum(entry.rejected.values()) - duplicates
        counts = (entry.read, filtered, rejected, duplicates, entry.rows)
        rows.append([entry.name, entry.layout, *(f"{count:,}" for count in counts)])
        if entry.rows == entry.settings.get("limit"):
            remarks.append(f"{entry.name}: reading ended at its limit of {entry.rows:,} samples")
        missing = entry.read - filtered - rejected - duplicates - entry.rows
        if missing:
            remarks.append(f"{entry.name}: {missing:,} of the rows read are in none of these columns")
    header = ["source", "layout", "read", "filtered", "rejected", "duplicates", "samples"]
    return Table(title="Rows read, left out and kept", header=header, rows=rows, remarks=remarks)


def reasons_table(survey: Survey) -> Table | None:
    """Why rows were left out; None if none was."""
    rows = [
        [entry.name, reason if "." in reason else reason.replace("_", " "), f"{count:,}"]
        for entry in _entries(survey)
        for reason, count in {**entry.filtered, **entry.rejected}.items()
    ]
    return Table(title="Why rows were left out", header=["source", "reason", "rows"], rows=rows) if rows else None


def _entries(survey: Survey) -> list[SourceEntry]:
    return [one.source.entry for one in survey.sources if one.source.entry is not None]


def kept_table(survey: Survey) -> Table | None:
    """Samples that a limit of tokens keeps and loses, per source; None if lengths are not known."""
    rows, any_estimate = [], False
    for one in survey.sources:
        kept = survey.kept(one)
        if kept is None:
            continue
        any_estimate |= not all(share.exact for share in kept.values())
        rows.append([one.source.name, *(_share(share) for share in kept.values())])
        lost = [f"-{(1 - kept[limit].value) * one.source.rows:,.0f}" for limit in survey.limits]
        rows.append(["  rows lost", *(text if text != "-0" else "0" for text in lost)])
    if not rows:
        return None
    of_draws = survey.kept_of_draws()
    if of_draws is not None and len(survey.sources) > 1:
        rows.append(
            ["all, as drawn", *(f"{100 * of_draws[limit]:.1f}".replace("100.0", "100") for limit in survey.limits)]
        )
    header = ["max_length", *(_limit(survey, limit) for limit in survey.limits)]
    remarks = [f"block size {survey.block_size}, supervised turns: {survey.turns}; a row holds its noisy copies too"]
    if survey.max_length is not None:
        remarks.append("* the configured one")
    if any_estimate:
        remarks.append("in brackets: where the share of the whole source lies with 95 % confidence")
    return Table(title="Samples kept by max_length, %", header=header, rows=rows, remarks=remarks)


def padding_table(survey: Survey) -> Table | None:
    """What filling up the last block of each response costs, per source; None if lengths are not known."""
    found = [(one, survey.padding(one)) for one in survey.sources]
    known: list[tuple[SourceSurvey, Mapping[int, Estimate]]] = [(one, shares) for one, shares in found if shares]
    if not known:
        return None
    rows = [[one.source.name, *(_share(share) for share in shares.values())] for one, shares in known]
    header = ["block size", *(str(block) for block in known[0][1])]
    return Table(
        title="Tokens of training rows that only fill up blocks, %",
        header=header,
        rows=rows,
        remarks=["without what pads rows of a batch to one length"],
    )


def _limit(survey: Survey, limit: int) -> str:
    return f"{limit}*" if limit == survey.max_length else str(limit)


def _share(share: Estimate) -> str:
    value, low, high = (f"{100 * part:.1f}".replace("100.0", "100") for part in share)
    return value if low == high else f"{value} ({low}-{high})"
