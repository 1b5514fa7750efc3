// A step, opened: what models said reaches the page as text alone, and nothing here makes HTML of a string.

const details = JSON.parse(document.getElementById("details").textContent);
const panel = document.getElementById("panel");
const body = document.getElementById("panel-body");
const status = document.getElementById("status");
const names = new Set(Object.values(details).map((step) => step.name));
const haveRead = Object.values(details).some((step) => "e" in step || "m" in step);
let opened = null; // the token whose step is shown

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

function nats(value) {
  if (Number.isNaN(value)) return "not known";
  if (value !== 0 && value < 0.001) {
    const [mantissa, exponent] = value.toExponential(2).split("e");
    const power = `10⁻${[...exponent.slice(1)].map((digit) => "⁰¹²³⁴⁵⁶⁷⁸⁹"[digit]).join("")}`;
    return Number(mantissa) === 1 ? power : `${Number(mantissa)}·${power}`;
  }
  return value >= 100 ? value.toFixed(0) : String(Number(value.toPrecision(3)));
}

function sayNats(value) {
  return Number.isNaN(value) ? "divergence not known" : `${nats(value)} nats`;
}

// A token where it stands alone: blanks at its ends show
function labelOf(text) {
  const flat = text.replaceAll("↵\n", "↵");
  if (!flat.trim()) return "␣".repeat(flat.length) || "⟨empty⟩";
  return flat.replace(/^ +| +$/g, (blanks) => "␣".repeat(blanks.length));
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
  const kinds = ["e", "a", "v", "r", "m"].filter((kind) => kind in step);
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
    const others = (kind) => (kind === "v" || kind === "r" ? 0 : rest(step[kind]));
    rows.push(make("tr", "others", header, ...kinds.map((kind) => cell(kind, others(kind)))));
  }
  return make("table", "beside", make("thead", "", head), make("tbody", "", ...rows));
}

// What is said of a kept step, and of another, of which a Dataset holds no label
function sayLabel(step) {
  const favourite = step.v.indexOf(Math.max(...step.v));
  const same = favourite === step.taken;
  const lead = make("p", "lead", make("code", "", step.tokens[step.taken]), " was taken; the label ");
  if (same) lead.append("prefers it too.");
  else lead.append("prefers ", make("code", "", step.tokens[favourite]), ".");
  const words = same ? "the label prefers it too" : `the label prefers ${step.tokens[favourite]}`;
  const parts = [lead, table(step)];
  if (haveRead && !("e" in step || "m" in step)) {
    parts.push(make("p", "note", "The models have read only the rows below. --num_trajectories sets their number."));
  }
  return { parts, words: `${step.tokens[step.taken]} was taken, ${words}, ${percent(step.v[favourite])}` };
}

function sayNotKept(step) {
  const lead = make("p", "lead", make("code", "", step.token), " was taken.");
  const note = make("p", "note", "The step was not kept, so it has no label.");
  return { parts: [lead, note], words: `${step.token} was taken, the step was not kept` };
}

function choose(element) {
  const mark = (token, isOpen) => {
    if (token?.matches("button")) token.setAttribute("aria-expanded", isOpen);
    else token?.classList.toggle("chosen", isOpen);
  };
  mark(opened, false);
  mark(element, true);
  opened = element;
}

function show(step, element) {
  choose(element);
  const { parts, words } = "v" in step ? sayLabel(step) : sayNotKept(step);
  const close = make("button", "close", "\u00d7");
  close.type = "button";
  close.setAttribute("aria-label", "Close");
  close.addEventListener("click", () => hide(true));
  const tools = make("div", "tools");
  for (const [text, offset] of [["← Previous", -1], ["Next →", 1]]) {
    const tool = make("button", "", text);
    tool.type = "button";
    tool.disabled = !neighbour(element, offset);
    tool.addEventListener("click", () => {
      go(neighbour(element, offset));
      const after = panel.querySelectorAll(".tools button")[offset > 0 ? 1 : 0];
      if (!after.disabled) after.focus();
    });
    tools.append(tool);
  }
  const place = { dataset: step.d, row: step.row, step: step.t };
  const title = `Row ${step.row.toLocaleString("en")}, step ${step.t}`;
  const heading = make("h3", "", title, make("span", "note", step.kl));
  const name = names.size > 1 ? [make("p", "note name", step.name)] : [];
  body.replaceChildren(heading, close, ...name, ...parts, tools, ...toolsOf(place));
  panel.classList.remove("empty");
  document.body.classList.add("open");
  status.textContent = `${names.size > 1 ? step.name + ", " : ""}${title}: ${words}.`;
  remember(`#${writePlace(place)}`);
}

function hide(focuses) {
  document.body.classList.remove("open");
  panel.classList.add("empty");
  body.replaceChildren(make("p", "", "Choose a framed token."));
  status.textContent = "";
  remember("");
  const element = opened;
  choose(null);
  if (focuses) element?.focus();
}

// The address of the page names what is open, so that it can be sent to somebody
function remember(fragment) {
  if (location.hash !== fragment) history.replaceState(null, "", location.href.split("#")[0] + fragment);
}

function buttons() {
  return [...document.querySelectorAll("button[data-step]")];
}

// The kept step before or after a token in the text of the page
function neighbour(element, offset) {
  if (!element) return null;
  const side = offset > 0 ? Node.DOCUMENT_POSITION_FOLLOWING : Node.DOCUMENT_POSITION_PRECEDING;
  const others = buttons().filter((button) => element.compareDocumentPosition(button) & side);
  return (offset > 0 ? others[0] : others.at(-1)) ?? null;
}

// One stop of the Tab key a trajectory; the arrow keys go on from there
function settle(button) {
  for (const other of button.parentElement.querySelectorAll("button")) other.tabIndex = other === button ? 0 : -1;
}

function go(button) {
  if (!button) return;
  const more = button.closest("details");
  if (more) more.open = true;
  settle(button);
  button.focus();
  if (opened) openToken(button);
}

// Dataset, row and step of a token of a text
function placeOf(token) {
  const [dataset, row] = token.parentElement.dataset.row.split(".").map(Number);
  const tokens = [...token.parentElement.children].filter((child) => child.tagName !== "BR");
  return { dataset, row, step: "step" in token.dataset ? Number(token.dataset.step.split(".")[2]) : tokens.indexOf(token) };
}

function openToken(token) {
  const kept = details[token.dataset.step];
  if (kept) show(kept, token);
  else openStep(placeOf(token), token);
  token.scrollIntoView({ block: "nearest" });
}

// A text whose tokens can be chosen
function enliven(text) {
  const first = text.querySelector("button");
  if (first) settle(first);
  text.addEventListener("click", (event) => {
    const token = event.target.closest(".text > *");
    if (!token || token.tagName === "BR") return;
    if (token === opened) hide(false);
    else openToken(token);
  });
  text.addEventListener("focusin", (event) => {
    if (event.target.matches("button")) settle(event.target);
  });
  text.addEventListener("keydown", (event) => {
    if (!event.target.matches("button") || event.ctrlKey || event.metaKey || event.altKey) return;
    const all = buttons();
    const place = all.indexOf(event.target);
    const places = { ArrowRight: place + 1, ArrowDown: place + 1, ArrowLeft: place - 1, ArrowUp: place - 1 };
    places.Home = 0;
    places.End = all.length - 1;
    if (event.key in places) {
      event.preventDefault();
      go(all[places[event.key]]);
    }
  });
}

document.querySelectorAll(".text").forEach(enliven);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") hide(!event.target.closest("#search"));
});
