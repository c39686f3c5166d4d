/* Curves: a line for each group, with a band over its seeds, drawn when it comes into view. */

function seedsOf(data, metric, group) {
  const found = (data.curves[metric] || []).filter(([run]) => data.groups[group].runs.includes(run));
  return found.map(([run, steps, values]) => ({ run, points: new Map(steps.map((step, i) => [step, values[i]])) }));
}

function smoothed(values, width) {
  if (width <= 1) return values;
  return values.map((_, i) => {
    const near = values.slice(Math.max(0, i - width + 1), i + 1);
    return near.reduce((a, b) => a + b, 0) / near.length;
  });
}

/* Mean, least and greatest of the seeds at the steps that all of them have. */
function spread(seeds, width) {
  const used = [...seeds[0].points.keys()].filter((step) => seeds.every((seed) => seed.points.has(step)));
  const rows = seeds.map((seed) => smoothed(used.map((step) => seed.points.get(step)), width));
  const at = (i) => rows.map((row) => row[i]);
  return {
    steps: used,
    mean: used.map((_, i) => at(i).reduce((a, b) => a + b, 0) / at(i).length),
    low: used.map((_, i) => Math.min(...at(i))),
    high: used.map((_, i) => Math.max(...at(i))),
  };
}

function rgba(hex, alpha) {
  const [r, g, b] = [1, 3, 5].map((start) => parseInt(hex.slice(start, start + 2), 16));
  return `rgba(${r},${g},${b},${alpha})`;
}

const SINGLE = ["#0072b2", "#d55e00", "#7f7f7f"]; // of one group's lines

/* All seeds as one line, or, where no step was measured in all of them, each as its own: means would change seeds. */
function linesOf(seeds) {
  const shared = [...seeds[0].points.keys()].some((step) => seeds.every((seed) => seed.points.has(step)));
  return shared ? [seeds] : seeds.map((seed) => [seed]);
}

function curvesOf(data, chart, width, hidden) {
  const curves = [];
  data.groups.forEach((group, place) => {
    if (hidden.has(place)) return;
    for (const [number, line] of chart.lines.entries()) {
      const seeds = seedsOf(data, line.metric, place);
      if (!seeds.length) continue;
      const several = chart.lines.length > 1;
      const name = data.groups.length === 1 ? (several ? line.label : group.label) : several ? `${group.label}: ${line.label}` : group.label;
      const colour = data.groups.length === 1 && several ? SINGLE[number % 3] : group.colour;
      const parts = linesOf(seeds);
      for (const part of parts) {
        const [{ run }] = part;
        const errors = line.error && part.length === 1 ? seedsOf(data, line.error, place).find((seed) => seed.run === run) : null;
        curves.push({ name: parts.length > 1 ? `${name}, ${data.runs[run].name}` : name, colour, line, seeds: part.length, errors, ...spread(part, width) });
      }
    }
  });
  return curves;
}

function tracesOf(curves) {
  const traces = [];
  for (const curve of curves) {
    const colour = curve.colour;
    if (curve.seeds > 1) {
      const band = { x: curve.steps, mode: "lines", line: { width: 0 }, hoverinfo: "skip" };
      traces.push({ ...band, y: curve.low }, { ...band, y: curve.high, fill: "tonexty", fillcolor: rgba(colour, 0.16) });
    }
    const few = curve.steps.length <= 25;
    const range = curve.low.map((low, i) => `${shortNumber(low)} to ${shortNumber(curve.high[i])}`);
    traces.push({
      x: curve.steps, y: curve.mean, name: curve.name, mode: few ? "lines+markers" : "lines",
      line: { color: colour, width: 2.2, dash: curve.line.dash }, marker: { size: 5, color: colour }, customdata: range,
      hovertemplate: curve.seeds > 1 ? "%{y:.4~g} (%{customdata})<extra>%{fullData.name}</extra>" : "%{y:.4~g}<extra>%{fullData.name}</extra>",
      error_y: curve.errors ? { type: "data", array: curve.steps.map((step) => curve.errors.points.get(step) ?? 0), thickness: 1, width: 2, color: rgba(colour, 0.6) } : undefined,
    });
  }
  return traces;
}

