"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a6d3b", "#9467bd", "#7f7f7f", "#17becf"];
const ORDERED = ["#440154", "#482878", "#3e4a89", "#31688e", "#26828e", "#1f9e89", "#35b779", "#6ece58", "#b5de2b", "#fde725"];
const MANY = 300; // steps: narrower bars cannot be told apart
const DASHES = ["solid", "dashed", "dotted", [8, 3, 2, 3]];
const SMALLEST = 1e-8; // the axis for values whose zeros count is linear below it
const PAGE = 10;
const charts = [];
const several = data.runs.length > 1;
const byId = (id) => document.getElementById(id);

function element(tag, text, properties) {
  return Object.assign(document.createElement(tag), text === undefined ? {} : { textContent: text }, properties);
}

// --- numbers

function show(value) {
  if (value === null || value === undefined) return "-";
  const size = Math.abs(value);
  if (value === 0 || Number.isInteger(value)) return value.toLocaleString("en");
  return size < 0.001 || size >= 1e6 ? value.toExponential(2) : value.toPrecision(4).replace(/(\.\d*?)0+$/, "$1").replace(/\.$/, "");
}
const toLog = (value) => (value === null ? null : Math.sign(value) * Math.log10(1 + Math.abs(value) / SMALLEST));
const fromLog = (place) => (place === null ? null : Math.sign(place) * SMALLEST * (10 ** Math.abs(place) - 1));
const showLog = (place) => (place === 0 ? "0" : `1e${Math.round(Math.log10(SMALLEST) + place)}`);

// --- charts

function points(run, name, transform) {
  const [steps, values] = run.series[name];
  return steps.map((step, i) => [step, transform(values[i])]);
}

// What is stacked needs a value at every step, and all of one step: where one of several steps is shown, the first.
function filled(run, names, name) {
  const all = [...new Set(names.flatMap((one) => run.series[one][0]))].sort((a, b) => a - b);
  const part = (step) => Math.floor(step / run.every);
  const steps = all.filter((step, i) => part(step) !== part(all[i - 1]) || i === all.length - 1);
  const values = new Map(points(run, name, (value) => value));
  return steps.map((step) => [step, values.get(step) ?? 0]);
}

// What a chart and its values leave out, in words.
function leftOut(runs) {
  return runs.filter((run) => run.every > 1).map((run) => ` ${several ? `${run.name}: of` : "Of"} every ${run.every} steps one is shown: one whose value is no number, of mismatch and maxima the largest, else the first.`).join("");
}

// One chart holds the lines of all runs; stacked ones hold one run each.
function chartsOf(panel) {
  const stacked = panel.kind !== "line";
  const groups = stacked ? data.runs.map((run) => [run]) : [data.runs];
  return groups.map((runs) => ({ panel, stacked, runs: runs.filter((run) => Object.keys(panel.lines).some((name) => name in run.series)) }))
    .filter((chart) => chart.runs.length);
}

function seriesOf({ panel, stacked, runs }) {
  const transform = panel.scale === "log" ? toLog : (value) => value;
  const found = [];
  for (const run of runs) {
    const names = Object.keys(panel.lines).filter((name) => name in run.series);
    names.forEach((name) => {
      const line = Object.keys(panel.lines).indexOf(name);
      const index = several && !stacked ? data.runs.indexOf(run) : line;
      const colour = (panel.ordered ? ORDERED : COLOURS)[index % COLOURS.length];
      const label = several && !stacked ? `${run.name}: ${panel.lines[name]}` : panel.lines[name];
      const base = { name: label, data: stacked ? filled(run, names, name) : points(run, name, transform), color: colour, animation: false };
      if (panel.kind === "bar" && base.data.length <= MANY) return found.push({ ...base, type: "bar", stack: "all", barMaxWidth: 40 });
      const style = { type: "line", showSymbol: base.data.length < 16, symbolSize: 5, sampling: panel.scale === "log" ? undefined : "lttb" }; // a mismatch is always drawn
      if (stacked) return found.push({ ...base, ...style, showSymbol: base.data.length < 2, stack: "all", areaStyle: { opacity: 0.75 }, lineStyle: { width: 0.5 } });
      const dash = several ? DASHES[line % DASHES.length] : DASHES[Math.floor(line / COLOURS.length)];
      found.push({ ...base, ...style, lineStyle: { width: 1.8, type: dash } });
      const interval = run.intervals[name];
      if (panel.scale === "share" && interval && interval.length) found.push(...band(label, interval, colour));
    });
    if (panel.title === "Held-out accuracy") Object.entries(run.controls).forEach(([name, level]) => found.push(control(run, name, level)));
  }
  return found;
}

