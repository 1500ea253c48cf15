// A chart of uPlot's, loaded when the first one is shown, in the page's colours.

import { html, useEffect, useRef } from "./html.js";

let loading = null;
const load = () => (loading ||= import("./vendor/uplot.js").then((module) => module.default));

/** `options(colour)` gives uPlot's options, `colour(name)` the value of a variable of the style sheet. `version` makes a new chart. */
export function Chart({ label, options, data, height, version }) {
  const place = useRef(null);
  const chart = useRef(null);
  useEffect(() => {
    const box = place.current;
    let gone = false;
    const watch = new ResizeObserver(() => chart.current?.setSize(sizeOf(box, height)));
    load().then((UPlot) => {
      if (gone) return;
      chart.current = new UPlot({ ...sizeOf(box, height), ...options(colourIn(box)) }, data, box);
      watch.observe(box);
    });
    return () => {
      gone = true;
      watch.disconnect();
      chart.current?.destroy();
      chart.current = null;
    };
  }, [version]);
  useEffect(() => chart.current?.setData(data), [data]);
  return html`<div class="chart" role="img" aria-label=${label} ref=${place}></div>`;
}

const sizeOf = (place, height) => ({ width: Math.max(240, place.clientWidth), height });

const colourIn = (place) => (name) => {
  const probe = document.createElement("i");
  probe.style.color = `var(${name})`;
  place.append(probe);
  const found = getComputedStyle(probe).color;
  probe.remove();
  return found;
};

/** An axis in the page's colours. */
export const axis = (colour, more) => ({
  stroke: colour("--quiet"),
  grid: { stroke: colour("--line"), width: 1 },
  ticks: { stroke: colour("--line"), width: 1 },
  font: "12px system-ui, sans-serif",
  labelFont: "12px system-ui, sans-serif",
  ...more,
});
