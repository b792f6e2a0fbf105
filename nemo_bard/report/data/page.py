"""The page of a survey: one file, no network, no scripts, in light and dark; everything from the data set is escaped."""

from __future__ import annotations

import base64
import html
import io

from PIL import Image

from nemo_bard.data.survey.survey import Survey
from nemo_bard.method.layout import CONTEXT
from nemo_bard.report.data.mask import CONTEXT_COLOR, EARLIER_COLOR, OWN_COLOR, draw_mask, png_uri
from nemo_bard.report.data.samples import Piece, Shown
from nemo_bard.report.data.tables import Table, all_tables

THUMBNAIL = 360
"""Longest side of an image on the page, in pixels."""

STYLE = """
:root { color-scheme: light dark; --page: #fbfbf9; --card: #ffffff; --ink: #1b1e23; --soft: #5a616b; --line: #d5d8dd;
  --even: #cfe6d4; --odd: #b4d4bd; --media: #e3e6ea; --bad: #a4262c; }
@media (prefers-color-scheme: dark) { :root { --page: #14161a; --card: #1d2026; --ink: #eceef1; --soft: #a3abb6;
  --line: #3a404a; --even: #1f4a30; --odd: #2c6341; --media: #2f353e; --bad: #ff8a8a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 72rem; margin: 0 auto; padding: 1.5rem 1rem 3rem; }
h1 { font-size: 1.35rem; margin: 0 0 .25rem; overflow-wrap: anywhere; } h2 { font-size: 1.05rem; margin: 0 0 .5rem; }
h3 { font-size: .95rem; margin: 1rem 0 .4rem; } p { margin: .3rem 0; }
.soft { color: var(--soft); font-size: .88rem; overflow-wrap: anywhere; } .bad { color: var(--bad); overflow-wrap: anywhere; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: 1rem; margin-top: 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .88rem; }
th, td { text-align: right; padding: .25rem .7rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
.histograms { max-width: 100%; height: auto; display: block; }
.images { display: flex; flex-wrap: wrap; gap: .5rem; margin: .5rem 0; }
.images img { max-width: 100%; height: auto; border: 1px solid var(--line); border-radius: .3rem; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; max-height: 30rem; overflow-y: auto;
  font: .9rem/1.7 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; }
.role { color: var(--soft); margin-right: .5rem; font-family: system-ui, sans-serif; }
.s { background: var(--even); border-radius: .2rem; box-shadow: inset -1px 0 var(--card); } .s.odd { background: var(--odd); }
.m { background: var(--media); border-radius: .2rem; padding: 0 .3rem; font-family: system-ui, sans-serif; font-size: .8rem; }
.mask { width: min(100%, 34rem); height: auto; border: 1px solid var(--line); image-rendering: pixelated; display: block; }
.key { display: inline-block; width: .8rem; height: .8rem; border-radius: .15rem; margin: 0 .3rem 0 .9rem; vertical-align: -1px; }
"""