// Two stacked lines: the lower bound without a fill, and the width of the interval with one.
function band(label, interval, colour) {
  const line = { type: "line", stack: `interval ${label}`, symbol: "none", lineStyle: { opacity: 0 }, silent: true, tooltip: { show: false }, animation: false, interval: true };
  return [
    { ...line, name: `${label} low`, data: interval.map(([step, low]) => [step, low]) },
    { ...line, name: `${label} width`, data: interval.map(([step, low, high]) => [step, high - low]), areaStyle: { color: colour, opacity: 0.16 } },
  ];
}

function control(run, name, level) {
  const label = `${several ? `${run.name}: ` : ""}${name} (control)`;
  const mark = { silent: true, symbol: "none", lineStyle: { type: "dotted", color: "#888888", width: 1.5 }, label: { formatter: label, position: "insideStartTop", color: "#888888" }, data: [{ yAxis: level }] };
  return { name: label, type: "line", data: [], markLine: mark, animation: false, interval: true, level };
}

function optionOf(chart) {
  const { panel } = chart;
  const style = getComputedStyle(document.documentElement);
  const [text, line, back] = ["--dim", "--line", "--back"].map((name) => style.getPropertyValue(name).trim());
  const legend = { top: 0, left: 0, itemWidth: 18, itemHeight: 9, textStyle: { color: text, fontSize: 11 }, pageIconColor: text, pageTextStyle: { color: text } };
  const tooltip = { confine: true, backgroundColor: back, borderColor: line, textStyle: { color: text } };
  if (chart.trace) return stepOption({ trace: chart.trace, text, line, legend });
  if (chart.gaps) return gapsOption({ gaps: chart.gaps, text, line, legend, tooltip });
  const series = seriesOf(chart);
  const isLog = panel.scale === "log";
  const value = (item) => show(isLog ? fromLog(item.value[1]) : item.value[1]);
  const labels = series.filter((one) => !one.interval).map((one) => one.name);
  const rows = Math.min(4, Math.ceil(labels.reduce((sum, label) => sum + 36 + 6.2 * label.length, 0) / chart.place.clientWidth));
  const tip = (items) => [`step ${items[0].value[0]}`, ...items.filter((item) => !/ (low|width)$/.test(item.seriesName) || labels.includes(item.seriesName))
    .map((item) => `${item.marker}${echarts.format.encodeHTML(item.seriesName)} <b>${value(item)}</b>`)].join("<br>");
  return {
    backgroundColor: "transparent",
    textStyle: { color: text, fontFamily: "system-ui, sans-serif" },
    aria: { enabled: true, label: { description: describe(chart) } },
    grid: { left: 8, right: 14, top: 18 + 22 * rows, bottom: 8, containLabel: true },
    legend: { data: labels, type: labels.length > 14 ? "scroll" : "plain", ...legend },
    tooltip: { ...tooltip, trigger: "axis", formatter: tip, axisPointer: { type: panel.kind === "bar" ? "shadow" : "line" } },
    toolbox: { show: true, itemSize: 0, feature: { dataZoom: { yAxisIndex: "none" } } },
    xAxis: { type: "value", min: "dataMin", max: "dataMax", minInterval: 1, axisLabel: { color: text }, axisLine: { lineStyle: { color: line } }, splitLine: { show: false }, ...(panel.kind === "bar" ? padded(series) : {}) },
    yAxis: { type: "value", scale: panel.kind === "line" && panel.scale === "linear", ...(panel.scale === "share" ? { min: 0, max: 1 } : {}), ...(isLog ? { min: 0, max: ({ max }) => Math.max(4, Math.ceil(max)), interval: 2 } : {}), name: panel.unit, nameTextStyle: { color: text, align: "left" }, axisLabel: { color: text, formatter: isLog ? showLog : undefined }, splitLine: { lineStyle: { color: line, opacity: 0.6 } } },
    series,
  };
}

