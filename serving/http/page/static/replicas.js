// A row for each replica: a bar of its blocks, and its figures.

import { byId, make, percent, rate, setText, whole } from "./dom.js";

const PARTS = ["compressed", "whole", "growth", "held"];
const STATES = ["fresh", "silent", "gone"];
const SHOWN = { fresh: "", silent: "no report", gone: "gone" };
const MANY = 16;
const rows = new Map();

// Parts of a bar, in blocks. Growth and held caches lie in the free blocks; growth may take all.
function partsOf(replica) {
  const growth = Math.min(replica.growth, replica.free);
  const held = Math.min(replica.held, replica.free - growth);
  return { compressed: replica.compressed, whole: replica.whole, growth, held };
}

function describe(replica) {
  const parts = [
    [replica.compressed, "compressed"], [replica.whole, "in whole prompts"],
    [replica.growth, "growth to come"], [replica.held, "in held sessions"], [replica.free, "free"],
    [replica.lent, "lent"], [replica.borrowed, "borrowed"],
  ].filter(([blocks]) => blocks > 0);
  return `${whole(replica.total)} blocks: ${parts.map(([blocks, name]) => `${whole(blocks)} ${name}`).join(", ")}`;
}

function newRow(replica) {
  const bar = make("div", { class: "bar", role: "img" }, ...PARTS.map((part) => make("i", { class: part })));
  const lanes = ["lent", "borrowed"].map((kind) => make("div", { class: "lane" }, make("i", { class: kind })));
  const state = make("span", { class: "state" });
  const figures = ["Used", "Running", "Waiting", "Tok/s", "Kept", "Preempted"].map((label) => make("td", { "data-label": label }));
  const row = make("tr", { "data-replica": replica.id },
    make("td", {}, make("span", {}, replica.id), state), make("td", {}, bar, ...lanes), ...figures);
  return { row, bar, lanes, state, figures };
}

function show({ row, bar, lanes, state, figures }, replica) {
  const total = Math.max(replica.total, 1), parts = partsOf(replica);
  row.dataset.state = STATES[replica.state];
  setText(state, SHOWN[row.dataset.state]);
  PARTS.forEach((part, index) => (bar.children[index].style.width = `${(100 * parts[part]) / total}%`));
  const text = describe(replica);
  bar.setAttribute("aria-label", text);
  bar.title = text;
  [replica.lent, replica.borrowed].forEach((blocks, index) => {
    lanes[index].classList.toggle("used", blocks > 0);
    lanes[index].firstChild.style.width = `${Math.min(100, (100 * blocks) / total)}%`;
  });
  const gone = replica.state === 2;
  const texts = [
    percent(1 - replica.free / total), whole(replica.running), whole(replica.waiting),
    rate(replica.decode_tokens_per_s), replica.compressed ? percent(replica.kept) : "-", whole(replica.preemptions),
  ];
  texts.forEach((text, index) => setText(figures[index], gone ? "-" : text));
}

export function showReplicas(changed, left, isWhole) {
  const body = byId("replica-table").tBodies[0];
  if (isWhole) {
    const names = new Set(changed.map((replica) => replica.id));
    left = [...rows.keys()].filter((name) => !names.has(name));
  }
  for (const name of left) {
    rows.get(name)?.row.remove();
    rows.delete(name);
  }
  for (const replica of changed) {
    if (!rows.has(replica.id)) {
      rows.set(replica.id, newRow(replica));
      body.append(rows.get(replica.id).row);
    }
    show(rows.get(replica.id), replica);
  }
  byId("replica-table").classList.toggle("many", rows.size > MANY);
  byId("replica-table").hidden = rows.size === 0;
}
