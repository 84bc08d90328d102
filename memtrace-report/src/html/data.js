// The incident's samples: growth in a stretch of time, as totals, as a tree of frames and as functions.
"use strict";

/** Causes with title and explanation. Their bytes measure different things and must not be added up. */
const CAUSES = {
  touch: ["Resident memory (touch)", "Pages the kernel gave on first touch: this is what fills the limit. The stack is that of the code that touched the page, which need not be the code that asked for the mapping."],
  map: ["Mapped (mmap)", "Address space asked for with mmap or mremap, whether it was ever touched or not; it does not count towards the limit until it is."],
  brk: ["Heap (brk)", "Address space the heap asked for with brk, whether it was ever touched or not; it does not count towards the limit until it is."],
  charge: ["Charged in system calls (charge)", "What system calls charged to the cgroup: page cache, sockets, kernel memory, and what they touched for the process."],
};

/** Why a stack ends before its outermost frame: the sentences of the text report (allocations.rs, why_cut). */
const CUTS = {
  slice: "the stack is larger than its copy",
  module: "code outside known modules, without frame pointers",
  unwind: "unwind information missing or broken",
  frames: "more frames than are kept",
  registers: "registers or stack could not be read",
  gone: "the process had ended",
};

/** The incident embedded in the page; null if it cannot be parsed. */
function readIncident() {
  try {
    const incident = JSON.parse(byId("incident").textContent);
    return incident !== null && typeof incident === "object" ? incident : null;
  } catch {
    return null;
  }
}

/** Samples and paths with missing fields filled in. Times are doubles: after 104 days of uptime they are rounded to 2 ns. */
class SampleStore {
  constructor(incident) {
    this.frames = [];
    this.processes = new Map();
    this.known = new Map();
    this.paths = list(incident.allocation_paths).map((path) => this.path(path || {}));
    this.eventNs = number((incident.at || {}).boot_ns) ?? 0;
    const allocations = incident.allocations || null;
    this.samples = sampleRows(allocations);
    this.timed = this.samples.length > 0;
    if (!this.timed) {
      // A file without samples still has the sum of each path, without times.
      this.samples = this.paths.map((path, index) => ({ ns: null, path: index, bytes: path.bytes }));
    }
    const times = list(((incident.timeline || {}).columns || {}).boot_ns).filter(Number.isFinite);
    let [from, until] = [Infinity, -Infinity];
    for (const ns of times.concat(this.samples.map((sample) => sample.ns).filter(Number.isFinite))) {
      from = Math.min(from, ns);
      until = Math.max(until, ns);
    }
    this.whole = from <= until ? { from, until } : { from: this.eventNs, until: this.eventNs };
  }

  /** A path with its frames interned, outermost first. */
  path(path) {
    const process = path.process || {};
    const key = `${process.pid}/${process.start_boot_ns}`;
    if (!this.processes.has(key)) {
      this.processes.set(key, { key, label: `${process.comm || "?"} (pid ${process.pid ?? "?"})` });
    }
    const steps = list(path.frames).map((frame) => this.intern(frame || {})).reverse();
    if (path.cut) steps.unshift(this.special("cut", `callers missing: ${CUTS[path.cut] || path.cut}`));
    return {
      cause: Object.hasOwn(CAUSES, path.cause) ? path.cause : "touch",
      process: key,
      bytes: number(path.weight_bytes) ?? 0,
      steps,
    };
  }

  intern(frame) {
    const named = typeof frame.symbol === "string" && frame.symbol !== "";
    const key = JSON.stringify([frame.kernel, frame.inlined, frame.module, named ? frame.symbol : frame.offset, named]);
    const place = frame.file ? `${frame.file}${frame.line ? ":" + frame.line : ""}` : null;
    const known = this.known.get(key);
    if (known !== undefined) {
      if (place && this.frames[known].places.length < 4 && !this.frames[known].places.includes(place)) {
        this.frames[known].places.push(place);
      }
      return known;
    }
    const module = typeof frame.module === "string" ? frame.module : null;
    const offset = Number.isFinite(frame.offset) ? `+0x${frame.offset.toString(16)}` : "";
    const bare = module ? baseName(module) + offset : frame.kernel ? "kernel" : "unknown code";
    return this.add(key, {
      kind: frame.kernel ? "kernel" : "user",
      label: named ? frame.symbol : bare,
      named,
      inlined: frame.inlined === true,
      module,
      offset,
      buildId: typeof frame.build_id === "string" ? frame.build_id : null,
      places: place ? [place] : [],
    });
  }

  special(kind, label) {
    const key = JSON.stringify([kind, label]);
    return this.known.get(key) ?? this.add(key, { kind, label, places: [] });
  }

