// Tokens as text: their bytes, the pieces of text that they make, where two lists part, and the views that show them.

import { html, useMemo } from "./html.js";
import { number, words } from "./words.js";

/** The bytes of a token as /v1/completions writes it: text, or `bytes:\xe2\x82` where it is no whole character. */
export function bytesOf(text) {
  const encoded = /^bytes:((?:\\x[0-9a-f]{2})+)$/.exec(text);
  if (!encoded) return new TextEncoder().encode(text);
  return Uint8Array.from(encoded[1].slice(2).split("\\x"), (pair) => parseInt(pair, 16));
}

/** Pieces of text, each of the tokens from `first` to `last`: one token, or several that make one character. */
export function piecesOf(tokens) {
  const decoder = new TextDecoder();
  const pieces = [];
  let first = 0;
  tokens.forEach((token, index) => {
    const text = decoder.decode(token.bytes, { stream: true });
    if (text === "" && token.bytes.length) return;
    pieces.push({ text, first, last: index });
    first = index + 1;
  });
  const rest = decoder.decode();
  if (rest) pieces.push({ text: rest, first, last: tokens.length - 1 });
  return pieces;
}

/** The index of the first token that differs; the shorter list's length where one begins with the other. */
export function partOf(one, other) {
  const length = Math.min(one.length, other.length);
  for (let index = 0; index < length; index += 1) if (one[index].text !== other[index].text) return index;
  return length;
}

/** A token's text so that spaces and line ends can be seen. */
export function visible(text) {
  if (text === "") return "∅";
  return text.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replace(/^ | $/g, "␣");
}

/** Text made of tokens, each of which can be pointed at. `styleOf(index)` gives a token's style or null. */
export function TokenText({ tokens, version, at, onPoint, classOf = () => "", styleOf = () => null, mark }) {
  const pieces = useMemo(() => piecesOf(tokens), [tokens, version]);
  const point = (event) => {
    const index = event.target.dataset?.index;
    if (index !== undefined) onPoint(Number(index));
  };
  return html`<p class="tokens" onMouseOver=${point} onClick=${point}>${pieces.map(
    ({
      text,
      first,
      last,
    }) => html`${mark !== undefined && first <= mark && mark <= last && html`<span class="part" aria-hidden="true"></span>`}<span
        data-index=${first}
        class=${`token ${classOf(first)} ${at !== null && first <= at && at <= last ? "at" : ""}`}
        style=${styleOf(first)}
        >${text}</span>`,
  )}</p>`;
}

/** A slider over tokens, for the keyboard and for screen readers. */
export function TokenSlider({ id, tokens, at, onPoint, describe = () => "" }) {
  if (!tokens.length) return null;
  const index = Math.min(at ?? 0, tokens.length - 1);
  const text = `${words.token.at(index, tokens.length)}: ${visible(tokens[index].text)} ${describe(index)}`;
  return html`<div class="slider">
    <label for=${id}>${words.token.slider}</label>
    <input
      id=${id}
      type="range"
      min="0"
      max=${tokens.length - 1}
      value=${index}
      aria-valuetext=${text}
      onInput=${(event) => onPoint(Number(event.target.value))}
    />
    <output for=${id}><code>${visible(tokens[index].text)}</code> <span class="quiet">${words.token.at(index, tokens.length)}</span></output>
  </div>`;
}

/** The likeliest tokens at a place, with the one that was written. */
export function Candidates({ title, token, note }) {
  if (note) return html`<section class="candidates"><h4>${title}</h4><p class="quiet">${note}</p></section>`;
  const listed = token.top.some((one) => one.text === token.text);
  const rows = listed || token.logprob === null ? token.top : [...token.top, token];
  if (!rows.length) return html`<section class="candidates"><h4>${title}</h4><p class="quiet">${words.token.none}</p></section>`;
  return html`<section class="candidates">
    <h4>${title}</h4>
    <ol>
      ${rows.map(({ text, logprob }) => html`<${Candidate}
        text=${text}
        share=${Math.exp(logprob ?? -Infinity)}
        chosen=${text === token.text}
      />`)}
    </ol>
  </section>`;
}

function Candidate({ text, share, chosen }) {
  return html`<li class=${chosen ? "chosen" : ""}>
    <code>${visible(text)}</code>
    <span class="share"><span style=${{ width: `${Math.max(1, share * 100)}%` }}></span></span>
    <span class="figure">${share >= 0.0005 ? number.tenths(share) : "< 0.1%"}</span>
    ${chosen && html`<span class="tag">${words.token.chosen}</span>`}
  </li>`;
}
