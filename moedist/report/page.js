// Draws the runs in DATA.

const LINES = {  // Okabe and Ito's colours, those that stand out from the ground first
  light: ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000"],
  dark: ["#56b4e9", "#e69f00", "#009e73", "#cc79a7", "#f0e442", "#d55e00", "#ffffff"],
};
const DASHES = ["solid", "dot", "dash", "dashdot"];
const SEQUENTIAL = "Cividis";

// A chart draws the keys that any of its runs has: [key, what its line is called].
const CHARTS = {
  Training: [
    { title: "Loss", unit: "nats per token", keys: [["train/loss", "training"], ["eval/loss", "held out"]] },
    { title: "Throughput", unit: "tokens/s", keys: [["train/tokens_per_s", ""]], ticks: "~s", zero: true },
  ],
  Balance: [
    { title: "MaxVio", unit: "largest load / mean load - 1, worst layer", hint: "0 is balanced; E - 1 means that one expert has everything.", keys: [["moe/max_vio", "feed-forward"], ["attention/max_vio", "attention"]], zero: true },
    { title: "Drop rate", unit: "share of pairs that no expert computed", hint: "Falls to a few percent or 0 as balance sets in.", keys: [["moe/drop_rate", "feed-forward"], ["attention/drop_rate", "attention"]], ticks: ".1~%", zero: true },
    { title: "Dead experts", unit: "experts, over all layers", hint: "Without a pair in the last log.dead_window steps.", keys: [["moe/dead_experts", "feed-forward"], ["attention/dead_experts", "attention"]], counts: true, zero: true },
    { title: "Capacity used", unit: "share of the slots that hold a pair", hint: "1 / capacity factor x (1 - drop rate).", keys: [["moe/capacity_used", ""]], ticks: ".1~%", zero: true },
    { title: "Entropy", unit: "share of its maximum", hint: "Load near 1 is balanced; a router between 0 and 1 has preferences.", keys: [["moe/load_entropy", "load"], ["moe/router_entropy", "router"]] },
    { title: "Balance loss", unit: "unscaled, mean over layers", hint: "1 for uniform routing, E for a collapsed one.", keys: [["moe/balance_loss", "feed-forward"], ["attention/balance_loss", "attention"]] },
    { title: "Router z-loss", unit: "unscaled, mean over layers", hint: "Grows when logits drift.", keys: [["moe/z_loss", "feed-forward"], ["attention/z_loss", "attention"]], zero: true },
  ],
  Steps: [
    { title: "Gradient norm", unit: "2-norm before the clip", keys: [["train/grad_norm", ""]], zero: true },
    { title: "Learning rate", unit: "per step", keys: [["train/lr_router", "router"], ["train/lr_experts", "experts"], ["train/lr_other", "other"]], zero: true },
    { title: "Waiting", unit: "0 is best", hint: "The largest rank's compute time, and bytes received, over the ranks' mean - 1.", keys: [["time/compute_imbalance", "compute"], ["moe/exchange_imbalance", "exchange"]], zero: true },
    { title: "Model FLOP utilization", unit: "share of the measured peak", keys: [["train/mfu", ""]], ticks: ".1~%", zero: true },
    { title: "Memory", unit: "GiB, largest peak of a rank", keys: [["train/memory_gib", ""]], zero: true },
  ],
};
const PARTS = [["time/compute", "compute"], ["time/exchange", "exchange"], ["time/optimizer", "optimizer"], ["time/data", "data"], ["time/other", "other"]];
const TILES = [
  ["train/loss", "training loss, nats/token", fixed(3)],
  ["eval/loss", "held-out loss, nats/token", fixed(3)],
  ["moe/drop_rate", "drop rate", percent],
  ["moe/max_vio", "MaxVio, worst layer", fixed(2)],
  ["moe/dead_experts", "dead experts", whole],
  ["train/tokens_per_s", "tokens/s", whole],
  ["train/mfu", "MFU", percent],
];
const QUANTITIES = {  // maps of experts; `share` is of the layer's mean, where 1 is balanced
  load: { name: "load / mean load", unit: "load / mean", share: "load" },
  asked: { name: "pairs before the limit", unit: "pairs", of: (at) => at.load },
  kept: { name: "pairs after the limit", unit: "pairs", of: (at) => at.kept },
  dropped: { name: "dropped pairs", unit: "pairs", of: (at) => at.load.map((load, place) => load - at.kept[place]) },
  drop_rate: { name: "drop rate", unit: "share of load", of: (at) => at.load.map((load, place) => load ? 1 - at.kept[place] / load : 0), percent: true },
  weight_norm: { name: "weight norm", unit: "2-norm", of: (at) => at.weight_norm },
  grad_norm: { name: "gradient norm", unit: "2-norm", of: (at) => at.grad_norm },
};

