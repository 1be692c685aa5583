// Updates the live region of a page: on events of the stream, else every few seconds. Updates end when the region contains
// data-final, unless the user asks for one. They pause while jobs are selected, so that no row moves away. No eval, no
// inline styles.
"use strict";

(() => {
  const region = document.querySelector("[data-interval-s]");
  const toggle = document.getElementById("live-toggle");
  if (!region || !toggle) return;

  const POLL_MS = Number(region.dataset.intervalS) * 1000;
  const QUIET_MS = Math.max(POLL_MS, 10000); // with the stream: texts such as "3 min ago" need updates too
  const RECONNECT_MS = 30000; // after the daemon has rejected the stream
  const LABELS = {
    live: ["Live", "This page updates when something changes. Press to stop."],
    reconnecting: ["Reconnecting", "The event stream was interrupted. Until it is back, this page updates every few seconds. Press to stop."],
    polling: ["Polling", "This page updates every few seconds. Press to stop."],
    paused: ["Paused", "This page does not update while jobs are selected. Press to stop."],
    stopped: ["Stopped", "This page does not update. Press to resume."],
  };
  let state = "polling";
  let source = null;
  let reconnectTimer = 0;
  let updatedAt = Date.now();

  const hasSelection = () => region.querySelector("input[name=ids]:checked") !== null;
  const show = () => {
    const shown = state !== "stopped" && hasSelection() ? "paused" : state;
    toggle.dataset.state = shown;
    [toggle.textContent, toggle.title] = LABELS[shown];
    toggle.setAttribute("aria-pressed", String(shown !== "stopped"));
  };
  const setState = (next) => {
    state = next;
    show();
  };
  const update = (isRequested = false) => {
    if (document.hidden || state === "stopped" || hasSelection()) return;
    if (!isRequested && region.querySelector("[data-final]")) {
      setState("stopped");
      close();
      return;
    }
    updatedAt = Date.now();
    htmx.trigger(region, "refresh"); // during a request, htmx queues one more
  };

  const close = () => {
    clearTimeout(reconnectTimer);
    if (source) source.close();
    source = null;
  };
  // Browsers open up to six connections to a host, so hidden pages hold none.
  const open = () => {
    close();
    if (!region.dataset.eventsUrl || document.hidden || state === "stopped") return;
    source = new EventSource(region.dataset.eventsUrl);
    source.addEventListener("live", () => {
      setState("live");
      update(); // for changes from before the stream was open
    });
    source.addEventListener("change", () => update());
    source.addEventListener("end", () => {
      close();
      setState("polling");
      update();
    });
    source.addEventListener("error", () => {
      if (source.readyState !== EventSource.CLOSED) {
        setState("reconnecting");
        return;
      }
      close();
      setState("polling");
      reconnectTimer = setTimeout(open, RECONNECT_MS);
    });
  };

  toggle.hidden = false;
  toggle.addEventListener("click", () => {
    setState(state === "stopped" ? "polling" : "stopped");
    open();
    update(true);
  });
  let hadSelection = false;
  const checkSelection = () => {
    show();
    if (hadSelection && !hasSelection()) update(); // for changes during the selection
    hadSelection = hasSelection();
  };
  document.addEventListener("change", checkSelection);
  addEventListener("pageshow", checkSelection); // on going back, a browser may restore the selection
  // Discard updates that were requested before the first selection.
  region.addEventListener("htmx:beforeSwap", (event) => {
    if (hasSelection()) event.detail.shouldSwap = false;
  });
  // Output shows its end, unless the user has scrolled up in it.
  let scrolledUp = new Set();
  const tails = () => [...region.querySelectorAll("[data-tail]")];
  const toEnd = () => tails().filter((each) => !scrolledUp.has(each.id)).forEach((each) => (each.scrollTop = each.scrollHeight));
  region.addEventListener("htmx:beforeSwap", () => {
    const isUp = (each) => each.scrollHeight - each.scrollTop - each.clientHeight > 8;
    scrolledUp = new Set(tails().filter(isUp).map((each) => each.id));
  });
  region.addEventListener("htmx:afterSwap", toEnd);
  toEnd();
  document.addEventListener("visibilitychange", () => {
    if (state !== "stopped") setState("polling");
    open();
    update();
  });
  addEventListener("pagehide", close);
  addEventListener("pageshow", (event) => event.persisted && open());
  setInterval(() => {
    if (Date.now() - updatedAt >= (state === "live" ? QUIET_MS : POLL_MS)) update();
  }, 500);
  setState("polling");
  open();
})();
