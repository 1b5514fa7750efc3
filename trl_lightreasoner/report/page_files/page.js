"use strict";
// What models said reaches the page as text alone: nothing here makes HTML of a string.

const details = JSON.parse(document.getElementById("details").textContent);
const panel = document.getElementById("panel");
const body = document.getElementById("panel-body");
const status = document.getElementById("status");
const buttons = [...document.querySelectorAll("button[data-step]")];
const hasTwo = new Set(Object.values(details).map((step) => step.name)).size > 1;
let opened = null;

function make(tag, className, ...children) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...children);
  return element;
}

function symbol(letter, index) {
  return make("span", "", letter === "v" ? make("i", "", "v") : letter, make("sub", "", index));
}

function percent(value) {
  const digits = value >= 0.9995 || value === 0 ? 0 : value < 0.001 ? 3 : 1;
  return (100 * value).toFixed(digits) + "\u00a0%";
}

function cell(kind, value) {
  if (kind === "r") {
    const text = value === 0 ? "\u2013" : value === 1 ? "1" : value.toPrecision(2);
    return make("td", kind, text);
  }
  const fill = make("span", "");
  fill.style.width = 100 * value + "%";
  const meter = make("span", "meter", fill);
  meter.setAttribute("aria-hidden", "true");
  return make("td", kind, percent(value), meter);
}

function table(step) {
  const titles = {
    e: () => ["Expert ", symbol("π", "E")],
    a: () => ["Amateur ", symbol("π", "A")],
    v: () => ["Label ", symbol("v", "C")],
    r: () => [symbol("π", "E"), "/", symbol("π", "A"), ", the favourite’s = 1"],
    m: () => ["Trained ", symbol("π", "θ")],
  };
  const kinds = ["e", "a", "r", "v", "m"].filter((kind) => kind in step);
  const head = make("tr", "");
  for (const title of [["Token"], ...kinds.map((kind) => titles[kind]())]) {
    const header = make("th", "", ...title);
    header.scope = "col";
    head.append(header);
  }
  const rows = step.tokens.map((token, i) => {
    const header = make("th", "", make("code", "", token));
    header.scope = "row";
    if (i === step.taken) header.append(make("span", "taken", "taken"));
    return make("tr", "", header, ...kinds.map((kind) => cell(kind, step[kind][i])));
  });
  if ("e" in step || "m" in step) {
    const header = make("th", "", "All others");
    header.scope = "row";
    const rest = (values) => Math.max(0, 1 - values.reduce((sum, value) => sum + value, 0));
    const others = { v: () => 0, r: () => 0 };
    rows.push(make("tr", "others", header, ...kinds.map((kind) => cell(kind, (others[kind] ?? (() => rest(step[kind])))()))));
  }
  return make("table", "beside", make("thead", "", head), make("tbody", "", ...rows));
}

function show(button) {
  if (opened) opened.setAttribute("aria-expanded", "false");
  opened = button;
  button.setAttribute("aria-expanded", "true");
  const step = details[button.dataset.step];
  const favourite = step.v.indexOf(Math.max(...step.v));
  const taken = step.tokens[step.taken];
  const same = favourite === step.taken;
  const lead = make("p", "lead", make("code", "", taken), " was taken; the label ");
  if (same) lead.append("prefers it too.");
  else lead.append("prefers ", make("code", "", step.tokens[favourite]), ".");
  const close = make("button", "close", "\u00d7");
  close.type = "button";
  close.setAttribute("aria-label", "Close");
  close.addEventListener("click", () => hide(true));
  const place = buttons.indexOf(button);
  const tools = make("div", "tools");
  for (const [text, offset] of [["← Previous", -1], ["Next →", 1]]) {
    const tool = make("button", "", text);
    tool.type = "button";
    tool.disabled = !buttons[place + offset];
    tool.addEventListener("click", () => {
      go(place + offset);
      const after = panel.querySelectorAll(".tools button")[offset > 0 ? 1 : 0];
      if (!after.disabled) after.focus();
    });
    tools.append(tool);
  }
  const title = `Row ${step.row.toLocaleString("en")}, step ${step.t}`;
  const heading = make("h3", "", title, make("span", "note", step.kl));
  const name = hasTwo ? [make("p", "note name", step.name)] : [];
  body.replaceChildren(heading, close, ...name, lead, table(step), tools);
  panel.classList.remove("empty");
  document.body.classList.add("open");
  const words = same ? "the label prefers it too" : `the label prefers ${step.tokens[favourite]}`;
  status.textContent = `${hasTwo ? step.name + ", " : ""}${title}: ${taken} was taken, ${words}, ${percent(step.v[favourite])}.`;
  button.scrollIntoView({ block: "nearest" });
}

function hide(focuses) {
  if (!opened) return;
  const button = opened;
  button.setAttribute("aria-expanded", "false");
  opened = null;
  body.replaceChildren(make("p", "", "Choose a framed token."));
  panel.classList.add("empty");
  document.body.classList.remove("open");
  status.textContent = "";
  if (focuses) button.focus();
}

// One stop of the Tab key a trajectory; the arrow keys go on from there
function settle(button) {
  for (const other of button.parentElement.querySelectorAll("button")) other.tabIndex = other === button ? 0 : -1;
}

function go(place) {
  const button = buttons[place];
  if (!button) return;
  const more = button.closest("details");
  if (more) more.open = true;
  settle(button);
  button.focus();
  if (opened) show(button);
}

for (const group of document.querySelectorAll(".text")) {
  const first = group.querySelector("button");
  if (first) settle(first);
}
for (const [place, button] of buttons.entries()) {
  button.addEventListener("click", () => (opened === button ? hide(false) : show(button)));
  button.addEventListener("focus", () => settle(button));
  button.addEventListener("keydown", (event) => {
    const steps = { ArrowRight: place + 1, ArrowDown: place + 1, ArrowLeft: place - 1, ArrowUp: place - 1 };
    steps.Home = 0;
    steps.End = buttons.length - 1;
    if (event.key in steps && !event.ctrlKey && !event.metaKey && !event.altKey) {
      event.preventDefault();
      go(steps[event.key]);
    }
  });
}
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") hide(true);
});