// One step of a run: a row for each process, a colour for each thing that one does.
function stepOption({ trace, text, line, legend }) {
  const names = [...new Set(trace.spans.map(([, name]) => name))];
  const series = names.map((name, i) => ({
    name, type: "line", symbol: "none", animation: false, color: COLOURS[i % COLOURS.length], lineStyle: { width: 16, cap: "butt" },
    data: trace.spans.filter((span) => span[1] === name).flatMap(([row, , from, to]) => [[from, trace.rows[row]], [to, trace.rows[row]], [null, null]]),
  }));
  return {
    backgroundColor: "transparent",
    textStyle: { color: text, fontFamily: "system-ui, sans-serif" },
    aria: { enabled: true, label: { description: `${trace.rows.join("; ")}.` } },
    grid: { left: 8, right: 24, top: 62, bottom: 8, containLabel: true },
    legend: { data: names, type: "scroll", ...legend },
    toolbox: { show: true, itemSize: 0, feature: { dataZoom: { yAxisIndex: "none" } } },
    xAxis: { type: "value", min: 0, max: trace.seconds, name: "s", axisLabel: { color: text, formatter: show }, axisLine: { lineStyle: { color: line } }, splitLine: { show: false } },
    yAxis: { type: "category", data: trace.rows, inverse: true, axisLabel: { color: text }, splitLine: { show: false } },
    series,
  };
}

function drawStep(run) {
  const { trace } = run;
  const panel = { title: "Who works when", text: `Step ${trace.step}, in seconds since it began: its phases, when the driver works while no other process does, and each process. qarl trace shows all of the run.`, lines: {} };
  draw({ panel, runs: [run], stacked: true, trace }, byId("charts"));
}

// What qarl mismatch measured: a bar for each part, a colour for each scheme, dtype and length.
function gapsOption({ gaps, text, line, legend, tooltip }) {
  const series = gaps.map((cell, i) => ({
    name: cell.title, type: "bar", animation: false, color: COLOURS[i % COLOURS.length], barMaxWidth: 14,
    data: cell.rows.map(([part, name, mean, max]) => ({ value: [toLog(mean), `${part}: ${name}`], mean, max })),
    label: { show: true, position: "right", color: text, fontSize: 11, formatter: ({ data: gap }) => (gap.mean === 0 ? "0" : "") },
  }));
  const tip = ({ seriesName, value, data: gap }) => `${echarts.format.encodeHTML(`${value[1]}, ${seriesName}`)}<br>mean <b>${show(gap.mean)}</b>, max <b>${show(gap.max)}</b>`;
  return {
    backgroundColor: "transparent",
    textStyle: { color: text, fontFamily: "system-ui, sans-serif" },
    aria: { enabled: true, label: { description: gaps.flatMap((cell) => cell.rows.map(([part, name, mean]) => `${cell.title}, ${part}, ${name}: ${show(mean)}`)).join("; ") } },
    grid: { left: 8, right: 24, top: 30, bottom: 8, containLabel: true },
    legend: { type: "scroll", ...legend },
    tooltip: { ...tooltip, trigger: "item", formatter: tip },
    xAxis: { type: "value", min: 0, max: ({ max }) => Math.max(4, Math.ceil(max)), interval: 2, axisLabel: { color: text, formatter: showLog }, splitLine: { lineStyle: { color: line, opacity: 0.6 } } },
    yAxis: { type: "category", inverse: true, data: partsOf(gaps), axisLabel: { color: text }, axisLine: { lineStyle: { color: line } }, axisTick: { show: false } },
    series,
  };
}

