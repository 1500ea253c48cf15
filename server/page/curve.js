// The curve: quality of each count against its speed, as calibrated, and speed as measured from this page.

import { html, useMemo } from "./html.js";
import { axis, Chart } from "./charts.js";
import { colourOf, presets } from "./models.js";
import { json } from "./server.js";
import { number, words } from "./words.js";

const SAYS = words.curve;
const TOKENS = 48;
const PROMPT = "Once upon a time";

/** Measures tokens per second at every count with a button, one after another. */
export async function measure(store) {
  const { model } = store.state;
  const change = (patch) => store.set({ curve: { ...store.state.curve, ...patch } });
  change({ measured: {}, error: "" });
  try {
    for (const count of presets(model)) {
      change({ busy: count });
      const body = { model: model.id, prompt: PROMPT, num_experts: count, max_tokens: TOKENS, temperature: 0, ignore_eos: true };
      const { metrics } = await json("v1/completions", body);
      const measured = { ...store.state.curve.measured, [count]: metrics.tokens_per_second };
      change({ measured });
    }
    change({ busy: null });
  } catch (error) {
    change({ busy: null, error: error.message });
  }
}

export function Curve({ state, theme, onMeasure }) {
  const { model, curve } = state;
  if (!model.choices) return html`<div class="view"><h2>${SAYS.title}</h2><p class="empty">${SAYS.dense}</p></div>`;
  const rows = rowsOf(model, curve.measured);
  const drawn = rows.filter((row) => row.quality && (row.calibrated || row.here));
  return html`<div class="view">
    <h2>${SAYS.title}</h2>
    <p class="about">${SAYS.about} ${sourceOf(model)}</p>
    <div class="card">
      ${drawn.length > 0 && html`<${Points} model=${model} rows=${drawn} theme=${theme} />`}
      <div class="controls">
        <button
          type="button"
          disabled=${curve.busy !== null}
          onClick=${onMeasure}
        >${curve.busy === null ? SAYS.measure : SAYS.measuring(curve.busy)}</button>
        <span class="quiet">${SAYS.about_measure}</span>
      </div>
      ${curve.error && html`<p class="error" role="alert">${curve.error}</p>`}
      <${Table} model=${model} rows=${rows} />
    </div>
  </div>`;
}

function sourceOf({ calibration, quality }) {
  if (calibration.machine) return SAYS.source(calibration);
  return Object.keys(quality).length ? SAYS.card : SAYS.none;
}

function rowsOf(model, measured) {
  const counts = new Set([...Object.keys(model.quality), ...Object.keys(measured)].map(Number));
  return [...counts]
    .sort((one, other) => one - other)
    .map((count) => {
      const row = model.quality[count];
      return {
        count,
        quality: row?.relative_quality,
        perplexity: row?.perplexity,
        calibrated: row?.tokens_per_second,
        here: measured[count],
      };
    });
}

function Points({ model, rows, theme }) {
  const here = rows.some((row) => row.here);
  const speed = (row) => (here ? row.here : row.calibrated);
  const points = rows.filter(speed).sort((one, other) => speed(one) - speed(other));
  const data = useMemo(() => [points.map(speed), points.map((row) => row.quality * 100)], [rows.length, here, points.length]);
  const options = (colour) => optionsOf(model, points, colour);
  return html`<${Chart}
    label=${SAYS.title}
    options=${options}
    data=${data}
    height=${320}
    version=${`${theme} ${here} ${points.length}`}
  />`;
}

function optionsOf(model, points, colour) {
  const draw = (chart) => points.forEach((row, index) => drawPoint(chart, model, row, index, colour));
  return {
    legend: { show: false },
    cursor: { show: false },
    padding: [24, 32, 0, 0],
    scales: {
      x: { time: false, range: (_, low, high) => widened(low, high) },
      y: { range: (_, low, high) => widened(low, high) },
    },
    axes: [
      axis(colour, { label: SAYS.speed }),
      axis(colour, { label: SAYS.quality, size: 64, values: (_, ticks) => ticks.map((tick) => `${number.short(tick)}`) }),
    ],
    series: [{}, { stroke: colour("--quiet"), width: 1.5, points: { show: false } }],
    hooks: { draw: [draw] },
  };
}

function widened(low, high) {
  const room = (high - low || 1) * 0.12;
  return [low - room, high + room];
}

function drawPoint(chart, model, row, index, colour) {
  const context = chart.ctx;
  const left = chart.valToPos(chart.data[0][index], "x", true);
  const top = chart.valToPos(chart.data[1][index], "y", true);
  const scale = devicePixelRatio;
  context.save();
  context.beginPath();
  context.arc(left, top, 6 * scale, 0, 2 * Math.PI);
  context.fillStyle = colourOf(model, row.count);
  context.fill();
  context.strokeStyle = colour("--text");
  context.lineWidth = row.count === model.trained ? 2 * scale : 0.75 * scale;
  context.stroke();
  context.fillStyle = colour("--text");
  context.font = `${12 * scale}px system-ui, sans-serif`;
  context.textAlign = "center";
  context.fillText(words.answer.count(row.count), left, top - 11 * scale);
  context.restore();
}

function Table({ model, rows }) {
  if (!rows.length) return null;
  return html`<details open><summary>${SAYS.table}</summary>
    <div class="scroll"><table>
      <thead><tr>${SAYS.columns.map((name) => html`<th>${name}</th>`)}</tr></thead>
      <tbody>
        ${rows.map(
          ({ count, quality, perplexity, calibrated, here }) => html`<tr class=${count === model.trained ? "reference" : ""}>
            <th scope="row">K ${count}</th>
            <td>${quality ? number.tenths(quality) : "–"}</td>
            <td>${perplexity ? number.short(perplexity) : "–"}</td>
            <td>${calibrated ? number.short(calibrated) : "–"}</td>
            <td>${here ? number.short(here) : "–"}</td>
          </tr>`,
        )}
      </tbody>
    </table></div>
  </details>`;
}
