// The theme, and what the page does first.
function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  byId("theme").textContent = theme === "dark" ? "Light theme" : "Dark theme";
  charts.forEach((chart) => chart.instance.setOption(optionOf(chart)));
}

byId("theme").addEventListener("click", () => setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));
const dark = matchMedia("(prefers-color-scheme: dark)");
dark.addEventListener("change", () => setTheme(dark.matches ? "dark" : "light"));
setTheme(dark.matches ? "dark" : "light");
data.panels.forEach((panel, i) => {
  if (panel.section !== data.panels[i - 1]?.section) byId("charts").append(element("h3", panel.section, { className: "section" }));
  chartsOf(panel).forEach((chart) => draw(chart, byId("charts")));
  if (panel.rows?.length) byId("charts").append(textOf(panel));
});
data.runs.filter((run) => run.gaps.length).forEach(drawGaps);
data.runs.filter((run) => run.trace).forEach(drawStep);
fillMetrics();
startSamples();
document.documentElement.dataset.ready = "yes";
