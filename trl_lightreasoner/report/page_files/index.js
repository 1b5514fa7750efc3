"use strict";
// What is searched: columns over all kept steps and all rows. Nothing here touches the page.

const UNKNOWN = 2; // whether an answer is right

function unpack([kind, text]) {
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  return new { u1: Uint8Array, u2: Uint16Array, u4: Uint32Array, f4: Float32Array }[kind](bytes.buffer);
}

function readIndex(data) {
  const columns = (packed) => Object.fromEntries(Object.entries(packed).map(([name, value]) => [name, value && unpack(value)]));
  const index = { ...data, rows: columns(data.rows), steps: columns(data.steps) };
  const { kept } = index.rows;
  index.steps.row = new Uint32Array(index.steps.position.length);
  index.begin = new Uint32Array(kept.length + 1); // the first kept step of each row
  for (let row = 0; row < kept.length; row++) {
    index.begin[row + 1] = index.begin[row] + kept[row];
    index.steps.row.fill(row, index.begin[row], index.begin[row + 1]);
  }
  const order = [...index.tokens.keys()].sort((a, b) => (index.tokens[a] < index.tokens[b] ? -1 : 1));
  index.rank = new Uint32Array(order.length); // of each token by its text
  order.forEach((token, rank) => (index.rank[token] = rank));
  return index;
}

// Which tokens are meant: those that hold what is typed, or in quotation marks are it, with or without their blanks
function matchTokens(tokens, typed) {
  const quoted = /^["“](.+)["”]$/.exec(typed);
  const text = (quoted ? quoted[1] : typed).replaceAll(" ", "␣");
  const isMeant = quoted
    ? (token) => token === text || token.replaceAll("␣", "") === text
    : (token) => token.toLowerCase().includes(text.toLowerCase());
  return tokens.map(isMeant);
}

const atLeast = (value, limit) => limit === "" || value >= limit;
const atMost = (value, limit) => limit === "" || value <= limit;
// In single precision, in which the divergences are and were compared with beta
const single = (value) => (value === "" ? "" : Math.fround(value));

// Numbers of the kept steps that a query means
function findSteps(index, query) {
  const { row, position, taken, preferred, nats } = index.steps;
  const meant = query.token === "" ? null : matchTokens(index.tokens, query.token);
  const [low, high] = [single(query.low), single(query.high)];
  const found = [];
  for (let i = 0; i < position.length; i++) {
    if (meant && !((query.role !== "preferred" && meant[taken[i]]) || (query.role !== "taken" && meant[preferred[i]]))) continue;
    if (!(atLeast(nats[i], low) && atMost(nats[i], high))) continue; // nor where it is not known
    if (!(atLeast(position[i], query.from) && atMost(position[i], query.to))) continue;
    if (query.label !== "" && (taken[i] === preferred[i]) !== (query.label === "same")) continue;
    if (query.first !== "" && (position[i] === 0) !== (query.first === "only")) continue;
    if (query.answer !== "" && index.rows.answer[row[i]] !== Number(query.answer)) continue;
    found.push(i);
  }
  return found;
}

// Whether a query says anything of steps
function asksForSteps(query) {
  return ["token", "low", "high", "from", "to", "label", "first"].some((name) => query[name] !== "");
}

// Rows with one of these steps, or, if no step was asked for, all of them
function findRows(index, query, steps) {
  if (asksForSteps(query)) return [...new Set(steps.map((step) => index.steps.row[step]))];
  const rows = [...index.rows.kept.keys()];
  return query.answer === "" ? rows : rows.filter((row) => index.rows.answer[row] === Number(query.answer));
}

const STEP_KEYS = {
  row: (index, i) => index.steps.row[i],
  step: (index, i) => index.steps.position[i],
  taken: (index, i) => index.rank[index.steps.taken[i]],
  preferred: (index, i) => index.rank[index.steps.preferred[i]],
  nats: (index, i) => index.steps.nats[i],
};
const ROW_KEYS = {
  row: (index, i) => i,
  kept: (index, i) => index.rows.kept[i],
  length: (index, i) => index.rows.length[i],
  highest: (index, i) => index.rows.highest[i],
  answer: (index, i) => index.rows.answer[i],
};

// What was found in another order; equals stay in theirs, and what is not known comes last
function sortFound(index, found, key, isDescending) {
  const sign = isDescending ? -1 : 1;
  const values = Float64Array.from(found, (i) => {
    const value = key(index, i);
    return Number.isNaN(value) ? Infinity : sign * value;
  });
  const places = Uint32Array.from(found.keys());
  return [...places.sort((a, b) => (values[a] < values[b] ? -1 : values[a] > values[b] ? 1 : a - b))].map((place) => found[place]);
}

// "#row-12-step-7", "#dataset-2-row-12"
function writePlace({ dataset, row, step }) {
  return `${dataset ? `dataset-${dataset + 1}-` : ""}row-${row}${step === null ? "" : `-step-${step}`}`;
}

function readPlace(fragment) {
  const found = /^#?(?:dataset-(\d+)-)?row-(\d+)(?:-step-(\d+))?$/.exec(fragment);
  if (!found) return null;
  return { dataset: Number(found[1] ?? 1) - 1, row: Number(found[2]), step: found[3] === undefined ? null : Number(found[3]) };
}

// One row of a file: its texts, its divergences, and the labels at its kept steps
function readRow(file, data) {
  const [taken, nats, kept, sizes, label, probs] = ["taken", "nats", "kept", "sizes", "label", "probs"].map((name) => unpack(data[name]));
  const steps = new Map();
  let begin = 0;
  kept.forEach((position, k) => {
    const places = [...label.subarray(begin, begin + sizes[k])];
    const values = [...probs.subarray(begin, begin + sizes[k])];
    begin += sizes[k];
    if (!places.includes(taken[position])) {
      places.push(taken[position]);
      values.push(0);
    }
    const tokens = places.map((place) => file.tokens[place]);
    steps.set(position, { tokens, v: values, taken: places.indexOf(taken[position]) });
  });
  const special = new Set(file.special);
  return {
    prompt: data.prompt,
    text: data.text ?? null,
    tokens: [...taken].map((place) => file.tokens[place]),
    special: [...taken].map((place) => special.has(place)),
    nats,
    steps,
  };
}
