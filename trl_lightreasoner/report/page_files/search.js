// The search over all rows, and a row that is opened by its number or by the address of the page.

const raw = JSON.parse(document.getElementById("index").textContent);
const inside = JSON.parse(document.getElementById("rows").textContent);
const indexes = raw.datasets.map(readIndex);
const HEAT_EDGES = [0.001, 0.01, 0.05, 0.1, 0.4, 1, 2];
const AT_A_TIME = 100;
const ANSWERS = ["wrong", "right", ""];

indexes.forEach((index) => names.add(index.name));

// Rows

const files = new Map(); // by number, promises
const waiting = new Map();

function receiveRows(key, number, file) {
  waiting.get(number)?.(key === raw.key ? file : null);
}

function loadFile(number) {
  if (inside) return Promise.resolve(inside[number]);
  if (!files.has(number)) {
    const name = `rows-${String(number).padStart(3, "0")}.js`;
    const loading = new Promise((resolve, reject) => {
      waiting.set(number, (file) => (file ? resolve(file) : reject(new Error(`${name} belongs to another report.`))));
      const script = document.createElement("script");
      script.src = name;
      script.onerror = () => reject(new Error(`This row is in ${name}, which must lie beside this page.`));
      document.body.append(script);
    });
    files.set(number, loading);
    loading.catch(() => files.delete(number)); // it may be there the next time
  }
  return files.get(number);
}

async function loadRow(dataset, row) {
  const number = indexes[dataset].first + Math.floor(row / raw.size);
  const file = await loadFile(number);
  return readRow(file, file.rows[row % raw.size]);
}

function stepOf({ dataset, row, step }, data) {
  const common = { name: indexes[dataset].name, d: dataset, row, t: step, kl: sayNats(data.nats[step]) };
  const kept = data.steps.get(step);
  if (!kept) return { ...common, token: labelOf(data.tokens[step]) };
  const best = Math.max(...kept.v);
  return { ...common, ...kept, tokens: kept.tokens.map(labelOf), r: kept.v.map((value) => value / best) };
}

// What the panel offers beside the kept steps before and after
function toolsOf(place) {
  const input = make("input", "");
  Object.assign(input, { type: "number", min: 0, max: indexes[place.dataset].rows.length[place.row] - 1, value: place.step });
  input.addEventListener("change", async () => {
    if (input.value === "" || !input.validity.valid) return input.reportValidity();
    await openPlace({ ...place, step: Number(input.value) });
    panel.querySelector(".tools input")?.focus();
  });
  const link = make("a", "", "Link");
  link.href = `#${writePlace(place)}`;
  link.title = "The address of this step, to copy or to send";
  return [make("div", "tools", make("label", "", "Step ", input), link)];
}

async function openStep(place, element) {
  try {
    show(stepOf(place, await loadRow(place.dataset, place.row)), element);
  } catch (error) {
    fail(error.message);
  }
}

function fail(message) {
  choose(null);
  body.replaceChildren(make("p", "", message));
  status.textContent = message;
  panel.classList.remove("empty");
}

// The row that was asked for, in its card

const viewer = document.getElementById("viewer");
let viewed = "";

async function view({ dataset, row }) {
  const key = `${dataset}.${row}`;
  if (viewed === key) return;
  const data = await loadRow(dataset, row);
  viewed = key;
  const text = make("div", "text");
  text.setAttribute("role", "group");
  text.dataset.row = key;
  const isReadable = data.text === null;
  data.tokens.forEach((token, t) => {
    const isKept = data.steps.has(t);
    if (!isKept && !isReadable) return;
    const heat = HEAT_EDGES.filter((edge) => data.nats[t] >= edge).length;
    const style = `h${heat}${data.special[t] ? " special" : ""}`;
    const element = make(isKept ? "button" : "span", style, isKept ? labelOf(token) : token);
    element.title = sayNats(data.nats[t]);
    element.dataset.step = `${key}.${t}`;
    text.append(element);
    if (!isKept) return;
    element.type = "button";
    element.setAttribute("aria-label", `Step ${t}, ${labelOf(token)}, ${element.title}`);
    element.setAttribute("aria-controls", "panel");
    element.setAttribute("aria-expanded", "false");
    details[`${key}.${t}`] ??= stepOf({ dataset, row, step: t }, data);
    if (token.endsWith("\n")) text.append(make("br", ""));
  });
  text.setAttribute("aria-label", `Completion, ${data.steps.size} kept ${data.steps.size === 1 ? "step" : "steps"}`);
  const prompt = make("p", "prompt", make("b", "", `Row ${row.toLocaleString("en")}`), " ", make("bdi", "", data.prompt));
  const answer = ANSWERS[indexes[dataset].rows.answer?.[row] ?? UNKNOWN];
  const notes = [...(indexes.length > 1 ? [indexes[dataset].name] : []), ...(answer ? [`The answer is ${answer}.`] : [])];
  const plain = isReadable ? [] : [make("p", "plain", make("bdi", "", data.text))];
  viewer.replaceChildren(prompt, ...notes.map((note) => make("p", "note name", note)), ...plain, text);
  viewer.hidden = false;
  enliven(text);
}

