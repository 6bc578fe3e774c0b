// An answer as it arrives: final tokens in the colour of their loops, drafts behind them until those are settled.

import { make, paint } from "./dom.js";

const FADE = 200; // milliseconds that a draft takes to vanish, as in style.css

// A token's element: its text without the space that leads it, which stays outside, so that words do not touch.
function piece(text, className) {
  const lead = /^ \S/.test(text) ? " " : "";
  const outer = make("span", className);
  outer.append(lead, make("span", "", text.slice(lead.length)));
  return outer;
}

export class Answer {
  // element: where the text goes. most: the loops that the scale of colours ends with. full: those asked for.
  constructor(element, most, full) {
    Object.assign(this, { element, most, full, text: "", drafted: 0, confirmed: 0 });
    this.tokens = []; // final ones, in order
    this.drafts = new Map(); // index -> element
    this.sent = performance.now();
    this.first = null; // milliseconds from sending to the first token
    this.block = element; // where new tokens go: the answer, or a code block in it
    this.line = { text: "", pieces: [] }; // the last one
    this.reached = false; // there is a token that the Tab key comes to
    this.instead = null; // the last draft that was taken back: the card of the token in its place tells of it
  }

  // One choice of a chunk: it first takes drafts back, then gives final tokens, then new drafts.
  take({ delta, text, mythos = {} }) {
    const content = delta?.content ?? text ?? "";
    this.text += content;
    this.full = mythos.full_loops ?? this.full;
    if (mythos.taken_back !== undefined) this.#takeBack(mythos.taken_back);
    for (const token of mythos.tokens ?? []) this.#add(token);
    if (content && !mythos.tokens?.length) this.#place(make("span", "", content)); // words that no token is told of
    for (const draft of mythos.provisional ?? []) this.#draft(draft);
  }

  // Nothing more comes: drafts that are not settled go.
  end() {
    this.#takeBack(0);
  }

  #add(token) {
    this.first ??= performance.now() - this.sent;
    const draft = this.drafts.get(token.index); // one that is still there is confirmed
    if (draft) this.confirmed += 1;
    this.drafts.delete(token.index);
    const outer = draft ?? piece("");
    outer.className = "";
    if (outer.textContent !== token.text) outer.replaceChildren(...piece(token.text).childNodes);
    const inner = outer.lastChild;
    inner.className = /^\s*\n\s*$/.test(token.text) ? "token line" : "token";
    inner.tabIndex = token.text && !this.reached ? 0 : -1; // one stop for the Tab key; arrows go on from there
    this.reached ||= token.text !== "";
    paint(inner, token.loops, this.most);
    const since = token.ms - (this.tokens.at(-1)?.ms ?? 0);
    const instead = this.instead?.index === token.index ? this.instead.text : null;
    inner.told = { ...token, since, instead, full: this.full, most: this.most };
    this.tokens.push(token);
    this.#place(outer);
  }

  #place(outer) {
    const [behind] = this.drafts.values();
    if (outer.parentNode !== this.block) this.block.insertBefore(outer, behind ?? null);
    const pieces = [...this.line.pieces, outer];
    const lines = (this.line.text + outer.textContent).split("\n");
    const fences = lines.slice(0, -1).filter((line) => line.startsWith("```")).length;
    this.line = { text: lines.at(-1), pieces: lines.length > 1 ? [] : pieces };
    if (fences % 2) this.#fence(pieces);
  }

  // A line of three backticks opens a code block, which takes that line in, or closes it.
  #fence(pieces) {
    if (this.block === this.element) {
      this.block = make("code", "block");
      this.block.append(...pieces);
      this.element.append(this.block);
    } else this.block = this.element;
    this.block.append(...this.drafts.values());
  }

  #draft({ index, text }) {
    if (index < this.tokens.length) return;
    this.drafts.get(index)?.remove();
    this.drafts.set(index, piece(text, "draft"));
    this.drafted += 1;
    this.block.append(this.drafts.get(index));
  }

  // They fade where they are and take no room there, so that what comes in their place does not move.
  #takeBack(index) {
    const gone = make("span", "gone");
    for (const [at, outer] of this.drafts) {
      if (at < index) continue;
      this.drafts.delete(at);
      if (at === index) this.instead = { index, text: outer.textContent };
      gone.append(outer);
    }
    if (!gone.firstChild) return;
    this.block.append(gone);
    setTimeout(() => gone.remove(), FADE);
  }

  numbers() {
    const count = this.tokens.length;
    const loops = this.tokens.reduce((sum, token) => sum + token.loops, 0);
    const took = count > 1 ? this.tokens.at(-1).ms - this.tokens[0].ms : 0;
    const rate = took > 0 ? ((count - 1) / took) * 1000 : null;
    return { count, rate, mean: loops / count, saved: 1 - loops / (count * this.full) };
  }
}
