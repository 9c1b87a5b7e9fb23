// Runs in the loaded report: looks at what is drawn, uses every control, and notes what it finds.
const figure = (title) => [...document.querySelectorAll("#charts figure")]
  .find((one) => one.querySelector("h3").textContent === title);
const gapsTitle = data.runs.length > 1 ? "Mismatch by part: first" : "Mismatch by part";
const text = (selector) => [...document.querySelectorAll(selector)].map((one) => one.textContent);
const second = (selector) => document.querySelector(`${selector} span:nth-child(2)`).title;

// The paths of a colour: lines, and the fills of bars.
const paths = (title, colour) => [...figure(title).querySelectorAll("svg path")]
  .filter((path) => [path.getAttribute("stroke"), path.getAttribute("fill")].includes(colour))
  .map((path) => path.getAttribute("d"));

// The vertical places of the points of a line: its path is the longest of its colour that is no circle.
function places(title, colour) {
  const lines = paths(title, colour).filter((d) => !d.includes("A") && !d.includes("Z"));
  return lines.sort((a, b) => b.length - a.length)[0].match(/-?[0-9.]+/g).map(Number).filter((_, i) => i % 2);
}

// A row of the table under a chart.
function rowOf(title, number) {
  const details = figure(title).querySelector("details");
  details.open = true;
  details.dispatchEvent(new Event("toggle"));
  return [...details.querySelectorAll(`tr:nth-child(${number}) td`)].map((one) => one.textContent);
}

function set(name, value) {
  filters[name].value = value;
  filters[name].dispatchEvent(new Event("input", { bubbles: true }));
}

found.titles = text("#charts figure h3");
found.labels = [...document.querySelectorAll("#charts .chart")].map((one) => one.getAttribute("aria-label"));
found.first = places("Reward", "#0072b2");
found.wide = document.documentElement.scrollWidth > innerWidth;
found.theme = document.documentElement.dataset.theme;
found.runs = text(".run h2");
if (data.runs.length > 1) {
  found.second = places("Reward", "#d55e00");
} else {
  const [work, update] = ["#0072b2", "#d55e00"].map((colour) => paths("Who works when", colour)
    .map((d) => d.match(/-?[0-9.]+/g).map(Number)).sort((a, b) => (b[2] - b[0]) - (a[2] - a[0]))[0]);
  found.work = (work[2] - work[0]) / (update[2] - update[0]);
  found.bars = ["#d55e00", "#cc79a7", "#8a6d3b"].map((colour) => paths("Phases", colour).length);
}

found.all = text("#count");
found.tokens = text(".sample:first-child .response span");
found.facts = text(".sample:first-child .facts");
found.likely = second(".sample .response");
set("step", "4");
set("low", "0.5");
found.filtered = text("#count");
set("colour", "ratio");
found.ratio = second(".sample .response");
set("text", "nowhere");
found.none = text("#count");
set("text", "");
set("table", "error_tokens");
found.table = text(".sample .response");
set("colour", "error");
found.error = text(".sample .response .error");

byId("metric").value = "mismatch/logp_abs_max";
byId("metric").dispatchEvent(new Event("change"));
found.any = text("#any h3");
found.values = rowOf("Reward", 3);
const gapsTexts = [...figure(gapsTitle).querySelectorAll("svg text")].map((one) => one.textContent);
found.parts = gapsTexts.filter((one) => one.includes(": "));
found.zeros = gapsTexts.filter((one) => one === "0").length;
found.gaps = [...figure(gapsTitle).querySelectorAll('svg path[fill="#0072b2"]')].map((path) => path.getBBox().width).slice(0, 3);
found.gapLabel = figure(gapsTitle).querySelector(".chart").getAttribute("aria-label");
found.gapRow = rowOf(gapsTitle, 3);
if (data.runs.length === 1) found.workRow = rowOf("Who works when", 3);
byId("theme").click();
found.after = document.documentElement.dataset.theme;
found.choice = document.querySelector('[data-for="run"]').checkVisibility();
found.unnamed = [...document.querySelectorAll("button, select, input")]
  .filter((one) => !one.textContent.trim() && !one.labels?.length).length;
