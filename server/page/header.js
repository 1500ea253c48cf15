// The bar at the top: model, views, state of the server, colours, help; and the line that says why nothing works.

import { html } from "./html.js";
import { words } from "./words.js";

export function Header({ state, change, onModel, onTheme }) {
  const { models, model, view, theme } = state;
  return html`<header class="top">
    <div class="bar">
      <h1 class="brand">moedial</h1>
      ${
        models.length > 1
          ? html`<select
            class="model"
            aria-label=${words.header.model}
            value=${model.id}
            onChange=${(event) => onModel(models.find((one) => one.id === event.target.value))}
          >
            ${models.map((one) => html`<option value=${one.id}>${one.id}</option>`)}
          </select>`
          : html`<span class="model">${model?.id}</span>`
      }
      <${Status} status=${state.status} />
      <span class="spring"></span>
      <label class="field theme"><span class="hidden">${words.theme.label}</span>
        <select value=${theme} title=${words.theme.label} onChange=${(event) => onTheme(event.target.value)}>
          ${["auto", "light", "dark"].map((one) => html`<option value=${one}>${words.theme[one]}</option>`)}
        </select>
      </label>
      <button
        type="button"
        class="icon"
        aria-label=${words.help.open}
        title=${words.help.open}
        onClick=${() => change({ help: true })}
      >?</button>
    </div>
    ${model && html`<${Views} view=${view} onView=${(one) => change({ view: one })} />`}
  </header>`;
}

function Status({ status }) {
  const { kind, running, waiting } = status;
  const text = kind === "ready" ? words.status.ready(running, waiting) : (words.status[kind] ?? "");
  return html`<span class=${`status ${kind}`} role="status">${text}</span>`;
}

function Views({ view, onView }) {
  const names = Object.keys(words.views);
  const move = (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const next = names[(names.indexOf(view) + step + names.length) % names.length];
    onView(next);
    document.getElementById(`tab-${next}`).focus();
  };
  return html`<div class="views" role="tablist" aria-label=${words.header.views} onKeyDown=${move}>
    ${names.map(
      (name) =>
        html`<button
          type="button"
          role="tab"
          id=${`tab-${name}`}
          aria-selected=${name === view}
          aria-controls="view"
          tabindex=${name === view ? 0 : -1}
          onClick=${() => onView(name)}
        >${words.views[name]}</button>`,
    )}
  </div>`;
}

/** One line where the server cannot answer now. */
export function Banner({ text }) {
  return text ? html`<p class="banner" role="alert">${text}</p>` : null;
}