let DATA = null;
const chosen = { axis: "step", hidden: new Set(), quantity: "load", run: 0, layer: 0, step: null, column: null, key: null };
const drawings = [];  // functions that draw a chart from DATA and `chosen`

// ---- small parts -------------------------------------------------------------------------------------------------

function fixed(digits) { return (value) => value.toFixed(digits); }
function whole(value) { return Math.round(value).toLocaleString("en-US"); }
function percent(value) { return `${(100 * value).toFixed(value < 0.1 ? 2 : 1)} %`; }
function css(name) { return getComputedStyle(document.documentElement).getPropertyValue(name).trim(); }
function theme() { return document.documentElement.dataset.theme; }
function last(values) { return values?.findLast((value) => value !== null) ?? null; }
function layerName(block) { return `layer ${block}`; }
// Of a run whose attention routes there are two families of layers, told apart like runs where one at a time is shown.
function mapped() { return DATA.runs.flatMap((run) => run.attention ? [run, { ...run, ...run.attention, name: `${run.name}: attention` }] : [run]); }
function shownRuns() { return DATA.runs.map((run, place) => ({ run, place })).filter(({ place }) => !chosen.hidden.has(place)); }
function color(place) { return LINES[theme()][place % LINES[theme()].length]; }
function dash(place) { return DASHES[Math.floor(place / LINES[theme()].length) % DASHES.length]; }
function refill(node, what, children) {  // only where it says something new, so that nobody loses what is in hand
  const said = JSON.stringify(what);
  if (node.said !== said) node.replaceChildren(...children());
  node.said = said;
}

// ---- charts ------------------------------------------------------------------------------------------------------

function layout(extra) {
  const axis = { gridcolor: css("--line"), linecolor: css("--line"), zeroline: false, automargin: true, title: { standoff: 8, font: { size: 12 } } };
  const { xaxis, yaxis, ...rest } = extra;
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", autosize: true, height: 260, showlegend: false,
    font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: css("--muted") },
    margin: { l: 56, r: 14, t: 12, b: 42 }, uirevision: "kept", hovermode: "x unified",
    hoverlabel: { bgcolor: css("--card"), bordercolor: css("--line"), font: { color: css("--text") } },
    xaxis: { ...axis, ...xaxis, title: { ...axis.title, ...xaxis?.title } },
    yaxis: { ...axis, ...yaxis, title: { ...axis.title, ...yaxis?.title } }, ...rest,
  };
}
function draw(node, traces, extra) {
  return Plotly.react(node, traces, layout(extra), { responsive: true, displayModeBar: false });
}
function card(title, unit, { wide = false, hint = "" } = {}) {
  const keys = make("div", { class: "keys" }), plot = make("div", { class: "plot" });
  const head = make("div", { class: "head" }, make("h3", {}, title), make("span", { class: "muted" }, unit), keys);
  return { node: make("section", { class: wide ? "card wide" : "card" }, head, hint ? make("p", {}, hint) : null, plot), head, keys, plot };
}
function keyLine(text, shade, style) {
  return make("span", {}, make("i", { class: "swatch", style: `border-top: 3px ${{ solid: "solid", dot: "dotted", dash: "dashed" }[style]} ${shade}; height: 0` }), text);
}
function most(traces) { return Math.max(0, ...traces.map(({ y }) => Math.max(...y))); }
function axisOf(run) { return chosen.axis === "tokens" && run.scalars["train/tokens"] ? run.scalars["train/tokens"] : run.steps; }
function axisTitle() { return chosen.axis === "tokens" ? "tokens" : "step"; }

