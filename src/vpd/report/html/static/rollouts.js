/* The browser of rollouts: filters, a list, and the chosen rollout. */

const PAGE = 80;
const FILTERS = ["run", "env", "role", "success", "source", "step_from", "step_to", "reward_from", "reward_to", "text"];

class Browser {
  constructor(data) {
    this.data = data;
    this.texts = data.rollouts.texts;
    this.rows = data.rollouts.rows.slice().sort((a, b) => a.run - b.run || a.step - b.step || a.row - b.row);
    this.form = $("#filters");
    this.list = $("#list");
    this.found = this.rows;
    this.shown = PAGE;
    this.chosen = null;
    this.fillChoices();
    this.form.addEventListener("input", () => this.filter());
    this.form.addEventListener("submit", (event) => event.preventDefault());
    this.form.addEventListener("reset", () => setTimeout(() => this.filter()));
    this.list.addEventListener("keydown", (event) => this.onKey(event));
    addEventListener("hashchange", () => this.followHash());
    this.restoreFilters();
    this.filter();
    this.followHash() || this.choose(this.mostTelling(), false);
    this.showChosenFirst();
  }

  fillChoices() {
    const choices = (name, values, all) => this.form.elements[name].replaceChildren(el("option", { value: "" }, all), ...values.map(([value, text]) => el("option", { value }, text)));
    const used = new Set(this.rows.map((row) => row.run));
    choices("run", this.data.runs.map((run, i) => [String(i), run.name]).filter(([i]) => used.has(Number(i))), "all");
    choices("env", [...new Set(this.data.runs.map((run) => run.env))].map((env) => [env, env]), "all");
    choices("source", [...new Set(this.rows.map((row) => row.source))].sort().map((source) => [source || "-", source || "none"]), "all");
  }

  restoreFilters() {
    const kept = JSON.parse(remembered.get("filters") || "{}");
    for (const name of FILTERS) if (kept[name]) this.form.elements[name].value = kept[name];
    this.form.elements.recorded.checked = Boolean(kept.recorded);
  }

  values() {
    const values = Object.fromEntries(FILTERS.map((name) => [name, this.form.elements[name].value]));
    values.recorded = this.form.elements.recorded.checked;
    return values;
  }

  filter() {
    const wanted = this.values();
    remembered.set("filters", JSON.stringify(wanted));
    const number = (text) => (text === "" ? null : Number(text));
    const inside = (value, low, high) => (low === null && high === null) || (value !== null && (low === null || value >= low) && (high === null || value <= high));
    const text = wanted.text.toLowerCase();
    this.found = this.rows.filter((row) =>
      (wanted.run === "" || row.run === Number(wanted.run)) &&
      (wanted.env === "" || this.data.runs[row.run].env === wanted.env) &&
      (wanted.role === "" || row.role === wanted.role) &&
      (wanted.success === "" || String(row.success) === wanted.success) &&
      (wanted.source === "" || (row.source || "-") === wanted.source) &&
      inside(row.step, number(wanted.step_from), number(wanted.step_to)) &&
      inside(row.reward, number(wanted.reward_from), number(wanted.reward_to)) &&
      (!wanted.recorded || row.by_token) &&
      (text === "" || this.textOf(row).includes(text)));
    this.shown = PAGE;
    this.showList();
    if (this.found.length && !this.found.includes(this.chosen)) this.choose(this.found[0], false);
  }

  textOf(row) {
    return [row.answer, this.texts[row.task], this.texts[row.prompt], row.feedback === null ? "" : this.texts[row.feedback]].join("\n").toLowerCase();
  }

