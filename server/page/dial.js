// The dial: how many experts each token uses. A radio group of counts, and a number for every other count.

import { html } from "./html.js";
import { colourOf, presets, within } from "./models.js";
import { words } from "./words.js";

/** A dial for column `letter`; what was measured at its count stands beside it. */
export function Dial({ model, letter, count, rate, onChange }) {
  const listed = presets(model);
  return html`<fieldset class="dial">
    <legend><span class=${`badge ${letter}`}>${letter}</span>${words.dial[letter]}</legend>
    <div class="counts">
      ${listed.map((one) => html`<${Count}
        model=${model}
        letter=${letter}
        one=${one}
        chosen=${one === count}
        onChange=${onChange}
      />`)}
    </div>
    ${listed.length < model.max - model.min + 1 && html`<${Exact}
      model=${model}
      letter=${letter}
      count=${count}
      onChange=${onChange}
    />`}
    <${Measured} model=${model} count=${count} rate=${rate} />
  </fieldset>`;
}

function Count({ model, letter, one, chosen, onChange }) {
  const trained = one === model.trained;
  return html`<label class=${`count ${trained ? "trained" : ""}`}>
    <input
      type="radio"
      name=${`count-${letter}`}
      value=${one}
      checked=${chosen}
      aria-label=${words.dial.describe(one, model.trained)}
      onChange=${() => onChange(one)}
    />
    <span><i
      class="swatch"
      style=${{ background: colourOf(model, one) }}
    ></i>${one}${trained && html`<small>${words.dial.trainedShort}</small>`}</span>
  </label>`;
}

function Exact({ model, letter, count, onChange }) {
  const change = (event) => {
    const value = Number(event.target.value);
    if (Number.isInteger(value) && value > 0) onChange(within(model, value));
  };
  return html`<input
    class="exact"
    type="number"
    id=${`exact-${letter}`}
    aria-label=${words.dial.exact}
    title=${words.dial.exact}
    min=${model.min}
    max=${model.max}
    value=${count}
    onChange=${change}
  />`;
}

function Measured({ model, count, rate }) {
  const row = model.quality[count];
  const { dial } = words;
  const parts = row ? [dial.quality(row)] : [Object.keys(model.quality).length ? dial.unmeasured : dial.uncalibrated];
  if (row?.agreement !== undefined) parts.push(dial.agreement(row));
  if (rate) parts.push(dial.last(rate));
  else if (row?.tokens_per_second) parts.push(dial.speed(row));
  return html`<p class="measured">${parts.map((part) => html`<span>${part}</span>`)}</p>`;
}

/** The next count down or up from `count`, for keys. */
export function stepped(model, count, by) {
  return within(model, count + by);
}