function lineChart(spec) {
  const parts = card(spec.title, spec.unit, spec);
  drawings.push(() => {
    const keys = spec.keys.filter(([key]) => DATA.runs.some((run) => run.scalars[key]));
    parts.node.hidden = !keys.length;
    if (!keys.length) return;
    const single = DATA.runs.length === 1;
    const look = (place, line) => single ? [color(line), "solid"] : [color(place), keys.length > 1 ? DASHES[line] : dash(place)];
    parts.keys.replaceChildren(...(keys.length > 1 ? keys.map(([, name], line) => keyLine(name, single ? color(line) : css("--muted"), single ? "solid" : DASHES[line])) : []));
    const traces = [];
    for (const { run, place } of shownRuns()) {
      keys.forEach(([key, name], line) => {
        if (!run.scalars[key]) return;
        const [shade, style] = look(place, line);
        const pairs = axisOf(run).map((x, row) => [x, run.scalars[key][row]]);
        const sparse = key.startsWith("eval/");  // measured at few of the steps: joined over the others
        const drawn = sparse ? pairs.filter(([, y]) => y !== null) : pairs;
        traces.push({
          x: drawn.map(([x]) => x), y: drawn.map(([, y]) => y), mode: sparse || drawn.length < 3 ? "lines+markers" : "lines",
          name: plain([single ? "" : run.name, keys.length > 1 ? name : ""].filter(Boolean).join(", ") || spec.title), line: { color: shade, width: 2, dash: style }, marker: { size: 6 },
        });
      });
    }
    return draw(parts.plot, traces, {
      xaxis: { title: { text: axisTitle() } },
      yaxis: { tickformat: spec.ticks, rangemode: spec.zero ? "tozero" : "normal", dtick: spec.counts && most(traces) < 6 ? 1 : undefined },
    });
  });
  return parts.node;
}

// ---- experts -----------------------------------------------------------------------------------------------------

const unpacked = new WeakMap(), cut = new WeakMap();  // by what they are made from, and gone with it
function array(run, name) {  // all steps of an [S, L, E] array
  const packed = run.experts.arrays[name];
  if (!unpacked.has(packed)) {
    const bytes = Uint8Array.from(atob(packed.base64), (letter) => letter.charCodeAt(0));
    unpacked.set(packed, packed.dtype === "int32" ? new Int32Array(bytes.buffer) : new Float32Array(bytes.buffer));
  }
  return unpacked.get(packed);
}
function rows(run, step, quantity) {  // [L][E] at a step
  if (!cut.has(run)) cut.set(run, new Map());
  const known = cut.get(run), key = `${quantity} ${step}`;
  if (!known.has(key)) known.set(key, rowsAnew(run, step, quantity));
  return known.get(key);
}
function rowsAnew(run, step, quantity) {
  const { num_experts: E, blocks, arrays } = run.experts, size = blocks.length * E, { share, of } = QUANTITIES[quantity];
  const at = Object.fromEntries(Object.keys(arrays).map((name) => [name, Array.from(array(run, name).subarray(step * size, (step + 1) * size))]));
  const layers = (values) => blocks.map((_, layer) => values.slice(layer * E, (layer + 1) * E));
  if (!share) return layers(of(at));
  return layers(at[share]).map((values) => {
    const mean = values.reduce((sum, value) => sum + value, 0) / E;
    return values.map((value) => mean ? value / mean : 0);
  });
}
function largest(run, quantity) {  // over all steps, so that colours mean the same at each
  return Math.max(1e-12, ...run.experts.steps.map((_, step) => rows(run, step, quantity).flat().reduce((most, value) => value > most ? value : most, 0)));
}
function scale(run, quantity) {
  const bar = { thickness: 12, outlinewidth: 0, title: { text: QUANTITIES[quantity].unit, side: "right", font: { size: 12 } } };
  if (QUANTITIES[quantity].share) {  // orange above the mean, blue below: balance is the ground's own grey
    const orange = theme() === "dark" ? "#f5a623" : "#b35806", blue = theme() === "dark" ? "#4aa3df" : "#2166ac";
    return { colorscale: [[0, blue], [0.5, css("--neutral")], [1, orange]], zmin: 0, zmax: 2, colorbar: { ...bar, tickvals: [0, 0.5, 1, 1.5, 2], ticktext: ["0", "0.5", "1", "1.5", "2 or more"] } };
  }
  return { colorscale: SEQUENTIAL, zmin: 0, zmax: largest(run, quantity), colorbar: { ...bar, tickformat: QUANTITIES[quantity].percent ? ".0%" : undefined } };
}
function heat(z, x, y, run, quantity, hover) {
  const form = QUANTITIES[quantity].percent ? ".1%" : QUANTITIES[quantity].unit === "pairs" ? ",d" : ".3g";
  const few = z.length * z[0].length <= 160 && z[0].length <= 32;
  return {
    type: "heatmap", z, x, y, xgap: z[0].length <= 64 ? 1 : 0, ygap: z.length <= 64 ? 1 : 0, ...scale(run, quantity),
    hovertemplate: `${hover}<br>${QUANTITIES[quantity].unit} %{z:${form}}<extra></extra>`,
    ...(few ? { texttemplate: `%{z:${QUANTITIES[quantity].share ? ".2f" : form}}`, textfont: { size: 11 } } : {}),
  };
}
function numbers(count) { return Array.from({ length: count }, (_, place) => place); }

