// Prometheus's text format: samples by name and labels, and quantiles of histograms. It knows no series of this server.

const SAMPLE = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)/;
const LABEL = /(\w+)="((?:\\.|[^"\\])*)"/g;

/** Samples as a list of { name, labels, value }. */
export function parse(text) {
  const samples = [];
  for (const line of text.split("\n")) {
    const found = line[0] === "#" ? null : SAMPLE.exec(line);
    if (found) samples.push({ name: found[1], labels: labelsOf(found[2] || ""), value: numberOf(found[3]) });
  }
  return samples;
}

function labelsOf(text) {
  const labels = {};
  for (const [, name, value] of text.matchAll(LABEL))
    labels[name] = value.replace(/\\(.)/g, (_, char) => (char === "n" ? "\n" : char));
  return labels;
}

const numberOf = (text) => ({ "+Inf": Infinity, "-Inf": -Infinity })[text] ?? Number(text);

/** The quantile of a histogram, { le: cumulative count }, as PromQL's histogram_quantile has it; null where it is empty. */
export function quantile(buckets, share) {
  const bounds = Object.keys(buckets)
    .map(Number)
    .sort((one, other) => one - other);
  const total = buckets[bounds.at(-1)];
  if (!total) return null;
  const wanted = share * total;
  let [low, below] = [0, 0];
  for (const bound of bounds) {
    const count = buckets[bound];
    if (count >= wanted && bound === Infinity) return low;
    if (count >= wanted) return low + ((bound - low) * (wanted - below)) / Math.max(1e-12, count - below);
    [low, below] = [bound, count];
  }
  return low;
}
