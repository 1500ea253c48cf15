// The heat map of routes: which experts (or groups of an ∞-MoE's mask) each layer used, for all tokens or for one.

import { html, useEffect, useMemo, useRef } from "./html.js";
import { viridis } from "./models.js";
import { TokenSlider } from "./tokens.js";
import { words } from "./words.js";

const SAYS = words.routing;
const CELL = 16; // pixels, at most
const MAP = 512; // pixels, at most, unless cells would become too narrow
const LISTED = 8; // experts of a layer in the table

/** Routes as the server writes them, read: `at(token, layer)` gives the experts of a token, best first. */
function readRoutes({ shape, dtype, bits, first, data }, experts) {
  const raw = Uint8Array.from(atob(data), (char) => char.charCodeAt(0));
  const [tokens, layers, width] = shape;
  const values = dtype === "uint16" ? wide(raw) : raw;
  const none = dtype === "uint16" ? 65535 : 255;
  const row = (token, layer) => values.subarray((token * layers + layer) * width, (token * layers + layer + 1) * width);
  const at = (token, layer) => {
    const own = Array.from(row(token, layer));
    return bits
      ? own.flatMap((byte, index) => [0, 1, 2, 3, 4, 5, 6, 7].filter((bit) => byte & (1 << bit)).map((bit) => index * 8 + bit))
      : own.filter((expert) => expert !== none);
  };
  return { tokens, layers, bits, first, columns: bits ? width * 8 : experts, at };
}

function wide(raw) {
  const view = new DataView(raw.buffer);
  return Uint16Array.from({ length: raw.length / 2 }, (_, index) => view.getUint16(index * 2, true));
}

/** By layer and expert, the share of tokens that used it. */
function sharesOf(routes) {
  const shares = Array.from({ length: routes.layers }, () => new Float64Array(routes.columns));
  for (let token = 0; token < routes.tokens; token += 1)
    for (let layer = 0; layer < routes.layers; layer += 1)
      for (const expert of routes.at(token, layer)) shares[layer][expert] += 1 / routes.tokens;
  return shares;
}

export function Routing({ state, change }) {
  const { model, turns, routing } = state;
  const shown = turns.filter((turn) => turn.answers.some((answer) => answer.state === "done"));
  const turn = shown.find((one) => one.id === routing.turn) || shown.at(-1);
  let content = html`<${Turns} model=${model} turns=${shown} turn=${turn} routing=${routing} change=${change} />`;
  if (!turn) content = html`<p class="empty">${SAYS.none}</p>`;
  if (!model.has) content = html`<p class="empty">${SAYS.dense}</p>`;
  else if (!model.tellsRoutes) content = html`<p class="empty">${SAYS.off}</p>`;
  return html`<div class="view"><h2>${SAYS.title}</h2>${content}</div>`;
}

function Turns({ model, turns, turn, routing, change }) {
  const read = turn.answers.map((answer) => answer.routes && readRoutes(answer.routes, model.experts));
  const bits = read.some((routes) => routes?.bits);
  const longest = read.reduce((most, routes) => (routes && routes.tokens > (most?.tokens ?? 0) ? routes : most), null);
  const index = read.indexOf(longest);
  return html`<p class="about">${bits ? SAYS.bitsAbout : SAYS.about}</p>
    <div class="card">
      <div class="controls">
        <label class="field"><span>${SAYS.answer}</span>
          <select value=${turn.id} onChange=${(event) => change({ turn: Number(event.target.value), at: 0 })}>
            ${turns.map((one) => html`<option value=${one.id}>${one.prompt.slice(0, 60)}</option>`)}
          </select>
        </label>
        <${Scope} routing=${routing} change=${change} />
      </div>
      ${longest && routing.scope === "one" && html`<${TokenSlider}
        id="routing-token"
        tokens=${labels(turn.answers[index], longest)}
        at=${routing.at}
        onPoint=${(at) => change({ at })}
      />`}
      <div class="columns maps">
        ${turn.answers.map((answer, place) => html`<${OneMap}
          model=${model}
          answer=${answer}
          routes=${read[place]}
          routing=${routing}
        />`)}
      </div>
    </div>`;
}

function Scope({ routing, change }) {
  return html`<fieldset class="segments">
    <legend class="hidden">${SAYS.scope}</legend>
    ${["all", "one"].map(
      (scope) =>
        html`<label><input
          type="radio"
          name="scope"
          checked=${routing.scope === scope}
          onChange=${() => change({ scope })}
        /><span>${SAYS[scope]}</span></label>`,
    )}
  </fieldset>`;
}

/** The routed tokens with their texts; those of the prompt, which the page does not know, by place. */
function labels(answer, routes) {
  const prompt = (answer.usage?.prompt_tokens ?? 0) - routes.first;
  return Array.from({ length: routes.tokens }, (_, index) => ({
    text: index < prompt ? `${SAYS.prompt} ${routes.first + index + 1}` : (answer.tokens[index - prompt]?.text ?? "?"),
  }));
}

