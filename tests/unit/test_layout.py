from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch

from nemo_bard.method.layout import (
    CONTEXT,
    NOISY,
    PADDING,
    TokenIds,
    attention_mask,
    context_block_ids,
    find_responses,
    next_block,
    sample_layout,
)

HEADER, END, OTHER_END = [7, 8, 9], 5, 6


@dataclass(frozen=True)
class Token:
    """One token of a training row, described without any block id."""

    sample: int
    noisy: bool
    region: int
    """Text before, in, between and after the responses is numbered 0, 1, 2, ...; odd ones are responses."""
    index: int
    """Position within the region."""
    order: int


def describe(length: int, responses: list[tuple[int, int]], block_size: int, sample: int = 0) -> list[Token]:
    """The row ``[context | noisy copies]`` of one conversation, from the definition in docs/architecture.md."""
    edges = [0, *itertools.chain(*responses), length]
    regions = list(zip(edges[:-1], edges[1:], strict=True))
    tokens = [
        Token(sample, False, region, position - start, position)
        for region, (start, end) in enumerate(regions)
        for position in range(start, end)
    ]
    for number, (start, end) in enumerate(responses):
        padded = (end - start + block_size - 1) // block_size * block_size
        tokens += [Token(sample, True, 2 * number + 1, index, start + index) for index in range(padded)]
    return tokens