function expertSection() {
  const section = make("div"), controls = make("div", { class: "row" });
  const map = card("Where tokens go", "every layer and expert", { wide: true });
  map.head.after(controls);
  const slider = make("input", { type: "range", min: 0, step: 1, "aria-label": "step", oninput: () => { chosen.step = now().experts.steps[slider.value]; update(); } });
  const shown = make("output");
  const bars = card("One layer, one step", ""), time = card("One layer over time", "");
  section.append(make("h2", {}, "Experts"), make("div", { class: "grid" }, map.node, bars.node, time.node));
  const now = () => mapped()[chosen.run];
  const place = () => { const steps = now().experts.steps, found = steps.indexOf(chosen.step); return found < 0 ? steps.length - 1 : found; };
  let waiting = false;
  const update = () => { if (!waiting) { waiting = true; requestAnimationFrame(() => { waiting = false; drawMaps(); }); } };
  function drawMaps() {
    const run = now(), { steps, blocks, num_experts: E } = run.experts, at = place(), quantity = chosen.quantity, step = steps[at];
    const names = blocks.map(layerName), experts = numbers(E), layer = Math.min(chosen.layer, blocks.length - 1);
    slider.max = steps.length - 1;
    slider.value = at;
    slider.disabled = steps.length < 2;
    shown.textContent = `step ${whole(step)}`;
    const expertAxis = { title: { text: "expert" }, dtick: E <= 16 ? 1 : undefined, range: [-0.5, E - 0.5] };
    const layerAxis = { type: "category", autorange: "reversed", showgrid: false };
    const height = Math.max(190, Math.min(760, 90 + blocks.length * 30));
    draw(map.plot, [heat(rows(run, at, quantity), experts, names, run, quantity, "%{y}, expert %{x}")], { height, hovermode: "closest", margin: { l: 70, r: 10, t: 8, b: 42 }, xaxis: { ...expertAxis, showgrid: false }, yaxis: layerAxis });
    if (!map.plot.heard) {
      map.plot.heard = true;
      map.plot.on("plotly_click", ({ points }) => { chosen.layer = points[0].pointNumber[0]; fill(); update(); });
    }
    const title = names[layer];
    bars.head.children[0].textContent = `${title[0].toUpperCase()}${title.slice(1)} at step ${whole(step)}`;
    bars.head.children[1].textContent = "pairs by expert";
    const kept = rows(run, at, "kept")[layer], dropped = rows(run, at, "dropped")[layer], total = rows(run, at, "asked")[layer].reduce((a, b) => a + b, 0);
    bars.keys.replaceChildren(keyLine("computed", color(0), "solid"), keyLine("dropped", color(1), "solid"), keyLine("mean load", css("--text"), "dot"));
    draw(bars.plot, [
      { type: "bar", x: experts, y: kept, name: "computed", marker: { color: color(0) } },
      { type: "bar", x: experts, y: dropped, name: "dropped", marker: { color: color(1) } },
    ], {
      barmode: "stack", bargap: 0.18, height: 290, xaxis: { ...expertAxis, showgrid: false }, yaxis: { title: { text: "pairs" }, rangemode: "tozero", separatethousands: true },
      shapes: [{ type: "line", xref: "paper", x0: 0, x1: 1, y0: total / E, y1: total / E, line: { color: css("--text"), width: 1.5, dash: "dot" } }],
    });
    time.head.children[0].textContent = `${title[0].toUpperCase()}${title.slice(1)} over time`;
    time.head.children[1].textContent = QUANTITIES[quantity].name;
    const byStep = steps.map((_, index) => rows(run, index, quantity)[layer]);
    const over = heat(experts.map((expert) => byStep.map((values) => values[expert])), steps, experts, run, quantity, "step %{x}, expert %{y}");
    draw(time.plot, [{ ...over, xgap: 0, texttemplate: undefined, ygap: E <= 32 ? 1 : 0 }], {
      height: 290, hovermode: "closest", xaxis: { title: { text: "step" }, showgrid: false }, yaxis: { title: { text: "expert" }, dtick: E <= 16 ? 1 : undefined, autorange: "reversed", showgrid: false },
      shapes: [{ type: "line", yref: "paper", y0: 0, y1: 1, x0: step, x1: step, line: { color: css("--text"), width: 1.5 } }],
    });
  }
  function fill() {
    const run = now(), having = mapped().map((each, index) => [index, each.name, each]).filter(([, , each]) => each.experts);
    const quantities = Object.entries(QUANTITIES).filter(([name]) => !(name.endsWith("_norm")) || run.experts.arrays[name]);
    const said = [having.map(([, name]) => name), quantities, run.experts.blocks, chosen.run, chosen.layer];
    refill(controls, said, () => [
      ...(having.length > 1 ? [picker("run", having, chosen.run, (value) => { chosen.run = Number(value); fill(); update(); })] : []),
      picker("show", quantities.map(([name, { name: text }]) => [name, text]), chosen.quantity, (value) => { chosen.quantity = value; update(); }),
      picker("layer below", run.experts.blocks.map((block, layer) => [layer, layerName(block)]), chosen.layer, (value) => { chosen.layer = Number(value); update(); }),
      make("label", { class: "grow" }, "step", slider, shown),
    ]);
  }
  drawings.push(() => {
    if (!now()?.experts) chosen.run = Math.max(0, mapped().findIndex((run) => run.experts));
    section.hidden = !now().experts;
    if (section.hidden) return;
    fill();
    drawMaps();
  });
  return section;
}

