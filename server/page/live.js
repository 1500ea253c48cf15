// The live view: latency by expert count from /metrics, over the last five minutes; and the state of the server in words.

import { html, useMemo } from "./html.js";
import { axis, Chart } from "./charts.js";
import { parse, quantile } from "./exposition.js";
import { colourOf } from "./models.js";
import { address } from "./server.js";
import { number, words } from "./words.js";

const SAYS = words.live;
const WINDOW_MS = 300_000;
const HISTOGRAMS = { first: "moedial:time_to_first_token_seconds", token: "moedial:inter_token_latency_seconds" };
const TOTALS = {
  running: "num_requests_running",
  waiting: "num_requests_waiting",
  up: "engine_up",
  cache: "kv_cache_usage_perc",
  pairs: "routed_pairs_total",
  saved: "routed_pairs_saved_total",
};

/** Reads /metrics once: the server's status, and a sample for the charts. */
export async function look(store) {
  let text;
  try {
    const response = await fetch(address("metrics"), { cache: "no-store" });
    if (!response.ok) return store.set({ live: { ...store.state.live, available: false }, status: { kind: "unknown" } });
    text = await response.text();
  } catch {
    return store.set({ status: { kind: "gone" } });
  }
  const sample = sampleOf(parse(text));
  const kept = store.state.live.samples.filter((one) => one.time > sample.time - WINDOW_MS);
  const kind = sample.up ? "ready" : store.state.model ? "down" : "loading";
  return store.set({
    live: { samples: [...kept, sample], available: true },
    status: { kind, running: sample.running, waiting: sample.waiting },
  });
}

/** What one reading of /metrics says: totals, and by count the histograms and the tokens. */
function sampleOf(samples) {
  const totals = Object.fromEntries(
    Object.entries(TOTALS).map(([name, series]) => [name, samples.find((one) => one.name === `moedial:${series}`)?.value ?? 0]),
  );
  const counts = {};
  for (const { name, labels, value } of samples) {
    const count = labels.num_experts;
    if (count === undefined) continue;
    const own = (counts[count] ||= { tokens: 0, first: empty(), token: empty() });
    if (name === "moedial:generation_tokens_total") own.tokens += value;
    for (const [kind, series] of Object.entries(HISTOGRAMS))
      add(own[kind], name.slice(series.length), name.startsWith(`${series}_`), labels.le, value);
  }
  return { time: Date.now(), counts, ...totals };
}

const empty = () => ({ sum: 0, count: 0, buckets: {} });

function add(histogram, ending, own, bound, value) {
  if (!own) return;
  if (ending === "_sum") histogram.sum += value;
  if (ending === "_count") histogram.count += value;
  if (ending === "_bucket") {
    const key = bound === "+Inf" ? Infinity : Number(bound);
    histogram.buckets[key] = (histogram.buckets[key] || 0) + value;
  }
}

/** What was added to a histogram from one sample to a later one. */
function between(earlier, later) {
  if (!earlier || later.count < earlier.count) return later; // a count that is new, or a server that began again
  const buckets = Object.fromEntries(
    Object.entries(later.buckets).map(([bound, value]) => [bound, value - (earlier.buckets[bound] || 0)]),
  );
  return { sum: later.sum - earlier.sum, count: later.count - earlier.count, buckets };
}

export function Live({ state, theme }) {
  const { live, model } = state;
  const { samples } = live;
  const last = samples.at(-1);
  if (!live.available) return html`<div class="view"><h2>${SAYS.title}</h2><p class="empty">${SAYS.unavailable}</p></div>`;
  const rows = samples.length > 1 ? rowsOf(samples) : [];
  const active = rows.filter((row) => row.tokens > 0 || row.first.count > 0);
  return html`<div class="view">
    <h2>${SAYS.title}</h2>
    <p class="about">${SAYS.about}</p>
    ${last && html`<${Totals} samples=${samples} last=${last} />`}
    ${
      active.length === 0
        ? html`<p class="empty">${SAYS.none}</p>`
        : html`<div class="card">
          <div class="columns">
            <${Lines} title=${SAYS.token} kind="token" model=${model} samples=${samples} rows=${active} theme=${theme} />
            <${Lines} title=${SAYS.first} kind="first" model=${model} samples=${samples} rows=${active} theme=${theme} />
          </div>
          <${Table} rows=${active} />
        </div>`
    }
  </div>`;
}

