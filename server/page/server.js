// Requests to the server: addresses relative to the page, the API key, and errors as sentences. It draws nothing.

import { words } from "./words.js";

const KEY = "moedial.key";

/** An error to show as it is. `param` is the field that the server refused, `code` its code. */
export class Refused extends Error {
  constructor(message, { status = 0, param = null, code = "" } = {}) {
    super(message);
    Object.assign(this, { status, param, code });
  }
}

/** The address of a path of this server, also behind a path prefix. */
export function address(path) {
  const page = new URL(document.baseURI);
  return new URL(path, page.origin + page.pathname).href;
}

export const keys = {
  get: () => sessionStorage.getItem(KEY) || "",
  set: (key) => sessionStorage.setItem(KEY, key),
  forget: () => sessionStorage.removeItem(KEY),
  ask: async () => null, // set by the page: shows the form and resolves with a key, or null
};

/** Sends a request; on a 401 asks for a key and sends it again. Raises Refused for every status that is no success. */
export async function request(path, body, signal) {
  for (let wrong = false; ; wrong = true) {
    const response = await send(path, body, signal);
    if (response.ok) return response;
    if (response.status !== 401) throw await refusal(response);
    const key = await keys.ask(wrong || keys.get() !== "");
    if (!key) throw new Refused(words.errors.key, { status: 401 });
    keys.set(key);
  }
}

export async function json(path, body, signal) {
  const response = await request(path, body, signal);
  return response.json();
}

async function send(path, body, signal) {
  const headers = keys.get() ? { authorization: `Bearer ${bytes(keys.get())}` } : {};
  const options = { headers, signal, cache: "no-store" };
  if (body !== undefined) {
    headers["content-type"] = "application/json";
    Object.assign(options, { method: "POST", body: JSON.stringify(body) });
  }
  try {
    return await fetch(address(path), options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(words.errors.network);
  }
}

/** A header carries bytes: the key's, as UTF-8, one character each. */
const bytes = (text) => String.fromCharCode(...new TextEncoder().encode(text));

async function refusal(response) {
  const said = await response.json().catch(() => ({}));
  const error = said.error || {};
  const wait = response.headers.get("retry-after");
  const parts = [error.message || words.errors.status(response.status), wait ? words.errors.retry(wait) : ""];
  return new Refused(parts.filter(Boolean).join(" "), { status: response.status, param: error.param, code: error.code });
}