  showList() {
    $("#count").textContent = `${this.found.length} of ${this.rows.length} rollouts${this.found.some((row) => row.by_token) ? "; ●: recorded token by token" : ""}`;
    const several = this.data.runs.length > 1;
    const items = this.found.slice(0, this.shown).map((row, place) => {
      const verdict = row.success === null ? "" : row.success ? el("span", { class: "good" }, "✓ ") : el("span", { class: "bad" }, "✗ ");
      const item = el("div", { class: "item", role: "option", id: `item-${place}`, "aria-selected": row === this.chosen ? "true" : "false", onclick: () => this.choose(row) },
        el("div", { class: "first" }, el("span", {}, verdict, `step ${row.step}, ${row.success === null ? "demonstration" : row.role === "teacher" ? "teacher's retry" : "student"}`), el("span", {}, row.by_token ? el("span", { title: "recorded token by token" }, "● ") : "", row.success === null ? "" : `reward ${shortNumber(row.reward)}`)),
        el("div", { class: "text start" }, this.texts[row.start]),
        el("div", { class: "text" }, row.answer.slice(0, 120) || "(empty)"),
        several ? el("div", { class: "text" }, this.data.runs[row.run].name) : null);
      item.row = row;
      return item;
    });
    this.list.replaceChildren(...items);
    if (this.found.length > this.shown) {
      this.list.append(el("button", { type: "button", onclick: () => { this.shown += PAGE; this.showList(); } }, `Show ${Math.min(PAGE, this.found.length - this.shown)} more`));
    }
    if (!this.found.length) {
      this.list.replaceChildren(el("p", { class: "item" }, this.rows.length ? "No rollout passes these filters." : "There are no rollouts."));
      $("#rollout").replaceChildren();
      this.chosen = null;
    }
  }

  onKey(event) {
    const place = this.found.indexOf(this.chosen);
    const to = { ArrowDown: place + 1, ArrowUp: place - 1, Home: 0, End: this.found.length - 1, PageDown: Math.min(place + 10, this.found.length - 1), PageUp: Math.max(place - 10, 0) }[event.key];
    if (to === undefined || !this.found[to]) return;
    event.preventDefault();
    this.choose(this.found[to]);
  }

  mostTelling() {
    const recorded = this.found.filter((row) => row.by_token && row.teacher && row.context.length && viewsOf(row).length);
    return recorded.find((row) => viewsOf(row).length > 1) || recorded[0] || this.found[0];
  }

  followHash() {
    const [, run, step, row] = /^#rollout-(\d+)-(\d+)-(\d+)$/.exec(location.hash) || [];
    if (run === undefined) return false;
    const found = this.rows.find((one) => one.run === Number(run) && one.step === Number(step) && one.row === Number(row));
    if (found) this.choose(found, false);
    return Boolean(found);
  }

  choose(row, link = true) {
    if (!row) return;
    this.chosen = row;
    hideTip();
    const place = this.found.indexOf(row);
    if (place >= this.shown) {
      this.shown = place + PAGE;
      this.showList();
    }
    for (const item of this.list.querySelectorAll(".item")) {
      const own = item.row === row;
      item.setAttribute("aria-selected", own ? "true" : "false");
      if (own) {
        this.list.setAttribute("aria-activedescendant", item.id);
        const [outer, inner] = [this.list.getBoundingClientRect(), item.getBoundingClientRect()];
        if (inner.top < outer.top) this.list.scrollTop += inner.top - outer.top;
        else if (inner.bottom > outer.bottom) this.list.scrollTop += inner.bottom - outer.bottom;
      }
    }
    if (link) history.replaceState(null, "", `#rollout-${row.run}-${row.step}-${row.row}`);
    $("#rollout").replaceChildren(...this.detail(row).filter(Boolean));
  }

  showChosenFirst() {
    const item = $("[aria-selected=true]", this.list);
    if (item) this.list.scrollTop += item.getBoundingClientRect().top - this.list.getBoundingClientRect().top - 1;
  }

  detail(row) {
    const run = this.data.runs[row.run];
    const fact = (text, kind = "") => el("span", { class: `badge ${kind}` }, text);
    const facts = [
      ...(row.success === null ? [] : [fact(row.success ? "success" : "failure", row.success ? "good" : "bad"), fact(`reward ${shortNumber(row.reward)}`)]), fact(`${row.tokens} tokens`),
      row.finish === "length" ? fact("ended at the length limit") : null, row.turns > 1 ? fact(`${row.turns} turns`) : null,
      row.source ? fact(`feedback from ${row.source}`) : null, row.cut ? fact(`${row.cut} tokens cut from the context`, "bad") : null,
    ];
    const heading = `${row.success === null ? "A demonstration" : row.role === "teacher" ? "The teacher's retry" : "The student's attempt"} at ${this.texts[row.task]}, step ${row.step}`;
    return [
      el("h3", {}, el("bdi", {}, heading)),
      el("p", { class: "muted" }, el("bdi", {}, `${run.name}, environment ${run.env}`)),
      el("div", { class: "facts" }, ...facts),
      ...this.promptOf(row), ...this.answerOf(row), ...this.feedbackOf(row), ...this.siblingsOf(row),
    ];
  }

