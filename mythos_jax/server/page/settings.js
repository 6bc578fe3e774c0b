// What the reader chooses, as fields of a request.

import { $ } from "./dom.js";

// The threshold of each criterion runs from `least` thought to `most`, on a logarithmic scale; that of a probability
// is logarithmic in what is `missing` to 1. Without `start` the model has a threshold of its own.
const LOOPS = "loops"; // as many as the model may run
const CRITERIA = {
  predicted: {
    least: 1, most: LOOPS,
    rule: "A trained predictor gives each token its loops: so many on average.",
  },
  act: {
    least: 0.5, most: 0.999, missing: true,
    rule: "Stops once the halting probabilities add up to this.",
  },
  gate: {
    least: 0.5, most: 0.999, missing: true, start: 0.9,
    rule: "Stops once the exit gate is as sure as this.",
  },
  latent: {
    least: 1, most: 1e-3, start: 0.03,
    rule: "Stops once a loop changes the state by less, as a part of its size.",
  },
  cosine: {
    least: 0.1, most: 1e-5, start: 1e-3,
    rule: "Stops once a loop turns the state by less (1 − cosine).",
  },
  kl: {
    least: 0.1, most: 1e-5, start: 5e-4, logits: true,
    rule: "Stops once a loop moves the prediction by fewer nats.",
  },
  entropy: {
    least: 0.1, most: 1e-5, start: 1e-3, logits: true,
    rule: "Stops once a loop changes the entropy of the prediction by fewer nats.",
  },
  argmax: {
    least: 1, most: LOOPS, start: 5, whole: true, logits: true,
    rule: "Stops once the likeliest token has stayed the same so many times.",
  },
};

let own = false; // the threshold is the model's own, until the slider is moved

const chosen = () => CRITERIA[$("halting").value];
const end = (criterion) => (criterion.most === LOOPS ? Math.max(2, Number($("loops").max)) : criterion.most);
const side = (criterion, value) => (criterion.missing ? 1 - value : value);

function threshold() {
  const criterion = chosen();
  const [from, to] = [side(criterion, criterion.least), side(criterion, end(criterion))];
  const value = side(criterion, from * (to / from) ** Number($("threshold").value));
  if (criterion.whole) return Math.round(value);
  return criterion.missing ? Number(value.toFixed(3)) : Number(value.toPrecision(2));
}

function place(criterion, value) {
  const [from, to] = [side(criterion, criterion.least), side(criterion, end(criterion))];
  $("threshold").step = "any"; // so that the default is met exactly
  $("threshold").value = Math.log(side(criterion, value) / from) / Math.log(to / from);
}

function choose() {
  const criterion = chosen();
  own = criterion !== undefined && criterion.start === undefined;
  if (own) $("threshold").value = 0.5;
  else if (criterion) place(criterion, criterion.whole ? Math.min(criterion.start, end(criterion)) : criterion.start);
  describe();
}

function describe() {
  const criterion = chosen();
  $("loops-says").textContent = $("loops").value;
  const temperature = Number($("temperature").value);
  $("temperature-says").textContent = temperature ? temperature.toFixed(2) : "0: the likeliest";
  $("by").hidden = !criterion;
  if (criterion) {
    const text = own ? "the model’s own" : `${threshold()}`;
    $("threshold-says").textContent = text;
    $("threshold").setAttribute("aria-valuetext", text);
    $("rule").textContent = criterion.rule;
  }
  $("provisional").disabled = Boolean(criterion?.logits);
  $("why").textContent = criterion?.logits
    ? "Not with a criterion that looks at the prediction after each loop."
    : "Drafts from a few loops appear in grey; full depth confirms them or takes them back.";
}

// Fits the controls to a model, as /v1/models describes it.
export function fit(model) {
  const { loops = 1, max_loops = loops, max_length, halting = [], chat = false, predictor = false, defaults } = model;
  document.body.classList.toggle("dense", max_loops < 2);
  $("loops").max = max_loops;
  $("loops").value = defaults?.loops ?? loops;
  $("limit").max = max_length ?? "";
  $("limit").value = Math.min(256, Math.floor((max_length ?? 512) / 2)); // leaves room for the prompt
  $("chat").hidden = !chat;
  $("stops").hidden = !halting.length;
  $("halting").replaceChildren($("halting").options[0], ...halting.map((name) => new Option(name)));
  const trained = Object.keys(CRITERIA).filter((name) => name !== "predicted" || predictor);
  // The server's own policy; without one, what the model was trained for comes first.
  const [policy, value] = defaults?.halting?.split(":") ?? [trained.find((name) => halting.includes(name)) ?? ""];
  $("halting").value = policy;
  choose();
  if (value === undefined) return;
  own = false;
  place(chosen(), Number(value));
  describe();
}

function halting() {
  const criterion = $("halting").value || null;
  return own || !chosen() ? criterion : `${criterion}:${threshold()}`;
}

export function request() {
  const dense = Number($("loops").max) < 2;
  const [limit, seed] = [$("limit").valueAsNumber, $("seed").valueAsNumber]; // NaN if nothing is written there
  return {
    temperature: Number($("temperature").value),
    ...(limit >= 1 && { max_tokens: Math.floor(limit) }),
    ...(seed >= 0 && { seed: Math.floor(seed) }),
    ...(!dense && { loops: Number($("loops").value) }),
    ...(!dense && { halting: halting() }), // null, so that a default of the server's does not stop it early
    ...(!dense && $("provisional").checked && !$("provisional").disabled && { provisional: true }),
  };
}

export function watch() {
  $("halting").addEventListener("change", choose);
  $("threshold").addEventListener("input", () => (own = false));
  $("controls").addEventListener("input", describe);
  $("controls").addEventListener("submit", (event) => event.preventDefault());
  // Beside the conversation there is room for the settings; on a narrow screen they open on demand.
  const wide = matchMedia("(min-width: 60rem)");
  const open = () => ($("settings").open = wide.matches);
  wide.addEventListener("change", open);
  open();
}
