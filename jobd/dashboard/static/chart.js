// The charts of the last hour and the last day: /chart.json drawn by uPlot, in the colours of the page.
"use strict";

(() => {
  const charts = document.getElementById("charts");
  if (!charts) return;
  const places = [...charts.querySelectorAll("[data-chart]")].map((place) => ({ place, chart: null, data: null }));

  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const thousands = (number) => String(number).replace(/\B(?=(\d{3})+$)/g, "\u202f"); // as the pages write them
  // A line needs two values: one that has no neighbours, as the first after a start, is a point.
  const alone = (chart, at) => {
    const values = chart.data[at];
    const has = (index) => values[index] !== null && values[index] !== undefined;
    return [...values.keys()].filter((index) => has(index) && !has(index - 1) && !has(index + 1));
  };
  const line = (label, name, dash) => ({
    label,
    stroke: colour(name),
    width: 1.5,
    dash,
    points: { show: false, filter: alone, size: 7, fill: colour(name) },
    value: (_, value) => (value === null ? "–" : thousands(value)),
  });
  // As wide as its longest number; uPlot asks again once it has drawn, which changes nothing.
  const width = (chart, words, at, round) => {
    const axis = chart.axes[at];
    if (round > 1) return axis._size;
    chart.ctx.font = axis.font[0];
    const longest = Math.max(0, ...(words ?? []).map((word) => chart.ctx.measureText(word).width));
    return Math.ceil(axis.ticks.size + axis.gap + longest / devicePixelRatio) + 4;
  };
  const STEPS = [0, 1, 2, 3, 4, 5, 6, 7].flatMap((power) => [1, 2, 5].map((each) => each * 10 ** power)); // jobs are whole
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
      axes: [{ ...axis, values: (_, ats) => ats.map((at) => clock(at).slice(0, 5)) }, { ...axis, size: width, values: (_, values) => values.map(thousands), incrs: STEPS }],
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
