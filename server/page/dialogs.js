// The two dialogs: an API key where the server has keys, and help.

import { html, useEffect, useRef } from "./html.js";
import { address, keys } from "./server.js";
import { words } from "./words.js";

/** A modal dialog of the browser's own: it keeps the focus inside, and Esc closes it. */
function Modal({ title, onClose, children }) {
  const dialog = useRef(null);
  useEffect(() => {
    dialog.current.showModal();
    return () => dialog.current?.close();
  }, []);
  const cancel = (event) => {
    event.preventDefault();
    onClose();
  };
  return html`<dialog ref=${dialog} aria-labelledby="dialog-title" onCancel=${cancel}>
    <h2 id="dialog-title">${title}</h2>
    ${children}
  </dialog>`;
}

/** Asks for a key; `onDone` gets it, or null. */
export function KeyForm({ wrong, onDone }) {
  const field = useRef(null);
  const send = (event) => {
    event.preventDefault();
    const key = field.current.value.trim();
    if (key) onDone(key);
  };
  return html`<${Modal} title=${words.key.title} onClose=${() => onDone(null)}>
    <form onSubmit=${send}>
      <p>${words.key.text}</p>
      ${wrong && html`<p class="error" role="alert">${words.key.wrong}</p>`}
      <label class="field wide"><span>${words.key.label}</span><input
        ref=${field}
        id="api-key"
        type="password"
        autocomplete="off"
        required
      /></label>
      <div class="controls">
        <button type="button" onClick=${() => onDone(null)}>${words.key.cancel}</button>
        <button type="submit" class="primary">${words.key.enter}</button>
      </div>
    </form>
  <//>`;
}

export function Help({ singleKeys, onSingleKeys, onForget, onClose }) {
  return html`<${Modal} title=${words.help.title} onClose=${onClose}>
    <p>${words.help.about}</p>
    <dl class="keys">${words.help.keys.map(([key, what]) => html`<div><dt><kbd>${key}</kbd></dt><dd>${what}</dd></div>`)}</dl>
    <label class="switch"><input
      type="checkbox"
      checked=${singleKeys}
      onChange=${(event) => onSingleKeys(event.target.checked)}
    /><span>${words.help.single}</span></label>
    <p><a href=${address("docs")}>${words.help.docs}</a></p>
    <div class="controls">
      ${keys.get() && html`<button type="button" onClick=${onForget}>${words.key.forget}</button>`}
      <span class="spring"></span>
      <button type="button" class="primary" onClick=${onClose}>${words.help.close}</button>
    </div>
  <//>`;
}
