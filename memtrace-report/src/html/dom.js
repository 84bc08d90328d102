// Elements and figures. Strings of the incident become text nodes, never markup, because they may be hostile.
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

/** Replaces the children of an element; strings become text. */
function fill(element, ...children) {
  element.replaceChildren(...children.filter((child) => child !== null && child !== undefined).map(asChild));
}

/** Text whose control characters and marks of direction are escaped, so that they cannot reorder the text around it. */
function printable(text) {
  return text.replace(
    /[\u0000-\u001f\u007f-\u009f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff]/g,
    (one) => "\\u{" + one.codePointAt(0).toString(16) + "}",
  );
}

/** Bytes in binary units, as memtrace_incident::units writes them: two decimals below ten, else one. */
function bytes(value) {
  if (!Number.isFinite(value)) return "unknown";
  const sign = value < 0 ? "\u2212" : "";
  let size = Math.abs(value);
  let unit = 0;
  const units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
  const digits = () => (unit === 0 ? 0 : size < 10 ? 2 : 1);
  // 1023.96 KiB is 1 MiB, not 1024 KiB.
  while (Number(size.toFixed(digits())) >= 1024 && unit < units.length - 1) {
    size /= 1024;
    unit += 1;
  }
  return sign + String(Number(size.toFixed(digits()))) + "\u00a0" + units[unit];
}

/** A length of time in nanoseconds, as memtrace_incident::units writes it: `12.3 ms`, `2 min 5 s`. */
function duration(value) {
  if (!Number.isFinite(value)) return "unknown";
  const sign = value < 0 ? "\u2212" : "";
  const ns = Math.round(Math.abs(value));
  if (ns < 1000) return `${sign}${ns}\u00a0ns`;
  for (const [scale, unit] of [[1e3, "us"], [1e6, "ms"], [1e9, "s"]]) {
    if (ns >= (unit === "s" ? 100e9 : scale * 1000)) continue;
    const ten = ns < 10 * scale ? 100 : 10;
    return `${sign}${Math.floor((ns * ten + scale / 2) / scale) / ten}\u00a0${unit}`;
  }
  const seconds = Math.floor((ns + 0.5e9) / 1e9);
  const two = (large, largeUnit, small, smallUnit) =>
    `${sign}${large}\u00a0${largeUnit}` + (small === 0 ? "" : `\u00a0${small}\u00a0${smallUnit}`);
  const whole = (value, unit) => Math.floor(value / unit);
  if (seconds < 3600) return two(whole(seconds, 60), "min", seconds % 60, "s");
  if (seconds < 86400) return two(whole(seconds, 3600), "h", whole(seconds % 3600, 60), "min");
  return two(whole(seconds, 86400), "d", whole(seconds % 86400, 3600), "h");
}

/** A share with one decimal, as memtrace_incident::units writes it; `-` if the whole is not above 0. */
function percent(part, whole) {
  if (!(whole > 0)) return "-";
  return `${Math.floor((part * 1000) / whole + 0.5) / 10}\u00a0%`;
}

/** The last part of a path. */
function baseName(path) {
  const at = path.lastIndexOf("/");
  return at >= 0 && at + 1 < path.length ? path.slice(at + 1) : path;
}

/** `value` if it is an array, else an empty one. */
function list(value) {
  return Array.isArray(value) ? value : [];
}

/** `value` if it is a finite number, else null. */
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
