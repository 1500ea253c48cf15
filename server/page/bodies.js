// From a question to the body of a request, and to links, commands and code that repeat it. It sends nothing.

import { address, keys } from "./server.js";

export const LIMITS = { seed: [0, 2 ** 31 - 1], temperature: [0, 2], maximum: [1, 4096] };

/** The path and body of a question: { mode, model, prompt, history, count, seed, temperature, maximum }. */
export function bodyOf(question) {
  const { mode, model, prompt, history, count, seed, temperature, maximum } = question;
  const asked = mode === "chat" ? { messages: [...history, { role: "user", content: prompt }] } : { prompt };
  const experts = count === null ? {} : { num_experts: count };
  const body = { model, ...asked, ...experts, max_tokens: maximum, temperature, seed };
  return { path: mode === "chat" ? "v1/chat/completions" : "v1/completions", body };
}

export function curlOf(question) {
  const { path, body } = bodyOf(question);
  const key = keys.get() ? ` -H "authorization: Bearer $KEY"` : "";
  return `curl ${quoted(address(path))}${key} -H 'content-type: application/json' -d ${quoted(JSON.stringify(body))}`;
}

const quoted = (text) => `'${text.replaceAll("'", `'\\''`)}'`;

export function pythonOf(question) {
  const { body } = bodyOf(question);
  const { num_experts, ...rest } = body;
  const fields = Object.entries(rest).map(([name, value]) => `    ${name}=${literal(value)},`);
  if (num_experts !== undefined) fields.push(`    extra_body={"num_experts": ${num_experts}},`);
  const [method, text] = question.mode === "chat" ? ["chat.completions", "message.content"] : ["completions", "text"];
  const key = keys.get() ? `os.environ["KEY"]` : `"none"`;
  return [
    ...(keys.get() ? ["import os", ""] : []),
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${literal(address("v1"))}, api_key=${key})`,
    `answer = client.${method}.create(`,
    ...fields,
    ")",
    `print(answer.choices[0].${text})`,
    "",
  ].join("\n");
}

/** A Python literal: as in JSON, since these values hold no true, false or null; but not every character as it is. */
const literal = (value) =>
  JSON.stringify(value).replace(
    /[\u007f-\u009f\u2028\u2029]/g,
    (char) => "\\u" + char.charCodeAt(0).toString(16).padStart(4, "0"),
  );

/** The address of the page with a question in it: everything that decides its answers. */
export function linkOf(questions, fingerprint) {
  const [first, second] = questions;
  const fields = new URLSearchParams({
    m: first.mode,
    p: first.prompt,
    seed: first.seed,
    t: first.temperature,
    max: first.maximum,
  });
  if (first.count !== null) fields.set("k", first.count);
  if (second) fields.set("vs", second.count);
  if (first.history.length) fields.set("h", JSON.stringify(first.history.map(pair)));
  if (second && JSON.stringify(first.history) !== JSON.stringify(second.history))
    fields.set("hb", JSON.stringify(second.history.map(pair)));
  if (fingerprint) fields.set("fp", fingerprint);
  return `${address("")}#${fields}`;
}

const pair = ({ role, content }) => [role, content];

/** What a link holds, checked; null where there is none. Raises an error where it cannot be used. */
export function readLink(hash) {
  if (hash.length < 2) return null;
  const fields = new URLSearchParams(hash.slice(1));
  const mode = fields.get("m");
  if (!["chat", "text"].includes(mode)) throw new Error("m");
  const second = fields.has("vs") ? numberOf(fields, "vs", [1, 100_000]) : null;
  return {
    mode,
    prompt: fields.get("p") || "",
    count: fields.has("k") ? numberOf(fields, "k", [1, 100_000]) : null,
    second,
    seed: numberOf(fields, "seed", LIMITS.seed),
    temperature: numberOf(fields, "t", LIMITS.temperature, false),
    maximum: numberOf(fields, "max", LIMITS.maximum),
    histories: [historyOf(fields, "h"), historyOf(fields, fields.has("hb") ? "hb" : "h")],
    fingerprint: fields.get("fp") || "",
  };
}

function numberOf(fields, name, [least, most], whole = true) {
  const value = fields.get(name) ? Number(fields.get(name)) : NaN;
  if (!(value >= least && value <= most) || (whole && !Number.isInteger(value))) throw new Error(name);
  return value;
}

function historyOf(fields, name) {
  const entries = JSON.parse(fields.get(name) || "[]");
  return entries.map(([role, content]) => {
    if (!["user", "assistant"].includes(role) || typeof content !== "string") throw new Error(name);
    return { role, content };
  });
}
