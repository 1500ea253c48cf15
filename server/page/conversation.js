// The conversation: turns of one answer or of two side by side, and where the two part.

import { html, useState } from "./html.js";
import { Answer, CopyLink, spells } from "./answer.js";
import { figuresOf } from "./asking.js";
import { Candidates, partOf, TokenSlider, visible } from "./tokens.js";
import { number, words } from "./words.js";

const SAYS = words.compare;
const finished = (answer) => ["done", "stopped"].includes(answer.state);

export function Conversation({ state, onLens, onRouting }) {
  const { turns, model, running } = state;
  return html`<div class="log" role="log" aria-label=${words.answer.log} aria-busy=${Boolean(running)}>
    ${turns.map((turn) => html`<${Turn} key=${turn.id} turn=${turn} model=${model} onLens=${onLens} onRouting=${onRouting} />`)}
  </div>`;
}

function Turn({ turn, model, onLens, onRouting }) {
  const { answers, prompt, mode, made } = turn;
  const [pointed, point] = useState(null); // index of a token
  const [open, setOpen] = useState(answers.length === 2);
  const paired = answers.length === 2;
  const both = paired && answers.every((answer) => answer.tokens.length);
  const mark = both ? partOf(answers[0].tokens, answers[1].tokens) : undefined;
  const at = open ? (pointed ?? (answers.every(finished) && both ? mark : null)) : null;
  const onPoint = (index) => {
    setOpen(true);
    point(index);
  };
  const actions = (
    answer,
  ) => html`<button type="button" class="quiet" onClick=${() => onLens(turn, answer)}>${words.answer.lens}</button>
    ${model.has && html`<button type="button" class="quiet" onClick=${() => onRouting(turn)}>${words.answer.routing}</button>`}
    ${!paired && answer.tokens.length > 0 && html`<button
      type="button"
      class="quiet"
      aria-expanded=${open}
      onClick=${() => setOpen(!open)}
    >${words.answer.showTokens}</button>`}
    ${!paired && html`<${CopyLink} answers=${answers} />`}`;
  return html`<article class=${`turn ${paired ? "paired" : ""}`}>
    <h2 class="asked"><span class="hidden">${mode === "chat" ? words.answer.you : words.answer.from}: </span>${prompt}</h2>
    ${made && answers.every(finished) && html`<${Made} made=${made} answers=${answers} />`}
    ${both && html`<${Verdict} answers=${answers} mark=${mark} />`}
    <div class="columns">
      ${answers.map(
        (answer, index) =>
          html`<${Answer}
            model=${model}
            answer=${answer}
            letter=${"AB"[index]}
            paired=${paired}
            mark=${mark}
            at=${at}
            onPoint=${onPoint}
            asTokens=${paired || open || mode === "text"}
            actions=${actions(answer)}
          />`,
      )}
    </div>
    ${open && answers.every(finished) && answers[0].tokens.length > 0 && html`<${Inspector}
      id=${`tokens-${turn.id}`}
      answers=${answers}
      at=${at ?? 0}
      mark=${mark}
      onPoint=${onPoint}
    />`}
  </article>`;
}

/** Whether a turn from a link ran on what the link was made on. */
function Made({ made, answers }) {
  const same = made.fingerprint === answers[0].fingerprint;
  return html`<p class=${same ? "notice" : "notice warns"}>${same ? words.link.same : words.link.other}</p>`;
}

function Verdict({ answers, mark }) {
  const [a, b] = answers;
  const over = answers.every(finished);
  const [one, other] = answers.map((answer) => answer.tokens[mark]);
  let said = html`<p>
    ${SAYS.part(mark)} ${SAYS.wrote(a.question.count)} <${Written} token=${one} letter="A" />, ${SAYS.wrote(b.question.count)}
    ${" "}<${Written} token=${other} letter="B" />.
  </p>`;
  if (!one && !other) said = html`<p>${over ? SAYS.same(mark) : SAYS.sameSoFar(mark)}</p>`;
  else if (!over && (!one || !other)) said = html`<p>${SAYS.sameSoFar(mark)}</p>`;
  return html`<div class="verdict">${said}${over && html`<${CopyLink} answers=${answers} /><${Speeds} answers=${answers} />`}</div>`;
}

function Written({ token, letter }) {
  if (!token) return html`<em>${SAYS.ended}</em>`;
  return html`<code class=${letter}>${visible(token.text)}</code> <span class="quiet">${number.percent(Math.exp(token.logprob))}</span>`;
}

function Speeds({ answers }) {
  const ordered = [...answers].sort((one, other) => one.question.count - other.question.count);
  const [few, many] = ordered.map((answer) => ({ count: answer.question.count, ...figuresOf(answer) }));
  const parts = [];
  if (few.rate && many.rate) parts.push(SAYS.faster(few.count, many.count, few.rate / many.rate));
  if (few.trained && many.pairs)
    parts.push(SAYS.pairs(few.pairs / few.trained / (many.pairs / many.trained), few.count, many.count));
  return parts.length > 0 && html`<p class="quiet">${parts.join(" · ")}</p>`;
}

/** What else could have been written at a token, in each of the answers. */
function Inspector({ id, answers, at, mark, onPoint }) {
  const longest = answers.reduce((one, other) => (other.tokens.length > one.tokens.length ? other : one));
  return html`<div class="inspector">
    <${TokenSlider} id=${id} tokens=${longest.tokens} at=${at} onPoint=${onPoint} />
    <div class="columns">
      ${answers.map((answer, index) => {
        const token = answer.tokens[at];
        const note = index > 0 && at > mark ? words.token.apart(answer.question.count) : token ? "" : SAYS.ended;
        return html`<${Candidates} title=${words.token.here(answer.question.count)} token=${token} note=${note} />`;
      })}
    </div>
    ${!answers.every((answer) => spells(answer.tokens, answer.text)) && html`<p class="quiet">${words.token.unmarked}</p>`}
  </div>`;
}
