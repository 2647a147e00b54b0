// Draws the analysis in DATA.

// Okabe and Ito's colours; further experts repeat them, and the page names an expert wherever it is pointed at.
const COLORS = ["#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7", "#999999"];
const SHADES = "Cividis";
const chosen = { corpus: null, layer: null, expert: null };
let DATA = null;

// ---- small parts -------------------------------------------------------------------------------------------------

function percent(value) { return `${(100 * value).toFixed(1)} %`; }
function tint(expert) { return `${COLORS[expert % COLORS.length]}80`; }
function visible(text) {  // a token in a table
  return text === "" ? "end" : text.replace(/ /g, "·").replace(/\n/g, "↵").replace(/\r/g, "␍").replace(/\t/g, "⇥");
}
function corpus() { return DATA.corpora[chosen.corpus]; }
function layer() { return corpus().layers[chosen.layer]; }
function sizes() { return DATA.layers[chosen.layer]; }
function blocks() { return Object.keys(DATA.layers); }
function each(of) {  // of all MoE layers, which need not be alike
  return [...new Set(blocks().map((block) => of(DATA.layers[block])))].join(" or ");
}
function experts(number) { return Array.from({ length: number }, (_, place) => String(place)); }
function card(title, note, body, wide = false) {
  return make("section", { class: wide ? "card wide" : "card" }, make("h3", {}, title), make("p", {}, note), body);
}

// ---- charts ------------------------------------------------------------------------------------------------------

const AXIS = { fixedrange: true, gridcolor: "#dfe3e8", zeroline: false, automargin: true, type: "category", ticks: "" };
function plot(data, layout, height = 300) {
  const node = make("div", { class: "plot", style: `height:${height}px` });
  const all = {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", margin: { l: 60, r: 12, t: 12, b: 44 },
    font: { family: "system-ui, DejaVu Sans, sans-serif", size: 12, color: "#1a1f26" }, showlegend: false, ...layout,
  };
  requestAnimationFrame(() => Plotly.newPlot(node, data, all, { displayModeBar: false, responsive: true }));
  return node;
}
function map(z, x, y, { unit, xTitle, yTitle, percents = true, height = null }) {
  const form = percents ? ":.1%" : ":.2f";
  return plot([{
    type: "heatmap", z, x, y, colorscale: SHADES, zmin: 0, xgap: 1, ygap: 1,
    hovertemplate: `${plain(yTitle)} %{y}<br>${plain(xTitle)} %{x}<br>%{z${form}}<extra></extra>`,
    colorbar: { title: { text: unit, side: "right" }, thickness: 12, outlinewidth: 0, tickformat: percents ? ".0%" : "" },
  }], {
    xaxis: { ...AXIS, title: { text: xTitle } }, yaxis: { ...AXIS, title: { text: yTitle }, autorange: "reversed" },
  }, height ?? Math.max(220, Math.min(620, 110 + 26 * y.length)));
}
function largest(rows) { return Math.max(...rows.map((row) => Math.max(...row))); }

