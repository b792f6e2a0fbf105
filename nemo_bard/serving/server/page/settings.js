// The form of decoding settings, made of what the server says about them.

const MAIN = ['remasking_strategy', 'confidence_threshold', 'entropy_bound', 'denoising_steps', 'temperature', 'edit_threshold', 'max_tokens'];
const WORDS = {
  remasking_strategy: 'strategy', confidence_threshold: 'threshold', denoising_steps: 'steps a block', edit_threshold: 'revise above',
  max_post_edit_steps: 'revision steps', max_tokens: 'max tokens', top_k: 'top k', top_p: 'top p', suppress_mask_token: 'never emit the mask',
  entropy_bound: 'entropy bound', seed: 'seed', temperature: 'temperature',
};

export class SettingsForm {
  constructor(main, more) {
    this.main = main;
    this.more = more;
    this.fields = [];
  }

  build(facts) {
    this.strategies = facts.strategies;
    const own = [
      { name: 'max_tokens', value: facts.max_tokens, kind: 'integer', choices: [], help: `most response tokens, up to ${facts.limits.max_tokens}` },
      { name: 'seed', value: null, kind: 'integer', choices: [], help: 'for temperature > 0; the same seed draws the same answer' },
    ];
    const all = [...facts.settings, ...own];
    const place = name => (MAIN.includes(name) ? MAIN.indexOf(name) : MAIN.length);
    all.sort((a, b) => place(a.name) - place(b.name));
    this.main.replaceChildren();
    this.more.replaceChildren();
    this.fields = all.map(setting => this.field(setting, MAIN.includes(setting.name) ? this.main : this.more));
    this.mark();
  }

  field(setting, room) {
    const label = document.createElement('label'), id = `s-${setting.name}`;
    const input = document.createElement(setting.kind === 'choice' ? 'select' : 'input');
    label.htmlFor = input.id = id;
    label.textContent = WORDS[setting.name] || setting.name.replaceAll('_', ' ');
    label.title = input.title = `${setting.name}: ${setting.help}`;
    if (setting.kind === 'choice') setting.choices.forEach(name => input.add(new Option(name.replaceAll('_', ' '), name)));
    else if (setting.kind === 'flag') input.type = 'checkbox';
    else {
      input.type = 'number';
      input.step = setting.kind === 'integer' ? '1' : 'any';
      input.placeholder = setting.value === null ? 'not set' : String(setting.value);
    }
    const field = { setting, label, input };
    this.put(field);
    input.addEventListener('input', () => this.mark());
    if (setting.kind === 'choice') [label, input].forEach(node => node.classList.add('wide'));
    room.append(label, input);
    return field;
  }

  put({ setting, input }) {
    if (setting.kind === 'choice') input.value = setting.value;
    else if (setting.kind === 'flag') input.checked = setting.value;
    else input.value = '';
  }

  reset() {
    this.fields.forEach(field => this.put(field));
    this.mark();
  }

  /** What differs from the model's own, or undefined. */
  value({ setting, input }) {
    if (setting.kind === 'choice') return input.value === setting.value ? undefined : input.value;
    if (setting.kind === 'flag') return input.checked === setting.value ? undefined : input.checked;
    return input.value === '' ? undefined : Number(input.value);
  }

  mark() {
    const chosen = this.fields.find(field => field.setting.name === 'remasking_strategy').input.value;
    const others = Object.entries(this.strategies).filter(([name]) => name !== chosen).flatMap(([, names]) => names);
    for (const field of this.fields) {
      const foreign = others.includes(field.setting.name) && !this.strategies[chosen].includes(field.setting.name);
      field.label.hidden = field.input.hidden = foreign;
      field.label.classList.toggle('given', this.value(field) !== undefined);
    }
  }

  /** Whether all numbers are numbers; else the browser says where not. */
  check() {
    return this.fields.every(field => field.input.hidden || field.input.reportValidity());
  }

  given() {
    const shown = this.fields.filter(field => !field.input.hidden && this.value(field) !== undefined);
    return Object.fromEntries(shown.map(field => [field.setting.name, this.value(field)]));
  }
}
