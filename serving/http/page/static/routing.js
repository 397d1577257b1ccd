// What this ingress has decided, and what has happened to the replicas.

import { byId, clock, make, setText, whole } from "./dom.js";

const REASONS = {
  least_cost: "least cost", affinity: "prefix cached there", session: "session was there", only_room: "only one with room",
  least_wait: "least wait, all full", fits_nowhere: "fits nowhere", no_footprint: "not predicted", no_reports: "no reports",
};
const EVENTS = {
  joined: () => "joined", silent: () => "sends no reports", back: () => "reports again", gone: () => "is gone",
  restarted: () => "has started anew", moved: (count) => `moved ${requests(count)} to other replicas`,
  returned: (count) => `took ${requests(count)} back after failed moves`, preempted: (count) => `preempted ${requests(count)}`,
  lends: (count) => `lends ${whole(count)} blocks`,
};
const BAD = new Set(["silent", "gone", "returned"]);
const MOST = 12, MOST_EVENTS = 30;
const requests = (count) => `${whole(count)} request${count === 1 ? "" : "s"}`;
const seconds = (number) => (number < 1 ? `${Math.round(number * 1000)} ms` : `${number.toFixed(1)} s`);

export function showReasons(reasons) {
  const sorted = Object.entries(reasons).sort(([, one], [, other]) => other - one);
  const most = Math.max(1, ...sorted.map(([, count]) => count));
  byId("reasons").replaceChildren(...sorted.map(([reason, count]) => {
    const fill = make("i");
    fill.style.width = `${(100 * count) / most}%`;
    return make("li", {}, make("span", {}, REASONS[reason] ?? reason), make("span", { class: "track" }, fill), make("span", { class: "count" }, whole(count)));
  }));
}

export function showDecisions(decisions, isWhole) {
  const body = byId("decisions").tBodies[0];
  if (isWhole) body.replaceChildren();
  for (const one of decisions) {
    const cells = [clock(one.at_s), one.replica_id, REASONS[one.reason] ?? one.reason, whole(one.prompt_tokens), whole(one.cached_tokens), seconds(one.first_token_s)];
    body.prepend(make("tr", {}, ...cells.map((text) => make("td", {}, text))));
  }
  while (body.rows.length > MOST) body.lastChild.remove();
}

let lastEvent = 0;

// Another ingress has other events, with numbers of their own.
export function forgetEvents() {
  byId("events").replaceChildren();
  lastEvent = 0;
}

// A whole state repeats events, which screen readers would read aloud again.
export function showEvents(events) {
  const list = byId("events");
  for (const { number, at_s, kind, replica_id, count } of events) {
    if (number <= lastEvent) continue;
    lastEvent = number;
    const text = make("span", BAD.has(kind) ? { class: "bad" } : {}, make("span", { class: "id" }, replica_id), ` ${EVENTS[kind]?.(count) ?? kind}`);
    list.prepend(make("li", {}, make("time", {}, clock(at_s)), text));
  }
  while (list.children.length > MOST_EVENTS) list.lastChild.remove();
  if (!list.children.length) list.append(make("li", { class: "note", id: "no-events" }, "none so far"));
  else if (list.children.length > 1) byId("no-events")?.remove();
}

export function showIngress(facts) {
  setText(byId("ingress"), facts.ingress ? `of the ingress ${facts.ingress}, since its start` : `by Ray Serve: routing.policy is ${facts.routing}`);
}
