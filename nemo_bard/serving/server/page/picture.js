// The answer while it is denoised: cells of tokens, numbers, and the steps to go through again.

const COLORS = {
  // as in the pages of `nemo-bard generate --visualize`
  step: [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]],
  confidence: [[179, 84, 30], [240, 222, 178], [31, 111, 139]],
};

function blend(colors, share) {
  const place = Math.min(Math.max(share, 0), 1) * (colors.length - 1);
  const low = Math.min(Math.floor(place), colors.length - 2), part = place - low;
  return colors[low].map((c, i) => Math.round(c + (colors[low + 1][i] - c) * part));
}

function ink(color) {
  const linear = color.map(v => v / 255).map(c => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
  const light = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
  return 1.05 / (light + 0.05) > (light + 0.05) / 0.05 ? '#fff' : '#000';
}

const shown = text => (/^ +$/.test(text) ? '\u2423'.repeat(text.length) : text.replace(/\n/g, '\u23ce').replace(/\t/g, '\u21e5')) || '\u2205';
const percent = value => (value >= 0.995 ? '1.0' : value.toFixed(2).slice(1));

export class Picture {
  constructor(el) {
    this.el = el;
    this.timer = null;
    this.waiting = [];
    el('mode').addEventListener('change', () => this.draw());
    el('slider').addEventListener('input', () => { this.pause(); this.now = Number(el('slider').value); this.draw(); });
    el('replay').addEventListener('click', () => { this.now = 0; this.play(); });
    this.clear();
  }

  clear() {
    this.pause();
    this.steps = [];
    this.now = 0;
    this.text = '';
    this.reason = '';
    this.numbers = null;
    this.started = performance.now();
    this.el('replay').disabled = this.el('slider').disabled = true;
    this.el('n-tps').textContent = '\u2013';
    this.draw();
  }

  add(step) {
    this.steps.push(step);
    this.el('replay').disabled = this.el('slider').disabled = false;
    this.el('slider').max = this.steps.length;
    if (!this.timer) this.play();
  }

  addText(text) {
    this.text += text;
    this.words();
  }

  ended(reason) { this.reason = reason; }

  finish(numbers) {
    this.numbers = numbers;
    this.draw();
  }

  pause() {
    clearTimeout(this.timer);
    this.timer = null;
    this.waiting.splice(0).forEach(done => done());
  }

  play() {
    clearTimeout(this.timer);
    if (this.now < this.steps.length) {
      const pace = Number(this.el('pace').value);
      this.now = pace ? this.now + 1 : this.steps.length;
      this.draw();
      this.timer = setTimeout(() => this.play(), pace || 16);
    } else this.pause();
  }

  /** Resolves when everything that came has been shown. */
  settled() {
    return this.timer ? new Promise(done => this.waiting.push(done)) : Promise.resolve();
  }

  /** Tokens after the first `count` steps: text, state, confidence, step, and whether the last of these steps made them. */
  state(count) {
    const blocks = [];
    this.steps.slice(0, count).forEach((step, index) => {
      const before = blocks[step.block] || { cells: [] };
      const cells = step.cells.map(([text, state, confidence], place) => {
        const old = before.cells[place];
        if (state === 'kept' && old) return { ...old, fresh: false };
        const revised = state === 'revised' || Boolean(old && old.revised && state !== 'draft');
        return { text, confidence, draft: state === 'draft', revised, step: step.step, fresh: state !== 'draft' && index === count - 1 };
      });
      blocks[step.block] = { cells, end: step.end };
    });
    return blocks;
  }

  draw() {
    const blocks = this.state(this.now), step = this.steps[this.now - 1];
    const most = Math.max(1, ...this.steps.map(one => one.step));
    const mode = this.el('mode').value;
    this.el('tokens').replaceChildren(...blocks.map(block => this.block(block, mode, most)));
    this.el('slider').value = this.now;
    const fixed = step ? step.cells.filter(cell => cell[1] === 'fixed' || cell[1] === 'revised').length : 0;
    const words = step ? `Forward ${this.now} of ${this.steps.length}: block ${step.block + 1}, step ${step.step + 1}, ${fixed} ${fixed === 1 ? 'token' : 'tokens'} fixed` : '';
    this.el('slider').setAttribute('aria-valuetext', words);
    const end = { length: '; cut at max tokens', stop: '' }[this.reason] || '';
    this.el('step').textContent = words ? words + (this.now === this.steps.length && this.numbers ? end : '') : 'Nothing to show yet.';
    this.count(blocks);
    this.words(blocks);
    this.el('scale').style.background = `linear-gradient(90deg, ${COLORS[mode].map(c => `rgb(${c})`).join(', ')})`;
    this.el('scale-words').textContent = mode === 'step' ? `step 1 to ${most + 1} of a block` : 'confidence 0 to 1';
  }

  /** The text: what the server said at the end, before that what the cells hold. */
  words(blocks = this.state(this.now)) {
    const cells = blocks.flatMap(block => (block.end === null ? block.cells : block.cells.slice(0, block.end)));
    const whole = this.now === this.steps.length;
    this.el('text').textContent = whole ? this.text : cells.map(cell => (cell.draft ? '\u2592' : cell.text)).join('');
  }

  count(blocks) {
    const cells = blocks.flatMap(block => (block.end === null ? block.cells : block.cells.slice(0, block.end + 1)));
    const all = this.now === this.steps.length && this.numbers;
    const tokens = all ? this.numbers.tokens : cells.filter(cell => !cell.draft).length;
    this.el('n-tokens').textContent = tokens;
    this.el('n-forwards').textContent = all ? this.numbers.denoising_forwards : this.now;
    this.el('n-tpf').textContent = this.now ? (all ? this.numbers.tokens_per_forward : tokens / this.now).toFixed(2) : '\u2013';
    this.el('n-blocks').textContent = blocks.length;
    if (this.numbers) this.el('n-tps').textContent = Math.round(this.numbers.tokens_per_second);
    else if (this.steps.length) {
      const seconds = (performance.now() - this.started) / 1000;
      this.el('n-tps').textContent = Math.round(tokens / Math.max(seconds, 0.001));
    }
  }

  block({ cells, end }, mode, most) {
    const room = document.createElement('span');
    room.className = 'block';
    cells.forEach((cell, place) => {
      room.append(this.token(cell, end !== null && place > end, mode, most));
      if (!cell.draft && cell.text.includes('\n') && !(end !== null && place >= end)) {
        const line = document.createElement('span');
        line.className = 'break';
        room.append(line);
      }
    });
    return room;
  }

  token(cell, after, mode, most) {
    const box = document.createElement('span'), note = document.createElement('small');
    box.className = 'token';
    box.textContent = after ? '\u00b7' : shown(cell.text);
    box.classList.toggle('draft', cell.draft);
    box.classList.toggle('now', cell.fresh);
    box.classList.toggle('revised', cell.revised);
    box.classList.toggle('after', after);
    const confidence = cell.confidence === null ? '' : percent(cell.confidence);
    note.textContent = cell.draft || mode === 'confidence' ? confidence : cell.step + 1;
    if (!cell.draft) {
      const color = mode === 'step' ? blend(COLORS.step, cell.step / most) : blend(COLORS.confidence, cell.confidence ?? 1);
      box.style.background = `rgb(${color})`;
      box.style.color = ink(color);
    }
    box.title = `${JSON.stringify(cell.text)}, ${cell.draft ? 'masked, draft' : `fixed in step ${cell.step + 1}`}`
      + (cell.confidence === null ? '' : `, confidence ${cell.confidence.toFixed(3)}`) + (after ? '; after the end, no part of the answer' : '');
    if (!after) box.append(note);
    return box;
  }
}