function layerSection() {
  const parts = card("Layers over time", "", { wide: true }), controls = make("div", { class: "row" });
  parts.head.after(controls);
  const words = (name) => name.replaceAll("_", " ");
  drawings.push(() => {
    const run = mapped()[chosen.run], names = Object.keys(run?.columns ?? {});
    parts.node.hidden = !names.length;
    if (!names.length) return;
    if (!names.includes(chosen.column)) chosen.column = names.includes("max_vio") ? "max_vio" : names[0];
    refill(controls, [names, chosen.column], () => [picker("show", names.map((name) => [name, words(name)]), chosen.column, (value) => { chosen.column = value; redraw(); })]);
    const values = run.columns[chosen.column], there = numbers(run.steps.length).filter((row) => values[row]);
    parts.head.children[1].textContent = `${words(chosen.column)} of every layer${DATA.runs.length > 1 ? `, ${run.name}` : ""}`;
    return draw(parts.plot, [{
      type: "heatmap", z: run.blocks.map((_, layer) => there.map((row) => values[row][layer])), x: there.map((row) => run.steps[row]), y: run.blocks.map(layerName),
      colorscale: SEQUENTIAL, ygap: run.blocks.length <= 64 ? 1 : 0, colorbar: { thickness: 12, outlinewidth: 0 }, hovertemplate: "%{y}, step %{x}<br>%{z:.4g}<extra></extra>",
    }], { height: Math.max(180, Math.min(620, 90 + run.blocks.length * 22)), hovermode: "closest", margin: { l: 70, r: 10, t: 8, b: 42 }, xaxis: { title: { text: "step" }, showgrid: false }, yaxis: { type: "category", autorange: "reversed", showgrid: false } });
  });
  return parts.node;
}

