// A prompt with a budget and a policy, its streamed answer, and the proof of its compression.

import { byId, make, percent, setText, whole } from "./dom.js";
import { eventsOf, headers } from "./feed.js";
import { hideHeads, showHeads } from "./heads.js";
import { needleText } from "./needle.js";

const AS_CONFIGURED = "as configured";
const BUDGETS = [16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096];
const SKIPPED = {
  full_requested: "nothing was to be dropped", within_budget: "the prompt is within the budget", frees_nothing: "it would free no block",
  no_decode: "there is no answer to decode", shared_prefix: "other requests use its blocks", no_room: "there was no room", resumable: "the prompt goes on",
};
let compression = null;
let budgets = [];
let asking = null;

export function offer(facts) {
  compression = facts.compression;
  byId("sample").addEventListener("click", () => (byId("prompt").value = needleText()));
  byId("try-form").addEventListener("submit", (event) => {
    event.preventDefault();
    ask();
  });
  byId("stop").addEventListener("click", () => asking?.abort());
  const policies = compression ? [AS_CONFIGURED, ...compression.policies] : [AS_CONFIGURED];
  byId("policy").append(...policies.map((name) => make("option", { value: name === AS_CONFIGURED ? "" : name }, name)));
  const { min_budget_tokens: least = 0, max_budget_tokens: most = null } = compression ?? {};
  budgets = [null, ...(compression ? BUDGETS.filter((one) => one >= least && (most === null || one <= most)) : [])];
  const slider = byId("budget");
  slider.max = budgets.length - 1;
  slider.value = 0;
  slider.disabled = byId("policy").disabled = compression === null;
  slider.addEventListener("input", showBudget);
  showBudget();
}

function showBudget() {
  const budget = budgets[byId("budget").value];
  const text = budget === null ? AS_CONFIGURED : `${whole(budget)} entries a head`;
  setText(byId("budget-text"), text);
  byId("budget").setAttribute("aria-valuetext", text);
}

function requestOf() {
  const options = {};
  const policy = byId("policy").value, budget = budgets[byId("budget").value];
  if (policy) options.adakv_policy = policy;
  if (budget !== null) options.adakv_budget_tokens = budget;
  // Only a prompt that is compressed as a whole has a detail.
  if (compression?.detail) Object.assign(options, { adakv_detail: true, adakv_session: "off" });
  return {
    messages: [{ role: "user", content: byId("prompt").value }],
    max_completion_tokens: Number(byId("answer-tokens").value), temperature: 0, stream: true, stream_options: { include_usage: true },
    ...(Object.keys(options).length ? { vllm_xargs: options } : {}),
  };
}

async function post(path, body, signal) {
  const response = await fetch(path, {
    method: "POST", signal, headers: { ...headers(), "content-type": "application/json" }, body: JSON.stringify(body),
  });
  if (!response.ok) throw new Error((await response.json()).error.message);
  return response;
}

async function ask() {
  asking = new AbortController();
  byId("ask").disabled = true;
  byId("stop").hidden = false;
  byId("answer").classList.remove("failed");
  setText(byId("answer"), "");
  setText(byId("answer-note"), "waiting for the first token");
  byId("proof").replaceChildren();
  hideHeads();
  try {
    await answer(requestOf(), asking.signal);
  } catch (problem) {
    if (problem.name === "AbortError") setText(byId("answer-note"), "stopped");
    else {
      byId("answer").classList.add("failed");
      setText(byId("answer"), problem.message);
      setText(byId("answer-note"), "");
    }
  } finally {
    byId("ask").disabled = false;
    byId("stop").hidden = true;
  }
}

async function answer(request, signal) {
  const began = performance.now();
  const response = await post("v1/chat/completions", request, signal);
  const replica = response.headers.get("x-replica-id") ?? "";
  let first = null, usage = null, proof = null;
  for await (const { data } of eventsOf(response)) {
    if (data === "[DONE]") break;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Error(chunk.error.message);
    usage = chunk.usage ?? usage;
    proof = chunk.choices?.[0]?.kv_compression ?? proof;
    const text = chunk.choices?.[0]?.delta?.content;
    if (text) {
      first ??= performance.now();
      byId("answer").append(text);
      setText(byId("answer-note"), `replica ${replica}, first token after ${seconds(first - began)}`);
    }
  }
  const last = performance.now();
  if (usage && first !== null) {
    const pace = usage.completion_tokens > 1 ? `, ${((usage.completion_tokens - 1) / ((last - first) / 1000)).toFixed(1)} tokens/s` : "";
    setText(byId("answer-note"), `replica ${replica}, first token after ${seconds(first - began)}, ${whole(usage.completion_tokens)} tokens${pace}`);
  }
  showProof(proof);
  if (Array.isArray(proof?.detail?.kept)) showHeads(proof, await tokensOf(request, signal));
}

const seconds = (milliseconds) => `${(milliseconds / 1000).toFixed(2)} s`;

// The prompt's tokens as text; none if the server does not say.
async function tokensOf(request, signal) {
  try {
    const body = { messages: request.messages, add_generation_prompt: true, return_token_strs: true };
    return (await (await post("tokenize", body, signal)).json()).token_strs ?? [];
  } catch (problem) {
    if (problem.name === "AbortError") throw problem;
    return [];
  }
}

function showProof(proof) {
  if (!proof) {
    byId("proof").replaceChildren(make("p", { class: "note" }, "The answer has no proof: this server does not compress."));
    return;
  }
  const rows = [["policy", proof.policy]];
  if (proof.skipped !== null) {
    rows.push(["compressed", `no: ${SKIPPED[proof.skipped] ?? proof.skipped}`], ["cached tokens", whole(proof.original_tokens)], ["blocks", whole(proof.blocks_before)]);
  } else {
    rows.push(
      ["cached tokens", whole(proof.original_tokens)],
      ["kept in a head", `${whole(proof.kept_mean)} on average, ${whole(proof.kept_min)} to ${whole(proof.kept_max)} (${percent(proof.kept_mean / proof.original_tokens)})`],
      ["blocks", `${whole(proof.blocks_before)} before, ${whole(proof.blocks_after)} after`],
    );
  }
  if (proof.fallback) rows.push(["other than asked", proof.fallback]);
  if (proof.decode_budget_tokens) rows.push(["while decoding", `${whole(proof.decode_budget_tokens)} entries, ${whole(proof.decode_evictions)} evictions`]);
  const list = make("dl", {}, ...rows.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, `${value}`)]));
  const share = proof.blocks_after / Math.max(proof.blocks_before, 1);
  const fill = make("i", { class: "compressed" });
  fill.style.width = `${100 * Math.min(1, share)}%`;
  const bar = make("div", { class: "bar", role: "img", "aria-label": `${percent(share)} of the prompt's blocks are left` }, fill);
  byId("proof").replaceChildren(list, ...(proof.skipped === null ? [bar, make("p", { class: "note" }, `${percent(share)} of the prompt's blocks are left`)] : []));
}
