// Asks questions and keeps what comes back: text, tokens, figures, routes. One answer at a time, so that none slows another.

import { bodyOf } from "./bodies.js";
import { request } from "./server.js";
import { events } from "./stream.js";
import { bytesOf } from "./tokens.js";

const ALTERNATIVES = 5;

let ids = 0;

/** Asks the question of the form, at one count or two, and adds the turn to the conversation. */
export async function ask(store, form, histories, made = null) {
  const controller = new AbortController();
  const counts = form.compare ? [form.count, form.second] : [form.count];
  const answers = counts.map((count, index) => newAnswer(questionOf(store, form, count, histories[index])));
  const turn = { id: ++ids, mode: form.mode, prompt: form.prompt, answers, made };
  store.set({ turns: [...store.state.turns, turn], running: controller, error: "", link: null });
  for (const answer of answers) {
    if (!controller.signal.aborted) await write(store, answer, controller.signal);
    if (controller.signal.aborted && answer.state !== "done") answer.state = "stopped";
  }
  store.set({ running: null });
  return turn;
}

function questionOf(store, form, count, history) {
  const { mode, prompt, seed, temperature, maximum } = form;
  return { mode, model: store.state.model.id, prompt, history, count, seed, temperature, maximum };
}

/** The messages before a new question, as column A or B of the conversation has them. */
export function historyOf(turns, column) {
  const answered = turns.filter((turn) => turn.mode === "chat" && turn.answers.every((answer) => answer.text));
  return answered.flatMap(({ prompt, answers }) => [
    { role: "user", content: prompt },
    { role: "assistant", content: (answers[column] || answers[0]).text },
  ]);
}

function newAnswer(question) {
  const state = { id: ++ids, question, state: "waiting", text: "", reasoning: "", tokens: [], routes: null, finish: null };
  return { ...state, usage: null, metrics: null, fingerprint: "", error: "", sent: 0, first: 0, last: 0 };
}

async function write(store, answer, signal) {
  answer.state = "running";
  answer.sent = performance.now();
  store.touch();
  try {
    const response = await send(store.state, answer.question, signal);
    for await (const event of events(response)) {
      take(answer, event);
      store.touch();
    }
    answer.state = "done";
    if (answer.metrics?.tokens_per_second) store.state.rates[answer.question.count] = answer.metrics.tokens_per_second;
  } catch (error) {
    if (error.name === "AbortError") answer.state = "stopped";
    else Object.assign(answer, { state: "failed", error: error.message });
  }
}

/** Sends the question with fields that it can do without, less those that this server has refused before. */
async function send({ model, refusedFields }, question, signal) {
  for (;;) {
    const { path, body } = bodyOf(question);
    const extra = optionalOf(model, question, refusedFields);
    const streamed = { ...body, ...extra, stream: true, stream_options: { include_usage: true } };
    try {
      return await request(path, streamed, signal);
    } catch (error) {
      if (error.status !== 400 || !(error.param in extra)) throw error;
      refusedFields.add(error.param);
    }
  }
}

function optionalOf(model, question, refused) {
  const scores = question.mode === "chat" ? { logprobs: true, top_logprobs: ALTERNATIVES } : { logprobs: ALTERNATIVES };
  const fields = model.has && model.tellsRoutes ? { ...scores, return_routed_experts: true } : scores;
  return Object.fromEntries(Object.entries(fields).filter(([name]) => !refused.has(name)));
}

function take(answer, event) {
  answer.fingerprint ||= event.system_fingerprint;
  if (event.usage) answer.usage = event.usage;
  if (event.metrics) answer.metrics = event.metrics;
  const choice = event.choices?.[0];
  if (!choice) return;
  const text = choice.text ?? choice.delta?.content ?? "";
  const reasoning = choice.delta?.reasoning_content ?? "";
  if (text || reasoning) {
    answer.last = performance.now();
    answer.first ||= answer.last;
  }
  answer.text += text;
  answer.reasoning += reasoning;
  answer.tokens.push(...tokensOf(choice.logprobs));
  if (choice.routed_experts) answer.routes = choice.routed_experts;
  if (choice.finish_reason) answer.finish = choice.finish_reason;
}

/** Tokens of either API: { text, bytes, logprob, top: [{ text, logprob }] }. */
export function tokensOf(logprobs) {
  if (!logprobs) return [];
  if (logprobs.content) {
    return logprobs.content.map(({ token, bytes, logprob, top_logprobs }) => ({
      text: token,
      bytes: Uint8Array.from(bytes || []),
      logprob,
      top: top_logprobs.map((one) => ({ text: one.token, logprob: one.logprob })),
    }));
  }
  return logprobs.tokens.map((text, index) => ({
    text,
    bytes: bytesOf(text),
    logprob: logprobs.token_logprobs[index],
    top: Object.entries(logprobs.top_logprobs?.[index] || {})
      .map(([name, logprob]) => ({ text: name, logprob }))
      .sort((one, other) => other.logprob - one.logprob),
  }));
}

/** The figures of an answer; of one that was stopped, what the page has counted itself. */
export function figuresOf(answer) {
  const { usage, metrics, tokens, sent, first, last } = answer;
  const seconds = (last - first) / 1000;
  const counted = tokens.length || null;
  return {
    tokens: usage?.completion_tokens ?? counted,
    rate: metrics?.tokens_per_second ?? (counted > 1 && seconds > 0 ? (counted - 1) / seconds : null),
    first: metrics?.time_to_first_token_ms ?? (first ? first - sent : null),
    pairs: usage?.routed_pairs ?? null,
    trained: usage?.routed_pairs_trained ?? null,
    prompt: usage?.prompt_tokens ?? null,
    cached: usage?.prompt_tokens_details?.cached_tokens ?? 0,
  };
}