  add(key, frame) {
    // The text that the search matches.
    frame.text = [frame.label, frame.module || "", ...frame.places].join("\n").toLowerCase();
    this.known.set(key, this.frames.length);
    return this.frames.push(frame) - 1;
  }

  /** The samples of a stretch, both ends included. */
  within(stretch) {
    if (!this.timed) return this.samples;
    return this.samples.filter((sample) => sample.ns >= stretch.from && sample.ns <= stretch.until);
  }

  /** Growth of resident memory in a stretch: all, with a stack, without; null when the file does not say. */
  totals(stretch) {
    let [attributed, unattributed] = [0, 0];
    for (const sample of this.within(stretch)) {
      const path = this.paths[sample.path];
      if (!path) unattributed += sample.bytes;
      else if (path.cause === "touch") attributed += sample.bytes;
    }
    if (!this.timed) return { growth: null, attributed, unattributed: null };
    return { growth: attributed + unattributed, attributed, unattributed };
  }

  /** Bytes of each path of a choice ({stretch, cause, process}), and of growth without a stack. */
  weights(choice) {
    const weights = new Map();
    let without = 0;
    for (const sample of this.within(choice.stretch)) {
      const path = this.paths[sample.path];
      if (!path) {
        // Its process is unknown, so it is shown only with all processes.
        if (choice.cause === "touch" && !choice.process) without += sample.bytes;
      } else if (path.cause === choice.cause && (!choice.process || path.process === choice.process)) {
        weights.set(path, (weights.get(path) || 0) + sample.bytes);
      }
    }
    return { weights, without };
  }

  /** The tree of a choice ({stretch, cause, process, inverted, kernel}). */
  tree(choice) {
    const root = node(null, { kind: "root", label: "all", places: [], text: "" });
    const { weights, without } = this.weights(choice);
    const child = (parent, key, frame) => {
      let found = parent.children.get(key);
      if (!found) parent.children.set(key, (found = node(parent, frame, key)));
      return found;
    };
    for (const [path, weight] of weights) {
      if (weight <= 0) continue;
      const process = this.processes.get(path.process);
      const owner = this.special("process", process.label);
      let steps = path.steps;
      if (!choice.kernel) steps = steps.filter((step) => this.frames[step].kind !== "kernel");
      steps = choice.inverted ? [...steps].reverse().concat(owner) : [owner, ...steps];
      let at = root;
      at.total += weight;
      for (const step of steps) {
        at = child(at, step, this.frames[step]);
        at.total += weight;
      }
      at.self += weight;
    }
    if (without > 0) {
      const step = this.special("none", "no stack");
      const leaf = child(root, step, this.frames[step]);
      leaf.total += without;
      leaf.self += without;
      root.total += without;
    }
    sortTree(root);
    return root;
  }

  /** User functions as rows of {frame, self, total}, unsorted, and the bytes that all of them are a share of. */
  functions(choice) {
    const found = new Map();
    const { weights, without } = this.weights(choice);
    let whole = without;
    for (const [path, weight] of weights) {
      whole += weight;
      const seen = new Set();
      let innermost = null;
      for (const step of path.steps) {
        const frame = this.frames[step];
        if (frame.kind !== "user") continue;
        // One row for a function, whether it was inlined or called.
        const key = JSON.stringify([frame.module, frame.label]);
        if (!found.has(key)) found.set(key, { frame, self: 0, total: 0 });
        innermost = found.get(key);
        if (!seen.has(key)) innermost.total += weight;
        seen.add(key);
      }
      if (innermost) innermost.self += weight;
    }
    return { whole, rows: [...found.values()] };
  }
}

/** The samples' columns as rows, oldest first; as many as the shortest column has. */
function sampleRows(allocations) {
  const columns = (allocations || {}).samples || {};
  const [times, paths, weights] = [list(columns.boot_ns), list(columns.path), list(columns.weight_bytes)];
  const rows = [];
  for (let i = 0; i < Math.min(times.length, paths.length, weights.length); i += 1) {
    if (Number.isFinite(times[i]) && Number.isFinite(weights[i])) {
      rows.push({ ns: times[i], path: Number.isInteger(paths[i]) ? paths[i] : -1, bytes: weights[i] });
    }
  }
  return rows.sort((one, other) => one.ns - other.ns);
}

function node(parent, frame, key = null) {
  return { parent, frame, key, depth: parent ? parent.depth + 1 : 0, total: 0, self: 0, children: new Map(), sorted: [] };
}

/** Sorts children by bytes, heaviest first. No recursion: a stack of the file may be deeper than the browser allows. */
function sortTree(root) {
  const todo = [root];
  while (todo.length > 0) {
    const at = todo.pop();
    at.sorted = [...at.children.values()].sort((one, other) => other.total - one.total);
    todo.push(...at.sorted);
  }
}
