"""The HTML page of a trace: one file, no network, readable without scripts, by keyboard, in light and dark."""

from __future__ import annotations

import base64
import html
import io
import json

from PIL import Image

from nemo_bard.report.colors import CONFIDENCE_COLORS, STEP_COLORS
from nemo_bard.report.trace import Trace

_THUMBNAIL = 320

_STYLE = """
:root { color-scheme: light dark; --page: #fbfbf9; --card: #ffffff; --ink: #1b1e23; --soft: #5a616b; --line: #d5d8dd;
  --mask: #e9ebee; --mark: #0b57d0; }
@media (prefers-color-scheme: dark) { :root { --page: #14161a; --card: #1d2026; --ink: #eceef1; --soft: #a3abb6;
  --line: #3a404a; --mask: #2b3038; --mark: #8ab4f8; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 1.5rem 1rem 3rem; }
h1 { font-size: 1.35rem; margin: 0 0 .25rem; }
h2 { font-size: 1rem; margin: 0 0 .5rem; }
p { margin: 0; } .soft { color: var(--soft); font-size: .9rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: 1rem; margin-top: 1rem; }
.turn { white-space: pre-wrap; overflow-wrap: anywhere; } .role { color: var(--soft); margin-right: .5rem; }
.images { display: flex; flex-wrap: wrap; gap: .5rem; margin-bottom: .6rem; }
.images img { max-width: 100%; height: auto; border: 1px solid var(--line); border-radius: .3rem; }
.controls { display: flex; flex-wrap: wrap; gap: .6rem; align-items: center; }
button, select { font: inherit; color: inherit; background: var(--card); border: 1px solid var(--line); border-radius: .4rem;
  padding: .3rem .7rem; min-height: 2.4rem; }
button { cursor: pointer; } #play { min-width: 5.5rem; font-weight: 600; }
:focus-visible { outline: 3px solid var(--mark); outline-offset: 2px; }
#slider { flex: 1 1 12rem; accent-color: var(--mark); min-height: 2rem; }
#status { min-height: 1.5rem; margin-top: .5rem; font-variant-numeric: tabular-nums; }
#bars { display: flex; align-items: flex-end; gap: 1px; height: 3.2rem; margin-top: .8rem; cursor: pointer; }
#bars div { flex: 1 1 0; min-width: 1px; max-width: 1.6rem; background: var(--soft); opacity: .35; }
#bars div.first { margin-left: 3px; } #bars div.past { opacity: 1; } #bars div.now { background: var(--mark); opacity: 1; }
#tokens { line-height: 1; margin-top: .5rem; }
.token { display: inline-grid; vertical-align: top; margin: 0 2px 7px 0; padding: .28rem .28rem .15rem; border-radius: .3rem;
  background: var(--mask); text-align: center; font: 1rem/1.25 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace;
  white-space: pre; border: 2px solid transparent; }
.token > span { grid-area: 1 / 1; } .token .size { visibility: hidden; }
.token small { grid-area: 2 / 1; font: 600 .7rem/1.1 system-ui, sans-serif; font-variant-numeric: tabular-nums; min-height: .8rem; }
.token .shown { max-width: 40rem; overflow: hidden; }
.token.current { border-color: var(--mark); } .token.new { border-color: var(--ink); box-shadow: 0 0 0 1px var(--ink); }
.token.masked { color: var(--soft); } .token.later { opacity: .35; } .token.dropped.visible { opacity: .45; }
.token.dropped.visible .shown { text-decoration: line-through; }
.edge { display: inline-block; width: 1px; height: 2.3rem; margin: 0 5px 0 3px; background: var(--line); vertical-align: top; }
.break { display: block; height: 0; }
.legend { display: flex; flex-wrap: wrap; gap: .4rem 1.2rem; align-items: center; margin-top: .6rem; }
.scale { display: inline-block; width: 8rem; height: .8rem; border-radius: .2rem; vertical-align: -1px; margin: 0 .35rem; }
#text { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; font: 1rem/1.5 ui-monospace, "DejaVu Sans Mono", monospace; }
table { border-collapse: collapse; width: 100%; font-size: .85rem; margin-top: .6rem; }
th, td { text-align: left; vertical-align: top; padding: .25rem .5rem; border-bottom: 1px solid var(--line); }
td.n { font-variant-numeric: tabular-nums; white-space: nowrap; } td.t { white-space: pre-wrap; overflow-wrap: anywhere;
  font-family: ui-monospace, "DejaVu Sans Mono", monospace; }
.wide { overflow-x: auto; } summary { cursor: pointer; padding: .2rem 0; }
"""

