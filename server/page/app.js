// Starts the page and ties its parts together: state, views, keys of the keyboard, polling. Everything else is in its own file.

import { html, render, useEffect } from "./html.js";
import { ask, historyOf } from "./asking.js";
import { readLink } from "./bodies.js";
import { Composer, faultOf } from "./composer.js";
import { Conversation } from "./conversation.js";
import { Curve, measure } from "./curve.js";
import { stepped } from "./dial.js";
import { Help, KeyForm } from "./dialogs.js";
import { Banner, Header } from "./header.js";
import { firstCounts, Lens, score } from "./lens.js";
import { Live, look } from "./live.js";
import { loadModels, opposite } from "./models.js";
import { Routing } from "./routing.js";
import { keys } from "./server.js";
import { FromLink, Start } from "./start.js";
import { createStore, initial, loadSettings, saveSettings, useStore } from "./store.js";
import { words } from "./words.js";

const BUSY_MS = 2000; // between looks at /metrics while something happens
const IDLE_MS = 5000;

const store = createStore({ ...initial(), ...loadSettings() });
const change = (patch) => store.set(patch);
const changeIn = (part) => (patch) => store.set({ [part]: { ...store.state[part], ...patch } });
const changeForm = changeIn("form");

// asking

async function send() {
  const { form, turns } = store.state;
  const fault = faultOf(form);
  if (fault) return change({ error: fault });
  if (form.mode === "chat") changeForm({ prompt: "" });
  return ask(store, { ...form }, [historyOf(turns, 0), historyOf(turns, 1)]);
}

function stop() {
  store.state.running?.abort();
}

function tryExample(prompt) {
  const { model, form } = store.state;
  const compared = model.choices ? { count: model.min, second: model.max, compare: true } : {};
  changeForm({ prompt, ...compared });
  ask(store, { ...form, prompt, ...compared }, [[], []]);
}

/** Asks what the link holds, as it is: a count that the model does not have is refused by the server, in words. */
function runLink() {
  const { link, model, form } = store.state;
  const { mode, prompt, seed, temperature, maximum } = link;
  const compare = model.choices && link.second !== null;
  const counts = model.choices ? { count: link.count ?? form.count, second: link.second ?? form.second } : {};
  const asked = { ...form, mode, prompt, seed, temperature, maximum, compare, ...counts };
  changeForm(asked);
  ask(store, asked, link.histories, { fingerprint: link.fingerprint });
}

function takeForLens(turn, answer) {
  const { question, text } = answer;
  const prefix =
    turn.mode === "chat"
      ? { messages: [...question.history, { role: "user", content: question.prompt }] }
      : { prompt: question.prompt };
  changeIn("lens")({
    text: turn.mode === "chat" ? text : question.prompt + text,
    prefix: turn.mode === "chat" ? prefix : null,
    results: null,
    error: "",
  });
  change({ view: "lens" });
  score(store);
}

function exportAll() {
  const turns = store.state.turns.map(({ mode, prompt, answers }) => ({
    mode,
    prompt,
    answers: answers.map(({ question, state, text, reasoning, usage, metrics, fingerprint, finish }) => ({
      question,
      state,
      text,
      reasoning,
      usage,
      metrics,
      fingerprint,
      finish,
    })),
  }));
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([JSON.stringify(turns, null, 2)], { type: "application/json" }));
  link.download = "conversation.json";
  link.click();
  URL.revokeObjectURL(link.href);
}

// views

function App() {
  const state = useStore(store);
  const { model, view, keyForm, help, status, refusal } = state;
  return html`<${Header} state=${state} change=${change} onModel=${choose} onTheme=${setTheme} />
    <${Banner} text=${words.banner[status.kind] ?? refusal} />
    ${model && html`<main class=${view}>
      <div id="view" role="tabpanel" aria-labelledby=${`tab-${view}`}><${View} state=${state} /></div>
    </main>`}
    ${keyForm && html`<${KeyForm} key=${keyForm.count} wrong=${keyForm.wrong} onDone=${keyForm.done} />`}
    ${help && html`<${Help}
      singleKeys=${state.singleKeys}
      onSingleKeys=${(singleKeys) => keep({ singleKeys })}
      onForget=${forget}
      onClose=${() => change({ help: false })}
    />`}`;
}

