// The fleet page: asks for a key where one is needed, follows the feed, and shows it.

import { addSamples } from "./charts.js";
import { byId, make, percent, rate, setText, whole } from "./dom.js";
import { follow, forgetKey, KeyRefused, storedKey, storeKey } from "./feed.js";
import { showReplicas } from "./replicas.js";
import { forgetEvents, showDecisions, showEvents, showIngress, showReasons } from "./routing.js";
import { offer } from "./tryit.js";

let facts = null;

const named = (fields, values) => Object.fromEntries(fields.map((field, index) => [field, values[index]]));

function showStatus(state, text) {
  byId("status").dataset.state = state;
  setText(byId("status"), text);
}

function showTotals(fleet, scale) {
  const bounds = scale?.most ? ` (${scale.least} to ${scale.most})` : "";
  const target = scale ? `target ${scale.target}${bounds}` : "";
  const tiles = [
    ["Replicas", whole(fleet.replicas), target], ["Running", whole(fleet.running), ""], ["Waiting", whole(fleet.waiting), ""],
    ["Answers, tokens/s", rate(fleet.decode_tokens_per_s), ""], ["Prompts, tokens/s", rate(fleet.prefill_tokens_per_s), ""],
    ["Blocks in use", percent(fleet.used_blocks / Math.max(fleet.total_blocks, 1)), `of ${whole(fleet.total_blocks)}`],
  ];
  const totals = byId("totals");
  if (!totals.children.length) {
    totals.append(...tiles.map(([name]) => make("div", {}, make("dt", {}, name), make("dd", {}, make("span"), make("small")))));
  }
  tiles.forEach(([, value, more], index) => {
    const [text, small] = totals.children[index].lastChild.children;
    setText(text, value);
    setText(small, more);
  });
}

const on = {
  live: () => showStatus("live", "live"),
  lost: (problem) => showStatus("lost", `reconnecting: ${problem}`),
  facts(data) {
    const isNew = facts === null;
    if (facts?.ingress !== data.ingress) forgetEvents();
    facts = data;
    byId("fleet").hidden = false;
    byId("key-form").hidden = true;
    setText(byId("application"), data.application);
    setText(byId("no-replicas"), data.ingress ? "" : `This ingress follows no reports, since routing.policy is ${data.routing}.`);
    showIngress(data);
    addSamples(data.history.map((values) => named(data.sample_fields, values)));
    if (isNew) offer(data);
  },
  state(data) {
    showReplicas(data.rows.map((values) => named(facts.fields, values)), data.left, data.whole);
    if (data.fleet) {
      const fleet = named(facts.sample_fields, data.fleet);
      showTotals(fleet, data.scale);
      addSamples([fleet]);
    }
    showReasons(data.reasons);
    showDecisions(data.decisions, data.whole);
    const events = data.events.map((values) => named(["number", "at_s", "kind", "replica_id", "count"], values));
    showEvents(events);
  },
};

function askForKey(problem) {
  showStatus("waiting", "needs a key");
  byId("fleet").hidden = true;
  byId("key-form").hidden = false;
  setText(byId("key-problem"), problem);
  byId("key").focus();
}

let isFollowing = false;

// A feed that is followed already takes the newest key with its next try.
async function start() {
  if (isFollowing) return;
  isFollowing = true;
  showStatus("waiting", "connecting");
  try {
    await follow(on);
  } catch (problem) {
    isFollowing = false;
    if (!(problem instanceof KeyRefused)) throw problem;
    const had = storedKey() !== null;
    forgetKey();
    askForKey(had ? "This key is not known here." : "");
  }
}

byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  storeKey(byId("key").value.trim());
  byId("key").value = "";
  setText(byId("key-problem"), "");
  start();
});

if (document.body.dataset.needsKey === "true" && storedKey() === null) askForKey("");
else start();