_SCRIPT = """
'use strict';
const data = JSON.parse(document.getElementById('data').textContent);
const el = id => document.getElementById(id);
const blend = (colors, share) => {
  const place = Math.min(Math.max(share, 0), 1) * (colors.length - 1);
  const low = Math.min(Math.floor(place), colors.length - 2), part = place - low;
  return colors[low].map((c, i) => Math.round(c + (colors[low + 1][i] - c) * part));
};
const ink = color => {
  const l = color.map(v => v / 255).map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  const y = 0.2126 * l[0] + 0.7152 * l[1] + 0.0722 * l[2];
  return 1.05 / (y + 0.05) > (y + 0.05) / 0.05 ? '#fff' : '#000';
};
const show = text => text.trim() === '' && /^ +$/.test(text) ? '\\u2423'.repeat(text.length) : text.replace(/\\n/g, '\\u23ce').replace(/\\t/g, '\\u21e5');
const two = x => x >= 0.995 ? '1.0' : x.toFixed(2).slice(1);
const cells = data.tokens.map((text, i) => {
  const box = document.createElement('span'), size = document.createElement('span');
  const shown = document.createElement('span'), note = document.createElement('small');
  box.className = 'token'; size.className = 'size'; shown.className = 'shown';
  size.textContent = show(text) || ' ';
  box.append(size, shown, note);
  if (i && i % data.blockSize === 0) {
    const edge = document.createElement('span');
    edge.className = 'edge';
    el('tokens').append(edge);
  }
  el('tokens').append(box);
  if (text.includes('\\n') && i < data.length) {
    const end = document.createElement('span');
    end.className = 'break';
    el('tokens').append(end);
  }
  return {box, shown, note, size};
});
const most = Math.max(...data.steps.map(s => s.changes.length));
const bars = data.steps.map((step, i) => {
  const bar = document.createElement('div');
  bar.style.height = `${Math.max(6, 100 * step.changes.length / most)}%`;
  if (step.step === 0 && i) bar.classList.add('first');
  bar.addEventListener('click', () => { pause(); draw(i + 1); });
  el('bars').append(bar);
  return bar;
});
let now = 0, timer = null;
function stateAt(count) {
  const state = data.tokens.map(() => null);
  data.steps.slice(0, count).forEach((step, index) => step.changes.forEach(([position, text, confidence, revised]) => {
    state[position] = {text, confidence, revised: revised || Boolean(state[position] && state[position].revised), step: step.step, index};
  }));
  return state;
}
function draw(count) {
  now = Math.min(Math.max(count, 0), data.steps.length);
  const state = stateAt(now), step = now ? data.steps[now - 1] : null;
  const block = step ? step.block : 0, byStep = el('mode').value === 'step';
  cells.forEach((cell, i) => {
    const token = state[i], own = Math.floor(i / data.blockSize);
    const proposal = step ? step.proposals[i] : undefined;
    cell.box.className = 'token';
    cell.box.classList.toggle('dropped', i >= data.length);
    cell.box.classList.toggle('visible', Boolean(token));
    cell.box.classList.toggle('masked', !token);
    cell.box.classList.toggle('later', !token && own > block);
    cell.box.classList.toggle('current', own === block && now > 0);
    cell.box.classList.toggle('new', Boolean(token) && token.index === now - 1);
    let tip = `token ${i + 1}, block ${own + 1}: `;
    if (token) {
      const color = byStep ? blend(data.stepColors, data.maxSteps > 1 ? token.step / (data.maxSteps - 1) : 0)
        : blend(data.confidenceColors, token.confidence);
      cell.box.style.background = `rgb(${color})`;
      cell.box.style.color = ink(color);
      cell.shown.textContent = show(token.text);
      cell.note.textContent = (byStep ? token.step + 1 : two(token.confidence)) + (token.revised ? '\\u270e' : '');
      tip += `${JSON.stringify(token.text)}, ${token.revised ? 'revised' : 'fixed'} in step ${token.step + 1}`
        + ` with confidence ${token.confidence.toFixed(3)}`;
      if (i >= data.length) tip += '; after the end, not part of the response';
    } else {
      cell.box.style.background = cell.box.style.color = '';
      cell.shown.textContent = '\\u00b7';
      cell.note.textContent = proposal === undefined ? '' : two(proposal);
      tip += proposal === undefined ? 'masked' : `masked, best proposal has confidence ${proposal.toFixed(3)}`;
    }
    cell.box.title = tip;
  });
  bars.forEach((bar, i) => { bar.classList.toggle('past', i < now); bar.classList.toggle('now', i === now - 1); });
  el('slider').value = now;
  const words = step
    ? `Forward ${now} of ${data.steps.length}: block ${step.block + 1}, step ${step.step + 1}, ${step.changes.length} fixed`
    : `Start: ${data.blockSize} masked tokens per block`;
  el('slider').setAttribute('aria-valuetext', words);
  el('status').setAttribute('aria-live', timer ? 'off' : 'polite');
  el('status').textContent = words;
  el('text').textContent = step ? step.text : '\\u2592'.repeat(Math.min(data.blockSize, data.length));
  el('scale-step').hidden = !byStep;
  el('scale-confidence').hidden = byStep;
}
function pause() {
  if (timer) clearTimeout(timer);
  timer = null;
  el('play').textContent = '\\u25b6 Play';
}
function tick() {
  if (now >= data.steps.length) { pause(); draw(now); return; }
  draw(now + 1);
  timer = setTimeout(tick, Number(el('speed').value));
}
function toggle() {
  if (timer) { pause(); draw(now); return; }
  el('play').textContent = '\\u23f8 Pause';
  if (now >= data.steps.length) now = 0;
  timer = setTimeout(tick, 0);
}
el('play').addEventListener('click', toggle);
el('back').addEventListener('click', () => { pause(); draw(now - 1); });
el('next').addEventListener('click', () => { pause(); draw(now + 1); });
el('slider').addEventListener('input', () => { pause(); draw(Number(el('slider').value)); });
el('mode').addEventListener('change', () => draw(now));
document.addEventListener('keydown', event => {
  if (event.ctrlKey || event.altKey || event.metaKey || ['SELECT', 'INPUT', 'BUTTON', 'SUMMARY'].includes(event.target.tagName)) return;
  if (event.key === ' ') { toggle(); event.preventDefault(); }
  if (event.key === 'ArrowLeft') { pause(); draw(now - 1); event.preventDefault(); }
  if (event.key === 'ArrowRight') { pause(); draw(now + 1); event.preventDefault(); }
});
el('slider').max = data.steps.length;
document.querySelectorAll('.needs-script').forEach(node => { node.hidden = false; });
const wanted = new URLSearchParams(location.hash.slice(1));
if (wanted.get('mode') === 'confidence') el('mode').value = 'confidence';
draw(wanted.has('step') ? Number(wanted.get('step')) : data.steps.length);
"""