function breakdown() {  // of one run: its own part of a step is what a colour means
  const parts = card("Step breakdown", "");
  drawings.push(() => {
    const run = mapped()[chosen.run], there = PARTS.filter(([key]) => run.scalars[key]);
    parts.node.hidden = !there.length;
    if (!there.length) return;
    const measured = numbers(run.steps.length).filter((row) => run.scalars[there[0][0]][row] !== null);
    parts.head.children[1].textContent = `ms of a step${DATA.runs.length > 1 ? `, ${run.name}` : ""}`;
    parts.keys.replaceChildren(...there.map(([, name], place) => keyLine(name, color(place), "solid")));
    const traces = there.map(([key, name], place) => ({ x: measured.map((row) => axisOf(run)[row]), y: measured.map((row) => 1000 * run.scalars[key][row]), name, stackgroup: "step", mode: "lines", line: { color: color(place), width: 1 }, fillcolor: color(place) }));
    return draw(parts.plot, traces, { xaxis: { title: { text: axisTitle() } }, yaxis: { rangemode: "tozero" } });
  });
  return parts.node;
}

// ---- several runs ------------------------------------------------------------------------------------------------

function keysOf(mappings) { return [...new Set(mappings.flatMap(Object.keys))].filter((key) => !key.startsWith("run.")); }
function differing(mappings = DATA.runs.map((run) => run.config)) {  // where a run lies, `run.`, says nothing of it
  return keysOf(mappings).filter((key) => new Set(mappings.map((mapping) => mapping[key])).size > 1);
}
function varied() {  // those that a sweep varied first
  const keys = differing();
  return [...new Set([...DATA.varied.filter((key) => keys.includes(key)), ...keys])];
}
function shortKey(key) { return key.split(".").slice(-2).join("."); }

function parallel() {
  const parts = card("Choices and what came of them", "a line for each run; drag along an axis to select", { wide: true });
  drawings.push(() => {
    const runs = DATA.runs, keys = varied().slice(0, 8);
    const figures = TILES.filter(([key]) => new Set(runs.map((run) => last(run.scalars[key]))).size > 1).slice(0, 6);
    parts.node.hidden = runs.length < 3 || !keys.length || !figures.length;
    if (parts.node.hidden) return;
    const choice = (key) => {
      const values = runs.map((run) => run.config[key] ?? "none"), levels = [...new Set(values)];
      const numeric = levels.every((value) => value !== "" && Number.isFinite(Number(value)));
      levels.sort(numeric ? (a, b) => a - b : undefined);
      return { label: plain(shortKey(key)), values: values.map((value) => levels.indexOf(value)), tickvals: numbers(levels.length), ticktext: levels.map(plain), range: [-0.2, levels.length - 0.8] };
    };
    const [goal] = figures.some(([key]) => key === "eval/loss") ? ["eval/loss"] : figures[0];
    const figure = ([key, name]) => ({ label: name.split(",")[0], values: runs.map((run) => last(run.scalars[key])), tickformat: ".4~g" });
    const shades = runs.map((run) => last(run.scalars[goal]));
    parts.head.children[1].textContent = `a line for each run, coloured by ${figures.find(([key]) => key === goal)[1].split(",")[0]}; drag along an axis to select`;
    return draw(parts.plot, [{
      type: "parcoords", dimensions: [...keys.map(choice), ...figures.map(figure)], labelfont: { size: 12, color: css("--text") }, tickfont: { size: 11, color: css("--muted") }, rangefont: { size: 1, color: "rgba(0,0,0,0)" },
      line: { color: shades, colorscale: SEQUENTIAL, reversescale: theme() === "dark", showscale: true, colorbar: { thickness: 12, outlinewidth: 0 } }, unselected: { line: { color: css("--line"), opacity: 0.5 } },
    }], { height: 360, margin: { l: 70, r: 40, t: 46, b: 26 } });
  });
  return parts.node;
}

