// The flame graph: rows of boxes, root on top, as wide as their bytes. Zoom, search, keyboard.
"use strict";

/** Boxes narrower than this are not drawn, px. */
const NARROWEST = 1.2;
/** Boxes drawn at once; the widest are kept. */
const MOST_BOXES = 6000;
/** Height of a row, px; page.css has it too. */
const ROW = 20;

class Flame {
  /** Elements: `element` for the boxes, `crumbs` for the zoomed path, `details` for the frame under the pointer, `matched` for the sum of the search. */
  constructor(element, crumbs, details, matched) {
    Object.assign(this, { element, crumbs, details, matched });
    this.root = null;
    this.zoomed = null;
    this.query = "";
    this.boxes = [];
    this.current = null;
    element.addEventListener("click", (event) => this.withBox(event, (box) => this.zoom(box.node)));
    element.addEventListener("mouseover", (event) => this.withBox(event, (box) => this.describe(box.node)));
    element.addEventListener("focusin", (event) => this.withBox(event, (box) => this.point(box)));
    element.addEventListener("mouseleave", () => this.describe(this.current ? this.current.node : this.zoomed));
    element.addEventListener("keydown", (event) => this.key(event));
    onWidth(element, () => this.draw());
  }

  withBox(event, then) {
    const drawn = event.target.closest(".box");
    const box = drawn && this.boxes[Number(drawn.dataset.index)];
    if (box) then(box);
  }

  /** Shows a tree; stays zoomed into the same frame if the tree has it. */
  show(root) {
    const way = [];
    for (let at = this.zoomed; at && at.parent; at = at.parent) way.unshift(at.key);
    this.root = root;
    this.zoomed = root;
    for (const key of way) {
      const next = this.zoomed.children.get(key);
      if (!next) break;
      this.zoomed = next;
    }
    this.current = null;
    this.draw();
    this.describe(this.zoomed);
  }

  zoom(node, focus = true) {
    this.zoomed = node;
    this.draw();
    this.describe(node);
    const box = this.boxes.find((candidate) => candidate.node === node);
    if (box && focus) box.drawn.focus({ preventScroll: true });
  }

  /** Highlights frames whose text contains `query`. */
  search(query) {
    this.query = query.trim().toLowerCase();
    this.draw();
  }

  matches(node) {
    return this.query !== "" && node.parent !== null && node.frame.text.includes(this.query);
  }

  /** Bytes below the zoomed frame whose stack has a match; a match inside a match counts once. */
  matchedBytes() {
    let sum = 0;
    const todo = [this.zoomed];
    while (todo.length > 0) {
      const at = todo.pop();
      if (this.matches(at)) sum += at.total;
      else todo.push(...at.sorted);
    }
    return sum;
  }

  /** The boxes that are wide enough to draw, and the number of those that are not. */
  layout(width) {
    const boxes = [];
    for (let at = this.zoomed.parent; at; at = at.parent) boxes.push({ node: at, left: 0, width, above: true });
    boxes.reverse();
    const todo = [{ node: this.zoomed, left: 0, width, above: false }];
    let hidden = 0;
    while (todo.length > 0) {
      const box = todo.pop();
      boxes.push(box);
      let left = box.left;
      for (const child of box.node.sorted) {
        const wide = (box.width * child.total) / box.node.total;
        if (wide >= NARROWEST) todo.push({ node: child, left, width: wide, above: false });
        else hidden += 1;
        left += wide;
      }
    }
    if (boxes.length > MOST_BOXES) {
      hidden += boxes.length - MOST_BOXES;
      boxes.sort((one, other) => other.width - one.width);
      boxes.length = MOST_BOXES;
    }
    return { boxes, hidden };
  }

  draw() {
    const { element, root } = this;
    if (!root) return;
    element.dataset.totalBytes = String(root.total);
    element.dataset.zoomedBytes = String(this.zoomed.total);
    this.drawCrumbs();
    this.showMatched();
    if (!(root.total > 0)) {
      this.boxes = [];
      fill(element, make("p", "note", "No growth with this cause in this stretch."));
      element.style.height = "";
      return;
    }
    const inside = element.clientWidth;
    const { boxes } = this.layout(inside);
    this.boxes = boxes;
    const drawn = boxes.map((box, index) => this.box(box, index));
    const deepest = boxes.reduce((most, box) => Math.max(most, box.node.depth), 0);
    const space = make("div", "rows", ...drawn);
    space.style.height = `${(deepest + 1) * ROW}px`;
    fill(element, space);
    const first = boxes.find((box) => box.node === this.zoomed) || boxes[0];
    first.drawn.tabIndex = 0;
    this.current = first;
  }

