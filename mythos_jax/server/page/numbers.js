// The live numbers beside an answer, and the scale of colours.

import { $, duration, make, paint, percent } from "./dom.js";

const SHOWN = 96; // bars of the spark line: those of the last tokens
const SVG = "http://www.w3.org/2000/svg";

export function drawLegend(most) {
  const cells = Math.min(most, 16);
  const swatches = Array.from({ length: cells }, (_, i) => {
    const swatch = make("i");
    paint(swatch, 1 + (i * (most - 1)) / Math.max(cells - 1, 1), most);
    return swatch;
  });
  const scale = make("div");
  scale.append(...swatches);
  $("legend").replaceChildren("1", scale, `${most} loops`);
  $("legend").setAttribute("aria-label", `Colours from 1 loop to ${most} loops`);
  $("spark").setAttribute("viewBox", `0 0 ${SHOWN} ${most}`);
}

function drawSpark(answer) {
  const bars = answer.tokens.slice(-SHOWN).map((token, i) => {
    const bar = document.createElementNS(SVG, "rect");
    const box = { x: i + 0.1, y: answer.most - token.loops, width: 0.8, height: token.loops };
    for (const [name, value] of Object.entries(box)) bar.setAttribute(name, value);
    paint(bar, token.loops, answer.most);
    return bar;
  });
  $("spark").replaceChildren(...bars);
  $("spark").setAttribute("aria-label", `Loops of the last ${bars.length} tokens`);
}

export function draw(answer) {
  const { count, mean, saved, rate } = answer.numbers();
  $("rate").textContent = rate ? rate.toFixed(rate < 10 ? 1 : 0) : "–";
  $("first").textContent = count ? duration(answer.first) : "–";
  $("mean").textContent = count ? `${mean.toFixed(1)} of ${answer.full}` : "–";
  $("saved").textContent = count ? percent(saved) : "–";
  $("saving").style.setProperty("--spent", count ? 1 - saved : 0);
  $("saving").setAttribute("aria-label", count ? `${percent(1 - saved)} of the loops of full depth` : "No loops yet");
  $("drafts").textContent = drafts(answer);
  drawSpark(answer);
}

const drafts = ({ confirmed, drafted }) => (drafted ? `${confirmed} of ${drafted} drafts kept` : "");

// The same in one line, which stays below an answer.
export function summary(answer) {
  const { count, mean, saved, rate } = answer.numbers();
  if (!count) return "";
  const parts = [`${count} token${count === 1 ? "" : "s"}${rate ? ` at ${rate.toFixed(rate < 10 ? 1 : 0)}/s` : ""}`];
  if (answer.most > 1) parts.push(`${mean.toFixed(1)} of ${answer.full} loops`, `${percent(saved)} saved`);
  parts.push(drafts(answer));
  return parts.filter(Boolean).join(" · ");
}
