// One answer: its text, its figures, which stay under it, and the buttons that repeat it elsewhere.

import { html, useState } from "./html.js";
import { figuresOf } from "./asking.js";
import { curlOf, linkOf, pythonOf } from "./bodies.js";
import { colourOf } from "./models.js";
import { Prose } from "./prose.js";
import { piecesOf, TokenText } from "./tokens.js";
import { number, words } from "./words.js";

const SAYS = words.answer;

/** `letter`: A or B. `mark`: the first token that differs from the other column's. `at`, `onPoint`: the token pointed at. */
export function Answer({ model, answer, letter, paired, mark, at, onPoint, asTokens, actions }) {
  const { question, state, error } = answer;
  const title = paired ? SAYS.column(letter, question.count) : SAYS.count(question.count);
  return html`<section class=${`answer ${letter}`} aria-label=${title}>
    <h3>
      ${question.count !== null && html`<i class="swatch" style=${{ background: colourOf(model, question.count) }}></i>`}
      ${paired && html`<span class=${`badge ${letter}`}>${letter}</span>`}
      ${SAYS.count(question.count)}
      ${question.count === model.trained && model.choices && html`<small>${words.dial.trained}</small>`}
      ${stateOf(answer) && html`<small class="state">${stateOf(answer)}</small>`}
    </h3>
    <div class="said" aria-busy=${state === "running"}>
      ${answer.reasoning && html`<details class="reasoning"><summary>${SAYS.reasoning}</summary><p>${answer.reasoning}</p></details>`}
      <${Said} answer=${answer} mark=${mark} at=${at} onPoint=${onPoint} asTokens=${asTokens} />
      ${error && html`<p class="error" role="alert">${error}</p>`}
    </div>
    ${["done", "stopped"].includes(state) && html`<${Figures} answer=${answer} />`}
    ${["done", "stopped"].includes(state) && html`<div class="actions">${actions}<${Copies} answer=${answer} /></div>`}
  </section>`;
}

function stateOf({ state, finish }) {
  if (state === "stopped") return SAYS.stopped;
  return finish === "length" ? SAYS.length : "";
}

function Said({ answer, mark, at, onPoint, asTokens }) {
  const { state, text, tokens, question } = answer;
  if (state === "waiting") return html`<p class="quiet">${SAYS.next}</p>`;
  if (state === "running" && !text) return html`<p class="quiet waiting">${SAYS.waiting}</p>`;
  if (!text) return state === "done" ? html`<p class="quiet">${SAYS.empty}</p>` : null;
  if (asTokens && spells(tokens, text)) {
    const classOf = (index) => (mark === undefined ? "" : index < mark ? "common" : index === mark ? "differs" : "");
    return html`<${TokenText}
      tokens=${tokens}
      version=${tokens.length}
      at=${at}
      onPoint=${onPoint}
      classOf=${classOf}
      mark=${mark}
    />`;
  }
  return question.mode === "chat" ? html`<${Prose} text=${text} />` : html`<p class="tokens">${text}</p>`;
}

/** Whether the tokens make exactly the text: not so where there are none, and where some of them show nothing. */
export function spells(tokens, text) {
  return (
    tokens.length > 0 &&
    piecesOf(tokens)
      .map((piece) => piece.text)
      .join("") === text
  );
}

function Figures({ answer }) {
  const { tokens, rate, first, pairs, trained, prompt, cached } = figuresOf(answer);
  const shown = [
    [rate && number.short(rate), SAYS.rate],
    [first && number.milliseconds(first), SAYS.first],
    [tokens && number.whole(tokens), SAYS.tokens],
  ];
  if (pairs !== null && answer.question.count !== null) shown.push([number.whole(pairs), SAYS.pairs], savedOf(pairs, trained));
  const rest = [prompt && SAYS.prompt(prompt), cached ? SAYS.cached(cached) : ""].filter(Boolean);
  return html`<dl class="figures">
      ${shown.map(([value, name]) => html`<div><dt>${name}</dt><dd>${value || "–"}</dd></div>`)}
    </dl>
    ${rest.length > 0 && html`<p class="rest">${rest.join(" · ")}</p>`}`;
}

function savedOf(pairs, trained) {
  if (pairs === trained || !trained) return [number.percent(1), SAYS.asTrained];
  const share = pairs / trained - 1;
  return [number.percent(Math.abs(share)), share < 0 ? SAYS.saved : SAYS.more];
}

function Copies({ answer }) {
  const { question } = answer;
  return html`<${Copy} label=${SAYS.curl} title=${SAYS.copy("curl")} text=${() => curlOf(question)} />
    <${Copy} label=${SAYS.python} title=${SAYS.copy("Python")} text=${() => pythonOf(question)} />`;
}

/** A link to everything of a turn: of one answer, or of two and their comparison. */
export function CopyLink({ answers }) {
  const text = () =>
    linkOf(
      answers.map((answer) => answer.question),
      answers[0].fingerprint,
    );
  return html`<${Copy} label=${SAYS.link} title=${SAYS.copyLink} text=${text} />`;
}

/** Copies a text, and shows it where the browser does not allow copying (as without HTTPS on another machine). */
function Copy({ label, title, text }) {
  const [shown, show] = useState("");
  const copy = async () => {
    try {
      await navigator.clipboard.writeText(text());
      show("copied");
      setTimeout(() => show(""), 1500);
    } catch {
      show(text());
    }
  };
  return html`<button type="button" class="quiet" title=${title} onClick=${copy}>
      <span aria-live="polite">${shown === "copied" ? SAYS.copied : label}</span>
    </button>
    ${shown && shown !== "copied" && html`<${Shown} text=${shown} onClose=${() => show("")} />`}`;
}

function Shown({ text, onClose }) {
  return html`<div class="shown">
    <p class="quiet">${SAYS.noCopy}</p>
    <pre tabindex="0"><code>${text}</code></pre>
    <button type="button" class="quiet" onClick=${onClose}>${SAYS.close}</button>
  </div>`;
}
