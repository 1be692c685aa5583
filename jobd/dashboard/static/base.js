// Behaviour of all pages: the offline banner, countdowns, copy buttons, forms, and the selection of jobs. No eval, no
// inline styles.
"use strict";

(() => {
  const find = (id) => document.getElementById(id);

  // Updates keep elements that a script fills (data-keep), opened details, checked boxes and disabled buttons.
  if (window.Idiomorph) {
    Idiomorph.defaults.callbacks.beforeNodeMorphed = (old) => !(old.dataset && "keep" in old.dataset);
    Idiomorph.defaults.callbacks.beforeAttributeUpdated = (name, node) => !(name === "open" && node.tagName === "DETAILS") && name !== "checked" && name !== "disabled";
  }

  // -- offline banner -------------------------------------------------------------------------------------------------
  const offline = find("offline");
  const showOffline = (text) => {
    if (!offline) return;
    if (text && offline.hidden) offline.textContent = `${text} This page shows the state of ${new Date().toLocaleTimeString()}. Retrying …`;
    offline.hidden = !text;
  };
  document.body.addEventListener("htmx:sendError", () => showOffline("The daemon does not respond."));
  document.body.addEventListener("htmx:timeout", () => showOffline("The daemon does not respond."));
  document.body.addEventListener("htmx:responseError", (event) => showOffline(`The daemon responds with status ${event.detail.xhr.status}.`));
  document.body.addEventListener("htmx:afterOnLoad", (event) => {
    if (event.detail.xhr.status < 400) showOffline("");
  });

  // -- countdowns, by the daemon's clock ------------------------------------------------------------------------------
  const duration = (ms) => {
    const s = Math.max(Math.ceil(ms / 1000), 0); // rounded up, as the daemon's time_left
    if (s < 60) return `${s} s`;
    const min = Math.floor(s / 60);
    if (min < 60) return s % 60 ? `${min} min ${s % 60} s` : `${min} min`;
    return min % 60 ? `${Math.floor(min / 60)} h ${min % 60} min` : `${Math.floor(min / 60)} h`;
  };
  let clockOffsetMs = null; // the daemon's clock minus this machine's, as of the latest update
  const readClock = () => {
    const shown = document.querySelector("[data-until]");
    clockOffsetMs = shown ? Number(shown.dataset.now) - Date.now() : null;
  };
  document.body.addEventListener("htmx:afterSettle", readClock);
  readClock();
  setInterval(() => {
    if (clockOffsetMs === null) return;
    for (const shown of document.querySelectorAll("[data-until]")) {
      const leftMs = Number(shown.dataset.until) - Date.now() - clockOffsetMs;
      if (leftMs < 86400000) shown.textContent = duration(leftMs);
    }
  }, 1000);

  // -- copy buttons and forms -----------------------------------------------------------------------------------------
  document.addEventListener("click", (event) => {
    const button = event.target.closest("[data-copy]");
    if (!button) return;
    const source = find(button.dataset.copy);
    const done = (text) => {
      button.textContent = text;
      setTimeout(() => (button.textContent = "Copy as curl"), 2000);
    };
    if (navigator.clipboard) navigator.clipboard.writeText(source.textContent).then(() => done("Copied"), () => done("Copying failed"));
    else getSelection().selectAllChildren(source);
  });
  document.addEventListener("submit", (event) => {
    // Disable the buttons only after the browser has read the form: a disabled button submits no value.
    const buttons = [...event.target.elements].filter((each) => each.type === "submit");
    setTimeout(() => buttons.forEach((button) => (button.disabled = true)));
  });

  // -- selected jobs --------------------------------------------------------------------------------------------------
  const selection = find("selection");
  const note = selection ? selection.textContent : "";
  const showSelection = () => {
    if (!selection) return;
    const boxes = [...document.querySelectorAll("input[name=ids]")];
    const count = boxes.filter((box) => box.checked).length;
    selection.textContent = count ? `${count} selected. The list does not update meanwhile. ${note}` : note;
    const all = document.querySelector("[data-select-all]");
    if (all) [all.checked, all.indeterminate] = [count > 0 && count === boxes.length, count > 0 && count < boxes.length];
  };
  document.addEventListener("change", (event) => {
    if (event.target.matches("[data-select-all]")) for (const box of document.querySelectorAll("input[name=ids]")) box.checked = event.target.checked;
    if (event.target.matches("[data-select-all], input[name=ids]")) showSelection();
  });
  document.body.addEventListener("htmx:afterSettle", showSelection);
  addEventListener("pageshow", () => {
    for (const button of document.querySelectorAll("button:disabled")) button.disabled = false;
    showSelection();
  });

  // A link on another site opens this page without the cookie (SameSite=Strict). Leave the sign-in page if there is a
  // session after all.
  const signIn = document.querySelector("[data-next]");
  if (signIn && location.hash.length > 1) { // a sign-in link: browsers do not send the token after the # by themselves
    const form = signIn.querySelector("form");
    form.elements.token.value = decodeURIComponent(location.hash.slice(1));
    history.replaceState(null, "", location.pathname);
    form.requestSubmit();
  } else if (signIn) {
    fetch(location.href).then((response) => {
      if (response.redirected) location.replace(signIn.dataset.next);
    }, () => {});
  }
})();
