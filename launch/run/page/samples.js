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
  const pre = element("pre", undefined, { className: "response", tabIndex: 0, ariaLabel: "Response", role: "group" });
  if (!row.tokens || mode === "none") return Object.assign(pre, { textContent: row.response });
  const kept = row.token_logprobs?.length ?? Infinity;
  row.tokens.forEach((text, i) => {
    if (i >= kept) return pre.append(element("span", text, { className: "rest", title: "the rest of the response: no values of its tokens were kept" }));
    const [colour, words] = look(row, i, mode);
    const flagged = row.token_errors?.[i] && mode !== "error" ? "error token" : "";
    const token = element("span", text, { title: [words, flagged].filter(Boolean).join(", ") });
    if (colour) token.style.backgroundColor = colour;
    if (row.token_errors?.[i]) token.className = "error";
    pre.append(token);
  });
  return pre;
}

// Arrow keys go from token to token, and say what the mouse sees on each.
function readToken(event, pre, said) {
  const tokens = [...pre.children];
  if (!(event.key in MOVES) || !tokens.length || event.ctrlKey || event.altKey || event.metaKey) return;
  event.preventDefault();
  const old = tokens.findIndex((one) => one.classList.contains("current"));
  const at = Math.max(0, Math.min(tokens.length - 1, old + MOVES[event.key]));
  tokens[old]?.classList.remove("current");
  tokens[at].classList.add("current");
  tokens[at].scrollIntoView({ block: "nearest" });
  said.textContent = `Token ${at + 1} of ${tokens.length}, ${JSON.stringify(tokens[at].textContent)}: ${tokens[at].title || "nothing to say"}`;
}

function facts(row) {
  const skip = new Set(["step", "table", "prompt", "response", "tokens", "marked", "token_logprobs", "token_ratios", "token_errors"]);
  const cells = Object.entries(row).filter(([name, value]) => !skip.has(name) && !["", "nan", null].includes(value));
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
    element("span", " Wavy underline: error token. By keys: Tab to a response, then arrows go from token to token and say what each has.", { className: "hint" }));
  byId("rows").replaceChildren(...rows.slice(page * PAGE, (page + 1) * PAGE).map((row) => {
    const article = element("article", undefined, { className: "sample" });
    const said = element("p", "", { className: "said", role: "status" });
    const shown = response(row, mode);
    shown.addEventListener("keydown", (event) => readToken(event, shown, said));
    article.append(element("p", facts(row), { className: "facts" }), element("pre", row.prompt, { className: "prompt" }), shown, said);
    return article;
  }));
  const { older } = data.runs[Number(filters.run.value)];
  byId("count").textContent = (rows.length ? `${rows.length} samples, page ${page + 1} of ${last + 1}` : "No sample matches.")
    + (older ? ` (${show(older)} older ones are in samples.jsonl alone)` : "");
  byId("previous").disabled = page === 0;
  byId("next").disabled = page === last;
}

function startSamples() {
  const withSamples = data.runs.map((run, i) => [run, i]).filter(([run]) => run.samples.length);
  if (!withSamples.length) return;
  byId("samples").hidden = document.querySelector(".skip").hidden = false;
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
  for (const [name, other, move] of [["previous", "next", -1], ["next", "previous", 1]]) {
    byId(name).addEventListener("click", () => {
      page += move;
      showSamples();
      if (byId(name).disabled) byId(other).focus(); // else the page would lose the focus
    });
  }
  refill();
  showSamples();
}
