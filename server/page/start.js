// What the Ask view shows before the first question: what this is, and questions to begin with; and a question from a link.

import { html } from "./html.js";
import { words } from "./words.js";

/** Examples that compare the smallest and the largest count, or just ask where the model has one count. */
export function Start({ model, mode, onExample }) {
  const { start } = words;
  return html`<section class="start">
    <h2>${model.choices ? start.title : words.views.ask}</h2>
    <p>${model.choices ? start.text(model.min, model.max) : start.plain}</p>
    <ul class="examples">
      ${start.examples[mode].map(
        (prompt) => html`<li><button type="button" onClick=${() => onExample(prompt)}>
          <span>${prompt}${mode === "text" ? " …" : ""}</span>
          ${model.choices && html`<small>${start.compare(`K ${model.min}`, `K ${model.max}`)}</small>`}
        </button></li>`,
      )}
    </ul>
  </section>`;
}

/** A question that came with the address. It runs only when it is asked for, since any site can link here. */
export function FromLink({ link, onRun, onDismiss }) {
  if (link.broken) return html`<p class="notice warns" role="alert">${words.link.broken}</p>`;
  const counts = [link.count, link.second].filter((count) => count !== null).map((count) => `K ${count}`);
  const short = link.prompt.length > 160 ? `${link.prompt.slice(0, 160)}…` : link.prompt;
  return html`<section class="notice link">
    <p>${words.link.notice(short, counts.join(" and ") || words.views.ask)}</p>
    <div class="controls">
      <button type="button" class="primary" id="run-link" onClick=${onRun}>${words.link.run}</button>
      <button type="button" onClick=${onDismiss}>${words.link.dismiss}</button>
    </div>
  </section>`;
}