function partsOf(gaps) {
  return [...new Set(gaps.flatMap((cell) => cell.rows.map(([part, name]) => `${part}: ${name}`)))];
}

function drawGaps(run) {
  const { gaps } = run;
  const panel = { title: "Mismatch by part", text: `Mean |d log p| in nats when one thing differs, as qarl mismatch measured it on the final model of step ${gaps[0].steps}; 0 means that both compute the same, bit for bit.`, lines: {} };
  draw({ panel, runs: [run], stacked: true, gaps }, byId("charts"));
}

function padded(series) {
  const steps = series.flatMap((one) => one.data.map(([step]) => step));
  return { min: Math.min(...steps) - 1, max: Math.max(...steps) + 1 };
}

// What a screen reader says: the last value of every line.
function describe({ panel, runs }) {
  const parts = runs.flatMap((run) => Object.entries(panel.lines).filter(([name]) => name in run.series).map(([name, label]) => {
    const [steps, values] = run.series[name];
    return `${several ? `${run.name}, ` : ""}${label}: ${show(values[0])} at step ${steps[0]}, ${show(values.at(-1))} at step ${steps.at(-1)}`;
  }));
  return `${panel.title}. ${panel.text} ${parts.join("; ")}.`;
}

function draw(chart, parent) {
  const { panel, runs, stacked } = chart;
  const figure = element("figure");
  const title = several && stacked ? `${panel.title}: ${runs[0].name}` : panel.title;
  figure.append(element("h3", title), element("figcaption", `${panel.text}${chart.trace || chart.gaps ? "" : leftOut(runs)}`));
  const place = element("div", undefined, { className: "chart" });
  if (chart.gaps) place.style.height = `${60 + partsOf(chart.gaps).length * Math.max(18, 12 * chart.gaps.length)}px`;
  figure.append(place, valuesOf(chart));
  parent.append(figure);
  if (!chart.trace && !chart.gaps) listenToKeys(chart, place, figure);
  chart.place = place;
  chart.instance = echarts.init(place, null, { renderer: "svg" });
  chart.instance.setOption(optionOf(chart));
  chart.instance.dispatchAction({ type: "takeGlobalCursor", key: "dataZoomSelect", dataZoomSelectActive: true });
  place.addEventListener("dblclick", () => chart.instance.dispatchAction({ type: "dataZoom", start: 0, end: 100 }));
  new ResizeObserver(() => chart.instance.resize()).observe(place);
  charts.push(chart);
}

const MOVES = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity };

// What the mouse does, by keys: arrows read the values step by step, digits hide lines, + zooms in, Escape shows all again.
function listenToKeys(chart, place, figure) {
  const lines = seriesOf(chart).map((one, index) => ({ ...one, index })).filter((one) => !one.interval);
  const steps = [...new Set(lines.flatMap((one) => one.data.map(([step]) => step)))].sort((a, b) => a - b);
  const said = element("p", "", { className: "said", role: "status" });
  const outside = element("div", undefined, { tabIndex: 0, className: "keys", role: "application", ariaLabel: `${figure.querySelector("h3").textContent}: arrow keys read the values` });
  place.replaceWith(outside);
  outside.append(place);
  figure.insertBefore(said, outside.nextSibling);
  let at = -1;
  const act = (type, what) => chart.instance.dispatchAction({ type, ...what });
  const read = (move) => {
    at = Math.max(0, Math.min(steps.length - 1, at + move));
    const found = lines.map((one) => [one, one.data.findIndex(([step]) => step === steps[at])]).filter(([, i]) => i >= 0);
    act("showTip", { seriesIndex: found[0][0].index, dataIndex: found[0][1] });
    const value = (one, i) => show(chart.panel.scale === "log" ? fromLog(one.data[i][1]) : one.data[i][1]);
    said.textContent = `Step ${steps[at]}: ${found.map(([one, i]) => `${one.name} ${value(one, i)}`).join(", ")}`;
  };
  outside.addEventListener("keydown", (event) => {
    const line = lines[Number(event.key) - 1];
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    if (event.key in MOVES) read(MOVES[event.key]);
    else if (line) {
      act("legendToggleSelect", { name: line.name });
      said.textContent = `${line.name}: ${chart.instance.getOption().legend[0].selected[line.name] === false ? "hidden" : "shown"}`;
    } else if (event.key === "+") {
      const [{ start = 0, end = 100 } = {}] = chart.instance.getOption().dataZoom ?? [];
      const centre = Math.max(0, at) / Math.max(1, steps.length - 1) * 100;
      const half = (end - start) / 4;
      const from = Math.max(0, Math.min(100 - 2 * half, centre - half));
      act("dataZoom", { start: from, end: from + 2 * half });
      said.textContent = `Zoomed to ${show(Math.round(2 * half))}% of the steps`;
    } else if (event.key === "Escape") {
      act("dataZoom", { start: 0, end: 100 });
      act("hideTip", {});
      said.textContent = "";
    } else return;
    event.preventDefault();
  });
}

