// The browser of samples.
const filters = byId("filters").elements;
let page = 0;

function fill(select, values, all) {
  const old = select.value;
  select.replaceChildren(...(all ? [element("option", all, { value: "" })] : []), ...values.map((value) => element("option", value, { value })));
  select.value = values.map(String).includes(old) ? old : select.options[0].value;
}

function chosen() {
  const run = data.runs[Number(filters.run.value)];
  const low = filters.low.value === "" ? -Infinity : Number(filters.low.value);
  const high = filters.high.value === "" ? Infinity : Number(filters.high.value);
  const text = filters.text.value.toLowerCase();
  return run.samples.filter((row) => row.table === filters.table.value
    && (filters.step.value === "" || row.step === Number(filters.step.value))
    && row.reward >= low && row.reward <= high
    && (text === "" || `${row.prompt}\n${row.response}`.toLowerCase().includes(text)));
}

// A colour for a token and what it says in words.
function look(row, i, mode) {
  if (mode === "error") return row.token_errors?.[i] ? ["rgba(213, 94, 0, .45)", "error token"] : [null, ""];
  if (mode === "ratio" && row.token_ratios) {
    const log = Math.log(row.token_ratios[i]);
    const strength = Math.min(0.75, Math.abs(log) * 2);
    return [log >= 0 ? `rgba(0, 158, 115, ${strength})` : `rgba(213, 94, 0, ${strength})`, `ratio ${show(row.token_ratios[i])}`];
  }
  if (mode === "logprob" && row.token_logprobs) {
    const strength = Math.min(0.8, -row.token_logprobs[i] / 5);
    return [`rgba(204, 121, 167, ${strength})`, `log-prob ${show(row.token_logprobs[i])}`];
  }
  return [null, ""];
}

function response(row, mode) {
  const pre = element("pre", undefined, { className: "response", tabIndex: 0 });
  if (!row.tokens || mode === "none") return Object.assign(pre, { textContent: row.response });
  row.tokens.forEach((text, i) => {
    const [colour, words] = look(row, i, mode);
    const token = element("span", text, { title: words });
    if (colour) token.style.backgroundColor = colour;
    if (row.token_errors?.[i]) token.className = "error";
    pre.append(token);
  });
  return pre;
}

function facts(row) {
  const skip = new Set(["step", "table", "prompt", "response", "tokens", "marked", "token_logprobs", "token_ratios", "token_errors"]);
  const cells = Object.entries(row).filter(([name, value]) => !skip.has(name) && value !== "" && value !== null);
  return `step ${row.step} · ${cells.map(([name, value]) => `${name.replaceAll("_", " ")} ${typeof value === "number" ? show(value) : value}`).join(" · ")}`;
}

const LEGENDS = {
  logprob: [["rgba(204, 121, 167, .1)", "likely"], ["rgba(204, 121, 167, .8)", "unlikely (log-prob -4 or less)"]],
  ratio: [["rgba(213, 94, 0, .7)", "the update made it less likely"], ["rgba(0, 158, 115, .7)", "more likely"]],
  error: [["rgba(213, 94, 0, .45)", "error token"]],
  none: [],
};

function showSamples() {
  const rows = chosen();
  const last = Math.max(0, Math.ceil(rows.length / PAGE) - 1);
  page = Math.min(page, last);
  const mode = filters.colour.value;
  byId("legend").replaceChildren(...LEGENDS[mode].map(([colour, text]) => Object.assign(element("span", text, { className: "key" }), { style: `background:${colour}` })),
    element("span", " Wavy underline: error token.", { className: "hint" }));
  byId("rows").replaceChildren(...rows.slice(page * PAGE, (page + 1) * PAGE).map((row) => {
    const article = element("article", undefined, { className: "sample" });
    article.append(element("p", facts(row), { className: "facts" }), element("pre", row.prompt, { className: "prompt" }), response(row, mode));
    return article;
  }));
  byId("count").textContent = rows.length ? `${rows.length} samples, page ${page + 1} of ${last + 1}` : "No sample matches.";
  byId("previous").disabled = page === 0;
  byId("next").disabled = page === last;
}

function startSamples() {
  const withSamples = data.runs.map((run, i) => [run, i]).filter(([run]) => run.samples.length);
  if (!withSamples.length) return;
  byId("samples").hidden = false;
  filters.run.replaceChildren(...withSamples.map(([run, i]) => element("option", run.name, { value: i })));
  document.querySelector('[data-for="run"]').hidden = !several;
  const refill = () => {
    const { samples } = data.runs[Number(filters.run.value)];
    fill(filters.table, [...new Set(samples.map((row) => row.table))]);
    fill(filters.step, [...new Set(samples.filter((row) => row.table === filters.table.value).map((row) => row.step))], "all");
  };
  byId("filters").addEventListener("input", (event) => {
    if (["run", "table"].includes(event.target.name)) refill();
    page = 0;
    showSamples();
  });
  byId("filters").addEventListener("submit", (event) => event.preventDefault());
  byId("previous").addEventListener("click", () => { page -= 1; showSamples(); });
  byId("next").addEventListener("click", () => { page += 1; showSamples(); });
  refill();
  showSamples();
}