def render_page(
    survey: Survey,
    samples: list[Shown],
    *,
    title: str,
    pictures: tuple[bytes, bytes] | None,
    context_attention: str = "block",
) -> str:
    """Return the page as HTML text.

    Args:
        survey: Its tables.
        samples: Shown one by one.
        title: What the data set is called.
        pictures: PNG files of its histograms, for light and for dark; None without.
        context_attention: What masks are drawn with, see ``layout.attention_mask``.
    """
    parts = [_table(table) for table in all_tables(survey)]
    if pictures is not None:
        parts.append(_histograms(*pictures))
    parts += [_sample(shown, survey, context_attention) for shown in samples]
    with_tokens = (
        f"Tokens at block size {survey.block_size}, noisy copies included."
        if survey.block_size is not None
        else "Lengths are in words; tokens and attention masks need --model FOLDER."
    )
    body = "\n".join(parts)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{_text(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<h1>{_text(title)}</h1>
<p class="soft">{with_tokens}</p>
{body}
</main>
</body>
</html>
"""


def _text(text: object) -> str:
    """Escaped, and without what UTF-8 cannot hold."""
    return html.escape(str(text).encode("utf-8", "replace").decode("utf-8"))


def _table(table: Table) -> str:
    def cells(tag: str, values: list[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{_text(value)}</{tag}>" for value in values) + "</tr>"

    body = "".join(cells("td", row) for row in table.rows)
    remarks = "".join(f'<p class="soft">{_text(remark)}</p>' for remark in table.remarks)
    return (
        f'<section class="card"><h2>{_text(table.title)}</h2><div class="wide"><table><thead>{cells("th", table.header)}'
        f"</thead><tbody>{body}</tbody></table></div>{remarks}</section>"
    )


def _histograms(light: bytes, dark: bytes) -> str:
    uris = [f"data:image/png;base64,{base64.b64encode(picture).decode('ascii')}" for picture in (light, dark)]
    return (
        '<section class="card"><h2>How large samples are</h2><picture>'
        f'<source media="(prefers-color-scheme: dark)" srcset="{uris[1]}">'
        f'<img class="histograms" alt="Histograms of lengths, pixels and turns" src="{uris[0]}"></picture></section>'
    )


def _sample(shown: Shown, survey: Survey, context_attention: str) -> str:
    name = f"{shown.source}: {shown.id}" if shown.id is not None else shown.source
    parts = [f"<h2>{_text(name)}</h2>", f'<p class="soft">{_text(shown.where)}</p>']
    if shown.problem is not None:
        parts.append(f'<p class="bad">cannot be used: {_text(shown.problem)}</p>')
    if shown.images:
        tags = "".join(_image(image, number) for number, image in enumerate(shown.images, start=1))
        parts.append(f'<div class="images">{tags}</div>')
    if shown.pieces:
        parts.append('<p class="soft">Coloured: supervised tokens; the shade changes from block to block.</p>')
        parts.append(f'<div class="text">{"".join(_piece(piece) for piece in shown.pieces)}</div>')
    else:
        parts += [_turn(role, text) for role, text in shown.turns]
    if shown.layout is not None:
        parts.append(_mask(shown, survey, context_attention))
    return f'<section class="card sample">{"".join(parts)}</section>'


def _piece(piece: Piece) -> str:
    if piece.media:
        return f'<span class="m">{_text(piece.text)}</span>'
    if not piece.supervised:
        return _text(piece.text)
    shade = "s odd" if piece.block % 2 else "s"
    return f'<span class="{shade}">{_text(piece.text)}</span>'


def _turn(role: str, text: str) -> str:
    mark = f'<span class="s">{_text(text)}</span>' if role == "assistant" else _text(text)
    return f'<div class="text"><span class="role">{_text(role)}</span>{mark}</div>'


def _image(image: Image.Image, number: int) -> str:
    small = image.convert("RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    stream = io.BytesIO()
    small.save(stream, "JPEG", quality=88)
    encoded = base64.b64encode(stream.getvalue()).decode("ascii")
    size = f"{image.width} x {image.height}"
    return f'<img alt="Image {number}, {size}" title="{size}" width="{small.width}" src="data:image/jpeg;base64,{encoded}">'


def _mask(shown: Shown, survey: Survey, context_attention: str) -> str:
    layout = shown.layout
    assert layout is not None
    picture = draw_mask(layout, context_attention=context_attention)
    context = int((layout.branch == CONTEXT).sum())
    noisy, filled = len(layout) - context, int(layout.padding.sum())
    keys = "".join(
        f'<span class="key" style="background: rgb{color[:3]}"></span>{words}'
        for color, words in (
            (CONTEXT_COLOR, "context sees context"),
            (EARLIER_COLOR, "noisy sees context of earlier blocks"),
            (OWN_COLOR, "noisy sees its own block"),
        )
    )
    facts = (
        f"Training row of {len(layout):,} tokens at block size {survey.block_size}: {context:,} of context,"
        f" {noisy:,} noisy, of which {filled:,} fill up blocks. A line per {picture.unit}; queries from top to bottom."
    )
    return (
        f'<h3>Who may attend to whom</h3><p class="soft">{facts}</p>'
        f'<img class="mask" alt="Attention mask" src="{png_uri(picture.image)}"><p class="soft">{keys}</p>'
    )
