// The last minutes as lines, by uPlot where the server has it.

import { byId, make, percent, rate, setText, whole } from "./dom.js";

const MOST = 300, SHOWN_S = 300;
const CHARTS = [
  { title: "Tokens a second", lines: [["answers", "decode_tokens_per_s", "--compressed"], ["prompts", "prefill_tokens_per_s", "--lent"]], text: rate },
  { title: "Requests", lines: [["running", "running", "--compressed"], ["waiting", "waiting", "--lent"]], text: whole },
  { title: "Blocks in use", lines: [["of all blocks", "used_share", "--compressed"]], text: percent, top: 1 },
  { title: "Requests a second", lines: [["preempted", "preempted_per_s", "--bad"], ["moved", "moved_per_s", "--borrowed"]], text: rate },
];

let samples = [];
let made = [];
const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function columns(chart) {
  return [samples.map((one) => one.at_s), ...chart.lines.map(([, field]) => samples.map((one) => one[field]))];
}

function plot(chart, place) {
  const axis = { stroke: color("--soft"), grid: { stroke: color("--line"), width: 1 }, ticks: { show: false }, font: "11px system-ui, sans-serif" };
  return new uPlot({
    width: place.clientWidth, height: 130, legend: { show: false }, cursor: { y: false, points: { size: 5 }, drag: { x: false } },
    scales: { x: { time: true, range: (_, least, most) => [most - SHOWN_S, most] }, y: { range: (_, least, most) => [0, chart.top ?? Math.max(1, most * 1.1)] } },
    axes: [
      { ...axis, size: 24, incrs: [60], values: (_, times) => times.map((at) => new Date(at * 1000).toLocaleTimeString("en-GB", { hour: "2-digit", minute: "2-digit" })) },
      { ...axis, size: 44, gap: 6, space: 34, values: (_, numbers) => numbers.map((number) => (chart.top ? percent(number) : number >= 10000 ? `${number / 1000}k` : `${number}`)) },
    ],
    series: [{}, ...chart.lines.map(([label, , name]) => ({ label, stroke: color(name), width: 1.5, points: { show: false } }))],
    hooks: { setCursor: [(self) => caption(chart, self.cursor.idx)] },
  }, columns(chart), place);
}

// The newest figures, or those under the pointer.
function caption(chart, index) {
  const sample = samples[index ?? samples.length - 1];
  if (sample) chart.values.forEach((value, line) => setText(value, chart.text(sample[chart.lines[line][1]])));
}

function build() {
  for (const { instance } of made) instance?.destroy();
  byId("charts").replaceChildren();
  made = CHARTS.map((chart) => {
    chart.values = chart.lines.map(() => make("b"));
    const labels = chart.lines.map(([label, , name], line) => {
      const mark = make("i");
      mark.style.background = `var(${name})`;
      return make("span", {}, mark, `${label} `, chart.values[line]);
    });
    const place = make("div", { "aria-hidden": "true" });
    byId("charts").append(make("figure", {}, make("figcaption", {}, make("b", {}, chart.title), ...labels), place));
    return { chart, place, instance: window.uPlot ? plot(chart, place) : null };
  });
  draw();
}

function draw() {
  for (const { chart, instance } of made) {
    instance?.setData(columns(chart));
    caption(chart, instance?.cursor.idx);
  }
}

// Large fleets have more than a second between two samples.
function withShares(sample, before) {
  const gap_s = before ? sample.at_s - before.at_s : 1;
  return {
    ...sample, used_share: sample.used_blocks / Math.max(sample.total_blocks, 1),
    preempted_per_s: sample.preempted / gap_s, moved_per_s: sample.moved / gap_s,
  };
}

export function addSamples(added) {
  const newest = samples.at(-1)?.at_s ?? 0;
  for (const one of added) if (one.at_s > newest) samples.push(withShares(one, samples.at(-1)));
  samples = samples.slice(-MOST);
  if (!made.length) build();
  else draw();
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => made.length && build());
addEventListener("resize", () => {
  for (const { place, instance } of made) instance?.setSize({ width: place.clientWidth, height: 130 });
});
