// When a page renews its living part: where the stream of news says so; without it, every few seconds; no more once the
// part that came says that it is to stay (data-final), unless somebody asks; and not while jobs are ticked in it, which
// would slide off the page or away under the pointer. No eval, no style.
"use strict";

(() => {
  const region = document.querySelector("[data-interval-s]");
  const toggle = document.getElementById("live-toggle");
  if (!region || !toggle) return;

  const POLL_MS = Number(region.dataset.intervalS) * 1000;
  const QUIET_MS = Math.max(POLL_MS, 10000); // with the stream, too: words like "3 min ago" grow old
  const AGAIN_MS = 30000; // after a stream was refused
  const WORDS = {
    live: ["Live", "The page renews itself when something happens. Press to stop it."],
    reconnecting: ["Reconnecting", "The stream of news broke off; the page asks every few seconds until it is back. Press to stop it."],
    polling: ["Polling", "The page asks every few seconds. Press to stop it."],
    held: ["Held", "The page stays as it is while jobs are selected, so that none of them gets lost. It renews itself again when none is. Press to stop it."],
    stopped: ["Stopped", "The page stays as it is. Press to renew it again."],
  };
  let state = "polling";
  let source = null;
  let again = 0;
  let renewedAt = Date.now();

  const isHeld = () => region.querySelector("input[name=ids]:checked") !== null;
  const show = () => {
    const shown = state !== "stopped" && isHeld() ? "held" : state;
    toggle.dataset.state = shown;
    [toggle.textContent, toggle.title] = WORDS[shown];
    toggle.setAttribute("aria-pressed", String(shown !== "stopped"));
  };
  const become = (next) => {
    state = next;
    show();
  };
  const renew = (isAsked = false) => {
    if (document.hidden || state === "stopped" || isHeld()) return;
    if (!isAsked && region.querySelector("[data-final]")) {
      become("stopped");
      close();
      return;
    }
    renewedAt = Date.now();
    htmx.trigger(region, "refresh"); // while one is under way, one more waits, and no more than one
  };

  const close = () => {
    clearTimeout(again);
    if (source) source.close();
    source = null;
  };
  // A browser opens six connections to a daemon and no more: pages that nobody looks at hold none.
  const open = () => {
    close();
    if (document.hidden || state === "stopped") return;
    source = new EventSource(region.dataset.eventsUrl);
    source.addEventListener("live", () => {
      become("live");
      renew(); // of what happened before the stream was there
    });
    source.addEventListener("change", () => renew());
    source.addEventListener("end", () => {
      close();
      become("polling");
      renew();
    });
    source.addEventListener("error", () => {
      if (source.readyState !== EventSource.CLOSED) {
        become("reconnecting");
        return;
      }
      close();
      become("polling");
      again = setTimeout(open, AGAIN_MS);
    });
  };

  toggle.hidden = false;
  toggle.addEventListener("click", () => {
    become(state === "stopped" ? "polling" : "stopped");
    open();
    renew(true);
  });
  let wasHeld = false;
  const look = () => {
    show();
    if (wasHeld && !isHeld()) renew(); // of all that happened meanwhile
    wasHeld = isHeld();
  };
  document.addEventListener("change", look);
  addEventListener("pageshow", look); // a browser that goes back may tick again what was ticked
  // What was asked for before the first tick comes too late.
  region.addEventListener("htmx:beforeSwap", (event) => {
    if (isHeld()) event.detail.shouldSwap = false;
  });
  document.addEventListener("visibilitychange", () => {
    if (state !== "stopped") become("polling");
    open();
    renew();
  });
  addEventListener("pagehide", close);
  addEventListener("pageshow", (event) => event.persisted && open());
  setInterval(() => {
    if (Date.now() - renewedAt >= (state === "live" ? QUIET_MS : POLL_MS)) renew();
  }, 500);
  become("polling");
  open();
})();
