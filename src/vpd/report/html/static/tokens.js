/* An answer token by token: coloured by what the teacher makes of it, with both probabilities on hover or focus. */

const FULL = 3; // nats at which a colour is at its strongest

const VIEWS = [
  { key: "now", title: "teacher less student", over: "teacher", under: "student" },
  { key: "before", title: "before the E-step", over: "teacher_before", under: "student_before" },
  { key: "after", title: "after the E-step", over: "teacher_after", under: "student" },
  { key: "change", title: "what the E-step changed", over: "teacher_after", under: "teacher_before" },
  { key: "retry", title: "teacher (as it sampled) less student", over: "sampler", under: "student" },
];

const PROBABILITIES = [
  { key: "student", title: "student", means: "as the M-step trains it" },
  { key: "teacher", title: "teacher", means: "as the M-step distils it" },
  { key: "student_before", title: "student before the E-step", means: "what the E-step compares the teacher with" },
  { key: "teacher_before", title: "teacher before the E-step", means: "as the E-step begins to train it" },
  { key: "teacher_after", title: "teacher after the E-step", means: "what the E-step made of it" },
  { key: "sampler", title: "as it was sampled", means: "by the weights that wrote the answer, as the sampler reported it" },
];

function viewsOf(row) {
  const tokens = row.by_token;
  return VIEWS.filter((view) => tokens[view.over] && tokens[view.under] && (view.key !== "retry" || (row.role === "teacher" && !tokens.teacher)));
}

function ratiosOf(tokens, view) {
  return tokens.texts.map((_, i) => {
    const over = tokens[view.over][i];
    const under = tokens[view.under][i];
    return over === null || under === null || (tokens.sampled && !tokens.sampled[i]) ? null : over - under;
  });
}

function implicitRewardOf(row, run) {
  const tokens = row.by_token;
  if (!tokens || !tokens.teacher_before || !tokens.student_before || run.beta === null || tokens.left_out) return null;
  const ratios = ratiosOf(tokens, VIEWS[1]).filter((ratio) => ratio !== null);
  const sum = ratios.reduce((a, b) => a + b, 0);
  return ratios.length ? run.beta * (run.mean ? sum / ratios.length : sum) : null;
}

function colourOf(ratio) {
  if (ratio === null) return "";
  const strength = Math.min(Math.abs(ratio) / FULL, 1) * 0.78;
  return `rgba(var(--${ratio > 0 ? "more" : "less"}), ${strength.toFixed(3)})`;
}

function tokenView(row, texts) {
  const tokens = row.by_token;
  const views = viewsOf(row);
  const box = el("div", { class: "text-box answer", role: "group", "aria-label": "The answer, token by token; arrow keys go from token to token" });
  const summary = el("p", { class: "muted" });
  const select = el("select", { "aria-label": "What the colours show" }, ...views.map((view) => el("option", { value: view.key }, view.title)));
  const spans = tokens.texts.map((text, i) => {
    const shown = text === "" ? "·" : text.replace(/\n/g, "⏎\n");
    const span = el("span", { class: "token" + (tokens.sampled && !tokens.sampled[i] ? " silent" : ""), tabindex: i ? "-1" : "0" }, shown);
    span.place = i;
    return span;
  });
  box.append(...spans);
  if (tokens.left_out) box.append(el("em", {}, ` [... ${tokens.left_out} more tokens ...]`));
  const paint = () => {
    const view = views.find((view) => view.key === select.value);
    const ratios = view ? ratiosOf(tokens, view) : [];
    spans.forEach((span, i) => { span.style.background = view ? colourOf(ratios[i]) : ""; });
    summary.textContent = view ? sumUp(ratios, view) : "The weights that sampled it are all that was recorded: this row had no teacher.";
  };
  select.addEventListener("change", paint);
  paint();
  listen(box, spans, row, texts);
  const tools = views.length ? el("p", { class: "tools" }, el("label", {}, "Colours: ", select), scale()) : null;
  return [tools, box, summary, legendOf(tokens)];
}

