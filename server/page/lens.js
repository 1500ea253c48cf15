// The lens: one text scored at several counts, its tokens coloured by how much the count mattered.

import { html } from "./html.js";
import { tokensOf } from "./asking.js";
import { presets } from "./models.js";
import { json } from "./server.js";
import { TokenSlider, TokenText, visible } from "./tokens.js";
import { number, words } from "./words.js";

const SAYS = words.lens;
const ALTERNATIVES = 5;
const FULL = 1.5; // a difference of log-probabilities with the strongest colour
const NOTED = 0.1; // the least difference that is counted and marked

/** Scores the lens's text at each of its counts: { ids, byCount: { count: tokens } } in `results`. */
export async function score(store) {
  const change = (patch) => store.set({ lens: { ...store.state.lens, ...patch } });
  const { model, lens } = store.state;
  change({ results: null, error: "", busy: lens.counts[0], at: 0 });
  try {
    const ids = await idsOf(lens);
    if (ids.length < 2) throw new Error(SAYS.short);
    const byCount = {};
    for (const count of lens.counts) {
      change({ busy: count });
      byCount[count] = await scoresOf(model, ids, count);
    }
    const reference = byCount[model.trained] ? model.trained : lens.counts.at(-1);
    change({ results: { byCount }, reference, show: "spread", busy: null, at: widest(byCount) });
  } catch (error) {
    change({ busy: null, error: error.message });
  }
}

/** The text's token ids. An answer's follow those of its prompt, as the chat template writes it. */
async function idsOf({ text, prefix }) {
  if (!prefix) return (await json("tokenize", { prompt: text })).tokens;
  const asked = prefix.messages ? { messages: prefix.messages } : { prompt: prefix.prompt };
  const [before, after] = await Promise.all([
    json("tokenize", asked),
    json("tokenize", { prompt: text, add_special_tokens: false }),
  ]);
  return [...before.tokens, ...after.tokens];
}

async function scoresOf(model, ids, count) {
  const body = { model: model.id, prompt: ids, num_experts: count, echo: true, max_tokens: 0, logprobs: ALTERNATIVES };
  const { choices } = await json("v1/completions", body);
  return tokensOf(choices[0].logprobs);
}

const scoreAt = (tokens, index) => tokens[index].logprob ?? 0;

function spreadAt(byCount, index) {
  const all = Object.values(byCount).map((tokens) => scoreAt(tokens, index));
  return Math.max(...all) - Math.min(...all);
}

function widest(byCount) {
  const [first] = Object.values(byCount);
  const spreads = first.map((_, index) => spreadAt(byCount, index));
  return spreads.indexOf(Math.max(...spreads));
}

export function Lens({ state, change, onScore, onTake }) {
  const { model, lens, turns } = state;
  if (!model.choices) return html`<div class="view"><h2>${SAYS.title}</h2><p>${SAYS.none}</p></div>`;
  const send = (event) => {
    event.preventDefault();
    if (!lens.text) return change({ error: SAYS.empty });
    return lens.counts.length < 2 ? change({ error: SAYS.few }) : onScore();
  };
  return html`<div class="view">
    <h2>${SAYS.title}</h2>
    <p class="about">${SAYS.about}</p>
    <form class="card" onSubmit=${send}>
      <textarea
        rows="3"
        aria-label=${SAYS.text}
        placeholder=${SAYS.text}
        value=${lens.text}
        onInput=${(event) => change({ text: event.target.value, prefix: null })}
      ></textarea>
      <div class="controls">
        <${Counts} model=${model} lens=${lens} change=${change} />
        <span class="spring"></span>
        ${turns.length > 0 && html`<button type="button" onClick=${onTake}>${SAYS.take}</button>`}
        <button
          type="submit"
          class="primary"
          disabled=${lens.busy !== null}
        >${lens.busy === null ? SAYS.run : SAYS.running(lens.busy)}</button>
      </div>
      ${lens.error && html`<p class="error" role="alert">${lens.error}</p>`}
    </form>
    ${lens.results && html`<${Results} lens=${lens} change=${change} />`}
  </div>`;
}

function Counts({ model, lens, change }) {
  const flip = (count) => {
    const kept = lens.counts.includes(count) ? lens.counts.filter((one) => one !== count) : [...lens.counts, count];
    change({ counts: kept.sort((one, other) => one - other) });
  };
  return html`<fieldset class="checks">
    <legend>${SAYS.counts}</legend>
    ${presets(model).map(
      (count) =>
        html`<label><input
          type="checkbox"
          checked=${lens.counts.includes(count)}
          onChange=${() => flip(count)}
        /><span>${count}</span></label>`,
    )}
  </fieldset>`;
}