function OneMap({ model, answer, routes, routing }) {
  const title = html`<h3>${words.answer.count(answer.question.count)}</h3>`;
  if (!routes) return html`<section>${title}<p class="quiet">${SAYS.without}</p></section>`;
  const shares = useMemo(() => sharesOf(routes), [answer]);
  const token = Math.min(routing.at, routes.tokens - 1);
  const one = routing.scope === "one";
  const most = Math.max(...shares.map((row) => Math.max(...row)));
  const grid = one ? gridOf(routes, token) : shares.map((row) => row.map((share) => share / most));
  const say = (layer, expert) => (one ? placeOf(routes, token, layer, expert) : SAYS.share(shares[layer][expert]));
  const unused = shares.reduce((sum, row) => sum + row.filter((share) => share === 0).length, 0);
  return html`<section>
    ${title}
    <${Grid} grid=${grid} say=${say} label=${`${SAYS.title} ${words.answer.count(answer.question.count)}`} />
    <${Ramp} most=${one ? (routes.bits ? SAYS.kept(true) : SAYS.rank(1)) : SAYS.share(most)} />
    <p class="quiet">${SAYS.unused(unused, routes.columns * routes.layers)}${routes.first > 0 ? ` ${SAYS.cached(routes.first)}` : ""}</p>
    <details><summary>${SAYS.table}</summary><${AsTable} grid=${grid} say=${say} /></details>
  </section>`;
}

function Ramp({ most }) {
  const steps = [0, 0.25, 0.5, 0.75, 1].map((share) => html`<i style=${{ background: viridis(share) }}></i>`);
  return html`<p class="scale quiet">${SAYS.fewest} <span class="ramp">${steps}</span> ${most}</p>`;
}

/** One token's experts as a grid: 1 for the best of a layer, less for the next; all that are kept of a mask are 1. */
function gridOf(routes, token) {
  return Array.from({ length: routes.layers }, (_, layer) => {
    const row = new Float64Array(routes.columns);
    const experts = routes.at(token, layer);
    experts.forEach((expert, rank) => {
      row[expert] = routes.bits ? 1 : 1 - (0.7 * rank) / experts.length;
    });
    return row;
  });
}

function placeOf(routes, token, layer, expert) {
  const rank = routes.at(token, layer).indexOf(expert) + 1;
  return routes.bits ? SAYS.kept(rank > 0) : SAYS.rank(rank);
}

/** A canvas with one cell per layer and expert; what is under the pointer is said below it. */
function Grid({ grid, say, label }) {
  const canvas = useRef(null);
  const told = useRef(null);
  useEffect(() => draw(canvas.current, grid), [grid]);
  const point = (event) => {
    const box = canvas.current.getBoundingClientRect();
    const expert = Math.floor(((event.clientX - box.left) / box.width) * grid[0].length);
    const layer = Math.floor(((event.clientY - box.top) / box.height) * grid.length);
    if (grid[layer]?.[expert] !== undefined) told.current.textContent = SAYS.cell(layer, expert, say(layer, expert));
  };
  return html`<canvas ref=${canvas} class="grid" role="img" aria-label=${label} onMouseMove=${point} onClick=${point}></canvas>
    <p class="told quiet" ref=${told}>${" "}</p>`;
}

function draw(canvas, grid) {
  const columns = grid[0].length;
  const cell = Math.max(3, Math.min(CELL, Math.floor(MAP / columns)));
  canvas.width = columns * cell;
  canvas.height = grid.length * CELL;
  canvas.style.width = `${canvas.width}px`;
  const context = canvas.getContext("2d");
  grid.forEach((row, layer) =>
    row.forEach((value, expert) => {
      context.fillStyle = viridis(value);
      context.fillRect(expert * cell, layer * CELL, cell - 1, CELL - 1);
    }),
  );
}

/** The busiest experts of each layer in words: a table of every cell would be thousands of them. */
function AsTable({ grid, say }) {
  return html`<div class="scroll"><table>
    <thead><tr><th>${SAYS.layer(0).split(" ")[0]}</th><th>${SAYS.busiest}</th></tr></thead>
    <tbody>
      ${grid.map((row, layer) => {
        const busiest = [...row.keys()].filter((expert) => row[expert] > 0).sort((one, other) => row[other] - row[one]);
        const listed = busiest.slice(0, LISTED).map((expert) => html`<span><code>${expert}</code> ${say(layer, expert)}</span>`);
        return html`<tr><th scope="row">${layer + 1}</th><td class="listed">${listed}</td></tr>`;
      })}
    </tbody>
  </table></div>`;
}