  box(box, index) {
    const { node } = box;
    const { frame } = node;
    const label = box.width > 24 ? (frame.inlined ? "\u21b3 " : "") + frame.label : "";
    const drawn = make("div", `box ${frame.kind}`, label);
    if (box.above) drawn.classList.add("above");
    if (frame.inlined) drawn.classList.add("inlined");
    if (node === this.zoomed && node.parent) drawn.classList.add("zoomed");
    if (this.query !== "") drawn.classList.add(this.matches(node) ? "match" : "other");
    drawn.dataset.index = String(index);
    drawn.dataset.bytes = String(node.total);
    drawn.style.left = `${box.left.toFixed(2)}px`;
    drawn.style.width = `${Math.max(box.width - 1, 0.8).toFixed(2)}px`;
    drawn.style.top = `${node.depth * ROW}px`;
    if (frame.kind === "user" || frame.kind === "process") drawn.style.setProperty("--shade", shade(frame.label));
    drawn.tabIndex = -1;
    drawn.setAttribute("role", "treeitem");
    drawn.setAttribute("aria-level", String(node.depth + 1));
    drawn.setAttribute("aria-label", printable(`${frame.label}, ${bytes(node.total)}, ${percent(node.total, this.root.total)}`));
    box.drawn = drawn;
    return drawn;
  }

  drawCrumbs() {
    const way = [];
    for (let at = this.zoomed; at; at = at.parent) way.unshift(at);
    this.crumbs.hidden = way.length < 2;
    // Of a long path, the beginning and the end.
    const shown = way.length > 8 ? [way[0], way[1], null, ...way.slice(-4)] : way;
    fill(this.crumbs, ...shown.flatMap((node) => {
      if (node === null) return [make("span", "faint", "\u2026")];
      const button = make("button", "crumb", node.frame.label);
      button.type = "button";
      button.addEventListener("click", () => this.zoom(node));
      return [button];
    }));
  }

  showMatched() {
    this.matched.hidden = this.query === "";
    if (this.query === "") return;
    const sum = this.matchedBytes();
    this.matched.dataset.bytes = String(sum);
    fill(this.matched, `Matched ${bytes(sum)}, ${percent(sum, this.zoomed.total)} of what is shown`);
  }

  /** Shows the facts of a frame below the graph. */
  describe(node) {
    if (!node) return;
    const { frame } = node;
    const facts = [
      [frame.kind === "user" || frame.kind === "kernel" ? "Function" : "Block", frame.label + (frame.inlined ? " (inlined)" : "")],
      ["With callees", `${bytes(node.total)}, ${percent(node.total, this.root.total)}`],
      ["Own", `${bytes(node.self)}, ${percent(node.self, this.root.total)}`],
    ];
    if (frame.places.length > 0) facts.push(["Source", frame.places.join(", ")]);
    if (frame.kind === "kernel") facts.push(["Module", frame.module || "kernel"]);
    else if (frame.module) facts.push(["Module", frame.module + (frame.named ? "" : frame.offset)]);
    if (frame.buildId) facts.push(["Build id", frame.buildId]);
    if (frame.kind === "none") facts.push(["Why", "see \u201cGrowth without a stack\u201d below"]);
    fill(this.details, ...facts.map(([name, value]) => make("div", "", make("dt", "", name), make("dd", "", value))));
  }

  point(box) {
    if (this.current) this.current.drawn.tabIndex = -1;
    this.current = box;
    box.drawn.tabIndex = 0;
    this.describe(box.node);
  }

  key(event) {
    const box = this.current;
    if (!box || event.ctrlKey || event.altKey || event.metaKey) return;
    const { node } = box;
    const near = (step) => {
      const row = this.boxes.filter((other) => other.node.depth === node.depth).sort((one, other) => one.left - other.left);
      return row[row.indexOf(box) + step];
    };
    const moves = {
      ArrowDown: () => this.boxes.find((other) => other.node.parent === node && other.node === node.sorted[0]) ||
        this.boxes.find((other) => other.node.parent === node),
      ArrowUp: () => this.boxes.find((other) => other.node === node.parent),
      ArrowRight: () => near(1),
      ArrowLeft: () => near(-1),
      Home: () => this.boxes[0],
    };
    if (event.key === "Enter" || event.key === " ") this.zoom(node);
    else if (event.key === "Escape") this.zoom(this.zoomed.parent || this.zoomed);
    else if (Object.hasOwn(moves, event.key)) {
      const next = moves[event.key]();
      if (next) next.drawn.focus();
    } else return;
    event.preventDefault();
  }
}

/** A shade from a hash of the name, so that a function has the same colour everywhere. */
function shade(name) {
  let hash = 2166136261;
  for (let i = 0; i < name.length; i += 1) hash = Math.imul(hash ^ name.charCodeAt(i), 16777619);
  return String((hash >>> 0) % 100 / 100);
}
