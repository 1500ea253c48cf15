// What the page needs of a model's card: its counts, what was measured at each of them, and what it can do.

import { json } from "./server.js";

const FEW = 8; // counts that all get a button

/** The models that the server lists, without their aliases; whether each has a chat template. */
export async function loadModels() {
  const [{ data }, tokenizer] = await Promise.all([json("v1/models"), json("tokenizer_info").catch(() => ({}))]);
  return data.filter((card) => !card.parent).map((card) => modelOf(card, Boolean(tokenizer.chat_template)));
}

function modelOf(card, chat) {
  const { moe, execution } = card.meta;
  const has = moe.layers > 0;
  return {
    id: card.id,
    chat,
    has,
    min: moe.min,
    max: moe.max,
    trained: moe.trained,
    default: Number.isInteger(moe.default) ? moe.default : moe.trained,
    layers: moe.layers,
    experts: moe.num_experts_total,
    choices: has && moe.max > moe.min,
    quality: measuredOf(moe.quality || [], moe.trained),
    calibration: moe.calibration || {},
    tellsRoutes: Boolean(execution.return_routed_experts),
    context: card.max_model_len,
  };
}

/** What was measured by count: by a calibration, or as the model's card has it, which may know less. */
function measuredOf(rows, trained) {
  const asTrained = rows.find((row) => row.num_experts === trained)?.perplexity;
  const quality = (row) => row.relative_quality ?? (asTrained && row.perplexity ? asTrained / row.perplexity : null);
  const rate = ({ tokens_per_second: speed }) => (typeof speed === "object" ? speed?.["1"] : speed);
  const read = rows.map((row) => [row.num_experts, { ...row, relative_quality: quality(row), tokens_per_second: rate(row) }]);
  return Object.fromEntries(read.filter(([, row]) => row.relative_quality));
}

/** The counts that get a button: all where they are few, else powers of two, the trained one and the ends. */
export function presets(model) {
  if (!model.has) return [];
  const all = Array.from({ length: model.max - model.min + 1 }, (_, index) => model.min + index);
  if (all.length <= FEW) return all;
  return all.filter(
    (count) => Number.isInteger(Math.log2(count)) || count === model.trained || count === model.min || count === model.max,
  );
}

/** A count to compare `count` with at first: the smallest, or the largest where it is the smallest itself. */
export const opposite = (model, count) => (count === model.min ? model.max : model.min);

export const within = (model, count) => Math.min(model.max, Math.max(model.min, count));

/** A colour of a count, from few to many, for marks that are no text. */
export function colourOf(model, count) {
  const span = Math.log2(model.max / model.min) || 1;
  return viridis(Math.log2(count / model.min) / span);
}

const STOPS = [
  [68, 1, 84],
  [59, 82, 139],
  [33, 145, 140],
  [94, 201, 98],
  [253, 231, 37],
];

/** The colour of a share from 0 to 1, readable without colour vision. */
export function viridis(share) {
  const at = Math.min(0.9999, Math.max(0, share)) * (STOPS.length - 1);
  const low = STOPS[Math.floor(at)];
  const high = STOPS[Math.floor(at) + 1];
  const mixed = low.map((value, index) => Math.round(value + (high[index] - value) * (at % 1)));
  return `rgb(${mixed.join(", ")})`;
}