def render_page(trace: Trace) -> str:
    """Return the page as HTML text."""
    pixels = "".join(_image_tag(image, number) for number, image in enumerate(trace.images, start=1))
    turns = "".join(
        f'<p class="turn"><span class="role">{html.escape(role)}</span>{html.escape(text)}</p>'
        for role, text in trace.prompt
    )
    prompt = (
        f'<section class="card"><h2>Prompt</h2><div class="images">{pixels}</div>{turns}</section>' if turns else ""
    )
    facts = (
        f"{trace.length} tokens in {trace.num_forwards} denoising forwards: {trace.tpf:.2f} tokens per forward,"
        f" block size {trace.block_size}"
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Denoising step by step</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
<h1>Denoising step by step</h1>
<p class="soft">{facts}</p>
{prompt}
<section class="card needs-script" hidden aria-label="Player">
<div class="controls">
<button id="play" type="button">&#9654; Play</button>
<button id="back" type="button" aria-label="One step back">&#8592;</button>
<button id="next" type="button" aria-label="One step on">&#8594;</button>
<input id="slider" type="range" min="0" value="0" step="1" aria-label="Forward">
<label>Speed <select id="speed"><option value="900">slow</option><option value="400" selected>normal</option>
<option value="120">fast</option></select></label>
<label>Colour <select id="mode"><option value="step">step</option><option value="confidence">confidence</option></select></label>
</div>
<p id="status" role="status"></p>
<div id="tokens" aria-hidden="true"></div>
<div class="legend soft">
<span id="scale-step">fixed in step 1<span class="scale" style="background:{_gradient(STEP_COLORS)}"></span>{trace.max_steps}</span>
<span id="scale-confidence" hidden>confidence 0<span class="scale" style="background:{_gradient(CONFIDENCE_COLORS)}"></span>1</span>
<span>blue frame: current block; thick frame: fixed now; &#9998;: revised; &middot;: masked, with the confidence of
its best proposal</span>
</div>
<div id="bars" aria-hidden="true" title="tokens fixed in each forward"></div>
<p class="soft">Tokens fixed in each forward; a gap starts a block.</p>
</section>
<section class="card needs-script" hidden><h2>Text at this step</h2><pre id="text"></pre></section>
<section class="card"><h2>Response</h2><p class="turn">{html.escape(trace.text)}</p></section>
<section class="card"><details><summary>All steps as a table</summary><div class="wide">{_table(trace)}</div></details></section>
</main>
<script id="data" type="application/json">{_data(trace)}</script>
<script>{_SCRIPT}</script>
</body>
</html>
"""


def _gradient(colors: tuple[tuple[int, int, int], ...]) -> str:
    return f"linear-gradient(90deg, {', '.join(f'rgb{color}' for color in colors)})"


def _image_tag(image: Image.Image, number: int) -> str:
    small = image.convert("RGB")
    small.thumbnail((_THUMBNAIL, _THUMBNAIL))
    buffer = io.BytesIO()
    small.save(buffer, format="PNG")
    encoded = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f'<img alt="Image {number} of the prompt" width="{small.width}" src="data:image/png;base64,{encoded}">'


def _data(trace: Trace) -> str:
    steps = [
        {
            "block": step.block,
            "step": step.step,
            "changes": [[c.position, c.text, round(c.confidence, 4), c.revised] for c in step.changes],
            "proposals": {str(position): round(value, 4) for position, value in step.proposals.items()},
            "text": step.text,
        }
        for step in trace.steps
    ]
    content = {
        "blockSize": trace.block_size,
        "length": trace.length,
        "maxSteps": trace.max_steps,
        "tokens": trace.tokens,
        "steps": steps,
        "stepColors": STEP_COLORS,
        "confidenceColors": CONFIDENCE_COLORS,
    }
    # "<" must not appear in a script element: "</script>" or "<!--" in a token would end or change it.
    return json.dumps(content).replace("<", "\\u003c")


def _table(trace: Trace) -> str:
    rows = []
    for number, step in enumerate(trace.steps, start=1):
        lowest = min((change.confidence for change in step.changes), default=None)
        shown = "-" if lowest is None else f"{lowest:.3f}"
        rows.append(
            f'<tr><td class="n">{number}</td><td class="n">{step.block + 1}</td><td class="n">{step.step + 1}</td>'
            f'<td class="n">{len(step.changes)}</td><td class="n">{shown}</td><td class="t">{html.escape(step.text)}</td></tr>'
        )
    head = "".join(
        f'<th scope="col">{name}</th>'
        for name in ("forward", "block", "step", "fixed", "lowest confidence", "text after the step")
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
