// A small part of Markdown as nodes: paragraphs, headings, lists, fenced code, bold, italic, code. It makes no HTML strings.

import { html, useMemo } from "./html.js";

const FENCE = /^```/;
const HEADING = /^#{1,4}\s+/;
const BULLET = /^\s*[-*+]\s+/;
const NUMBERED = /^\s*\d{1,3}[.)]\s+/;
const INLINE = /(`[^`]+`|\*\*[^*]+\*\*|\*[^*\s][^*]*\*)/;

export function Prose({ text }) {
  return html`<div class="prose">${useMemo(() => blocks(text.split("\n")), [text])}</div>`;
}

function blocks(lines) {
  const made = [];
  let index = 0;
  while (index < lines.length) {
    const [node, next] = block(lines, index);
    if (node) made.push(node);
    index = next;
  }
  return made;
}

/** The block that begins at a line, and the line after it. */
function block(lines, index) {
  const line = lines[index];
  if (line.trim() === "") return [null, index + 1];
  if (FENCE.test(line)) return fenced(lines, index + 1);
  if (HEADING.test(line)) return [html`<p class="heading">${inline(line.replace(HEADING, ""))}</p>`, index + 1];
  if (BULLET.test(line)) return list(lines, index, BULLET, "ul");
  if (NUMBERED.test(line)) return list(lines, index, NUMBERED, "ol");
  const end = endOf(
    lines,
    index + 1,
    (one) => one.trim() !== "" && ![FENCE, HEADING, BULLET, NUMBERED].some((kind) => kind.test(one)),
  );
  return [html`<p>${inline(lines.slice(index, end).join("\n"))}</p>`, end];
}

function fenced(lines, index) {
  const end = endOf(lines, index, (line) => !FENCE.test(line));
  return [html`<pre><code>${lines.slice(index, end).join("\n")}</code></pre>`, end + 1];
}

function list(lines, index, kind, name) {
  const end = endOf(lines, index, (line) => kind.test(line));
  const items = lines.slice(index, end).map((line) => html`<li>${inline(line.replace(kind, ""))}</li>`);
  return [name === "ul" ? html`<ul>${items}</ul>` : html`<ol>${items}</ol>`, end];
}

function endOf(lines, index, goesOn) {
  let end = index;
  while (end < lines.length && goesOn(lines[end])) end += 1;
  return end;
}

function inline(text) {
  return text.split(INLINE).map((part) => {
    if (part.length > 2 && part.startsWith("`") && part.endsWith("`")) return html`<code>${part.slice(1, -1)}</code>`;
    if (part.length > 4 && part.startsWith("**") && part.endsWith("**")) return html`<strong>${part.slice(2, -2)}</strong>`;
    if (part.length > 2 && part.startsWith("*") && part.endsWith("*")) return html`<em>${part.slice(1, -1)}</em>`;
    return part;
  });
}