function legendOf(tokens) {
  const known = PROBABILITIES.filter(({ key }) => (tokens[key] || []).some((value) => value !== null));
  return el("details", { class: "legend" }, el("summary", {}, "The probabilities that a token shows on hover"),
    el("dl", {}, ...known.flatMap(({ title, means }) => [el("dt", {}, title), el("dd", {}, means)])));
}

function scale() {
  return el("span", { class: "scale" }, `likes it less (−${FULL} nats)`, el("i", { "aria-hidden": "true" }), `more (+${FULL} nats)`);
}

function sumUp(ratios, view) {
  const known = ratios.filter((ratio) => ratio !== null);
  const sum = known.reduce((a, b) => a + b, 0);
  const verb = sum > 0 ? "likelier" : "less likely";
  if (view.key === "change") return `In sum ${signed(sum)} nats over ${known.length} tokens: the E-step made the answer ${verb} to the teacher.`;
  return `In sum ${signed(sum)} nats over ${known.length} tokens: the answer is ${verb} to the teacher than to the student.`;
}

function quoted(text) {
  return `"${text.replace(/\n/g, "\\n").replace(/\t/g, "\\t")}"`;
}

function listen(box, spans, row, texts) {
  const show = (span) => showTip(span, row.by_token, span.place, texts);
  box.addEventListener("pointerover", (event) => { if (event.target.classList.contains("token")) show(event.target); });
  box.addEventListener("pointerleave", hideTip);
  box.addEventListener("focusin", (event) => { if (event.target.classList.contains("token")) show(event.target); });
  box.addEventListener("focusout", hideTip);
  box.addEventListener("keydown", (event) => {
    const from = event.target.place;
    const to = { ArrowRight: from + 1, ArrowLeft: from - 1, Home: 0, End: spans.length - 1 }[event.key];
    if (event.key === "Escape") hideTip();
    if (from === undefined || to === undefined || !spans[to]) return;
    event.preventDefault();
    spans[from].tabIndex = -1;
    spans[to].tabIndex = 0;
    spans[to].focus();
  });
}

function showTip(span, tokens, place, texts) {
  const tip = $("#tip");
  const at = (name) => (tokens[name] ? tokens[name][place] : null);
  const parts = [el("div", {}, el("code", {}, quoted(tokens.texts[place])), ` token ${place + 1} of ${tokens.texts.length}`)];
  if (tokens.sampled && !tokens.sampled[place]) parts.push(el("div", {}, "written by the environment; no loss sees it"));
  const lines = PROBABILITIES.map(({ key, title }) => [title, at(key)]);
  const known = lines.filter(([, value]) => value !== null && value !== undefined);
  parts.push(el("table", {}, el("tbody", {}, ...known.map(([name, value]) => el("tr", {}, el("th", { scope: "row" }, name), el("td", { class: "n" }, probability(value)))))));
  if (at("teacher") !== null && at("student") !== null) parts.push(el("div", {}, `log-ratio ${signed(at("teacher") - at("student"))} nats`));
  if (tokens.k) parts.push(alternatives(tokens, place, texts));
  tip.replaceChildren(...parts);
  tip.hidden = false;
  const box = span.getBoundingClientRect();
  const own = tip.getBoundingClientRect();
  tip.style.left = Math.max(4, Math.min(box.left, innerWidth - own.width - 8)) + "px";
  tip.style.top = (box.bottom + own.height + 10 < innerHeight ? box.bottom + 6 : Math.max(4, box.top - own.height - 6)) + "px";
}

function alternatives(tokens, place, texts) {
  const start = place * tokens.k;
  const rows = Array.from({ length: tokens.k }, (_, i) => start + i).map((i) => el("tr", {},
    el("td", {}, el("code", {}, quoted(texts[tokens.top[i]]))), el("td", { class: "n" }, probability(tokens.top_teacher[i])), el("td", { class: "n" }, probability(tokens.top_student[i]))));
  return el("table", {}, el("thead", {}, el("tr", {}, ...["the teacher's likeliest", "teacher", "student"].map((text) => el("th", { scope: "col" }, text)))), el("tbody", {}, ...rows));
}

function hideTip() {
  $("#tip").hidden = true;
}
