// Puts the page together: one choice (stretch, cause, process, direction), and everything that depends on it.
"use strict";

function start() {
  const incident = readIncident();
  if (!incident) {
    fill(byId("title"), "The incident in this page cannot be read");
    return;
  }
  showHead(incident);
  showAbout(byId("about"), incident);
  const store = new SampleStore(incident);
  const choice = { stretch: store.whole, cause: "touch", process: "", inverted: false, kernel: true };
  let order = "self";
  let isWhole = true;
  const flame = new Flame(byId("flame"), byId("crumbs"), byId("details"), byId("matched"));
  const magnifier = byId("magnify");

  const showCode = () => {
    byId("flame").dataset.cause = choice.cause;
    flame.show(store.tree(choice));
    const reorder = (key) => {
      order = key;
      showFunctions(byId("functions"), store, choice, order, reorder);
    };
    reorder(order);
  };
  const choose = (stretch) => {
    isWhole = !stretch;
    choice.stretch = stretch ? clamp(stretch, store.whole) : store.whole;
    curve.mark(isWhole ? null : choice.stretch);
    if (isWhole && curve.magnified) {
      curve.magnified = false;
      curve.magnify(null);
    }
    magnifier.disabled = isWhole;
    magnifier.setAttribute("aria-pressed", String(curve.magnified));
    for (const button of byId("stretches").querySelectorAll("[data-last-ns]")) {
      button.setAttribute("aria-pressed", String(!isWhole ? sameStretch(choice.stretch, last(store, button.dataset.lastNs)) : button.dataset.lastNs === "all"));
    }
    showTotals(byId("stretch"), store, choice.stretch);
    showCode();
  };
  const curve = new Curve(byId("curve"), incident, store, choose);
  const hint = store.timed ? "Drag over the curve to restrict everything below to that stretch; double-click for the whole window." : "This file has no samples with times: the figures below are for the whole window.";
  const thinned = (incident.timeline || {}).thinned;
  fill(byId("curve-note"), hint + (thinned > 0 ? ` ${thinned} readings were left out where the curve is older.` : ""));

  for (const button of byId("stretches").querySelectorAll("[data-last-ns]")) {
    button.addEventListener("click", () => choose(last(store, button.dataset.lastNs)));
  }
  magnifier.addEventListener("click", () => {
    curve.magnified = !curve.magnified;
    magnifier.setAttribute("aria-pressed", String(curve.magnified));
    curve.magnify(curve.magnified ? choice.stretch : null);
  });
  fillSelects(store, choice);
  const set = (id, key, read) => byId(id).addEventListener("change", (event) => {
    choice[key] = read(event.target);
    if (key === "cause") showCause(choice.cause);
    showCode();
  });
  set("cause", "cause", (select) => select.value);
  set("process", "process", (select) => select.value);
  set("inverted", "inverted", (box) => box.checked);
  set("kernel", "kernel", (box) => box.checked);
  byId("search").addEventListener("input", (event) => flame.search(event.target.value));
  // Escape clears the search box; outside of it, it zooms out.
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && document.activeElement === document.body) flame.zoom(flame.zoomed.parent || flame.zoomed);
  });
  showCause(choice.cause);
  choose(null);
}

/** Fills the selects with the causes and processes of the file. */
function fillSelects(store, choice) {
  const there = new Set(store.paths.map((path) => path.cause));
  if (store.samples.some((sample) => !store.paths[sample.path])) there.add("touch");
  const option = (value, text) => {
    const made = make("option", "", text);
    made.value = value;
    return made;
  };
  const causes = Object.keys(CAUSES).filter((cause) => there.has(cause) || cause === "touch");
  if (!there.has("touch") && causes.length > 1) choice.cause = causes[1];
  fill(byId("cause"), ...causes.map((cause) => option(cause, CAUSES[cause][0])));
  byId("cause").value = choice.cause;
  const processes = [...store.processes.values()];
  byId("process-box").hidden = processes.length < 2;
  fill(byId("process"), option("", "all"), ...processes.slice(0, 500).map(({ key, label }) => option(key, label)));
}

function showCause(cause) {
  fill(byId("cause-note"), CAUSES[cause][1]);
}

/** The stretch of `length` nanoseconds up to the event; null for "all". */
function last(store, length) {
  if (length === "all") return null;
  const until = Math.min(Math.max(store.eventNs, store.whole.from), store.whole.until);
  return { from: Math.max(until - Number(length), store.whole.from), until };
}

function clamp({ from, until }, whole) {
  const inside = (ns) => Math.min(Math.max(ns, whole.from), whole.until);
  return { from: inside(Math.min(from, until)), until: inside(Math.max(from, until)) };
}

function sameStretch(one, other) {
  return other !== null && one.from === other.from && one.until === other.until;
}

start();
