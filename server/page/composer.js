// The form that asks: mode, prompt, dial, sampling, and a second count to compare with.

import { html, useRef } from "./html.js";
import { LIMITS } from "./bodies.js";
import { Dial } from "./dial.js";
import { opposite } from "./models.js";
import { words } from "./words.js";

const { composer } = words;

export function Composer({ state, change, onSend, onStop }) {
  const { form, model, rates, running, error } = state;
  const send = (event) => {
    event.preventDefault();
    if (!running) onSend();
  };
  return html`<form class="composer" aria-label=${composer.prompt[form.mode]} novalidate onSubmit=${send}>
    <${Prompt} form=${form} change=${change} onSend=${send} />
    ${model.choices && html`<${Dials} model=${model} form=${form} rates=${rates} change=${change} />`}
    ${!model.choices && html`<p class="measured">${model.has ? words.dial.fixed(model.trained) : words.dial.none}</p>`}
    <div class="controls">
      <${Mode} mode=${form.mode} chat=${model.chat} change=${change} />
      <${Sampling} form=${form} change=${change} />
      ${model.choices && html`<${CompareSwitch} model=${model} form=${form} change=${change} />`}
      <span class="spring"></span>
      ${
        running
          ? html`<button type="button" class="stop" onClick=${onStop}>${composer.stop} <kbd>Esc</kbd></button>`
          : html`<button type="submit" class="primary">${form.compare ? composer.compare : composer.submit[form.mode]}</button>`
      }
    </div>
    ${error && html`<p class="error" role="alert">${error}</p>`}
  </form>`;
}

function Prompt({ form, change, onSend }) {
  const { mode, prompt } = form;
  const onKeyDown = (event) => {
    const sends =
      event.key === "Enter" && !event.isComposing && (event.ctrlKey || event.metaKey || (mode === "chat" && !event.shiftKey));
    if (sends) onSend(event);
  };
  return html`<textarea
    id="prompt"
    rows="2"
    aria-label=${composer.prompt[mode]}
    aria-describedby="prompt-hint"
    placeholder=${composer.placeholder[mode]}
    value=${prompt}
    onInput=${(event) => change({ prompt: event.target.value })}
    onKeyDown=${onKeyDown}
  ></textarea>
  <p id="prompt-hint" class="hint">${composer.hint[mode]}</p>`;
}

function Dials({ model, form, rates, change }) {
  return html`<div class="dials">
    <${Dial} model=${model} letter="A" count=${form.count} rate=${rates[form.count]} onChange=${(count) => change({ count })} />
    ${
      form.compare &&
      html`<${Dial}
        model=${model}
        letter="B"
        count=${form.second}
        rate=${rates[form.second]}
        onChange=${(second) => change({ second })}
      />`
    }
  </div>`;
}

function Mode({ mode, chat, change }) {
  return html`<fieldset class="segments">
    <legend class="hidden">${composer.mode}</legend>
    ${["text", "chat"].map(
      (one) => html`<label title=${one === "chat" && !chat ? composer.noChat : undefined}>
        <input
          type="radio"
          name="mode"
          value=${one}
          checked=${one === mode}
          disabled=${one === "chat" && !chat}
          onChange=${() => change({ mode: one })}
        />
        <span>${composer[one]}</span>
      </label>`,
    )}
  </fieldset>`;
}

function Sampling({ form, change }) {
  const draw = () => change({ seed: Math.floor(Math.random() * LIMITS.seed[1]) });
  return html`<div class="sampling">
    <${Figure} name="seed" label=${composer.seed} form=${form} change=${change} step="1" />
    <button type="button" class="icon" aria-label=${composer.newSeed} title=${composer.newSeed} onClick=${draw}>⟳</button>
    <${Figure} name="temperature" label=${composer.temperature} form=${form} change=${change} step="0.1" />
    <${Figure} name="maximum" label=${composer.maximum} form=${form} change=${change} step="1" />
  </div>`;
}

/** A number. What cannot be used is marked by the browser, and refused in words when the form is sent. */
function Figure({ name, label, form, change, step }) {
  const [least, most] = LIMITS[name];
  const onInput = (event) => change({ [name]: event.target.value === "" ? NaN : Number(event.target.value) });
  const value = useRef(form[name]);
  if (!Number.isNaN(form[name])) value.current = form[name];
  return html`<label class="field">
    <span>${label}</span>
    <input type="number" name=${name} min=${least} max=${most} step=${step} value=${value.current} onInput=${onInput} />
  </label>`;
}

function CompareSwitch({ model, form, change }) {
  const flip = (event) => change({ compare: event.target.checked, second: form.second ?? opposite(model, form.count) });
  return html`<label class="switch">
    <input type="checkbox" name="compare" checked=${form.compare} onChange=${flip} />
    <span>${composer.compare}</span>
  </label>`;
}

/** A sentence about the first value of the form that cannot be sent; empty where all can. */
export function faultOf(form) {
  const names = { seed: composer.seed, temperature: composer.temperature, maximum: composer.maximum };
  for (const [name, [least, most]] of Object.entries(LIMITS)) {
    const value = form[name];
    const whole = name === "temperature" || Number.isInteger(value);
    if (!(value >= least && value <= most) || !whole) return composer.invalid(names[name], least, most);
  }
  return form.prompt === "" && form.mode === "chat" ? composer.empty : "";
}
