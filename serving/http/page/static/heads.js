// What each head kept of a prompt: a map of layers and heads, and the prompt's words.

import { byId, make, percent, setText, whole } from "./dom.js";

const GAP = 2, LEFT = 34, TOP = 16;

export const hideHeads = () => (byId("heads").hidden = true);

export function showHeads(proof, tokens) {
  byId("heads").hidden = false;
  const { kept, keeping } = proof.detail;
  drawMap(kept, proof.original_tokens);
  showWords(keeping, tokens, kept.length * kept[0].length);
}

// Layers from left to right, heads from top to bottom: models have more layers than heads.
function drawMap(kept, tokens) {
  const layers = kept.length, heads = kept[0].length, most = Math.max(...kept.flat());
  const width = Math.max(12, Math.min(30, Math.floor(1060 / layers) - GAP)), height = Math.max(10, Math.min(24, Math.floor(260 / heads) - GAP));
  const cells = kept.flatMap((row, layer) => row.map((entries, head) => {
    const text = `layer ${layer}, head ${head}: ${whole(entries)} of ${whole(tokens)} entries, ${percent(entries / tokens)}`;
    const cell = make("rect", {
      x: LEFT + layer * (width + GAP), y: TOP + head * (height + GAP), width, height, rx: 2, role: "img", tabindex: -1,
      "aria-label": text, "fill-opacity": (0.06 + (0.94 * entries) / most).toFixed(3), "data-layer": layer, "data-head": head,
    }, make("title", {}, text));
    cell.addEventListener("focus", () => setText(byId("head-text"), text));
    cell.addEventListener("pointerenter", () => setText(byId("head-text"), text));
    return cell;
  }));
  const marks = [];
  for (let layer = 0; layer < layers; layer += layers > 16 ? 5 : 1) marks.push(mark(LEFT + layer * (width + GAP) + width / 2, 11, "middle", layer));
  for (let head = 0; head < heads; head += heads > 16 ? 4 : 1) marks.push(mark(LEFT - 6, TOP + head * (height + GAP) + height / 2 + 3, "end", head));
  const size = { width: LEFT + layers * (width + GAP), height: TOP + heads * (height + GAP) };
  const map = make("svg", { ...size, viewBox: `0 0 ${size.width} ${size.height}`, role: "group", "aria-label": `${layers} layers and ${heads} heads` }, ...marks, ...cells);
  map.addEventListener("keydown", (event) => step(event, cells, layers, heads));
  cells[0].setAttribute("tabindex", 0);
  byId("heads-map").replaceChildren(map);
  const least = Math.min(...kept.flat());
  setText(byId("heads-text"), `Layers from left to right, KV heads from top to bottom. The darker a cell, the more of the prompt its head kept: ${whole(least)} to ${whole(most)} of ${whole(tokens)} entries. Arrow keys go from head to head.`);
  setText(byId("head-text"), "");
}

const mark = (x, y, anchor, text) => make("text", { x, y, "text-anchor": anchor, "aria-hidden": "true" }, `${text}`);

function step(event, cells, layers, heads) {
  const by = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
  const here = event.target.dataset;
  if (!by || here.layer === undefined) return;
  event.preventDefault();
  const layer = Math.min(layers - 1, Math.max(0, Number(here.layer) + by[0])), head = Math.min(heads - 1, Math.max(0, Number(here.head) + by[1]));
  event.target.setAttribute("tabindex", -1);
  const next = cells[layer * heads + head];
  next.setAttribute("tabindex", 0);
  next.focus();
}

function showWords(keeping, tokens, heads) {
  const words = byId("words");
  words.replaceChildren();
  if (!Array.isArray(keeping)) setText(byId("words-text"), "The prompt is too long for its words.");
  else if (tokens.length !== keeping.length) setText(byId("words-text"), "The server gave no text for the prompt's tokens.");
  else {
    setText(byId("words-text"), `The stronger a word is marked, the more of the ${whole(heads)} heads kept it.`);
    const texts = textsOf(tokens);
    keeping.forEach((count, index) => {
      const word = make("span", { title: `kept by ${whole(count)} of ${whole(heads)} heads` }, texts[index]);
      // Of most words few heads keep an entry: the root lets them be seen.
      const strength = Math.round(80 * Math.sqrt(count / heads));
      if (count > 0) word.style.background = `color-mix(in srgb, var(--compressed) ${strength}%, transparent)`;
      words.append(word);
    });
  }
}

// Vocabularies store bytes as printable characters (GPT-2's table), or spaces as a low block.
function textsOf(tokens) {
  const bytes = new Map();
  const printable = (code) => (code > 32 && code < 127) || (code > 160 && code < 173) || (code > 173 && code < 256);
  for (let code = 0, others = 256; code < 256; code++) bytes.set(printable(code) ? code : others++, code);
  const decoder = new TextDecoder();
  return tokens.map((token) => {
    const codes = [...token].map((character) => bytes.get(character.codePointAt(0)));
    const text = codes.includes(undefined) ? token : decoder.decode(Uint8Array.from(codes), { stream: true });
    return text.replaceAll("\u2581", " ");
  });
}
