"""Colours of steps and confidences, the same in the page, the GIF and the picture."""

from __future__ import annotations

from collections.abc import Sequence

Color = tuple[int, int, int]
STEP_COLORS: tuple[Color, ...] = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
"""Viridis from the first to the last step: rises in lightness, so it also works in grey and for the colour-blind."""
CONFIDENCE_COLORS: tuple[Color, ...] = ((179, 84, 30), (240, 222, 178), (31, 111, 139))
"""Orange over sand to blue, from 0 to 1."""


def blend(colors: Sequence[Color], share: float) -> Color:
    """Colour at ``share`` in [0, 1] of a scale."""
    place = min(max(share, 0.0), 1.0) * (len(colors) - 1)
    low = min(int(place), len(colors) - 2)
    part = place - low
    red, green, blue = (round(a + (b - a) * part) for a, b in zip(colors[low], colors[low + 1], strict=True))
    return red, green, blue


def ink_on(color: Color) -> Color:
    """Black or white, whichever reads better on ``color`` (WCAG relative luminance)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in color)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return (255, 255, 255) if 1.05 / (luminance + 0.05) > (luminance + 0.05) / 0.05 else (0, 0, 0)