def may_attend(query: Token, key: Token, block_size: int, context_attention: str) -> bool:
    """The table of the paper, extended to several responses: a block is (region, index // B)."""
    if query.sample != key.sample or query.sample == PADDING:
        return False
    query_block = (query.region, query.index // block_size)
    key_block = (key.region, key.index // block_size)
    if query.noisy:
        return key_block == query_block if key.noisy else key_block < query_block
    if key.noisy:
        return False
    return key_block <= query_block if context_attention == "block" else key.order <= query.order


def brute_force(tokens: list[Token], block_size: int, context_attention: str) -> torch.Tensor:
    return torch.tensor([[may_attend(q, k, block_size, context_attention) for k in tokens] for q in tokens])


def ids_of(length: int, responses: list[tuple[int, int]], block_size: int, sample: int = 0) -> TokenIds:
    layout = sample_layout(length, responses, block_size, drop_last_clean_block=False)
    return TokenIds(torch.full_like(layout.block, sample), layout.branch, layout.block, torch.arange(len(layout)))


CONVERSATIONS = {
    "one_turn": (13, [(5, 13)]),
    "short_answer": (9, [(8, 9)]),
    "prefix_of_whole_blocks": (16, [(8, 16)]),
    "text_after_the_answer": (15, [(4, 10)]),
    "two_turns": (22, [(3, 9), (14, 22)]),
    "three_turns": (31, [(2, 7), (10, 11), (17, 30)]),
    "answers_side_by_side": (12, [(3, 7), (7, 12)]),
    "answer_first": (10, [(0, 6)]),
}


@pytest.mark.parametrize("context_attention", ["block", "causal"])
@pytest.mark.parametrize("block_size", [1, 3, 4, 8, 32])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_attention_mask_equals_its_definition(conversation, block_size, context_attention):
    length, responses = CONVERSATIONS[conversation]
    ids = ids_of(length, responses, block_size)
    expected = brute_force(describe(length, responses, block_size), block_size, context_attention)
    assert torch.equal(attention_mask(ids, ids, context_attention=context_attention), expected)


@pytest.mark.parametrize("context_attention", ["block", "causal"])
def test_attention_mask_of_packed_and_padded_rows(context_attention):
    """Samples of a row do not see each other, whatever their block ids, and padding sees and is seen by nothing."""
    block_size, parts = 4, [(13, [(5, 13)]), (22, [(3, 9), (14, 22)])]
    tokens, ids = [], []
    for sample, (length, responses) in enumerate(parts):
        tokens += describe(length, responses, block_size, sample)
        ids.append(ids_of(length, responses, block_size, sample))
    tokens += [Token(PADDING, False, 0, 0, 0)] * 5
    ids.append(TokenIds(torch.full((5,), PADDING), *[torch.zeros(5, dtype=torch.int64)] * 3))
    row = TokenIds(*(torch.cat(field) for field in zip(*ids, strict=True)))
    mask = attention_mask(row, row, context_attention=context_attention)
    assert torch.equal(mask, brute_force(tokens, block_size, context_attention))
    assert not mask[-5:].any()
    assert not mask[:, -5:].any()


def test_attention_mask_broadcasts_over_rows_and_takes_other_queries_than_keys():
    one, two = ids_of(13, [(5, 13)], 4), ids_of(13, [(4, 12)], 4)
    batch = TokenIds(*(torch.stack(pair) for pair in zip(one, two, strict=True)))
    full = attention_mask(batch, batch)
    assert torch.equal(full, torch.stack([attention_mask(one, one), attention_mask(two, two)]))
    some = TokenIds(*(field[:, 6:9] for field in batch))
    assert torch.equal(attention_mask(some, batch), full[:, 6:9])


def test_attention_mask_refuses_an_unknown_context_attention():
    ids = ids_of(13, [(5, 13)], 4)
    with pytest.raises(ValueError, match=r"context_attention must be one of block, causal, got 'full'"):
        attention_mask(ids, ids, context_attention="full")


def test_context_tokens_see_nothing_else_when_noisy_copies_are_absent():
    """The decoder's prompt is the context part of the training row: same ids, same mask."""
    ids = ids_of(22, [(3, 9), (14, 22)], 4)
    context = TokenIds(*(field[:22] for field in ids))
    for context_attention in ("block", "causal"):
        full = attention_mask(ids, ids, context_attention=context_attention)
        assert torch.equal(attention_mask(context, context, context_attention=context_attention), full[:22, :22])
        assert not full[:22, 22:].any()


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("block_size", [1, 3, 4, 32])
def test_context_block_ids_restart_at_both_ends_of_a_response(conversation, block_size):
    length, responses = CONVERSATIONS[conversation]
    ids = context_block_ids(length, responses, block_size)
    keys = [(t.region, t.index // block_size) for t in describe(length, responses, block_size) if not t.noisy]
    numbers = {key: number for number, key in enumerate(sorted(set(keys)))}
    assert ids.tolist() == [numbers[key] for key in keys]
    assert next_block(length, responses, block_size) == len(numbers)


def test_context_block_ids_of_a_single_turn_are_those_of_the_paper():
    prefix, response, block_size = 10, 8, 4
    ids = context_block_ids(prefix + response, [(prefix, prefix + response)], block_size)
    expected = [i // 4 for i in range(prefix)] + [3 + i // 4 for i in range(response)]
    assert ids.tolist() == expected
    assert next_block(prefix, [], block_size) == 3


def test_an_empty_context_has_no_blocks():
    assert context_block_ids(0, [], 4).numel() == 0
    assert next_block(0, [], 4) == 0


@pytest.mark.parametrize("block_size", [0, -1, 2.0, "4", True, None])
def test_block_size_has_to_be_a_positive_integer(block_size):
    with pytest.raises(ValueError, match="block_size must be an integer >= 1"):
        context_block_ids(4, [], block_size)
    with pytest.raises(ValueError, match="block_size must be an integer >= 1"):
        sample_layout(8, [(4, 8)], block_size)


@pytest.mark.parametrize("responses", [[(4, 4)], [(4, 3)], [(-1, 3)], [(4, 9)], [(4, 6), (5, 8)], [(5, 8), (1, 3)]])
def test_response_spans_have_to_be_ordered_disjoint_and_inside(responses):
    with pytest.raises(ValueError, match="response spans must be ordered, disjoint and inside 8 tokens"):
        context_block_ids(8, responses, 4)


class TestFindResponses:
    def find(self, ids, header=HEADER, ends=(END,)):
        return find_responses(torch.tensor(ids, dtype=torch.int64), header, list(ends))

    def test_runs_from_behind_the_header_through_the_first_end(self):
        assert self.find([1, *HEADER, 2, 3, END, 4, END]) == [(4, 7)]

    def test_all_turns_in_order(self):
        assert self.find([*HEADER, 2, END, 1, 1, *HEADER, 3, 3, END]) == [(3, 5), (10, 13)]

    def test_an_open_response_ends_with_the_sequence(self):
        assert self.find([*HEADER, 2, END, *HEADER, 3, 3]) == [(3, 5), (8, 10)]

    def test_a_generation_prompt_is_no_response(self):
        assert self.find([1, 2, *HEADER]) == []
        assert self.find([*HEADER, 2, END, *HEADER]) == [(3, 5)]

    def test_any_of_several_ends_closes(self):
        assert self.find([*HEADER, 2, OTHER_END, 3, END], ends=(END, OTHER_END)) == [(3, 5)]

    def test_an_end_before_the_header_does_not_count(self):
        assert self.find([END, 1, END, *HEADER, 2, END]) == [(6, 8)]

    def test_a_header_inside_a_response_is_text(self):
        assert self.find([*HEADER, 2, *HEADER, 3, END, *HEADER, 4, END]) == [(3, 9), (12, 14)]

    def test_an_empty_answer_is_its_end_token(self):
        assert self.find([*HEADER, END, 1]) == [(3, 4)]

    @pytest.mark.parametrize("header", [None, []])
    def test_without_a_header_there_are_none(self, header):
        assert self.find([1, 2, END], header=header) == []

    def test_without_end_ids_a_response_is_open(self):
        assert self.find([*HEADER, 2, END, 3], ends=()) == [(3, 6)]

    @pytest.mark.parametrize("ids", [[], [7], HEADER, [1, 2, 3, 4, 5]])
    def test_short_or_headerless_sequences_have_none(self, ids):
        assert self.find(ids) == []


@pytest.mark.parametrize("drop", [True, False])
@pytest.mark.parametrize("block_size", [1, 4, 8])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_sample_layout(conversation, block_size, drop):
    length, responses = CONVERSATIONS[conversation]
    layout = sample_layout(length, responses, block_size, drop_last_clean_block=drop)
    blocks = context_block_ids(length, responses, block_size)
    kept = int((layout.branch == CONTEXT).sum())
    assert layout.branch.tolist() == [CONTEXT] * kept + [NOISY] * (len(layout) - kept)
    assert layout.source[:kept].tolist() == list(range(kept))
    assert torch.equal(layout.block[:kept], blocks[:kept])
    assert (layout.response[:kept] == -1).all()
    assert not layout.offset[:kept].any()
    assert not layout.padding[:kept].any()
    cursor = kept
    for number, (start, end) in enumerate(responses):
        size = end - start
        padded = -(-size // block_size) * block_size
        copy = slice(cursor, cursor + padded)
        assert layout.source[copy].tolist() == list(range(start, end)) + [-1] * (padded - size)
        assert layout.padding[copy].tolist() == [False] * size + [True] * (padded - size)
        assert layout.offset[copy].tolist() == [0] * size + list(range(1, padded - size + 1))
        assert layout.block[copy].tolist() == [int(blocks[start]) + i // block_size for i in range(padded)]
        assert (layout.response[copy] == number).all()
        cursor += padded
    assert cursor == len(layout)
    last_start, last_end = responses[-1]
    assert kept == (last_start + (last_end - last_start - 1) // block_size * block_size if drop else length)


@pytest.mark.parametrize("context_attention", ["block", "causal"])
@pytest.mark.parametrize("block_size", [1, 3, 4, 8])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_what_is_left_out_reaches_no_supervised_token(conversation, block_size, context_attention):
    """No path of any number of layers leads from a supervised token to a dropped one; and no more could be dropped."""
    length, responses = CONVERSATIONS[conversation]
    ids = ids_of(length, responses, block_size)
    sees = attention_mask(ids, ids, context_attention=context_attention)
    reached = sees[length:].any(0)
    for _ in range(len(ids.block)):
        reached = reached | sees[reached].any(0)
    kept = int((sample_layout(length, responses, block_size).branch == CONTEXT).sum())
    assert not reached[kept:length].any()
    if context_attention == "block":
        assert reached[:kept].all()


def test_only_the_chosen_responses_are_supervised():
    layout = sample_layout(31, [(2, 7), (10, 11), (17, 30)], 4, supervised=[1, 0, 1])
    noisy = layout.branch == NOISY
    assert layout.response[noisy].tolist() == [0] * 8 + [1] * 4
    assert int((~noisy).sum()) == 10  # up to the only block of the last chosen response


@pytest.mark.parametrize("supervised", [[], ()])
def test_a_sample_needs_a_supervised_response(supervised):
    with pytest.raises(ValueError, match="at least one assistant response"):
        sample_layout(8, [(4, 8)], 4, supervised=supervised)
    with pytest.raises(ValueError, match="at least one assistant response"):
        sample_layout(8, [], 4)


@pytest.mark.parametrize("supervised", [[-1], [1], [0, 5]])
def test_supervised_has_to_index_the_responses(supervised):
    with pytest.raises(ValueError, match="supervised must index the 1 responses"):
        sample_layout(8, [(4, 8)], 4, supervised=supervised)