function layoutOf(chart, xTitle) {
  const style = getComputedStyle(document.documentElement);
  const ink = style.getPropertyValue("--muted").trim();
  const line = style.getPropertyValue("--line").trim();
  const ground = style.getPropertyValue("--ground").trim();
  const axis = { gridcolor: line, zerolinecolor: line, linecolor: line, color: ink, automargin: true, zeroline: true, fixedrange: false };
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: ink },
    margin: { l: 48, r: 8, t: 8, b: 36 }, hovermode: "x unified", hoverlabel: { bgcolor: ground, bordercolor: line, font: { color: style.getPropertyValue("--ink").trim(), size: 12 }, namelength: -1 },
    xaxis: { ...axis, title: { text: xTitle, standoff: 4 }, hoverformat: "d" },
    yaxis: { ...axis, zerolinecolor: chart.zero ? ink : line, title: { text: chart.unit, standoff: 6 }, exponentformat: "e", ...(chart.share ? { range: [-0.03, 1.03] } : { rangemode: "tozero" }) },
    showlegend: false,
  };
}

const PLOT_OPTIONS = { displaylogo: false, responsive: true, displayModeBar: "hover", modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] };

function describe(chart, curves) {
  const ends = curves.map((curve) => `${curve.name} ends at ${shortNumber(curve.mean.at(-1))}`);
  return `${chart.title}. ${ends.join("; ")}. The numbers are in the table below the chart.`;
}

function curveTable(curves) {
  const steps = [...new Set(curves.flatMap((curve) => curve.steps))].sort((a, b) => a - b);
  const places = curves.map((curve) => new Map(curve.steps.map((step, i) => [step, curve.mean[i]])));
  const most = 200;
  const every = Math.ceil(steps.length / most);
  const kept = steps.filter((_, i) => i % every === 0 || i === steps.length - 1);
  return tableOf(["step", ...curves.map((curve) => curve.name)], kept.map((step) => [String(step), ...places.map((values) => shortNumber(values.get(step)))]));
}

/* Which line is which, where a chart has several: by dash, and with one group by colour too. */
function keysOf(chart, single) {
  const dashes = { solid: "solid", dash: "dashed", dot: "dotted" };
  return el("p", { class: "keys" }, ...chart.lines.map((line, place) => el("span", {},
    el("i", { class: "stroke", style: `border-top: 2.5px ${dashes[line.dash]} ${single ? SINGLE[place % 3] : "currentColor"}` }), line.label)));
}

class Charts {
  constructor(data) {
    this.data = data;
    this.width = 1;
    this.hidden = new Set();
    this.drawn = new Map();
    this.seen = new IntersectionObserver((entries) => {
      for (const entry of entries) if (entry.isIntersecting) this.draw(entry.target);
    }, { rootMargin: "300px" });
  }

  add(holder, chart, draw) {
    const plot = el("div", { class: "plot", role: "img" });
    const details = el("details", {}, el("summary", {}, "As a table"));
    const keys = (chart.lines || []).length > 1 ? keysOf(chart, this.data.groups.length === 1) : null;
    const figure = el("figure", { class: "chart" }, el("h3", {}, chart.title), el("p", { class: "about" }, chart.about), keys, plot, details);
    plot.redraw = () => draw(plot, details);
    holder.append(figure);
    this.seen.observe(plot);
    return plot;
  }

  addCurves(holder, chart) {
    return this.add(holder, chart, (plot, details) => {
      const curves = curvesOf(this.data, chart, this.width, this.hidden);
      plot.setAttribute("aria-label", describe(chart, curves));
      Plotly.react(plot, tracesOf(curves), layoutOf(chart, "step"), PLOT_OPTIONS);
      const fill = () => details.open && details.replaceChildren(details.firstChild, curveTable(curves));
      details.ontoggle = fill;
      fill();
    });
  }

  addBars(holder, chart, table) {
    return this.add(holder, chart, (plot, details) => {
      const names = this.data.groups.map((group) => group.label);
      const traces = table.map(([title, values, colour]) => ({
        type: "bar", orientation: "h", y: names, x: values, name: title, marker: { color: colour },
        hovertemplate: "%{x:,.4~g}<extra>%{fullData.name}</extra>",
      }));
      const layout = layoutOf({ unit: "" }, chart.unit);
      Object.assign(layout, { barmode: "stack", hovermode: "closest" });
      layout.xaxis.hoverformat = undefined;
      layout.yaxis.autorange = "reversed";
      plot.setAttribute("aria-label", `${chart.title}. The numbers are in the table below.`);
      details.hidden = true;
      Plotly.react(plot, traces, layout, PLOT_OPTIONS);
    });
  }

