"""Decoding by the next-token distribution of a causal context: the loop.

Every forward verifies tokens and drafts blocks behind them (``nemo_bard.generation.causal``). What a row holds between two
forwards: one token that is certain and not yet in the cache, and a draft behind it, which may be empty. The forward tells the
next token behind each of them. As long as the draft has that token, it is accepted; where it has another one, the right one is
known, and is the certain token of the next forward. So a forward finds at least one token, whatever the draft, and the answer
does not depend on drafts: ``autoregressive`` is this loop without any.

With ``temperature`` > 0 the token at a place of a row is decided by one number, which depends on the row's seed and the place
alone; drafts are drawn with the same number, so that a good draft has the same token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nemo_bard.generation.causal import Verdict, num_drafts
from nemo_bard.generation.decode import DecodeResult, Loop, say_once
from nemo_bard.generation.drafts import likely_ends
from nemo_bard.generation.records import Recorder
from nemo_bard.generation.sampling import Candidates, propose, uniform_numbers
from nemo_bard.generation.session import Session


@dataclass(kw_only=True)
class Row:
    """A row of the batch."""

    number: int
    """In the batch."""
    response: list[int] = field(default_factory=list)
    """Its last token is certain, and not yet in the cache."""
    draft: list[int] = field(default_factory=list)
    confidence: list[float] = field(default_factory=list)
    """Of the draft's tokens."""
    found: list[int] = field(default_factory=list)
    """Tokens that each forward has found."""


