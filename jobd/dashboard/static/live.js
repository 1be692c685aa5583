// When a page renews its living part: where the stream of news says so; without it, every few seconds; no more once the
// part that came says that it is to stay (data-still), unless somebody asks. No eval, no style.
"use strict";

(() => {
  const region = document.querySelector("[data-every]");
  const toggle = document.getElementById("live-toggle");
  if (!region || !toggle) return;

  const POLL_MS = Number(region.dataset.every) * 1000;
  const QUIET_MS = Math.max(POLL_MS, 10000); // with the stream, too: words like "3 min ago" grow old
  const AGAIN_MS = 30000; // after a stream was refused
  const WORDS = {
    live: ["Live", "The page renews itself when something happens. Press to stop it."],
    reconnecting: ["Reconnecting", "The stream of news broke off; the page asks every few seconds until it is back. Press to stop it."],
    polling: ["Polling", "The page asks every few seconds. Press to stop it."],
    stopped: ["Stopped", "The page stays as it is. Press to renew it again."],
  };
  let state = "polling";
  let source = null;
  let again = 0;
  let renewedAt = Date.now();

  const become = (next) => {
    state = next;
    toggle.dataset.state = next;
    [toggle.textContent, toggle.title] = WORDS[next];
    toggle.setAttribute("aria-pressed", String(next !== "stopped"));
  };
  const renew = (isAsked = false) => {
    if (document.hidden || state === "stopped") return;
    if (!isAsked && region.querySelector("[data-still]")) {
      become("stopped");
      close();
      return;
    }
    renewedAt = Date.now();
    htmx.trigger(region, "renew"); // while one is under way, one more waits, and no more than one
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
    source = new EventSource(region.dataset.news);
    source.addEventListener("live", () => {
      become("live");
      renew(); // of what happened before the stream was there
    });
    source.addEventListener("news", () => renew());
    source.addEventListener("over", () => {
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