function loadMap() {
  const rows = blocks().map((block) => {
    const { load } = corpus().layers[block];
    const mean = load.reduce((sum, value) => sum + value, 0) / load.length;
    return load.map((value) => value / Math.max(mean, 1));
  });
  return card("Load", "Pairs over the layer's mean: 1 is balanced.", map(rows, experts(largest(rows.map((row) => [row.length]))), blocks(), {
    unit: "load / mean", xTitle: "expert", yTitle: "layer", percents: false,
  }));
}
function information() {
  const of = (key) => blocks().map((block) => {
    const found = corpus().layers[block];
    return found[key] / Math.max(found.expert_entropy, 1e-9);
  });
  const bar = (name, key, color) => ({
    type: "bar", name, x: blocks(), y: of(key), marker: { color }, hovertemplate: `layer %{x}<br>${name}: %{y:.1%}<extra></extra>`,
  });
  const chance = (name, key, offset) => ({
    type: "scatter", mode: "markers", name, x: blocks(), y: of(key), marker: { symbol: "line-ew-open", size: 16, color: "#1a1f26" },
    hovertemplate: `layer %{x}<br>${name}: %{y:.2%}<extra></extra>`,
  });
  return card("How much of the choice the token decides",
    "Mutual information of token (or its class) and expert, over the entropy of the expert. 100 %: the token alone decides. The dash is what chance would show.",
    plot([
      bar("token", "token_information", "#0072b2"), bar("class of token", "class_information", "#e69f00"),
      chance("chance, token", "token_information_bias"),
    ], {
      barmode: "group", showlegend: true, legend: { orientation: "h", y: 1.16, x: 0 },
      xaxis: { ...AXIS, title: { text: "layer" } }, yaxis: { ...AXIS, type: "linear", tickformat: ".0%", rangemode: "tozero" },
    }));
}
function classMap() {
  const { class_pairs: pairs, class_shares: shares } = layer();
  const seen = corpus().classes.map((_, place) => place).filter((place) => pairs[place].some((value) => value > 0));
  return card("Classes of tokens", `Where the pairs of each class go: a row sums to 100 %; ${percent(1 / sizes().experts)} is chance.`,
    map(seen.map((place) => shares[place]), experts(sizes().experts), seen.map((place) => corpus().classes[place]), {
      unit: "share of the class", xTitle: "expert", yTitle: "", height: 360,
    }));
}
function coactivation() {
  const E = sizes().experts, K = sizes().top_k;
  const note = K < 2 ? "With one choice per token no two experts act together."
    : `Of the tokens with the row's expert, the share that also has the column's; ${percent((K - 1) / (E - 1))} is chance.`;
  return card("Experts that act together", note, map(layer().coactivation, experts(E), experts(E), {
    unit: "share of tokens", xTitle: "also has expert", yTitle: "expert", height: 360,
  }));
}
function positions() {
  const rows = layer().position_load, starts = corpus().positions;
  const turned = experts(sizes().experts).map((_, expert) => rows.map((row) => row[expert]));
  return card("Load by position", "Position in the document (or row), cut into ranges; load over the mean load of the range: 1 is balanced.",
    map(turned, starts.map(String), experts(sizes().experts), { unit: "load / mean", xTitle: "from position", yTitle: "expert", percents: false, height: 330 }), true);
}
function domainMap() {
  const found = DATA.domains.layers[chosen.layer], names = DATA.domains.corpora;
  return card("Domains", `Share of each text's tokens that have the expert among their ${sizes().top_k} choices; ${percent(sizes().top_k / sizes().experts)} is chance.`,
    plot(names.map((name, place) => ({
      type: "bar", name: plain(name), x: experts(sizes().experts), y: found.all[place], marker: { color: ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00"][place % 6] },
      hovertemplate: `expert %{x}<br>${plain(name)}: %{y:.1%}<extra></extra>`,
    })), {
      barmode: "group", showlegend: true, legend: { orientation: "h", y: 1.14, x: 0 },
      xaxis: { ...AXIS, title: { text: "expert" } }, yaxis: { ...AXIS, type: "linear", tickformat: ".0%", rangemode: "tozero" },
      shapes: [{ type: "line", xref: "paper", x0: 0, x1: 1, y0: sizes().top_k / sizes().experts, y1: sizes().top_k / sizes().experts, line: { dash: "dot", width: 1 } }],
    }), true);
}
function saturation() {
  const steps = Object.keys(DATA.saturation).map(Number).sort((left, right) => left - right);
  const all = [...steps, DATA.step].sort((left, right) => left - right);
  const lines = blocks().map((block, place) => ({
    type: "scatter", mode: "lines+markers", name: `layer ${block}`, x: all, line: { color: COLORS[(place + 4) % 8], dash: ["solid", "dot", "dash"][Math.floor(place / 8) % 3] },
    y: all.map((step) => step === DATA.step ? 1 : DATA.saturation[step][block]),
    hovertemplate: `step %{x}<br>layer ${block}: %{y:.1%}<extra></extra>`,
  }));
  return card("Router saturation", `Share of a token's experts that the checkpoint of another step chooses too, mean over tokens; step ${DATA.step} agrees with itself. ${each((size) => percent(size.top_k / size.experts))} is chance.`,
    plot(lines, {
      showlegend: true, legend: { orientation: "h", y: 1.14, x: 0 }, xaxis: { ...AXIS, type: "linear", title: { text: "step" }, tickvals: all },
      yaxis: { ...AXIS, type: "linear", tickformat: ".0%", range: [0, 1.03] },
    }), true);
}

// ---- text --------------------------------------------------------------------------------------------------------

function coloured() {
  const { rows, experts: choices } = corpus().excerpt;
  const pens = make("div", { class: "pens", role: "group", "aria-label": "experts" });
  for (const expert of experts(sizes().experts)) {
    const on = chosen.expert === Number(expert);
    pens.append(make("button", {
      style: `background:${tint(Number(expert))}`, "aria-pressed": String(on),
      onclick: () => { chosen.expert = on ? null : Number(expert); draw(); },
    }, `expert ${expert}`));
  }
  const texts = rows.map((row, place) => {
    const node = make("div", { class: "text" });
    row.forEach((text, column) => {
      const own = choices[chosen.layer][place][column];
      const shown = chosen.expert === null ? own[0] : own.includes(chosen.expert) ? chosen.expert : null;
      const span = make("span", { title: `${visible(text)}  experts ${own.join(", ")}`, ...(shown === null ? {} : { style: `background:${tint(shown)}` }) });
      if (text === "") span.append(make("i", {}, "end"), "\n");
      else if (text.includes("\n")) span.append(make("i", {}, "↵"), text);
      else span.append(text);
      node.append(span);
    });
    return node;
  });
  const note = chosen.expert === null ? "Each token in the colour of its first choice; point at one for all of its experts, press an expert to see its tokens alone."
    : `Tokens that have expert ${chosen.expert} among their choices.`;
  return card("Text by expert", note, make("div", {}, pens, make("div", { class: "texts" }, ...texts)), true);
}
function favourites() {
  const body = make("tbody");
  layer().tokens.forEach((tokens, expert) => {
    const cell = make("td", { class: "token" });
    for (const token of tokens) {
      cell.append(make("span", { title: `id ${token.id}, came ${token.seen} times` }, make("code", {}, visible(token.text)), make("small", {}, percent(token.share))));
    }
    body.append(make("tr", {}, make("td", {}, String(expert)), make("td", {}, percent(layer().share_of_tokens[expert])), cell));
  });
  const head = make("thead", {}, make("tr", {}, make("th", {}, "expert"), make("th", {}, "tokens"), make("th", {}, "taken most, and how often it is among their choices")));
  return card("What each expert takes", "Of tokens that came 10 times or more.", make("div", { class: "experts" }, make("table", {}, head, body)), true);
}

// ---- the page ----------------------------------------------------------------------------------------------------

function tiles() {
  const mean = (of) => blocks().reduce((sum, block) => sum + of(corpus().layers[block]), 0) / blocks().length;
  const facts = [
    [corpus().tokens.toLocaleString("en-US"), "tokens"],
    [`${blocks().length} × ${each((size) => size.experts)}, top ${each((size) => size.top_k)}`, "MoE layers × experts"],
    [percent(mean((found) => found.token_information / Math.max(found.expert_entropy, 1e-9))), "of the choice of experts is decided by the token, mean over layers"],
    [percent(mean((found) => found.class_information / Math.max(found.expert_entropy, 1e-9))), "by the token's class"],
  ];
  return make("div", { class: "tiles" }, ...facts.map(([value, name]) => make("div", { class: "tile" }, make("b", {}, value), make("span", {}, name))));
}
function draw() {
  document.querySelector("h1").textContent = `${DATA.run}, step ${DATA.step}: routing`;
  document.getElementById("controls").replaceChildren(
    picker("text", Object.keys(DATA.corpora).map((name) => [name, name]), chosen.corpus, (name) => { chosen.corpus = name; draw(); }),
    picker("layer", blocks().map((block) => [block, block]), chosen.layer, (block) => { chosen.layer = block; chosen.expert = null; draw(); }),
  );
  const few = DATA.domains.corpora.length > 1 ? [domainMap()] : [];
  const others = Object.keys(DATA.saturation).length ? [saturation()] : [];
  document.getElementById("main").replaceChildren(
    tiles(), make("p", {}, DATA.described[chosen.corpus]),
    make("h2", {}, `Layer ${chosen.layer}`), make("div", { class: "grid" }, classMap(), coactivation(), ...few, coloured(), favourites(), positions()),
    make("h2", {}, "All layers"), make("div", { class: "grid" }, loadMap(), information(), ...others),
  );
}
async function begin() {
  DATA = await unpack();
  chosen.corpus = Object.keys(DATA.corpora)[0];
  chosen.layer = blocks().at(-1);
  draw();
  requestAnimationFrame(() => { document.documentElement.dataset.drawn = "yes"; });
}
begin();