function View({ state }) {
  const { view, theme, turns } = state;
  const take = () => takeForLens(turns.at(-1), turns.at(-1).answers[0]);
  if (view === "lens")
    return html`<${Lens} state=${state} change=${changeIn("lens")} onScore=${() => score(store)} onTake=${take} />`;
  if (view === "routing") return html`<${Routing} state=${state} change=${changeIn("routing")} />`;
  if (view === "curve") return html`<${Curve} state=${state} theme=${theme} onMeasure=${() => measure(store)} />`;
  if (view === "live") return html`<${Live} state=${state} theme=${theme} />`;
  return html`<${Ask} state=${state} />`;
}

function Ask({ state }) {
  const { turns, link, model, form, running } = state;
  useEffect(() => document.querySelector(".turn:last-child")?.scrollIntoView(), [turns.length]);
  const showRouting = (turn) => store.set({ view: "routing", routing: { turn: turn.id, scope: "all", at: 0 } });
  return html`<div class="ask">
    <div class="talk">
      ${link && !running && html`<${FromLink} link=${link} onRun=${runLink} onDismiss=${() => change({ link: null })} />`}
      ${!turns.length && !link && html`<${Start} model=${model} mode=${form.mode} onExample=${tryExample} />`}
      <${Conversation} state=${state} onLens=${takeForLens} onRouting=${showRouting} />
      ${
        turns.length > 0 &&
        !running &&
        html`<p class="all">
        <button type="button" class="quiet" onClick=${exportAll}>${words.composer.exportAll}</button>
        <button type="button" class="quiet" onClick=${() => change({ turns: [] })}>${words.composer.clear}</button>
      </p>`
      }
    </div>
    <${Composer} state=${state} change=${changeForm} onSend=${send} onStop=${stop} />
  </div>`;
}

// settings and keys

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  keep({ theme });
}

function keep(patch) {
  change(patch);
  saveSettings(store.state);
}

function forget() {
  keys.forget();
  change({ help: false });
}

let asked = null; // one form, however many requests wait for the key
let forms = 0;

keys.ask = (wrong) =>
  (asked ||= new Promise((resolve) => {
    const done = (key) => {
      asked = null;
      change({ keyForm: null });
      resolve(key);
    };
    change({ keyForm: { wrong, done, count: ++forms } });
  }));

function onKey(event) {
  const { form, model, view, running, help, keyForm, singleKeys } = store.state;
  if (!model || help || keyForm) return;
  if (event.key === "Escape" && running) return stop();
  const typing = event.target.closest?.("textarea, select, input:not([type=radio], [type=checkbox], [type=range])");
  if (typing || !singleKeys || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "?") return change({ help: true });
  if (view !== "ask" || !model.choices) return;
  const step = { "[": -1, "]": 1 }[event.key];
  if (step) changeForm({ count: stepped(model, form.count, step) });
  if (event.key === "c") changeForm({ compare: !form.compare, second: form.second ?? opposite(model, form.count) });
}

// start

async function openModels() {
  try {
    const models = await loadModels();
    change({ models, refusal: "" });
    choose(models[0]);
  } catch (error) {
    change({ refusal: error.message });
  }
}

/** Shows a model: its dial stands at its default count. */
function choose(model) {
  const { lens, form } = store.state;
  const counts = model.choices ? firstCounts(model) : [];
  const count = model.has ? model.default : null;
  change({ model, lens: { ...lens, counts, results: null }, form: { ...form, count, second: null, compare: false } });
}

function takeLink() {
  try {
    change({ link: readLink(location.hash) });
  } catch {
    change({ link: { broken: true } });
  }
}

async function poll() {
  if (document.visibilityState === "visible") {
    await look(store);
    const { model, keyForm, status } = store.state;
    if (!model && !keyForm && ["ready", "unknown"].includes(status.kind)) await openModels();
  }
  const busy = store.state.running || store.state.view === "live" || store.state.status.kind !== "ready";
  setTimeout(poll, busy ? BUSY_MS : IDLE_MS);
}

document.documentElement.dataset.theme = store.state.theme;
document.addEventListener("keydown", onKey);
addEventListener("hashchange", takeLink);
takeLink();
render(html`<${App} />`, document.getElementById("app"));
poll();
