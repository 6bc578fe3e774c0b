// The card of a token: loops, time, probability and the alternatives, on hover, focus or tap.

import { $, duration, make, paint, percent } from "./dom.js";

const card = $("card");
let shown = null; // the token that the card is of
let pinned = false; // by focus, which a click or a tap gives too: then pointing at other tokens changes nothing

// Spaces and line breaks made visible.
function visible(text) {
  return text.replaceAll(" ", "·").replaceAll("\n", "↵").replaceAll("\t", "⇥") || "(part of a character)";
}

function row(name, value) {
  const line = make("div");
  line.append(make("dt", "", name), make("dd", "", value));
  return line;
}

function alternative([text, logprob], chosen) {
  const line = make("li", text === chosen ? "chosen" : "");
  line.style.setProperty("--p", Math.exp(logprob).toFixed(3));
  line.append(make("span", "", visible(text)), make("span", "", percent(Math.exp(logprob))));
  return line;
}

function fill(told) {
  const title = make("p", "title");
  const swatch = make("span", "swatch deep", `${told.loops}`);
  paint(swatch, told.loops, told.most);
  title.append(make("b", "", visible(told.text)), swatch);
  const facts = make("dl");
  if (told.most > 1) facts.append(row("loops", `${told.loops} of ${told.full}`));
  facts.append(row("time", `${duration(told.since)}, at ${duration(told.ms)}`));
  if (typeof told.logprob === "number") facts.append(row("probability", percent(Math.exp(told.logprob))));
  if (told.instead) facts.append(row("draft said", visible(told.instead)));
  card.replaceChildren(title, facts);
  if (told.top?.length) {
    const list = make("ol");
    list.append(...told.top.map((one) => alternative(one, told.text)));
    card.append(list);
  }
}

function show(token) {
  if (token === shown) return;
  hide();
  shown = token;
  fill(token.told);
  card.hidden = false;
  token.classList.add("shown");
  token.setAttribute("aria-describedby", "card");
  place(token);
}

// Above the token if there is room.
function place(token) {
  const at = token.getClientRects()[0] ?? token.getBoundingClientRect();
  const { offsetWidth: width, offsetHeight: height } = card;
  const above = at.top - height - 6;
  card.style.left = `${Math.max(8, Math.min(at.left, innerWidth - width - 8))}px`;
  card.style.top = `${above >= 8 ? above : Math.min(at.bottom + 6, innerHeight - height - 8)}px`;
}

export function hide() {
  shown?.classList.remove("shown");
  shown?.removeAttribute("aria-describedby");
  shown = null;
  pinned = false;
  card.hidden = true;
}

const tokenOf = (event) => event.target.closest?.(".token");

// Left, right, Home and End go from token to token.
function walk(event) {
  const token = tokenOf(event);
  if (!token) return;
  const all = [...token.closest(".answer").querySelectorAll(".token:not(:empty)")];
  const step = { ArrowLeft: -1, ArrowRight: 1, Home: -all.length, End: all.length }[event.key];
  if (!step) return;
  event.preventDefault();
  const next = all[Math.max(0, Math.min(all.indexOf(token) + step, all.length - 1))];
  token.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
}

export function watch(talk) {
  talk.addEventListener("pointerover", (event) => {
    if (!pinned && tokenOf(event) && event.pointerType !== "touch") show(tokenOf(event));
  });
  talk.addEventListener("pointerout", () => pinned || hide());
  talk.addEventListener("click", (event) => tokenOf(event)?.focus()); // not every browser does so itself
  talk.addEventListener("focusin", (event) => {
    if (!tokenOf(event)) return;
    show(tokenOf(event));
    pinned = true;
  });
  talk.addEventListener("focusout", hide);
  talk.addEventListener("scroll", () => (pinned ? place(shown) : hide())); // focus itself may scroll
  talk.addEventListener("keydown", walk);
  document.addEventListener("keydown", (event) => event.key === "Escape" && hide());
  document.addEventListener("click", (event) => tokenOf(event) || hide());
}
