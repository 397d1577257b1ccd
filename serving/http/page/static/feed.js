// Server-sent events over fetch, which unlike EventSource can present a key.

const KEY = "adakv-key";

export const storedKey = () => sessionStorage.getItem(KEY);
export const storeKey = (key) => sessionStorage.setItem(KEY, key);
export const forgetKey = () => sessionStorage.removeItem(KEY);

export function headers() {
  const key = storedKey();
  return key === null ? {} : { authorization: `Bearer ${key}` };
}

// Yields {event, data} of a response's body; `data` is text.
export async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      text += value;
      const events = text.split(/\r?\n\r?\n/);
      text = events.pop();
      for (const lines of events) {
        const event = { event: "message", data: "" };
        for (const line of lines.split(/\r?\n/)) {
          if (line.startsWith("event:")) event.event = line.slice(6).trim();
          else if (line.startsWith("data:")) event.data += line.slice(5).trimStart();
        }
        if (event.data) yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

export class KeyRefused extends Error {}

// Follows the feed for ever. `on` has facts(data), state(data), live() and lost(problem).
export async function follow(on) {
  for (let failures = 0; ; ) {
    try {
      const response = await fetch("page/feed", { headers: headers(), cache: "no-store" });
      if (response.status === 401) throw new KeyRefused();
      if (!response.ok) throw new Error((await response.json()).error.message);
      on.live();
      for await (const { event, data } of eventsOf(response)) {
        failures = 0;
        on[event]?.(JSON.parse(data));
      }
    } catch (problem) {
      if (problem instanceof KeyRefused) throw problem;
      failures += 1;
      on.lost(problem instanceof TypeError ? "no connection" : problem.message);
    }
    // A feed ends now and then; only failures make it wait for long.
    await new Promise((done) => setTimeout(done, Math.min(200 * 2 ** failures, 5000)));
  }
}
