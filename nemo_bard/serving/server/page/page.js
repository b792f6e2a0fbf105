import { dataUrl, events, failure } from './stream.js';
import { Picture } from './picture.js';
import { SettingsForm } from './settings.js';

const el = id => document.getElementById(id);
const picture = new Picture(el);
const form = new SettingsForm(el('settings'), el('more'));
let images = [];
let running = null;
let facts = null;

function say(error) {
  el('error').hidden = !error;
  el('error').textContent = error || '';
}

function headers() {
  const key = el('key').value.trim();
  return { 'content-type': 'application/json', ...(key ? { authorization: `Bearer ${key}` } : {}) };
}

function choice(facts) {
  const select = document.createElement('select');
  select.setAttribute('aria-label', 'Model');
  select.append(...facts.models.map(model => new Option(model, model)));
  select.value = facts.model;
  select.addEventListener('change', () => load(select.value));
  return select;
}

async function load(name) {
  try {
    const response = await fetch(`v1/bard${name ? `?model=${encodeURIComponent(name)}` : ''}`, { headers: headers() });
    if (!response.ok) throw await failure(response);
    facts = await response.json();
    el('model').textContent = `${facts.model}, ${facts.block_size} tokens a block`;
    document.title = `${facts.model} - nemo_bard`;
    el('models').replaceChildren(...(facts.models.length > 1 ? [choice(facts)] : []));
    form.build(facts);
    el('key-row').hidden = !el('key').value;
    say('');
  } catch (error) {
    if (error.status === 401) el('key-row').hidden = false;
    say(error.message);
  }
}

async function add(files) {
  say('');
  for (const file of files) {
    if (!file.type.startsWith('image/')) {
      say(`${file.name} is no image`);
      continue;
    }
    images.push({ name: file.name || 'pasted image', url: await dataUrl(file) });
  }
  drawImages();
}

function drawImages() {
  el('images').replaceChildren(...images.map((image, index) => {
    const item = document.createElement('li'), picture = document.createElement('img');
    const remove = document.createElement('button');
    picture.src = image.url;
    picture.alt = `Image ${index + 1}: ${image.name}`;
    remove.type = 'button';
    remove.textContent = '\u00d7';
    remove.setAttribute('aria-label', `Remove ${image.name}`);
    remove.addEventListener('click', () => { images.splice(index, 1); drawImages(); el('files').focus(); });
    item.append(picture, remove);
    return item;
  }));
}

function body() {
  const content = images.map(image => ({ type: 'image_url', image_url: { url: image.url } }));
  content.push({ type: 'text', text: el('question').value });
  return {
    model: facts.model, messages: [{ role: 'user', content }], stream: true, stream_options: { include_usage: true },
    bard_drafts: true, ...form.given(),
  };
}

async function ask() {
  if (running) return;
  say('');
  if (!facts) await load();
  if (!facts) return;
  if (!form.check()) return;
  running = new AbortController();
  el('go').disabled = true;
  el('stop').disabled = false;
  el('status').textContent = 'waiting';
  picture.clear();
  if (el('answer').getBoundingClientRect().top > innerHeight / 2) el('answer').scrollIntoView({ block: 'start' });
  try {
    const response = await fetch('v1/chat/completions', {
      method: 'POST', headers: headers(), body: JSON.stringify(body()), signal: running.signal,
    });
    if (!response.ok) throw await failure(response);
    await follow(response);
    await picture.settled();
    el('status').textContent = 'done';
  } catch (error) {
    picture.pause();
    el('status').textContent = error.name === 'AbortError' ? 'stopped' : '';
    if (error.status === 401) el('key-row').hidden = false;
    if (error.name !== 'AbortError') say(error.message);
  } finally {
    running = null;
    el('go').disabled = false;
    el('stop').disabled = true;
  }
}

async function follow(response) {
  for await (const event of events(response)) {
    if (event.error) throw new Error(event.error.message);
    el('status').textContent = 'decoding';
    const extra = event.bard || {}, choice = event.choices[0];
    if (extra.step) picture.add(extra.step);
    if (extra.numbers) picture.finish(extra.numbers);
    if (choice && choice.delta.content) picture.addText(choice.delta.content);
    if (choice && choice.finish_reason) picture.ended(choice.finish_reason);
  }
}

function stop() {
  if (running) running.abort();
  picture.pause();
}

el('ask').addEventListener('submit', event => { event.preventDefault(); ask(); });
el('stop').addEventListener('click', stop);
el('reset').addEventListener('click', () => form.reset());
el('key').addEventListener('change', () => load());
el('files').addEventListener('change', event => { add([...event.target.files]); event.target.value = ''; });
document.addEventListener('paste', event => {
  const files = [...event.clipboardData.files];
  if (files.length) { event.preventDefault(); add(files); }
});
document.addEventListener('keydown', event => {
  if (event.key === 'Escape') stop();
  if (event.key === 'Enter' && (event.ctrlKey || event.metaKey)) { event.preventDefault(); ask(); }
});
// Dropped anywhere, so that a miss does not make the browser leave the page.
let depth = 0;
const over = on => el('drop').classList.toggle('over', on);
document.addEventListener('dragenter', () => { depth += 1; over(true); });
document.addEventListener('dragleave', () => { depth -= 1; over(depth > 0); });
document.addEventListener('dragover', event => event.preventDefault());
document.addEventListener('drop', event => {
  event.preventDefault();
  depth = 0;
  over(false);
  add([...event.dataTransfer.files]);
});
load();
