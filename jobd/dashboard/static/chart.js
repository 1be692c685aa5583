// The chart of the last hour: /chart.json drawn by uPlot, in the colours of the page.
"use strict";

(() => {
  const place = document.getElementById("chart");
  const dark = matchMedia("(prefers-color-scheme: dark)");
  let chart = null;
  let data = null;

  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const line = (label, name, dash) => ({
    label,
    stroke: colour(name),
    width: 1.5,
    dash,
    points: { show: false },
    value: (_, value) => (value === null ? "–" : String(value)),
  });
  const size = () => ({ width: Math.max(place.clientWidth, 240), height: 180 });

  const draw = () => {
    if (!data) return;
    if (chart) chart.destroy();
    const axis = { stroke: colour("--dim"), grid: { stroke: colour("--line"), width: 1 }, ticks: { stroke: colour("--line"), width: 1 } };
    const options = {
      ...size(),
      series: [
        { label: "At", value: (_, at) => (at === null ? "–" : new Date(at * 1000).toLocaleTimeString()) },
        line("created", "--created", [6, 4]),
        line("completed", "--completed"),
        line("attempts failed", "--failed", [2, 3]),
      ],
      axes: [{ ...axis, values: (_, ats) => ats.map((at) => new Date(at * 1000).toTimeString().slice(0, 5)) }, { ...axis, size: 46, incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000] }],
      scales: { y: { range: (_, low, high) => [0, Math.max(high * 1.1, 4)] } },
      cursor: { drag: { x: false, y: false } },
    };
    chart = new uPlot(options, data, place);
  };

  const renew = async () => {
    if (document.hidden) return;
    const toggle = document.getElementById("live-toggle");
    if (data && toggle && toggle.getAttribute("aria-pressed") === "false") return;
    try {
      const answer = await fetch(place.dataset.url);
      if (!answer.ok) return;
      const { at, created, completed, failed } = (await answer.json()).data;
      data = [at, created, completed, failed];
    } catch {
      return; // the banner says that the daemon does not answer
    }
    if (chart) chart.setData(data);
    else draw();
  };

  new ResizeObserver(() => chart && chart.setSize(size())).observe(place);
  dark.addEventListener("change", draw);
  renew();
  setInterval(renew, 5000);
})();
