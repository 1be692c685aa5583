// Draws /chart.json with uPlot in the colours of the page: the last hour and the last day.
"use strict";

(() => {
  const charts = document.getElementById("charts");
  if (!charts) return;
  const panels = [...charts.querySelectorAll("[data-chart]")].map((element) => ({ element, chart: null, data: null }));

  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const thousands = (number) => String(number).replace(/\B(?=(\d{3})+$)/g, "\u202f"); // as on the pages
  // A value without neighbours, such as the first after a start, makes no line, so it is drawn as a point.
  const isolated = (chart, at) => {
    const values = chart.data[at];
    const has = (index) => values[index] !== null && values[index] !== undefined;
    return [...values.keys()].filter((index) => has(index) && !has(index - 1) && !has(index + 1));
  };
  const line = (label, name, dash) => ({
    label,
    stroke: colour(name),
    width: 1.5,
    dash,
    points: { show: false, filter: isolated, size: 7, fill: colour(name) },
    value: (_, value) => (value === null ? "–" : thousands(value)),
  });
  // Fit the axis to its longest number. uPlot calls this again after drawing, with no effect.
  const width = (chart, labels, at, round) => {
    const axis = chart.axes[at];
    if (round > 1) return axis._size;
    chart.ctx.font = axis.font[0];
    const longest = Math.max(0, ...(labels ?? []).map((label) => chart.ctx.measureText(label).width));
    return Math.ceil(axis.ticks.size + axis.gap + longest / devicePixelRatio) + 4;
  };
  const STEPS = [0, 1, 2, 3, 4, 5, 6, 7].flatMap((power) => [1, 2, 5].map((each) => each * 10 ** power)); // whole numbers of jobs
  // UTC, as in the tables.
  const clock = (at) => new Date(at * 1000).toISOString().slice(11, 19);
  const size = (element) => ({ width: Math.max(element.clientWidth, 240), height: 180 });

  const draw = (panel) => {
    if (!panel.data) return;
    if (panel.chart) panel.chart.destroy();
    const axis = { stroke: colour("--dim"), grid: { stroke: colour("--line"), width: 1 }, ticks: { stroke: colour("--line"), width: 1 } };
    const options = {
      ...size(panel.element),
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
    panel.chart = new uPlot(options, panel.data, panel.element);
  };

  const update = async () => {
    if (document.hidden) return;
    const toggle = document.getElementById("live-toggle");
    if (panels[0].data && toggle && toggle.getAttribute("aria-pressed") === "false") return;
    let chartData;
    try {
      const response = await fetch(charts.dataset.url);
      if (!response.ok) return;
      chartData = (await response.json()).data;
    } catch {
      return; // the offline banner is shown
    }
    // Values from before the start are unknown, not zero.
    const known = (lines, values) => values.map((value, at) => (lines.at[at + 1] * 1000 <= chartData.since ? null : value));
    for (const panel of panels) {
      const lines = chartData[panel.element.dataset.chart];
      panel.data = [lines.at, known(lines, lines.created), known(lines, lines.completed), known(lines, lines.failed)];
      if (panel.chart) panel.chart.setData(panel.data);
      else draw(panel);
    }
  };

  const watch = new ResizeObserver((entries) => {
    for (const panel of panels) if (panel.chart && entries.some((entry) => entry.target === panel.element)) panel.chart.setSize(size(panel.element));
  });
  for (const panel of panels) watch.observe(panel.element);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => panels.forEach(draw));
  update();
  setInterval(update, 5000);
})();
