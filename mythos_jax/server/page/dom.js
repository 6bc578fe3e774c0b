// Making elements. All text goes through textContent: what a model writes never becomes markup.

export const $ = (id) => document.getElementById(id);

export function make(tag, className = "", text = "") {
  const element = document.createElement(tag);
  element.className = className;
  element.textContent = text;
  return element;
}

export function button(label, action) {
  const element = make("button", "", label);
  element.type = "button";
  element.addEventListener("click", action);
  return element;
}

// Where a number of loops lies on the scale of colours, from 0 (one loop) to 1 (as many as this model may run).
export function paint(element, loops, most) {
  element.style.setProperty("--h", most > 1 ? ((loops - 1) / (most - 1)).toFixed(3) : 0);
}

export function duration(ms) {
  return ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(ms < 10_000 ? 2 : 1)} s`;
}

export function percent(fraction) {
  return fraction > 0 && fraction < 0.005 ? "< 1 %" : `${Math.round(fraction * 100)} %`;
}