function overview() {
  const node = make("div");
  drawings.push(() => {
    const notes = [...DATA.notes.map((note) => [null, note]), ...DATA.runs.flatMap((run) => run.notes.map((note) => [run.name, note]))];
    const shown = notes.map(([name, note]) => make("p", { class: "note" }, DATA.runs.length > 1 && name !== null ? `${name}: ${note}` : note));
    node.replaceChildren(...shown, DATA.runs.length === 1 ? tiles(DATA.runs[0]) : comparison());
  });
  return node;
}
function progress(run) { return run.num_steps === null ? whole(run.step) : `${whole(run.step)} / ${whole(run.num_steps)}`; }
function tiles(run) {
  const figures = TILES.filter(([key]) => last(run.scalars[key]) !== null);
  const grid = make("div", { class: "tiles" }, make("div", { class: "tile" }, make("b", {}, whole(run.step)), make("span", {}, run.num_steps === null ? "steps" : `of ${whole(run.num_steps)} steps`)));
  for (const [key, name, form] of figures) grid.append(make("div", { class: "tile" }, make("b", {}, form(last(run.scalars[key]))), make("span", {}, name)));
  return make("div", {}, grid, make("p", { class: "facts" }, [...facts(run.config), run.path].join("  ·  ")));
}
function facts(config) {
  const said = [["moe.num_experts", "experts"], ["moe.router.top_k", "per token"], ["moe.capacity.factor", "capacity factor"], ["model.layers.num_layers", "layers"], ["model.dim", "wide"], ["mesh.ep", "-way expert parallel"]];
  return said.filter(([key]) => config[key] !== undefined && config[key] !== "null").map(([key, name]) => name.startsWith("-") ? `${config[key]}${name}` : name === "capacity factor" ? `${name} ${config[key]}` : `${config[key]} ${name}`);
}
function comparison() {
  const figures = TILES.filter(([key]) => DATA.runs.some((run) => last(run.scalars[key]) !== null));
  const keys = varied().slice(0, 5);
  const body = DATA.runs.map((run, place) => make("tr", {},
    make("td", {}, make("i", { class: "swatch", style: `background: ${color(place)}` }), run.name), make("td", {}, run.state), make("td", {}, progress(run)), ...keys.map((key) => make("td", {}, run.config[key] ?? "")),
    ...figures.map(([key, , form]) => { const value = last(run.scalars[key]); return make("td", {}, value === null ? "" : form(value)); })));
  const head = make("tr", {}, ...["run", "state", "step", ...keys.map(shortKey), ...figures.map(([, name]) => name)].map((name) => make("th", {}, name)));
  return make("section", { class: "card" }, make("div", { class: "head" }, make("h3", {}, "Runs"), make("span", { class: "muted" }, "newest value of each")), make("div", { class: "scroll" }, make("table", {}, make("thead", {}, head), make("tbody", {}, ...body))));
}

function explorer() {
  const parts = card("Any other metric", "", { wide: true }), controls = make("div", { class: "row" });
  parts.head.after(controls);
  const drawn = new Set(["train/tokens", ...PARTS.map(([key]) => key), ...Object.values(CHARTS).flatMap((charts) => charts.flatMap(({ keys }) => keys.map(([key]) => key)))]);
  drawings.push(() => {
    const keys = [...new Set(DATA.runs.flatMap((run) => Object.keys(run.scalars)))].filter((key) => !drawn.has(key)).sort();
    parts.node.hidden = !keys.length;
    if (!keys.length) return;
    if (!keys.includes(chosen.key)) chosen.key = keys[0];
    refill(controls, [keys, chosen.key], () => [picker("metric", keys.map((key) => [key, key]), chosen.key, (value) => { chosen.key = value; redraw(); })]);
    const traces = shownRuns().filter(({ run }) => run.scalars[chosen.key]).map(({ run, place }) => ({ x: axisOf(run), y: run.scalars[chosen.key], mode: run.steps.length < 3 ? "lines+markers" : "lines", name: plain(run.name), line: { color: color(place), dash: dash(place), width: 2 } }));
    return draw(parts.plot, traces, { xaxis: { title: { text: axisTitle() } } });
  });
  return parts.node;
}

