// Views of the own prompt and of the batch. Every text goes in as textContent: what a model says is never markup.

const MOST_BLOCKS = 120;
const MOST_PLAIN = 40; // steps without a draft that share a line

/** A piece of text with its spaces and line ends made visible. */
function visible(piece) {
  return piece.replace(/\r?\n/g, "⏎").replace(/\t/g, "⇥").replace(/^ | $/g, "·").replace(/ /g, "\u00a0") || "∅";
}

function element(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function cell(piece, kind, words, chance) {
  const made = element("span", `cell ${kind}`, visible(piece));
  made.title = chance === undefined ? words : `${words}; accepted up to here with probability ${chance} %`;
  if (chance !== undefined) {
    const bar = element("i");
    bar.style.width = `${chance}%`;
    made.append(bar, element("small", "", `${chance}`));
  }
  made.append(element("span", "quiet", ` ${made.title}, `));
  return made;
}

/** The tokens that a line gained, and its steps. */
function stepLabel(gained, words, more = "") {
  const label = element("span", "step", words);
  label.prepend(element("b", "", `+${gained}`));
  if (more) label.append(element("br"), more);
  return label;
}

/** One step of the own prompt as a list item. */
function blockItem(block, number) {
  const item = element("li", "new");
  const gained = block.accepted + (block.own === null ? 0 : 1);
  item.append(stepLabel(gained, `step ${number}`, block.copied ? "copied" : ""));
  block.draft.forEach(([piece, chance], position) => {
    if (position === block.verified) item.append(element("span", "cut-mark", "│"));
    if (position < block.accepted) item.append(cell(piece, "accepted", "accepted", chance));
    else if (position >= block.verified) item.append(cell(piece, "unverified", "not verified", chance));
    else if (position === block.accepted && block.own !== null) item.append(cell(piece, "rejected", "rejected", chance));
    else item.append(cell(piece, "void", "verified, but behind a rejection or the end", chance));
  });
  if (block.draft.length && block.verified === block.draft.length) item.append(element("span", "cut-mark", "│"));
  if (block.own !== null) {
    if (!block.verified) item.append(cell(block.own, "plain", "no draft token verified, the target’s token"));
    else if (block.accepted === block.verified) item.append(cell(block.own, "bonus", "bonus token"));
    else item.append(cell(block.own, "correction", "the target’s correction"));
  }
  return item;
}

/** The own prompt: its answer and its blocks. */
export class OwnView {
  constructor(answer, list, empty) {
    [this.answer, this.list, this.empty] = [answer, list, empty];
    this.clear();
  }

  clear() {
    this.steps = 0;
    this.plain = null; // the line that gathers steps without a draft, if it is the newest
    this.answer.replaceChildren();
    this.list.replaceChildren();
  }

  add(block, number) {
    if (block.draft.length) {
      this.plain = null;
      this.list.prepend(blockItem(block, number));
      return;
    }
    if (!this.plain || this.plain.count === MOST_PLAIN) {
      this.plain = { item: element("li", "new"), from: number, count: 0 };
      this.plain.item.append(stepLabel(0, ""));
      this.list.prepend(this.plain.item);
    }
    const { item, from } = this.plain;
    this.plain.count++;
    const words = number === from ? `step ${number}` : `steps ${from}–${number}`;
    item.firstElementChild.replaceWith(stepLabel(this.plain.count, words));
    if (block.own !== null) item.append(cell(block.own, "plain", "no draft, the target’s token"));
  }

  show(own) {
    const following = this.answer.scrollHeight - this.answer.scrollTop - this.answer.clientHeight < 40;
    for (const [text, kind] of own.text) {
      const last = this.answer.lastElementChild;
      if (last?.className === kind) last.append(text);
      else this.answer.append(element("span", kind, text));
    }
    if (following) this.answer.scrollTop = this.answer.scrollHeight;
    this.steps += own.skipped;
    for (const item of this.list.querySelectorAll(".new")) item.classList.remove("new");
    for (const block of own.blocks) this.add(block, ++this.steps);
    while (this.list.children.length > MOST_BLOCKS) this.list.lastElementChild.remove();
    this.empty.hidden = this.list.children.length > 0;
  }
}

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/** Every request of the newest step as a row of small squares: its block and its outcome. */
export function drawBatch(canvas, note, picture) {
  const rows = picture?.rows ?? [];
  const width = canvas.clientWidth;
  const size = rows.length <= 8 ? 18 : rows.length <= 18 ? 15 : 12;
  const gap = 3;
  const slots = Math.max(8, ...rows.map((row) => row.survival.length)) + 1;
  const rowWidth = 34 + slots * (size + gap) + 14;
  const columns = Math.max(1, Math.floor((width + 14) / rowWidth));
  const lines = Math.max(Math.min(rows.length, 8), Math.ceil(rows.length / columns), 4);
  const height = lines * (size + 5) + 2;
  const scale = window.devicePixelRatio || 1;
  if (canvas.width !== Math.round(width * scale) || canvas.height !== Math.round(height * scale)) {
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(height * scale);
    canvas.style.height = `${height}px`;
  }
  const pen = canvas.getContext("2d");
  pen.setTransform(scale, 0, 0, scale, 0, 0);
  pen.clearRect(0, 0, width, height);
  pen.textBaseline = "middle";
  pen.textAlign = "right";
  const [dim, yes, no, spark, soft] = ["--dim", "--yes", "--no", "--spark", "--line"].map(css);
  rows.forEach((row, index) => {
    const left = Math.floor(index / lines) * rowWidth;
    const top = (index % lines) * (size + 5) + 2;
    pen.fillStyle = dim;
    pen.font = "11px system-ui, sans-serif";
    pen.fillText(row.number, left + 26, top + size / 2 + 0.5);
    const square = (slot, paint) => paint(left + 34 + slot * (size + gap), top);
    row.survival.forEach((chance, slot) => {
      // The target's own token stands behind the kept prefix, so what was not verified moves on by one.
      square(slot < row.verified ? slot : slot + 1, (x, y) => {
        if (slot < row.accepted) {
          pen.fillStyle = yes;
          pen.fillRect(x, y, size, size);
        } else if (slot < row.verified) {
          pen.strokeStyle = pen.fillStyle = no;
          pen.lineWidth = 1.5;
          pen.strokeRect(x + 1, y + 1, size - 2, size - 2);
          if (slot === row.accepted) pen.fillRect(x + size / 3, y + size / 3, size / 3, size / 3);
        } else {
          pen.fillStyle = soft;
          pen.fillRect(x + size / 4, y + size / 4, size / 2, size / 2);
        }
      });
    });
    pen.fillStyle = spark;
    square(row.verified, (x, y) => {
      pen.beginPath();
      pen.arc(x + size / 2, y + size / 2, size / 2 - 1.5, 0, 7);
      pen.fill();
    });
  });
  if (!picture) return;
  const drafts = rows.reduce((sum, row) => sum + row.verified, 0);
  canvas.setAttribute("aria-label", `${rows.length} requests in the step, ${drafts} draft tokens verified`);
  note.textContent =
    `${picture.sampling} request${picture.sampling === 1 ? "" : "s"}, ${picture.drafts} draft tokens verified, ` +
    `${picture.committed} tokens gained` + (picture.prefill ? `, ${picture.prefill} prompt tokens beside them. ` : ". ") +
    "Filled: accepted; framed: rejected; small: not verified; round: the target’s own token. Other clients’ texts are never shown.";
}