/** One row per count: what was added over the window. */
function rowsOf(samples) {
  const [earliest, latest] = [samples[0], samples.at(-1)];
  return Object.entries(latest.counts).map(([count, own]) => ({
    count,
    tokens: own.tokens - (earliest.counts[count]?.tokens ?? 0),
    first: between(earliest.counts[count]?.first, own.first),
    token: between(earliest.counts[count]?.token, own.token),
  }));
}

function Totals({ samples, last }) {
  const before = samples.at(-2);
  const made = (sample) => Object.values(sample.counts).reduce((sum, own) => sum + own.tokens, 0);
  const rate = before ? ((made(last) - made(before)) * 1000) / (last.time - before.time) : 0;
  const saved = last.saved / (last.saved + last.pairs || 1);
  const shown = [
    [number.whole(last.running), SAYS.running],
    [number.whole(last.waiting), SAYS.waiting],
    [number.short(Math.max(0, rate)), SAYS.rate],
    [number.percent(last.cache), SAYS.cache],
    [number.percent(saved), SAYS.saved],
  ];
  return html`<dl class="figures tall">${shown.map(([value, name]) => html`<div><dt>${name}</dt><dd>${value}</dd></div>`)}</dl>`;
}

function Lines({ title, kind, model, samples, rows, theme }) {
  const counts = rows.map((row) => row.count);
  const data = useMemo(() => linesOf(samples, counts, kind), [samples]);
  const options = (colour) => ({
    legend: { show: false },
    cursor: { show: false },
    scales: { x: { time: true }, y: { range: (_, low, high) => [0, Math.max(high * 1.1, 1)] } },
    axes: [axis(colour, { values: (_, ticks) => ticks.map(clock) }), axis(colour, { size: 48 })],
    series: [{}, ...counts.map((count) => lineOf(model, count, colour))],
  });
  return html`<section><h3>${title}</h3>
    <${Chart} label=${title} options=${options} data=${data} height=${200} version=${`${theme} ${counts}`} />
    <p class="scale quiet">${counts.map((count) => html`<span><i
      class="swatch"
      style=${{ background: colourFor(model, count) }}
    ></i>${SAYS.count(count)}</span>`)}</p>
  </section>`;
}

const clock = (seconds) => new Date(seconds * 1000).toLocaleTimeString("en", { hour12: false });
const colourFor = (model, count) => (model && Number(count) ? colourOf(model, Number(count)) : "gray");
const lineOf = (model, count) => ({
  stroke: colourFor(model, count),
  width: 2,
  spanGaps: false,
  points: { show: true, size: 6, fill: colourFor(model, count) },
});

/** Times in seconds, and by count the mean of what was added since the sample before, in ms; null where nothing was. */
function linesOf(samples, counts, kind) {
  const times = samples.slice(1).map((sample) => sample.time / 1000);
  const means = (count) =>
    samples.slice(1).map((sample, index) => {
      const own = sample.counts[count]?.[kind];
      if (!own) return null;
      const added = between(samples[index].counts[count]?.[kind], own);
      return added.count ? (added.sum / added.count) * 1000 : null;
    });
  return [times, ...counts.map(means)];
}

function Table({ rows }) {
  const shown = (histogram, share) => {
    const value = quantile(histogram.buckets, share);
    return value === null ? "–" : number.milliseconds(value * 1000);
  };
  return html`<div class="scroll"><table>
    <thead><tr>${SAYS.columns.map((name) => html`<th>${name}</th>`)}</tr></thead>
    <tbody>
      ${rows.map(
        ({ count, tokens, first, token }) => html`<tr>
          <th scope="row">${SAYS.count(count)}</th><td>${number.whole(first.count)}</td>
          <td>${shown(first, 0.5)}</td><td>${shown(first, 0.95)}</td><td>${shown(token, 0.5)}</td><td>${shown(token, 0.95)}</td><td>${number.whole(tokens)}</td>
        </tr>`,
      )}
    </tbody>
  </table></div>`;
}
