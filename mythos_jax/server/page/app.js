// Talks with the model, and shows what it spends on each token.

import { Answer } from "./answer.js";
import * as api from "./api.js";
import * as card from "./card.js";
import { $, button, make } from "./dom.js";
import * as numbers from "./numbers.js";
import * as settings from "./settings.js";

const EXAMPLES = {
  chat: ["Why is the sky blue?", "What is 17 × 23?", "Write a haiku about depth."],
  text: ["Once upon a time", "The capital of France is", "def fibonacci(n):"],
};

const talk = $("talk");
let model = null; // as /v1/models describes it
let turns = []; // {question, element, answer}
let forgotten = 0; // the first turns, which the model is not told of any more: the conversation became too long for it
let running = null; // aborts the request under way
let following = true; // the reader is at the end, so the text may scroll
let lastTop = 0; // where the reader was last
let drawing = null; // the answer whose numbers the next frame shows

// For an answer that is being written: many tokens may come within one frame.
function drawSoon(answer) {
  if (!drawing) requestAnimationFrame(() => drawing && draw(drawing));
  drawing = answer;
}

function draw(answer) {
  drawing = null;
  numbers.draw(answer);
  if (!following || talk.scrollTop < lastTop) return; // the reader has just scrolled up, and the event is to come
  talk.scrollTop = talk.scrollHeight;
  lastTop = talk.scrollTop;
}

function body(turn) {
  const asked = { model: model.id, ...settings.request() };
  if (!model.mythos.chat) return { ...asked, prompt: turn.question, logprobs: 5 };
  const system = $("system").value.trim();
  const before = turns.slice(forgotten, turns.indexOf(turn)).filter(({ answer }) => answer.text);
  const messages = [
    ...(system ? [{ role: "system", content: system }] : []),
    ...before.flatMap(({ question, answer }) => [
      { role: "user", content: question },
      { role: "assistant", content: answer.text },
    ]),
    { role: "user", content: turn.question },
  ];
  return { ...asked, messages, logprobs: true, top_logprobs: 5 };
}

// Says what has become a whole sentence, or all of it at the end.
function speaker() {
  let said = 0;
  $("spoken").replaceChildren();
  return (text, ended) => {
    const whole = ended ? text.length : Math.max(...[". ", "? ", "! ", "\n"].map((end) => text.lastIndexOf(end) + 1));
    if (whole > said) $("spoken").append(make("p", "", text.slice(said, whole)));
    said = Math.max(said, whole);
  };
}

async function run(turn) {
  const chat = model.mythos.chat;
  const text = make("div", "answer waiting");
  const foot = make("footer");
  if (!chat) text.append(make("span", "given", turn.question));
  turn.answer = new Answer(text, model.mythos.max_loops ?? 1, settings.request().loops ?? 1);
  if (turn.element.contains(document.activeElement)) talk.focus({ preventScroll: true }); // its button goes
  turn.element.querySelectorAll(".answer, footer, .error").forEach((old) => old.remove());
  turn.element.append(text, foot);
  document.querySelectorAll("#talk footer .again").forEach((old) => old.remove());
  card.hide();
  const mine = (running = new AbortController());
  following = true;
  lastTop = 0;
  busy(true);
  draw(turn.answer);
  const say = speaker();
  const end = await reply(turn, chat ? "v1/chat/completions" : "v1/completions", say, mine.signal);
  if (!turns.includes(turn)) return; // cleared, and another one may be running
  running = null;
  busy(false);
  turn.answer.end();
  text.classList.remove("waiting");
  say(turn.answer.text, true);
  finish(turn, foot, end);
}

// As `follow`. A conversation that is too long for the model loses its first turns, one after the other.
async function reply(turn, path, say, signal) {
  for (;;) {
    const end = await follow(turn.answer, path, body(turn), say, signal);
    if (end.error?.code !== "context_length_exceeded" || forgotten >= turns.indexOf(turn)) return end;
    forgotten += 1;
  }
}

// Takes a streamed answer in; returns how it ended.
async function follow(answer, path, content, say, signal) {
  let reason = "";
  try {
    for await (const { choices } of api.stream(path, content, signal)) {
      signal.throwIfAborted(); // what had come before
      if (!choices?.length) continue; // usage
      answer.take(choices[0]);
      reason = choices[0].finish_reason ?? reason;
      answer.element.classList.toggle("waiting", !answer.tokens.length && !answer.drafts.size);
      say(answer.text);
      drawSoon(answer);
    }
    return { note: reason === "length" ? "token limit" : "" };
  } catch (error) {
    if (error.name === "AbortError") return { note: "stopped" };
    return { error };
  }
}

