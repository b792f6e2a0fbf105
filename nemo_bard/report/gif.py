"""The GIF of a trace: one frame a step, drawn with Pillow."""

from __future__ import annotations

import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from nemo_bard.report.colors import STEP_COLORS, Color, blend, ink_on
from nemo_bard.report.trace import Change, Step, Trace

_WIDTH, _MARGIN = 960, 24
_MAX_BODY = 640
_PAPER, _INK, _SOFT, _MASK, _LINE, _MARK = (
    (251, 251, 249),
    (27, 30, 35),
    (90, 97, 107),
    (229, 231, 235),
    (213, 216, 221),
    (11, 87, 208),
)
_STEP_MS, _LAST_MS = 400, 3000
Box = tuple[int, int, int, int]


def load_font(name: str, size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    """Return a DejaVu font: matplotlib's copy, the system's, or Pillow's own font where there is neither.

    Args:
        name: ``DejaVuSans`` or ``DejaVuSansMono``.
        size: In pixels.
    """
    candidates = [f"{name}.ttf"]
    try:
        import matplotlib

        candidates.insert(0, str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"))
    except ImportError:
        pass
    for candidate in candidates:
        try:
            return ImageFont.truetype(candidate, size)
        except OSError:
            continue
    return ImageFont.load_default(size)


class _Painter:
    """Lays the tokens out once, at their final width, so that nothing moves from frame to frame."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.token_font, self.note_font = load_font("DejaVuSansMono", 20), load_font("DejaVuSans", 12)
        self.text_font, self.title_font = load_font("DejaVuSans", 16), load_font("DejaVuSans", 18)
        self.thumbnails = self._thumbnails()
        self.prompt_lines = self._prompt_lines()
        self.boxes, self.body = self._layout()
        left = max((image.height for image in self.thumbnails), default=0)
        self.head = _MARGIN + max(left, 24 * len(self.prompt_lines)) + 18
        self.window = min(self.body, _MAX_BODY)
        self.height = self.head + 44 + self.window + 66

    def _thumbnails(self) -> list[Image.Image]:
        small = []
        for image in self.trace.images[:3]:
            copy = image.convert("RGB")
            copy.thumbnail((200, 160))
            small.append(copy)
        return small

    def _prompt_lines(self) -> list[str]:
        text = " ".join(
            shown.replace("<image>", "").replace("<video>", "[video] ").strip() for _, shown in self.trace.prompt
        )
        room = _WIDTH - 2 * _MARGIN - sum(image.width + 12 for image in self.thumbnails)
        lines = textwrap.wrap(text, max(10, room // 10))
        return lines if len(lines) <= 6 else [*lines[:5], "..."]

    def _layout(self) -> tuple[list[Box], int]:
        boxes: list[Box] = []
        x, y, high, gap = _MARGIN, 0, 48, 5
        for index, token in enumerate(self.trace.tokens):
            if index and index % self.trace.block_size == 0:
                x += 9
            width = max(26, int(self.token_font.getlength(_shown(token))) + 14)
            width = min(width, _WIDTH - 2 * _MARGIN)
            if x + width > _WIDTH - _MARGIN:
                x, y = _MARGIN, y + high + gap + 3
            boxes.append((x, y, x + width, y + high))
            x += width + gap
            if "\n" in token and index < self.trace.length:
                x, y = _MARGIN, y + high + gap + 3
        return boxes, boxes[-1][3] + 4

    def frame(self, count: int) -> Image.Image:
        """Draw the state after ``count`` steps."""
        trace = self.trace
        canvas = Image.new("RGB", (_WIDTH, self.height), _PAPER)
        draw = ImageDraw.Draw(canvas)
        self._draw_head(canvas, draw)
        step = trace.steps[count - 1] if count else None
        where = f"block {step.block + 1}, step {step.step + 1}" if step else "start"
        line = f"forward {count} of {len(trace.steps)}: {where}"
        draw.text((_MARGIN, self.head + 6), line, font=self.title_font, fill=_INK)
        facts = f"{trace.length} tokens, {trace.tpf:.2f} per forward"
        draw.text((_WIDTH - _MARGIN, self.head + 8), facts, font=self.text_font, fill=_SOFT, anchor="ra")
        body = self._draw_body(count, step)
        canvas.paste(body, (0, self.head + 44))
        self._draw_legend(draw, self.head + 44 + self.window + 18)
        return canvas

    def _draw_head(self, canvas: Image.Image, draw: ImageDraw.ImageDraw) -> None:
        x = _MARGIN
        for image in self.thumbnails:
            canvas.paste(image, (x, _MARGIN))
            draw.rectangle((x - 1, _MARGIN - 1, x + image.width, _MARGIN + image.height), outline=_LINE)
            x += image.width + 12
        for number, line in enumerate(self.prompt_lines):
            draw.text((x, _MARGIN + 24 * number), line, font=self.text_font, fill=_INK)
        draw.line((_MARGIN, self.head, _WIDTH - _MARGIN, self.head), fill=_LINE)

    def _draw_body(self, count: int, step: Step | None) -> Image.Image:
        trace = self.trace
        latest: dict[int, tuple[int, Step, Change]] = {}
        for number, past in enumerate(trace.steps[:count]):
            for change in past.changes:
                latest[change.position] = (number, past, change)
        body = Image.new("RGB", (_WIDTH, self.body), _PAPER)
        draw = ImageDraw.Draw(body)
        block = step.block if step else 0
        for position, box in enumerate(self.boxes):
            current = step is not None and position // trace.block_size == block
            if position not in latest:
                note = f"{step.proposals[position]:.2f}" if step and position in step.proposals else ""
                self._draw_token(draw, box, "\u00b7", note, _MASK, _SOFT, _MARK if current else None)
                continue
            number, past, change = latest[position]
            fill = blend(STEP_COLORS, past.step / (trace.max_steps - 1) if trace.max_steps > 1 else 0.0)
            dropped = position >= trace.length
            if dropped:
                fill = blend((fill, _PAPER), 0.7)
            ring = _INK if number == count - 1 else _MARK if current else None
            note = f"{past.step + 1}{'*' if change.revised else ''}"
            self._draw_token(draw, box, _shown(change.text), note, fill, ink_on(fill), ring)
            if dropped:
                middle = (box[1] + box[3]) // 2 - 6
                draw.line((box[0] + 5, middle, box[2] - 5, middle), fill=_SOFT, width=2)
        top = 0
        if self.body > self.window:  # follow the current block
            focus = self.boxes[min(block * trace.block_size, len(self.boxes) - 1)][1]
            top = min(max(0, focus - self.window // 2), self.body - self.window)
        return body.crop((0, top, _WIDTH, top + self.window))

    def _draw_token(
        self, draw: ImageDraw.ImageDraw, box: Box, text: str, note: str, fill: Color, ink: Color, ring: Color | None
    ) -> None:
        draw.rounded_rectangle(box, radius=6, fill=fill, outline=ring, width=3 if ring == _INK else 2)
        middle = (box[0] + box[2]) // 2
        draw.text((middle, box[1] + 24), text, font=self.token_font, fill=ink, anchor="ms")
        draw.text((middle, box[1] + 42), note, font=self.note_font, fill=ink, anchor="ms")

    def _draw_legend(self, draw: ImageDraw.ImageDraw, y: int) -> None:
        draw.text((_MARGIN, y), "fixed in step 1", font=self.note_font, fill=_SOFT)
        x = _MARGIN + int(self.note_font.getlength("fixed in step 1")) + 8
        for offset in range(120):
            draw.line((x + offset, y + 1, x + offset, y + 13), fill=blend(STEP_COLORS, offset / 119))
        draw.text((x + 128, y), str(self.trace.max_steps), font=self.note_font, fill=_SOFT)
        words = "thick frame: fixed now    blue frame: current block    *: revised    \u00b7: masked, confidence below"
        draw.text((_MARGIN, y + 22), words, font=self.note_font, fill=_SOFT)


def _shown(token: str) -> str:
    if token and not token.strip(" "):
        return "\u2423" * len(token)
    return token.replace("\n", "\u21b5").replace("\t", "\u21e5") or " "


def write_gif(trace: Trace, path: Path) -> None:
    """Draw every step and write the animation, which loops.

    Args:
        trace: What to show.
        path: File to write.
    """
    painter = _Painter(trace)
    frames = [painter.frame(count) for count in range(len(trace.steps) + 1)]
    # One palette for all frames: quantising each alone makes colours flicker.
    palette = frames[-1].quantize(colors=256)
    indexed = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    durations = [_STEP_MS] * (len(frames) - 1) + [_LAST_MS]
    indexed[0].save(path, save_all=True, append_images=indexed[1:], duration=durations, loop=0, optimize=False)
