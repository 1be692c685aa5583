// What pages do beside htmx: says when the daemon does not answer, counts down, copies. No eval, no style.
"use strict";

(() => {
  const find = (id) => document.getElementById(id);

  // Nodes that a script fills, details that somebody has opened, and buttons that were pressed stay as they are when a
  // page renews itself.
  if (window.Idiomorph) {
    Idiomorph.defaults.callbacks.beforeNodeMorphed = (old) => !(old.dataset && "keep" in old.dataset);
    Idiomorph.defaults.callbacks.beforeAttributeUpdated = (name, node) => !(name === "open" && node.tagName === "DETAILS") && name !== "checked" && name !== "disabled";
  }

  // -- the daemon does not answer -------------------------------------------------------------------------------------
  const offline = find("offline");
  const say = (text) => {
    if (!offline) return;
    if (text && offline.hidden) offline.textContent = `${text} What you see is of ${new Date().toLocaleTimeString()}; it is asked again and again.`;
    offline.hidden = !text;
  };
  document.body.addEventListener("htmx:sendError", () => say("The daemon does not answer."));
  document.body.addEventListener("htmx:timeout", () => say("The daemon does not answer."));
  document.body.addEventListener("htmx:responseError", (event) => say(`The daemon answers with ${event.detail.xhr.status}.`));
  document.body.addEventListener("htmx:afterOnLoad", (event) => {
    if (event.detail.xhr.status < 400) say("");
  });

  // -- countdowns, by the daemon's clock ------------------------------------------------------------------------------
  const span = (ms) => {
    const s = Math.max(Math.floor(ms / 1000), 0);
    if (s < 60) return `${s} s`;
    const min = Math.floor(s / 60);
    if (min < 60) return s % 60 ? `${min} min ${s % 60} s` : `${min} min`;
    return min % 60 ? `${Math.floor(min / 60)} h ${min % 60} min` : `${Math.floor(min / 60)} h`;
  };
  let aheadMs = null; // how far the daemon's clock is ahead of this machine's, as of the latest page
  const learn = () => {
    const shown = document.querySelector("[data-until]");
    aheadMs = shown ? Number(shown.dataset.now) - Date.now() : null;
  };
  document.body.addEventListener("htmx:afterSettle", learn);
  learn();
  setInterval(() => {
    if (aheadMs === null) return;
    for (const shown of document.querySelectorAll("[data-until]")) {
      const left = Number(shown.dataset.until) - Date.now() - aheadMs;
      if (left < 86400000) shown.textContent = span(left);
    }
  }, 1000);

  // -- copy, and forms that are sent once -----------------------------------------------------------------------------
  document.addEventListener("click", (event) => {
    const button = event.target.closest("[data-copy]");
    if (!button) return;
    const source = find(button.dataset.copy);
    const done = (text) => {
      button.textContent = text;
      setTimeout(() => (button.textContent = "Copy as curl"), 2000);
    };
    if (navigator.clipboard) navigator.clipboard.writeText(source.textContent).then(() => done("Copied"), () => done("Not copied"));
    else getSelection().selectAllChildren(source);
  });
  document.addEventListener("submit", (event) => {
    // Once the form has been read: a button that is disabled before sends no value.
    const buttons = [...event.target.elements].filter((each) => each.type === "submit");
    setTimeout(() => buttons.forEach((button) => (button.disabled = true)));
  });

  // -- jobs that are picked -------------------------------------------------------------------------------------------
  const picked = find("selection");
  const words = picked ? picked.textContent : "";
  const tell = () => {
    if (!picked) return;
    const boxes = [...document.querySelectorAll("input[name=ids]")];
    const count = boxes.filter((box) => box.checked).length;
    picked.textContent = count ? `${count} selected; meanwhile the list stays as it is. ${words}` : words;
    const all = document.querySelector("[data-select-all]");
    if (all) [all.checked, all.indeterminate] = [count > 0 && count === boxes.length, count > 0 && count < boxes.length];
  };
  document.addEventListener("change", (event) => {
    if (event.target.matches("[data-select-all]")) for (const box of document.querySelectorAll("input[name=ids]")) box.checked = event.target.checked;
    if (event.target.matches("[data-select-all], input[name=ids]")) tell();
  });
  document.body.addEventListener("htmx:afterSettle", tell);
  addEventListener("pageshow", () => {
    for (const button of document.querySelectorAll("button:disabled")) button.disabled = false;
    tell();
  });

  // A link from elsewhere brings no cookie along (SameSite=Strict): who is signed in already goes on.
  const signIn = document.querySelector("[data-next]");
  if (signIn) {
    fetch(location.href).then((answer) => {
      if (answer.redirected) location.replace(signIn.dataset.next);
    }, () => {});
  }
})();
