// What both pages are made of. What comes from a run or a text reaches them as text only: textContent here, `plain` in
// charts, whose labels would otherwise read a few tags as markup.

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "style") node.style.cssText = value;
    else node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}
function plain(text) { return String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;"); }
function picker(name, options, current, change) {
  const select = make("select", { "aria-label": name, onchange: (event) => change(event.target.value) });
  for (const [value, text] of options) select.append(make("option", { value, ...(String(value) === String(current) ? { selected: "" } : {}) }, text));
  return make("label", {}, name, select);
}
async function inflate(id) {
  const bytes = Uint8Array.from(atob(document.getElementById(id).textContent), (letter) => letter.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
}
async function unpack() {  // the charting library, and what the page shows
  document.head.append(Object.assign(document.createElement("script"), { nonce: NONCE, textContent: await inflate("library") }));
  return JSON.parse(await inflate("data"));
}