function tableCard(title, mappingOf) {
  const table = make("table", { class: "config" }), controls = make("div", { class: "row" }), kept = { filter: "", all: false };
  const parts = card(title, "", { wide: true });
  parts.plot.replaceWith(controls, make("div", { class: "scroll" }, table));
  const filter = make("input", { type: "search", placeholder: "filter keys", "aria-label": "filter keys", oninput: (event) => { kept.filter = event.target.value; fill(); } });
  const all = make("label", {}, make("input", { type: "checkbox", onchange: (event) => { kept.all = event.target.checked; fill(); } }), "also what is the same in all runs");
  function fill() {
    const several = DATA.runs.length > 1, mappings = DATA.runs.map(mappingOf), every = keysOf(mappings);
    const keys = several && !kept.all ? differing(mappings) : every;
    parts.node.hidden = !every.length;
    controls.replaceChildren(filter, ...(several ? [all] : []));
    parts.head.children[1].textContent = several && !kept.all ? `${keys.length} of ${every.length} keys differ` : `${keys.length} keys`;
    const cells = (tag, values) => make("tr", {}, ...values.map((value) => make(tag, {}, value)));
    const found = keys.filter((key) => key.includes(kept.filter.trim()));
    table.replaceChildren(make("thead", {}, cells("th", ["key", ...(several ? DATA.runs.map((run) => run.name) : ["value"])])), make("tbody", {}, ...found.map((key) => cells("td", [key, ...mappings.map((mapping) => mapping[key] ?? "")]))));
  }
  drawings.push(() => { if (document.activeElement !== filter) fill(); });
  return parts.node;
}

// ---- the page ----------------------------------------------------------------------------------------------------

function head() {
  document.querySelector("h1").textContent = DATA.title;
  const chips = document.querySelector("#chips");
  if (DATA.runs.length === 1) return chips.replaceChildren(make("span", { class: `state ${DATA.runs[0].state}` }, DATA.runs[0].state));
  chips.replaceChildren(...DATA.runs.map((run, place) => make("button", { class: "chip", "aria-pressed": String(!chosen.hidden.has(place)), title: run.path, onclick: () => { chosen.hidden.has(place) ? chosen.hidden.delete(place) : chosen.hidden.add(place); redraw(); } },
    make("i", { class: "swatch", style: `border-top: 4px ${{ solid: "solid", dot: "dotted" }[dash(place)] ?? "dashed"} ${color(place)}; height: 0` }), make("span", {}, run.name))));
}
function controls(said) {
  document.querySelector("#controls").replaceChildren(said,
    picker("x axis", [["step", "step"], ["tokens", "tokens"]], chosen.axis, (value) => { chosen.axis = value; redraw(true); }),
    make("button", { onclick: () => { document.documentElement.dataset.theme = theme() === "dark" ? "light" : "dark"; redraw(); } }, "light / dark"));
}
function redraw(fresh = false) {
  head();
  for (const drawing of drawings) drawing();
  if (fresh) for (const plot of document.querySelectorAll(".plot.js-plotly-plot")) Plotly.relayout(plot, { "xaxis.autorange": true });
}
function build() {
  const main = document.querySelector("#main");
  main.replaceChildren(overview(), parallel());
  main.append(charts("Training"), expertSection(), charts("Balance"), charts("Steps", breakdown()), make("h2", {}, "More"), make("div", { class: "grid" }, layerSection(), explorer(), tableCard("Environment", (run) => run.environment), tableCard("Configuration", (run) => run.config)));
}
function charts(title, ...more) {
  const node = make("div", {}, make("h2", {}, title), make("div", { class: "grid" }, ...more, ...CHARTS[title].map(lineChart)));
  drawings.push(() => { node.hidden = !CHARTS[title].some(({ keys }) => keys.some(([key]) => DATA.runs.some((run) => run.scalars[key]))); });
  return node;
}
async function follow(said) {
  try {
    const answer = await fetch(`/data?version=${DATA.version}`);
    if (answer.status === 200) {
      DATA = await answer.json();
      redraw();
    }
    said.textContent = answer.ok ? `live, looked at ${new Date().toLocaleTimeString()}` : await answer.text();
  } catch {
    said.textContent = "no longer live: the server has ended";
  }
  setTimeout(follow, 1000 * REFRESH_S, said);
}
async function begin() {
  document.documentElement.dataset.theme = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  DATA = await unpack();
  const said = make("span", {}, REFRESH_S === null ? `made ${DATA.made}` : "live");
  build();
  controls(said);
  redraw();
  if (REFRESH_S !== null) setTimeout(follow, 1000 * REFRESH_S, said);
  document.documentElement.dataset.drawn = "yes";
}
begin();
