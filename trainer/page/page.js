"use strict";
(() => {
  const DATA = JSON.parse(document.getElementById("data").textContent);
  let RUNS = [];
  const LIGHT = ["#0b57a4", "#b3400a", "#0f7a4f", "#8a2a9b", "#8a6100", "#b3174b", "#006d7a", "#4b4fbf", "#5c6b00", "#6b4a3a"];
  const DARK = ["#6fb4ff", "#ff9d5c", "#5fd6a0", "#dd94f0", "#f0c04a", "#ff8fb0", "#5cd3e0", "#aab0ff", "#c4d45a", "#d8b09c"];
  const MOST_ROWS = 300;
  const DOTTED = 120;  // points of a line, at most, for each to have a dot
  const DASHES = [[], [6, 4], [2, 3], [10, 4, 2, 4], [1, 5]];
  const KINDS = { resume: "resumes", rewind: "rewinds", skip: "skipped samples", save: "saves", failed: "faults" };
  const MARK_COLOURS = { resume: "#2f8f4e", rewind: "#a86f00", skip: "#8a5cd6", save: "#8a949e", failed: "#d0342c" };
  const state = { axis: "step", smooth: 0, log: false, shown: [], marks: { resume: true, rewind: true, skip: true, save: false, failed: true }, range: null };
  const $ = (id) => document.getElementById(id);
  const make = (tag, attributes = {}, ...children) => {
    const node = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    node.append(...children);
    return node;
  };
  const dark = () => document.documentElement.hasAttribute("data-dark");
  const colour = (run) => (dark() ? DARK : LIGHT)[run % 10];
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const short = (value) => {
    if (value === null || value === undefined) return "–";
    const size = Math.abs(value);
    if (size >= 1e4) return value.toLocaleString("en", { notation: "compact", maximumFractionDigits: 2 });
    if (size !== 0 && size < 1e-3) return value.toExponential(2);
    return String(+value.toPrecision(5));
  };

  // steps to the chosen axis, by the run's own clock
  const along = (run, step) => {
    if (state.axis === "step") return step;
    const { step: steps } = RUNS[run].clock, other = RUNS[run].clock[state.axis];
    let low = 0, high = steps.length - 1;
    if (step >= steps[high]) return other[high];
    while (high - low > 1) { const middle = (low + high) >> 1; if (steps[middle] <= step) low = middle; else high = middle; }
    const share = (step - steps[low]) / (steps[high] - steps[low] || 1);
    return other[low] + share * (other[high] - other[low]);
  };
  const smoothed = (values, dots) => {
    if (!state.smooth || dots) return values;
    let mean = 0, weight = 0;
    return values.map((value) => {
      if (value === null) return null;
      mean = state.smooth * mean + (1 - state.smooth) * value;
      weight = state.smooth * weight + (1 - state.smooth);
      return mean / weight;
    });
  };

  // one figure holds a key's lines of all runs
  const figures = new Map();
  const gather = () => {
    figures.clear();
    RUNS.forEach((run, number) => run.figures.forEach((figure) => {
      if (!figures.has(figure.key)) figures.set(figure.key, { ...figure, lines: [], labels: [] });
      const whole = figures.get(figure.key);
      figure.lines.forEach((line) => {
        if (!whole.labels.includes(line.label)) whole.labels.push(line.label);
        whole.lines.push({ ...line, run: number, dash: whole.labels.indexOf(line.label) });
      });
    }));
  };

  const charts = [];
  const data = (figure) => {
    const tables = figure.lines.map((line) => {
      const x = line.x.map((step) => along(line.run, step));
      let y = smoothed(line.y, line.dots);
      if (state.log) y = y.map((value) => (value !== null && value > 0 ? value : null));
      return [x, y];
    });
    return [tables, uPlot.join(tables, tables.map((table) => table.map(() => 1)))];
  };
  const drawMarks = (plot) => {
    const { ctx, bbox } = plot;
    ctx.save();
    ctx.setLineDash([4, 4]);
    ctx.lineWidth = devicePixelRatio;
    RUNS.forEach((run, number) => {
      if (!state.shown[number]) return;
      for (const [kind, marks] of Object.entries(run.marks)) {
        if (!state.marks[kind]) continue;
        ctx.strokeStyle = MARK_COLOURS[kind];
        for (const mark of marks) {
          const x = plot.valToPos(along(number, mark.step), "x", true);
          if (x < bbox.left || x > bbox.left + bbox.width) continue;
          ctx.beginPath(); ctx.moveTo(x, bbox.top); ctx.lineTo(x, bbox.top + bbox.height); ctx.stroke();
        }
      }
    });
    ctx.restore();
  };
  const zoom = (low, high) => {
    state.range = low === null ? null : [low, high];
    for (const { plot } of charts) {
      const x = plot ? plot.data[0] : [];
      if (!x.length) continue;
      plot.setScale("x", state.range ? { min: low, max: high } : { min: x[0], max: x[x.length - 1] });
    }
  };
  const options = (chart) => {
    const axis = { stroke: css("--soft"), grid: { stroke: css("--grid"), width: 1 }, ticks: { stroke: css("--line"), width: 1 }, font: "12px system-ui, sans-serif" };
    return {
      width: Math.max(200, chart.box.clientWidth), height: 250, legend: { show: false },
      cursor: { sync: { key: "all", setSeries: false }, drag: { x: true, y: false, setScale: false }, points: { size: 6 } },
      scales: { x: { time: false }, y: { distr: state.log ? 3 : 1 } },
      axes: [{ ...axis, size: 30, values: (_, ticks) => ticks.map(short) }, { ...axis, size: 62, values: (_, ticks) => ticks.map((tick) => (tick === null ? "" : short(tick))) }],
      series: [{}, ...chart.figure.lines.map((line) => ({
        label: line.label, show: state.shown[line.run], stroke: colour(line.run), width: line.dots ? 2 : 1.5, dash: DASHES[line.dash % DASHES.length],
        spanGaps: true, points: { show: line.dots && line.x.length <= DOTTED, size: 5 },
      }))],
      hooks: {
        drawClear: [drawMarks],
        setSelect: [(plot) => {
          if (plot.select.width < 4) return;
          const low = plot.posToVal(plot.select.left, "x"), high = plot.posToVal(plot.select.left + plot.select.width, "x");
          plot.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
          zoom(low, high);
        }],
        setCursor: [(plot) => tell(chart, plot)],
      },
    };
  };
  const nearest = ([xs, ys], x) => {
    let low = 0, high = xs.length - 1;
    while (high - low > 1) { const middle = (low + high) >> 1; if (xs[middle] <= x) low = middle; else high = middle; }
    return ys[x - xs[low] <= xs[high] - x ? low : high];
  };
  const tell = (chart, plot) => {
    const at = plot.cursor.idx;
    if (at === null || at === undefined) { chart.at.textContent = ""; return; }
    const x = plot.data[0][at], said = [`${$("axis").selectedOptions[0].textContent} ${short(x)}`];
    chart.figure.lines.forEach((line, number) => {
      if (!state.shown[line.run]) return;
      const value = nearest(chart.tables[number], x);  // the lines of a figure have points at places of their own
      if (value !== null) said.push(`${RUNS.length > 1 ? RUNS[line.run].name + " " : ""}${line.label} ${short(value)}`);
    });
    chart.at.textContent = said.join(" · ");
  };
  const draw = (chart) => {
    const started = chart.plot;
    if (started) started.destroy();
    chart.stale = false;
    const [tables, joined] = data(chart.figure);
    chart.tables = tables;
    chart.plot = new uPlot(options(chart), joined, chart.box);
    chart.plot.over.addEventListener("dblclick", () => zoom(null, null));
    chart.plot.root.querySelectorAll("canvas").forEach((canvas) => canvas.setAttribute("aria-hidden", "true"));
    if (state.range) chart.plot.setScale("x", { min: state.range[0], max: state.range[1] });
    chart.key.replaceChildren(...key(chart.figure));
  };
  const key = (figure) => {
    const seen = new Set(), items = [];
    for (const line of figure.lines) {
      if (!state.shown[line.run]) continue;
      const name = RUNS.length > 1 ? `${RUNS[line.run].name}: ${line.label}` : line.label;
      if (seen.has(name)) continue;
      seen.add(name);
      const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
      for (const [attribute, value] of Object.entries({ width: 26, height: 8, "aria-hidden": "true" })) svg.setAttribute(attribute, value);
      const stroke = document.createElementNS("http://www.w3.org/2000/svg", "line");
      const own = { x1: 0, x2: 26, y1: 4, y2: 4, stroke: colour(line.run), "stroke-width": 2, "stroke-dasharray": DASHES[line.dash % DASHES.length].join(" ") };
      for (const [attribute, value] of Object.entries(own)) stroke.setAttribute(attribute, value);
      svg.append(stroke);
      items.push(make("li", {}, svg, name));
    }
    return items;
  };
  // what is on the screen at once, the rest one by one when the browser has time
  let coming = 0;
  const seen = (chart) => { const { top, bottom } = chart.section.getBoundingClientRect(); return bottom > 0 && top < innerHeight; };
  const later = () => {
    clearTimeout(coming);
    const next = charts.find((chart) => chart.stale);
    document.documentElement.toggleAttribute("data-drawn", !next);
    if (next) coming = setTimeout(() => { if (next.stale) draw(next); later(); });
  };
  const redraw = () => {
    charts.forEach((chart) => { chart.stale = true; });
    charts.filter(seen).forEach(draw);
    later();
  };

  const table = (caption, heads, rows, differs = () => false) => {
    const body = make("tbody");
    rows.forEach((row) => {
      const line = make("tr", differs(row) ? { class: "differs" } : {});
      row.forEach((cell, place) => line.append(place ? make("td", typeof cell === "number" ? { class: "number" } : {}, typeof cell === "number" ? short(cell) : cell ?? "–") : make("th", { scope: "row" }, String(cell))));
      body.append(line);
    });
    const own = make("table", {}, make("caption", {}, caption), make("thead", {}, make("tr", {}, ...heads.map((head) => make("th", { scope: "col" }, head)))), body);
    return make("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": caption }, own);
  };
  const evenly = (length, most) => length <= most ? [...Array(length).keys()] : [...Array(most).keys()].map((place) => Math.round(place * (length - 1) / (most - 1)));
  const figureTable = (figure) => {
    const parts = figure.lines.map((line) => {
      const rows = evenly(line.x.length, 100).map((place) => [line.x[place], line.y[place]]);
      return table(`${RUNS[line.run].name}: ${line.label}`, ["step", `${figure.title}${figure.unit ? `, ${figure.unit}` : ""}`], rows);
    });
    return parts;
  };
  const tables = (chart) => { if (chart.details.open) chart.details.replaceChildren(chart.details.firstChild, ...figureTable(chart.figure)); };
  const summary = (figure) => figure.lines.map((line) => {
    const values = line.y.filter((value) => value !== null);
    return `${RUNS.length > 1 ? RUNS[line.run].name + " " : ""}${line.label} from ${short(values[0])} to ${short(values[values.length - 1])}`;
  }).slice(0, 6).join("; ");

  const addChart = (figure) => {
    const box = make("div", { class: "plot", tabindex: "0", role: "img", "aria-label": `${figure.title}: ${summary(figure)}` });
    const details = make("details", {}, make("summary", {}, `${figure.title} as a table`));
    const own = { figure, box, details, at: make("p", { class: "at", "aria-live": "off" }), key: make("ul", { class: "key" }) };
    details.addEventListener("toggle", () => tables(own));
    const heading = make("h2", {}, figure.title, " ", make("span", { class: "unit" }, figure.unit));
    box.addEventListener("keydown", (event) => {
      if (!own.plot) return;
      const plot = own.plot, { min, max } = plot.scales.x, x = plot.data[0];
      const at = plot.cursor.idx ?? 0;
      if (event.key === "ArrowLeft" || event.key === "ArrowRight") {
        const next = Math.min(x.length - 1, Math.max(0, at + (event.key === "ArrowLeft" ? -1 : 1) * (event.shiftKey ? 20 : 1)));
        plot.setCursor({ left: plot.valToPos(x[next], "x"), top: 10 });
        own.at.setAttribute("aria-live", "polite");
      } else if (event.key === "+" || event.key === "-") {
        const middle = plot.cursor.idx === null || plot.cursor.idx === undefined ? (min + max) / 2 : x[at];
        const half = (max - min) / 2 * (event.key === "+" ? 0.5 : 2);
        const low = Math.max(x[0], middle - half), high = Math.min(x[x.length - 1], middle + half);
        if (low < high) zoom(low, high);
      } else if (event.key === "Escape" || event.key === "0") zoom(null, null);
      else return;
      event.preventDefault();
    });
    own.section = make("section", { "aria-label": figure.title }, heading, box, own.at, own.key, details);
    $("charts").append(own.section);
    charts.push(own);
  };

  const sections = () => {
    const marks = RUNS.flatMap((run) => Object.entries(run.marks).flatMap(([kind, own]) => own.map((mark) => [mark.step, KINDS[kind], run.name, mark.said])));
    // saves are many and alike: they give way first, the oldest of them before the others
    const listed = marks.sort((a, b) => (a[1] === KINDS.save) - (b[1] === KINDS.save) || b[0] - a[0]).slice(0, MOST_ROWS).sort((a, b) => a[0] - b[0]);
    const title = `What happened, by step${listed.length < marks.length ? `: ${listed.length} of ${marks.length}` : ""}`;
    for (const id of ["marks", "facts", "tasks", "answers", "recipe", "environment"]) $(id).replaceChildren();
    $("marks").append(marks.length ? table(title, ["step", "what", "run", "more"], listed.map((row) => row.map((cell, place) => (place ? cell : String(cell))))) : "Nothing but steps.");
    RUNS.forEach((run) => $("facts").append(table(run.name, ["what", "planned", "measured"], run.facts)));
    const tasks = RUNS.filter((run) => run.tasks.length).map((run) => table(run.name, ["step", "task", "metric", "reached", "samples"], run.tasks));
    $("tasks").append(...(tasks.length ? tasks : ["None (eval.tasks, or zeropipe eval RUN --tasks)."]));
    const answers = RUNS.flatMap((run) => run.answers.map((own) => table(`${run.name}: ${own.prompt}`, ["step", "answer"], own.answers.map((one) => [String(one.step), one.answer]))));
    $("answers").append(...(answers.length ? answers : ["No prompts (eval.prompts)."]));
    for (const [name, title] of [["recipe", "Recipe"], ["deepspeed", "DeepSpeed JSON"]]) {
      const keys = [...new Set(RUNS.flatMap((run) => Object.keys(run[name])))];
      const rows = keys.map((key) => [key, ...RUNS.map((run) => run[name][key] ?? "–")]);
      const unlike = (row) => new Set(row.slice(1)).size > 1;
      const ordered = [...rows.filter(unlike), ...rows.filter((row) => !unlike(row))];
      const said = RUNS.length > 1 ? `${title}: ${rows.filter(unlike).length} of ${rows.length} keys differ, first` : title;
      $("recipe").append(table(said, ["key", ...RUNS.map((run) => run.name)], ordered, unlike));
    }
    const keys = [...new Set(RUNS.flatMap((run) => Object.keys(run.environment)))];
    $("environment").append(table("What it ran on", ["what", ...RUNS.map((run) => run.name)], keys.map((key) => [key, ...RUNS.map((run) => run.environment[key] ?? "–")]), (row) => new Set(row.slice(1)).size > 1));
  };

  const check = (parent, label, on, change, swatch) => {
    const box = make("input", { type: "checkbox" });
    box.checked = on;
    box.addEventListener("change", () => { change(box.checked); redraw(); });
    parent.append(make("label", {}, box, ...(swatch ? [swatch] : []), label));
  };
  const swatches = [];
  const theme = () => {
    const wanted = $("theme").value;
    const on = wanted === "dark" || (wanted === "auto" && matchMedia("(prefers-color-scheme: dark)").matches);
    document.documentElement.toggleAttribute("data-dark", on);
    swatches.forEach((swatch, run) => { swatch.style.background = colour(run); });
  };

  const refill = (fieldset, boxes) => {  // what has not changed keeps the focus
    const wanted = JSON.stringify(boxes.map((box) => box[0]));
    if (fieldset.dataset.of === wanted) return;
    fieldset.dataset.of = wanted;
    fieldset.replaceChildren(fieldset.firstElementChild);
    boxes.forEach((box) => check(fieldset, ...box));
  };
  const fill = (runs) => {
    const before = new Map(RUNS.map((run, number) => [run.path, state.shown[number]]));
    RUNS = runs;
    state.shown = RUNS.map((run) => before.get(run.path) ?? true);
    $("title").textContent = `ZeroPipe ${DATA.live ? "watch" : "report"}: ${RUNS.map((run) => run.name).join(", ")}`;
    document.title = $("title").textContent;
    swatches.splice(0, swatches.length, ...RUNS.map(() => make("span", { class: "swatch" })));
    delete $("runs").dataset.of;
    const focused = $("runs").contains(document.activeElement) ? [...$("runs").querySelectorAll("input")].indexOf(document.activeElement) : -1;
    refill($("runs"), RUNS.map((run, number) => [run.name, state.shown[number], (on) => { state.shown[number] = on; }, swatches[number]]));
    if (focused >= 0) $("runs").querySelectorAll("input")[focused]?.focus();
    refill($("mark-kinds"), Object.keys(KINDS).filter((kind) => RUNS.some((run) => run.marks[kind])).map((kind) => {
      const swatch = make("span", { class: "swatch" });
      swatch.style.background = MARK_COLOURS[kind];
      return [KINDS[kind], state.marks[kind], (on) => { state.marks[kind] = on; }, swatch];
    }));
    $("mark-kinds").hidden = $("mark-kinds").children.length === 1;
    $("state").replaceChildren(...RUNS.filter((run) => run.state).map((run) => make("li", { class: run.state.kind }, `${run.name}: ${run.state.said}`)));
    gather();
    charts.filter((chart) => !figures.has(chart.figure.key)).forEach((chart) => { chart.plot?.destroy(); chart.section.remove(); charts.splice(charts.indexOf(chart), 1); });
    figures.forEach((figure) => {
      const own = charts.find((chart) => chart.figure.key === figure.key);
      if (!own) { addChart(figure); return; }
      own.figure = figure;
      own.box.setAttribute("aria-label", `${figure.title}: ${summary(figure)}`);
      tables(own);
    });
    theme();
    redraw();
    sections();
  };

  fill(DATA.runs);
  if (DATA.live) {
    const source = new EventSource("events");
    source.onmessage = (event) => { $("link").textContent = ""; fill(JSON.parse(event.data)); document.documentElement.setAttribute("data-heard", ""); };
    source.onerror = () => { $("link").textContent = "No answer from zeropipe watch; trying again."; };
  }
  $("axis").addEventListener("change", () => { state.axis = $("axis").value; state.range = null; redraw(); });
  $("smooth").addEventListener("input", () => { state.smooth = +$("smooth").value; $("smooth-value").textContent = $("smooth").value; redraw(); });
  $("log").addEventListener("change", () => { state.log = $("log").checked; redraw(); });
  $("theme").addEventListener("change", () => { theme(); redraw(); });
  $("reset").addEventListener("click", () => zoom(null, null));
  $("controls").addEventListener("submit", (event) => event.preventDefault());
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { theme(); redraw(); });
  addEventListener("beforeprint", () => charts.filter((chart) => chart.stale).forEach(draw));
  let width = innerWidth, waiting;
  addEventListener("resize", () => {
    if (innerWidth === width) return;
    width = innerWidth; clearTimeout(waiting); waiting = setTimeout(() => charts.forEach((chart) => chart.plot?.setSize({ width: Math.max(200, chart.box.clientWidth), height: 250 })), 100);
  });
  window.zeropipe = { state, charts, zoom };
  document.documentElement.setAttribute("data-ready", "");
})();
