// What the page knows, in one object whose parts `set` replaces; views draw it anew after each change. It sends nothing.

import { useEffect, useState } from "./html.js";

const DRAW_MS = 40; // while an answer streams, the page is drawn so often

/** A store of one state. `touch` draws soon, for changes deep inside; `set` draws at once. */
export function createStore(state) {
  const listeners = new Set();
  let timer = 0;
  const draw = () => {
    clearTimeout(timer);
    timer = 0;
    for (const listener of listeners) listener();
  };
  return {
    state,
    set(patch) {
      Object.assign(state, patch);
      draw();
    },
    touch() {
      timer ||= setTimeout(draw, DRAW_MS);
    },
    listen(listener) {
      listeners.add(listener);
      return () => listeners.delete(listener);
    },
  };
}

/** The state, drawn again after each change. */
export function useStore(store) {
  const [, again] = useState(0);
  useEffect(() => store.listen(() => again((count) => count + 1)), [store]);
  return store.state;
}

export const initial = () => ({
  view: "ask",
  models: [],
  model: null, // see models.js
  status: { kind: "connecting" },
  form: { mode: "text", prompt: "", count: null, compare: false, second: null, seed: 7, temperature: 0.7, maximum: 64 },
  turns: [], // of { id, mode, prompt, answers: [A] or [A, B] }
  running: null, // an AbortController while answers are written
  refusedFields: new Set(), // optional fields of requests that this server refused
  rates: {}, // by count: tokens per second of the last answer
  error: "", // why the question was not sent
  refusal: "", // why the models cannot be listed
  link: null, // a question that came in the address bar
  keyForm: null,
  help: false,
  theme: "auto",
  singleKeys: true,
  lens: { text: "", prefix: null, counts: null, reference: null, results: null, show: "spread", at: 0, busy: null, error: "" },
  routing: { turn: null, scope: "all", at: 0 },
  curve: { measured: {}, busy: null, error: "" },
  live: { samples: [], available: true },
});

const STORED = "moedial.settings"; // colours and keys; never a question

export function loadSettings() {
  try {
    const { theme = "auto", singleKeys = true } = JSON.parse(localStorage.getItem(STORED)) || {};
    return { theme, singleKeys };
  } catch {
    return {};
  }
}

export function saveSettings({ theme, singleKeys }) {
  try {
    localStorage.setItem(STORED, JSON.stringify({ theme, singleKeys }));
  } catch {
    // without storage the settings last as long as the page
  }
}