class NextTokenDecoder(Loop):
    """The loop for one batch. ``logits_processor`` and ``stopping_criteria`` are asked about each token, row by row."""

    def __init__(self, session: Session, **options: Any) -> None:
        """Prepare decoding; ``options`` are those of ``Loop``."""
        super().__init__(session, **options)
        self.engine = self.settings.engine(session)
        self.num_drafts = num_drafts(self.settings)
        self.ends = frozenset(self.settings.end_ids)
        self.rows = [Row(number=number) for number in range(len(self.prompt.input_ids))]
        self.live = list(self.rows)
        """Rows that have not ended."""
        self.recorder = Recorder(self.settings.block_size, self.settings.mask_token_id)
        if self.settings.compile_step:
            name = self.given.remasking_strategy
            say_once(f"decoding goes step by step from the host, without CUDA graphs, for remasking_strategy={name}")

    def _run(self) -> DecodeResult:
        start = self._clock()
        self.session.encode_vision()
        after_vision = self._clock()
        ends = [[1] if self.num_drafts else [] for _ in self.live]
        self._take(self.engine.first(with_draft=self.num_drafts > 0), ends)
        after_prefill = self._clock()
        while self.live:
            ends = [self._ends(row) for row in self.live]
            clean = [[row.response[-1], *row.draft] for row in self.live]
            verdict = self.engine.step(_padded(clean, self.device), _padded(ends, self.device, repeat=True))
            self._take(verdict, ends)
        end = self._clock()
        return self._result(
            {"vision": after_vision - start, "prefill": after_prefill - after_vision, "decode": end - after_prefill}
        )

    def _result(self, seconds: dict[str, float]) -> DecodeResult:
        lengths = [len(row.response) for row in self.rows]
        sequences = torch.full((len(self.rows), max(lengths)), self.settings.pad_token_id)
        found = torch.zeros(len(self.rows), max(len(row.found) for row in self.rows), dtype=torch.int64)
        for row in self.rows:
            sequences[row.number, : len(row.response)] = torch.tensor(row.response)
            found[row.number, : len(row.found)] = torch.tensor(row.found)
        return DecodeResult(
            sequences=sequences.to(self.device),
            lengths=lengths,
            block_step_counts=(found > 0).long(),
            commit_forwards=[0] * len(lengths),
            forwards=self.engine.forwards,
            seconds=seconds,
            history=self.history,
            accepted_tokens=found,
        )

    def _ends(self, row: Row) -> list[int]:
        left = self.given.max_new_tokens - len(row.response)
        return likely_ends(row.draft, row.confidence, left=left, end_ids=self.ends, most=self.num_drafts)

    def _take(self, verdict: Verdict, ends: Sequence[Sequence[int]]) -> None:
        """Accept what a forward says, and drop the rows that have ended."""
        places = [len(row.response) for row in self.live]
        told = self._told(verdict.logits, places)
        accepted, news = [], []
        for row, tokens in zip(self.live, told.ids.tolist(), strict=True):
            right = 0
            while right < len(row.draft) and row.draft[right] == tokens[right]:
                right += 1
            accepted.append(([row.response[-1]] if row.response else []) + row.draft[:right])
            news.append(tokens[: right + 1])
        behind = [len(new) for new in news]
        drafts = self._drafts(verdict, ends, behind, places)
        going = []
        for index, (row, new) in enumerate(zip(self.live, news, strict=True)):
            row.draft, row.confidence = drafts[index]
            if self._add(row, new):
                going.append(index)
        self._show(told.confidence)
        if self.hooks.on_block is not None:
            row = self.live[0]
            self.hooks.on_block(torch.tensor(row.response[-row.found[-1] :], device=self.device))
            if going and self._stops(row):  # which may depend on what came of that
                going = []
        self.engine.accept(accepted)
        if len(going) < len(self.live):
            self.live = [self.live[index] for index in going]
            if going:
                self.engine.select(torch.tensor(going, device=self.device))

    def _drafts(
        self, verdict: Verdict, ends: Sequence[Sequence[int]], behind: Sequence[int], places: Sequence[int]
    ) -> list[tuple[list[int], list[float]]]:
        """Tokens and confidence of each row's next draft, the place of the certain token left out; empty if none was made."""
        has = [count in own for count, own in zip(behind, ends, strict=True)]
        if not any(has):
            return [([], [])] * len(has)
        segment = [own.index(count) if count in own else 0 for count, own in zip(behind, ends, strict=True)]
        logits = verdict.draft(torch.tensor(segment, device=self.device))
        found = self._propose(logits, [place + count - 1 for place, count in zip(places, behind, strict=True)])
        pairs = zip(has, found.ids[:, 1:].tolist(), found.confidence[:, 1:].tolist(), strict=True)
        return [(ids, confidence) if one else ([], []) for one, ids, confidence in pairs]

    # ------------------ tokens ------------------
    def _told(self, logits: Tensor, places: Sequence[int]) -> Candidates:
        """The next token behind each clean token, ``[N, M]``."""
        if self.hooks.logits_processor is not None:
            for index, row in enumerate(self.live):
                for column in range(len(row.draft) + 1):
                    ids = self._context(row, [*row.response, *row.draft[:column]])
                    logits[index, column] = self.hooks.logits_processor(ids, logits[index, column].unsqueeze(0))[0]
        return self._propose(logits, places)

    def _propose(self, logits: Tensor, places: Sequence[int]) -> Candidates:
        """Tokens ``[N, M]`` at the places of the response that begin with ``places``."""
        width = logits.shape[1]
        if self.given.suppress_mask_token:
            logits[..., self.settings.mask_token_id] = float("-inf")
        uniform = None
        if self.given.temperature > 0:
            seeds = self.seeds[torch.tensor([row.number for row in self.live], device=self.device)]
            place = torch.tensor(places, device=self.device).unsqueeze(1) + torch.arange(width, device=self.device)
            place = place.flatten()
            uniform = uniform_numbers(seeds.repeat_interleave(width), place, torch.zeros_like(place), 1).flatten()
        found = propose(
            logits.flatten(0, 1),
            temperature=self.given.temperature,
            top_k=self.given.top_k,
            top_p=self.given.top_p,
            uniform=uniform,
        )
        return Candidates(found.ids.unflatten(0, (-1, width)), found.confidence.unflatten(0, (-1, width)), None)

    def _context(self, row: Row, response: Sequence[int]) -> Tensor:
        """Prompt, without padding, and response of a row, ``[1, ...]``."""
        prompt = self.prompt.input_ids[row.number, self.prompt.real[row.number]]
        return torch.cat([prompt, torch.tensor(response, dtype=torch.int64, device=self.device)]).unsqueeze(0)

    def _add(self, row: Row, new: Sequence[int]) -> bool:
        """Add the tokens that a forward found, up to the row's end; returns whether it goes on, with its draft cut likewise."""
        goes_on, before = True, len(row.response)
        for token in new:
            row.response.append(token)
            goes_on = token not in self.ends and len(row.response) < self.given.max_new_tokens and not self._stops(row)
            if not goes_on:
                break
        row.found.append(len(row.response) - before)
        keep = max(0, self.given.max_new_tokens - len(row.response) - 1) if goes_on else 0
        first_end = next((i + 1 for i, token in enumerate(row.draft) if token in self.ends), keep)
        row.draft, row.confidence = row.draft[: min(keep, first_end)], row.confidence[: min(keep, first_end)]
        return goes_on

    def _stops(self, row: Row) -> bool:
        """Whether a criterion ends a row."""
        if self.hooks.stopping_criteria is None:
            return False
        stop = self.hooks.stopping_criteria(self._context(row, row.response), None)
        return bool(stop.all() if isinstance(stop, Tensor) else stop)

    def _show(self, confidence: Tensor) -> None:
        """Tell what a forward did to whoever wants to know; ``confidence`` ``[N, M]`` is that of the next tokens."""
        if self.hooks.on_draft is not None and self.live[0].draft:
            self.hooks.on_draft(torch.tensor([self.live[0].draft], device=self.device))
        if not self.given.output_history and self.hooks.on_step is None:
            return
        for row, chances in zip(self.live, confidence.float().tolist(), strict=True):
            new = chances[: row.found[-1]]
            for record in self.recorder.records(row.number, row.response, new, row.draft, row.confidence):
                if self.given.output_history:
                    self.history.append(record)
                if self.hooks.on_step is not None:
                    self.hooks.on_step(record)


def _padded(lists: Sequence[Sequence[int]], device: torch.device, *, repeat: bool = False) -> Tensor:
    """Lists as rows of one length, ``[N, longest]`` int64; filled up with 0, or with their first number (1 if empty)."""
    longest = max(len(one) for one in lists)
    filled = [[*one, *[(one[0] if one else 1) if repeat else 0] * (longest - len(one))] for one in lists]
    return torch.tensor(filled, dtype=torch.int64, device=device).view(len(lists), longest)