function Results({ lens, change }) {
  const { byCount } = lens.results;
  const { show, reference, at } = lens;
  const tokens = byCount[reference];
  const difference = (index) =>
    show === "spread" ? spreadAt(byCount, index) : scoreAt(byCount[show], index) - scoreAt(tokens, index);
  const onPoint = (index) => change({ at: index });
  return html`<div class="card">
    <${Choice} lens=${lens} change=${change} />
    <${Scale} spread=${show === "spread"} />
    <${TokenText}
      tokens=${tokens}
      version=${reference}
      at=${at}
      onPoint=${onPoint}
      classOf=${(index) => signOf(difference(index), show)}
      styleOf=${(index) => shade(difference(index), show)}
    />
    <${TokenSlider}
      id="lens-token"
      tokens=${tokens}
      at=${at}
      onPoint=${onPoint}
      describe=${(index) => number.signed(difference(index))}
    />
    <${AtToken} byCount=${byCount} reference=${reference} at=${at} />
    <${Totals} byCount=${byCount} reference=${reference} />
  </div>`;
}

/** What the colours show: the largest difference between counts, or one count against the reference. */
function Choice({ lens, change }) {
  const { byCount } = lens.results;
  const counts = Object.keys(byCount)
    .map(Number)
    .filter((count) => count !== lens.reference);
  const options = [["spread", SAYS.spread], ...counts.map((count) => [count, SAYS.versus(count, lens.reference)])];
  return html`<fieldset class="segments">
    <legend>${SAYS.show}</legend>
    ${options.map(
      ([value, name]) => html`<label>
        <input
          type="radio"
          name="lens-show"
          checked=${lens.show === value}
          onChange=${() => change({ show: value })}
        /><span>${name}</span>
      </label>`,
    )}
  </fieldset>`;
}

function Scale({ spread }) {
  const steps = spread ? [0.1, 0.5, 1, 1.5] : [-1.5, -0.75, -0.1, 0.1, 0.75, 1.5];
  const show = spread ? "spread" : "count";
  return html`<p class="scale quiet">
    ${!spread && SAYS.unlikelier}
    ${steps.map((value) => html`<span
      class=${`token ${signOf(value, show)}`}
      style=${shade(value, show)}
    >${spread ? value.toFixed(1) : number.signed(value)}</span>`)}
    ${!spread && SAYS.likelier}
  </p>`;
}

/** Lines under tokens say by their kind what colours say: dotted for unlikelier, solid for likelier and for differences. */
function signOf(difference, show) {
  if (Math.abs(difference) < NOTED) return "";
  if (show === "spread") return "spread";
  return difference < 0 ? "less" : "more";
}

const shade = (difference, show) =>
  signOf(difference, show) ? { "--strength": `${Math.round(Math.min(1, Math.abs(difference) / FULL) * 82) + 18}%` } : null;

function AtToken({ byCount, reference, at }) {
  const counts = Object.keys(byCount).map(Number);
  const base = scoreAt(byCount[reference], at);
  return html`<div class="scroll"><table class="wide">
    <thead><tr>${SAYS.tokenColumns.map((name) => html`<th>${name}</th>`)}</tr></thead>
    <tbody>
      ${counts.map((count) => {
        const token = byCount[count][at];
        const known = token.logprob !== null;
        return html`<tr class=${count === reference ? "reference" : ""}>
          <th scope="row">K ${count}</th>
          <td>${known ? number.tenths(Math.exp(token.logprob)) : "–"}</td>
          <td>${known && count !== reference ? number.signed(token.logprob - base) : "–"}</td>
          <td class="listed">${token.top.slice(0, ALTERNATIVES).map((one) => html`<${Likely} one=${one} chosen=${one.text === token.text} />`)}</td>
        </tr>`;
      })}
    </tbody>
  </table></div>`;
}

function Likely({ one, chosen }) {
  const share = number.percent(Math.exp(one.logprob ?? -Infinity));
  return html`<span class=${chosen ? "chosen" : ""}><code>${visible(one.text)}</code> ${share}</span>`;
}

function Totals({ byCount, reference }) {
  const rows = Object.entries(byCount).map(([count, tokens]) => {
    const scored = tokens.filter((token) => token.logprob !== null);
    const mean = scored.reduce((sum, token) => sum + token.logprob, 0) / scored.length;
    const differing = tokens.filter(
      (_, index) => Math.abs(scoreAt(tokens, index) - scoreAt(byCount[reference], index)) > NOTED,
    ).length;
    return [Number(count), mean, differing];
  });
  return html`<h3>${SAYS.table}</h3>
    <div class="scroll"><table>
      <thead><tr>${SAYS.columns.map((name) => html`<th>${name}</th>`)}</tr></thead>
      <tbody>
        ${rows.map(
          ([count, mean, differing]) => html`<tr class=${count === reference ? "reference" : ""}>
            <th scope="row">K ${count}</th><td>${mean.toFixed(3)}</td><td>${number.short(Math.exp(-mean))}</td><td>${count === reference ? "–" : number.whole(differing)}</td>
          </tr>`,
        )}
      </tbody>
    </table></div>`;
}

/** The counts that are chosen at first: the ends, the trained one, and one between. */
export function firstCounts(model) {
  const listed = presets(model);
  const wanted = [model.min, 2, model.trained, listed[Math.min(listed.length - 1, listed.indexOf(model.trained) + 1)]];
  return listed.filter((count) => wanted.includes(count));
}
