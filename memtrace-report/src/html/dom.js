// Elements and figures. Whatever comes out of the incident becomes text here and nowhere becomes markup.
"use strict";

/** The element with this id. */
function byId(id) {
  return document.getElementById(id);
}

/** A new element with a class and children; strings become text. */
function make(tag, className, ...children) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.append(...children.filter((child) => child !== null && child !== undefined).map(asChild));
  return made;
}

function asChild(child) {
  return child instanceof Node ? child : document.createTextNode(printable(String(child)));
}

/** Replaces what an element holds. */
function fill(element, ...children) {
  element.replaceChildren(...children.filter((child) => child !== null && child !== undefined).map(asChild));
}

/** A name without what would turn the text around it: control characters and marks of direction become visible. */
function printable(text) {
  return text.replace(
    /[\u0000-\u001f\u007f-\u009f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff]/g,
    (one) => "\\u{" + one.codePointAt(0).toString(16) + "}",
  );
}

/** Bytes in binary units by the rule of memtrace_incident::units: two decimals below ten, else one. */
function bytes(value) {
  if (!Number.isFinite(value)) return "unknown";
  const sign = value < 0 ? "\u2212" : "";
  let size = Math.abs(value);
  let unit = 0;
  const units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
  const digits = () => (unit === 0 ? 0 : size < 10 ? 2 : 1);
  while (Number(size.toFixed(digits())) >= 1024 && unit < units.length - 1) {
    size /= 1024;
    unit += 1;
  }
  return sign + String(Number(size.toFixed(digits()))) + "\u00a0" + units[unit];
}

/** A length of time in nanoseconds. */
function duration(ns) {
  if (!Number.isFinite(ns)) return "unknown";
  const sign = ns < 0 ? "\u2212" : "";
  const size = Math.abs(ns);
  const scales = [[60e9, "min"], [1e9, "s"], [1e6, "ms"], [1e3, "\u00b5s"]];
  for (const [scale, unit] of scales) {
    if (size >= scale) return sign + String(Number((size / scale).toPrecision(4))) + "\u00a0" + unit;
  }
  return sign + String(Math.round(size)) + "\u00a0ns";
}

/** A share; of nothing it is nothing. */
function percent(part, whole) {
  if (!(whole > 0)) return "0\u00a0%";
  const share = (100 * part) / whole;
  return (share > 0 && share < 0.1 ? "<0.1" : share.toFixed(1)) + "\u00a0%";
}

/** The last part of a path. */
function baseName(path) {
  const at = path.lastIndexOf("/");
  return at >= 0 && at + 1 < path.length ? path.slice(at + 1) : path;
}

/** An array, whatever is there. */
function list(value) {
  return Array.isArray(value) ? value : [];
}

/** A finite number or null. */
function number(value) {
  return Number.isFinite(value) ? value : null;
}

/** A table: heads are [text, isNumber], rows are arrays of text or elements. */
function table(caption, heads, rows) {
  const cell = (tag, content, isNumber) => make(tag, isNumber ? "number" : "", content);
  const head = make("tr", "", ...heads.map(([text, isNumber]) => cell("th", text, isNumber)));
  for (const th of head.children) th.scope = "col";
  const body = rows.map((row) => make("tr", "", ...row.map((content, i) => cell("td", content, heads[i][1]))));
  const whole = make("table", "", make("caption", "", caption), make("thead", "", head), make("tbody", "", ...body));
  const box = make("div", "scroll", whole);
  box.tabIndex = 0;
  box.setAttribute("role", "region");
  box.setAttribute("aria-label", caption);
  return box;
}

/** Calls `then` when an element's width has changed, before the next frame is drawn. */
function onWidth(element, then) {
  let width = element.clientWidth;
  const observer = new ResizeObserver(() => {
    // Drawing inside the observer could change sizes again, which browsers report as an error.
    requestAnimationFrame(() => {
      if (element.clientWidth === width) return;
      width = element.clientWidth;
      then();
    });
  });
  observer.observe(element);
}