function finish(turn, foot, { note, error }) {
  const { answer } = turn;
  const gone = forgotten === 1 ? "question" : `${forgotten} questions`;
  const without = forgotten && `the model no longer sees the first ${gone}`;
  foot.append(make("span", "", [numbers.summary(answer), note, without].filter(Boolean).join(" · ")));
  if (error) fail(turn, error);
  if (answer.text) foot.append(button("Copy", (event) => copy(event.target, answer)));
  const again = button(error ? "Try again" : "Regenerate", () => running || run(turn));
  again.classList.add("again");
  foot.append(again);
  draw(answer);
}

function fail(turn, error) {
  const line = make("p", "error", error instanceof api.Failure ? error.message : `The page failed: ${error.message}`);
  line.setAttribute("role", "alert");
  turn.element.insertBefore(line, turn.element.lastChild);
  if (error.status === 401) askForKey();
  if (error.status === 0 || error.status === 503) connect();
}

// Browsers let only local pages and those with https write to the clipboard; on others the text is selected.
async function copy(from, answer) {
  const done = await navigator.clipboard?.writeText(answer.text).then(() => true, () => false);
  if (!done) getSelection().selectAllChildren(answer.element);
  from.textContent = done ? "Copied" : "Selected";
  setTimeout(() => (from.textContent = "Copy"), 1500);
}

function busy(now) {
  const held = [$("send"), $("stop")].includes(document.activeElement);
  $("send").hidden = now;
  $("stop").hidden = !now;
  if (held) (now ? $("stop") : $("prompt")).focus();
  $("clear").hidden = !turns.length;
  $("empty").hidden = turns.length > 0;
}

function send(question) {
  if (!question.trim() || !model || running) return;
  const element = make("article");
  if (model.mythos.chat) element.append(make("p", "question", question));
  const turn = { question, element };
  turns.push(turn);
  talk.append(element);
  $("prompt").value = "";
  run(turn);
}

function clear() {
  running?.abort();
  running = null;
  turns.forEach(({ element }) => element.remove());
  turns = [];
  forgotten = 0;
  card.hide();
  busy(false);
  draw(new Answer(null, 1, 1));
  $("prompt").focus();
}

function askForKey() {
  $("unlock").hidden = false;
  $("key").focus();
}

let connecting = false;

// Asks until the server is there and ready: it may still be compiling.
async function connect() {
  if (connecting) return;
  connecting = true;
  for (; ; await new Promise((resolve) => setTimeout(resolve, 1000))) {
    try {
      const found = await api.model();
      $("status").textContent = "";
      if (model?.id !== found.id) meet(found);
      break;
    } catch (error) {
      $("status").textContent = error.message;
      if (error.status === 401) {
        askForKey();
        break;
      }
    }
  }
  connecting = false;
}

function meet(found) {
  document.body.classList.remove("unmet");
  $("send").disabled = false;
  model = { ...found, mythos: found.mythos ?? {} };
  const { loops, max_loops: most, chat } = model.mythos;
  document.title = $("name").textContent = model.id;
  $("facts").textContent = most > 1 ? `${loops} loops${most > loops ? `, up to ${most}` : ""}` : "";
  $("prompt").placeholder = chat ? "Message" : "Text to continue";
  $("prompt").setAttribute("aria-label", $("prompt").placeholder);
  $("examples").replaceChildren(
    ...EXAMPLES[chat ? "chat" : "text"].map((text) => {
      const item = make("li");
      item.append(button(text, () => send(text)));
      return item;
    }),
  );
  settings.fit(model.mythos);
  numbers.drawLegend(most ?? 1);
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  send($("prompt").value);
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send($("prompt").value);
});
$("unlock").addEventListener("submit", (event) => {
  event.preventDefault();
  api.useKey($("key").value);
  $("unlock").hidden = true;
  connect();
});
$("stop").addEventListener("click", () => running?.abort());
$("clear").addEventListener("click", clear);
talk.addEventListener("scroll", () => {
  const end = talk.scrollHeight - talk.scrollTop - talk.clientHeight < 40;
  following = end || (following && talk.scrollTop >= lastTop); // text may have grown since it was scrolled to its end
  lastTop = talk.scrollTop;
});
card.watch(talk);
settings.watch();
connect();
