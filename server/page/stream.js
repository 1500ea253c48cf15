// Server-sent events over `fetch`: an async generator of the objects in a response's `data:` lines.

import { Refused } from "./server.js";
import { words } from "./words.js";

/** Yields each object until `[DONE]`. Raises Refused for an error event, and where the stream ends early. */
export async function* events(response) {
  for await (const data of lines(response)) {
    if (data === "[DONE]") return;
    const event = JSON.parse(data);
    if (event.error) throw new Refused(event.error.message, { param: event.error.param, code: event.error.code });
    yield event;
  }
  throw new Refused(words.errors.cut);
}

async function* lines(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await next(reader);
      if (done) return;
      const parts = (rest + value).split("\n");
      rest = parts.pop();
      for (const line of parts) if (line.startsWith("data: ")) yield line.slice(6).trimEnd();
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

async function next(reader) {
  try {
    return await reader.read();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(words.errors.cut);
  }
}