// What a chart shows, as rows under names.
function tableOf({ panel, runs, trace, gaps }) {
  if (trace) return [["process", "does", "from (s)", "to (s)"], trace.spans.map(([row, name, from, to]) => [trace.rows[row], name, from, to])];
  if (gaps) {
    const quarters = [1, 2, 3, 4].map((number) => `mean of quarter ${number}`);
    return [["measured", "part", "what differs", "mean", "max", ...quarters], gaps.flatMap((cell) => cell.rows.map((row) => [cell.title, ...row]))];
  }
  const rows = runs.flatMap((run) => Object.keys(panel.lines).filter((one) => one in run.series).flatMap((name) => {
    const [steps, values] = run.series[name];
    return steps.map((step, i) => [run.name, panel.lines[name], step, values[i]]);
  }));
  return [["run", "metric", "step", "value"], rows];
}

// The values of a chart as a table, made when it is opened.
function valuesOf(chart) {
  const details = element("details");
  details.append(element("summary", "Values"));
  details.addEventListener("toggle", () => {
    if (details.childElementCount > 1) return;
    const [names, rows] = tableOf(chart);
    const table = element("table");
    const head = element("tr");
    names.forEach((name) => head.append(element("th", name, { scope: "col" })));
    table.append(head);
    for (const cells of rows) {
      const row = element("tr");
      cells.forEach((cell) => row.append(element("td", typeof cell === "string" ? cell : show(cell))));
      table.append(row);
    }
    const box = element("div", undefined, { tabIndex: 0 });
    box.append(table);
    details.append(box);
  });
  return details;
}

// A panel of text or of a table.
function textOf(panel) {
  const figure = element("figure", undefined, { className: panel.wide ? "wide" : "" });
  const table = element("table");
  panel.rows.forEach((cells) => {
    const row = element("tr");
    cells.forEach((cell) => row.append(element("td", typeof cell === "number" ? show(cell) : cell)));
    table.append(row);
  });
  const box = element("div", undefined, { className: "rows", tabIndex: 0 });
  box.append(table);
  figure.append(element("h3", panel.title), box);
  return figure;
}

// --- any metric

function fillMetrics() {
  const select = byId("metric");
  Object.keys(data.metrics).forEach((name) => select.append(element("option", name)));
  select.addEventListener("change", () => {
    const old = charts.findIndex((chart) => chart.any);
    if (old >= 0) charts.splice(old, 1)[0].instance.dispose();
    byId("any").replaceChildren();
    const name = select.value;
    const panel = { title: name, text: data.metrics[name], unit: "", lines: { [name]: name.split("/").slice(1).join("/") || name }, kind: "line", scale: "linear" };
    chartsOf(panel).forEach((chart) => draw({ ...chart, any: true }, byId("any")));
  });
  select.dispatchEvent(new Event("change"));
}
