"""Where next-token decoding drafts: behind the tokens at which a draft most likely ends."""

from __future__ import annotations

from collections.abc import Collection, Sequence

LEAST_CHANCE = 0.02
"""Further blocks are drafted only behind tokens at which the draft ends with this probability, by its own confidence."""


def likely_ends(
    draft: Sequence[int], confidence: Sequence[float], *, left: int, end_ids: Collection[int], most: int
) -> list[int]:
    """Behind how many tokens to draft, the certain one in front of the draft counted.

    With confidences ``c``, token ``i`` of the draft is the first wrong one with probability ``c_1 ... c_{i-1} (1 - c_i)``.

    Args:
        draft: Tokens that the next forward verifies.
        confidence: Their probabilities.
        left: Tokens that the response still takes.
        end_ids: Ids behind which nothing comes.
        most: Blocks that a forward drafts.

    Returns:
        At most ``most`` numbers from 1 to ``len(draft) + 1``, the most likely first; empty where nothing is left to draft.
    """
    chances, upto = [], 1.0
    for end in range(1, len(draft) + 2):
        if (end > 1 and draft[end - 2] in end_ids) or end > left - 2:
            break  # of what is behind, the next token is found by the forward itself; a draft needs one more
        chance = confidence[end - 1] if end <= len(draft) else 0.0
        chances.append((upto * (1.0 - chance), end))
        upto *= chance
    chances.sort(key=lambda pair: (-pair[0], -pair[1]))
    likely = [end for chance, end in chances[:most] if chance >= LEAST_CHANCE]
    return likely or [end for _, end in chances[: min(1, most)]]
