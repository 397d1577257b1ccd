// Elements made of text and attributes, never of markup: whatever comes from outside stays text.

export const byId = (id) => document.getElementById(id);

export function make(tag, attributes = {}, ...children) {
  const svg = tag === "svg" || tag === "rect" || tag === "text" || tag === "title" || tag === "g";
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

export const whole = (number) => Math.round(number).toLocaleString("en");
export const percent = (share) => `${Math.round(share * 100)} %`;
export const rate = (number) => (number >= 100 ? whole(number) : number.toFixed(1));
export const clock = (seconds) => new Date(seconds * 1000).toLocaleTimeString("en-GB");