async function openPlace(place, moves) {
  const length = indexes[place.dataset]?.rows.length[place.row];
  if (length === undefined || (place.step !== null && place.step >= length)) {
    return fail(length === undefined ? `There is no row ${place.row}.` : `Row ${place.row} has ${length} steps, 0 to ${length - 1}.`);
  }
  try {
    await view(place);
  } catch (error) {
    return fail(error.message);
  }
  if (place.step === null) {
    status.textContent = `Row ${place.row} is shown.`;
    remember(`#${writePlace(place)}`);
  } else {
    const key = `${place.dataset}.${place.row}.${place.step}`;
    const token = viewer.querySelector(`[data-step="${key}"]`);
    if (details[key]) show(details[key], token);
    else await openStep(place, token);
  }
  if (moves) {
    viewer.scrollIntoView({ block: "start" });
    viewer.focus({ preventScroll: true });
  }
}

function openAddress(moves) {
  const place = readPlace(location.hash);
  if (place) openPlace(place, moves);
}

// The search

const filters = document.getElementById("filters");
const results = document.querySelector("#results table");
const more = document.getElementById("more-results");
const counted = document.getElementById("count");
const order = { steps: ["row", false], rows: ["row", false] };
let found = [];

function columns(list, index) {
  const code = (token) => make("code", "", index.tokens[token]);
  const { steps, rows } = index;
  const answer = rows.answer ? { answer: ["Answer", (row) => ANSWERS[rows.answer[row]]] } : {};
  if (list === "rows") {
    return {
      row: ["Row", (i) => linkTo({ dataset: chosen(), row: i, step: null }, i)],
      kept: ["Kept", (i) => rows.kept[i]],
      length: ["Steps", (i) => rows.length[i]],
      highest: ["Highest KL", (i) => nats(rows.highest[i])],
      ...answer,
    };
  }
  return {
    row: ["Row", (i) => steps.row[i]],
    step: ["Step", (i) => linkTo({ dataset: chosen(), row: steps.row[i], step: steps.position[i] }, steps.position[i])],
    taken: ["Taken", (i) => code(steps.taken[i])],
    preferred: ["Label prefers", (i) => (steps.preferred[i] === steps.taken[i] ? "the same" : code(steps.preferred[i]))],
    nats: ["KL", (i) => nats(steps.nats[i])],
  };
}

function linkTo(place, text) {
  const link = make("a", "", String(text));
  link.href = `#${writePlace(place)}`;
  if (place.step !== null) link.setAttribute("aria-label", `Step ${place.step} of row ${place.row}`);
  return link;
}

function chosen() {
  return Number(filters.elements.data.value || 0);
}

function search() {
  const query = Object.fromEntries(new FormData(filters));
  for (const name of ["low", "high", "from", "to"]) query[name] = query[name] === "" ? "" : Number(query[name]);
  const index = indexes[chosen()];
  const steps = findSteps(index, query);
  const rows = query.list === "rows" ? findRows(index, query, steps) : null;
  const [key, isDescending] = order[query.list];
  found = sortFound(index, rows ?? steps, (rows ? ROW_KEYS : STEP_KEYS)[key], isDescending);
  const count = (number, noun) => `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;
  counted.textContent = rows
    ? `${count(rows.length, "row")} of ${index.rows.kept.length.toLocaleString("en")}`
    : `${count(steps.length, "kept step")} of ${index.steps.row.length.toLocaleString("en")}, in ${count(new Set(steps.map((i) => index.steps.row[i])).size, "row")}`;
  const head = make("tr", "");
  for (const [name, [title]] of Object.entries(columns(query.list, index))) {
    const button = make("button", "", title);
    button.type = "button";
    button.addEventListener("click", () => {
      order[query.list] = [name, name === order[query.list][0] && !order[query.list][1]];
      search();
      results.querySelector(`[data-column="${name}"] button`).focus();
    });
    const header = make("th", "", button);
    header.scope = "col";
    header.dataset.column = name;
    if (name === key) header.setAttribute("aria-sort", isDescending ? "descending" : "ascending");
    head.append(header);
  }
  results.tHead.replaceChildren(head);
  results.tBodies[0].replaceChildren();
  showMore();
}

function showMore() {
  const shown = results.tBodies[0].rows.length;
  const cells = Object.values(columns(filters.elements.list.value, indexes[chosen()]));
  for (const i of found.slice(shown, shown + AT_A_TIME)) {
    results.tBodies[0].append(make("tr", "", ...cells.map(([, write]) => make("td", "", write(i)))));
  }
  more.hidden = shown + AT_A_TIME >= found.length;
}

{
  const { data } = filters.elements;
  indexes.forEach((index, i) => data.append(new Option(index.name, i)));
  const parts = { two: indexes.length > 1, answers: indexes.some((index) => index.rows.answer) };
  for (const part of filters.querySelectorAll("[data-if]")) part.hidden = !parts[part.dataset.if];
  filters.addEventListener("input", search);
  filters.addEventListener("submit", (event) => event.preventDefault());
  filters.addEventListener("reset", () => setTimeout(search));
  more.addEventListener("click", showMore);
  const form = document.getElementById("goto");
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const { row, step } = form.elements;
    openPlace({ dataset: chosen(), row: Number(row.value), step: step.value === "" ? null : Number(step.value) });
  });
  search();
  addEventListener("hashchange", () => openAddress(false));
  openAddress(true);
}