  /* The implicit reward of each row that was recorded in an E-step: beta times the log-ratio before it. */
  addRewards(holder) {
    const rows = this.data.rollouts.rows.filter((row) => implicitRewardOf(row, this.data.runs[row.run]) !== null);
    if (!rows.length) return;
    const chart = { title: "Implicit rewards, row by row", about: "Of the rows that were recorded token by token: circles succeeded, crosses failed. A trained teacher puts circles above crosses.", unit: "implicit reward", zero: true };
    this.add(holder, chart, (plot, details) => {
      const traces = this.data.groups.flatMap((group, place) => [true, false].map((success) => {
        const own = this.hidden.has(place) ? [] : rows.filter((row) => this.data.runs[row.run].group === place && row.success === success);
        return {
          x: own.map((row) => row.step), y: own.map((row) => implicitRewardOf(row, this.data.runs[row.run])), mode: "markers", type: "scatter",
          name: `${group.label}, ${success ? "success" : "failure"}`, hovertemplate: "%{y:.3~g}<extra>%{fullData.name}</extra>",
          marker: { symbol: success ? "circle" : "x-thin", size: success ? 8 : 7, color: group.colour, opacity: 0.75, line: { width: success ? 0 : 2, color: group.colour } },
        };
      })).filter((trace) => trace.x.length);
      const layout = layoutOf(chart, "step");
      layout.hovermode = "closest";
      plot.setAttribute("aria-label", `${chart.title}. The rollouts below have the numbers.`);
      details.hidden = true;
      Plotly.react(plot, traces, layout, PLOT_OPTIONS);
    });
  }

  draw(plot) {
    if (this.drawn.get(plot)) return;
    this.drawn.set(plot, true);
    plot.redraw();
  }

  redrawAll() {
    for (const plot of this.drawn.keys()) plot.redraw();
  }
}

function showCharts(data) {
  const charts = new Charts(data);
  for (const holder of document.querySelectorAll(".charts")) {
    for (const chart of data.charts.filter((chart) => chart.part === holder.dataset.part)) charts.addCurves(holder, chart);
  }
  showAnyMetric(charts, data);
  const eStep = $('.charts[data-part="e_step"]');
  if (eStep) charts.addRewards(eStep);
  const spent = $('.charts[data-part="spent"]');
  if (spent && data.spent.seconds.length) charts.addBars(spent, { title: "Seconds a run", about: "Where the time of one run went.", unit: "seconds" }, data.spent.seconds);
  if (spent && data.spent.tokens.length) charts.addBars(spent, { title: "Tokens a run", about: "Sampled, written as critiques, and learned from; a token may be sampled once and learned from twice.", unit: "tokens" }, data.spent.tokens);
  for (const button of document.querySelectorAll("button[data-group]")) {
    button.addEventListener("click", () => toggle(charts, Number(button.dataset.group)));
  }
  $("#smooth")?.addEventListener("change", (event) => {
    charts.width = Number(event.target.value);
    charts.redrawAll();
  });
  return charts;
}

function toggle(charts, group) {
  if (!charts.hidden.delete(group)) charts.hidden.add(group);
  for (const button of document.querySelectorAll(`button[data-group="${group}"]`)) button.setAttribute("aria-pressed", String(!charts.hidden.has(group)));
  charts.redrawAll();
}

function showAnyMetric(charts, data) {
  const select = $("#metric");
  const names = Object.keys(data.curves);
  for (const prefix of new Set(names.map((name) => (name.includes("/") ? name.split("/")[0] : "rollouts")))) {
    const own = names.filter((name) => (name.includes("/") ? name.split("/")[0] : "rollouts") === prefix);
    select.append(el("optgroup", { label: prefix }, ...own.map((name) => el("option", { value: name }, name))));
  }
  if (!names.length) return;
  select.value = names.includes("reward") ? "reward" : names[0];
  const holder = $('.charts[data-part="any"]');
  const chart = { title: select.value, about: "", unit: "", lines: [{ metric: select.value, label: "", dash: "solid", error: "" }] };
  const plot = charts.addCurves(holder, chart);
  select.addEventListener("change", () => {
    chart.title = chart.lines[0].metric = select.value;
    $("h3", holder).textContent = select.value;
    plot.redraw();
  });
}
