// The charts of the last hour and the last day: /chart.json drawn by uPlot, in the colours of the page.
"use strict";

(() => {
  const charts = document.getElementById("charts");
  if (!charts) return;
  const places = [...charts.querySelectorAll("[data-chart]")].map((place) => ({ place, chart: null, data: null }));

  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const line = (label, name, dash) => ({
    label,
    stroke: colour(name),
    width: 1.5,
    dash,
    points: { show: false },
    value: (_, value) => (value === null ? "–" : String(value)),
  });
  // As in the tables, which say when something was in the time of all servers.
  const clock = (at) => new Date(at * 1000).toISOString().slice(11, 19);
  const size = (place) => ({ width: Math.max(place.clientWidth, 240), height: 180 });

  const draw = (one) => {
    if (!one.data) return;
    if (one.chart) one.chart.destroy();
    const axis = { stroke: colour("--dim"), grid: { stroke: colour("--line"), width: 1 }, ticks: { stroke: colour("--line"), width: 1 } };
    const options = {
      ...size(one.place),
      series: [
        { label: "At", value: (_, at) => (at === null ? "–" : `${clock(at)} UTC`) },
        line("created", "--created", [6, 4]),
        line("completed", "--completed"),
        line("attempts failed", "--failed", [2, 3]),
      ],
      axes: [{ ...axis, values: (_, ats) => ats.map((at) => clock(at).slice(0, 5)) }, { ...axis, size: 46, incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000] }],
      scales: { y: { range: (_, low, high) => [0, Math.max(high * 1.1, 4)] } },
      cursor: { drag: { x: false, y: false } },
    };
    one.chart = new uPlot(options, one.data, one.place);
  };

  const renew = async () => {
    if (document.hidden) return;
    const toggle = document.getElementById("live-toggle");
    if (places[0].data && toggle && toggle.getAttribute("aria-pressed") === "false") return;
    let found;
    try {
      const answer = await fetch(charts.dataset.url);
      if (!answer.ok) return;
      found = (await answer.json()).data;
    } catch {
      return; // the banner says that the daemon does not answer
    }
    // What was before the start is not known, which is not the same as nothing.
    const known = (lines, values) => values.map((value, at) => (lines.at[at + 1] * 1000 <= found.since ? null : value));
    for (const one of places) {
      const lines = found[one.place.dataset.chart];
      one.data = [lines.at, known(lines, lines.created), known(lines, lines.completed), known(lines, lines.failed)];
      if (one.chart) one.chart.setData(one.data);
      else draw(one);
    }
  };

  const watch = new ResizeObserver((entries) => {
    for (const one of places) if (one.chart && entries.some((entry) => entry.target === one.place)) one.chart.setSize(size(one.place));
  });
  for (const one of places) watch.observe(one.place);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => places.forEach(draw));
  renew();
  setInterval(renew, 5000);
})();