  promptOf(row) {
    const box = (text) => el("div", { class: "text-box", dir: "auto", tabindex: "0" }, text);
    if (row.role === "teacher") return [el("h4", {}, "What the teacher read"), this.ofTeacher(this.attemptOf(row)) || box(this.texts[row.prompt])];
    const found = [el("h4", {}, "What the student read"), box(this.texts[row.prompt])];
    const teacher = this.ofTeacher(row);
    found.push(el("h4", {}, "What the teacher read"));
    found.push(teacher || el("p", { class: "muted" }, row.context.length ? "Nothing: there was no room for the context, so this row had no teacher." : "Nothing: there was no feedback on this attempt, so this row had no teacher."));
    return found;
  }

  ofTeacher(row) {
    if (!row || !row.teacher) return null;
    const box = el("div", { class: "text-box", dir: "auto", tabindex: "0" });
    const missing = [];
    for (const [kind, text, cut] of row.teacher) {
      box.append(el("span", { class: `part ${kind}` }, this.texts[text]));
      if (this.texts[cut]) missing.push(el("details", { class: "missing" }, el("summary", {}, `Cut from the ${kind}: ${this.texts[cut].length} characters`), el("div", { class: "text-box", dir: "auto" }, this.texts[cut])));
    }
    const kinds = new Set(row.teacher.map(([kind]) => kind));
    const names = { demonstration: "demonstration (a sibling's success)", feedback: "feedback", closing: "closing line" };
    const keys = Object.entries(names).filter(([kind]) => kinds.has(kind)).map(([kind, name]) => el("span", {}, el("span", { class: `part ${kind}` }, "\u00a0\u00a0\u00a0"), ` ${name}`));
    return el("div", {}, el("div", { class: "keys" }, ...keys), box, ...missing);
  }

  attemptOf(row) {
    const before = this.rows.filter((other) => other.run === row.run && other.step === row.step && other.role === "student" && other.row < row.row);
    return before.length && before.at(-1).group === row.group ? before.at(-1) : null;
  }

  answerOf(row) {
    const title = el("h4", {}, row.role === "teacher" ? "What it answered" : "What the student answered");
    if (row.by_token) return [title, ...tokenView(row, this.texts).filter(Boolean), this.implicitReward(row)];
    return [title, el("div", { class: "text-box", dir: "auto", tabindex: "0" }, row.answer || "(empty)"), el("p", { class: "muted" }, "Not recorded token by token.")];
  }

  implicitReward(row) {
    const run = this.data.runs[row.run];
    const value = implicitRewardOf(row, run);
    return value === null ? null : el("p", { class: "muted" }, `Implicit reward in the E-step: ${signed(value)} (beta ${run.beta} times the ${run.mean ? "mean" : "sum"} of teacher less student before it).`);
  }

  feedbackOf(row) {
    const found = [];
    const box = (text) => el("div", { class: "text-box", dir: "auto", tabindex: "0" }, text);
    if (row.feedback !== null) found.push(el("h4", {}, "What the grader wrote"), box(this.texts[row.feedback]));
    for (const [source, kind, text] of row.context) {
      if (text !== row.feedback) found.push(el("h4", {}, `Context from ${source}${kind ? ` (${kind})` : ""}`), box(this.texts[text]));
    }
    return found;
  }

  siblingsOf(row) {
    const others = this.rows.filter((other) => other.run === row.run && other.step === row.step && other.group === row.group && other !== row);
    if (!others.length) return [];
    const buttons = others.map((other) => {
      const outcome = `${other.success ? "✓" : "✗"} ${other.role === "teacher" ? "retry" : "attempt"}, reward ${shortNumber(other.reward)}`;
      return el("button", { type: "button", class: other.success === null ? "" : other.success ? "good" : "bad", onclick: () => this.choose(other) }, other.success === null ? "demonstration" : outcome);
    });
    return [el("h4", {}, "Others at this task, in this step"), el("div", { class: "siblings" }, ...buttons)];
  }
}
