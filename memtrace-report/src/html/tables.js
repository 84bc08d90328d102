// The words and tables of the page: head, totals, functions, victims, tasks, composition, growth.
"use strict";

const KINDS = {
  oom_kill: "OOM kill",
  spike: "Spike",
  near_miss: "Near miss",
  stuck: "Stuck at the limit",
  recording: "Recording",
};

/** The head: what happened, where, the evidence, and what is missing. */
function showHead(incident) {
  const cgroup = incident.cgroup || {};
  const kind = KINDS[incident.kind] || "Incident";
  fill(byId("kind"), kind);
  const title = headline(incident, kind);
  fill(byId("title"), title);
  document.title = printable(`${title} \u2013 memtrace`);
  fill(byId("summary"), (incident.verdict || {}).summary || "");
  const facts = [
    ["When", (incident.at || {}).wall],
    ["Cgroup", cgroup.path],
    ["Limit", cgroup.limit_bytes === null || cgroup.limit_bytes === undefined ? "none" : bytes(cgroup.limit_bytes)],
    ["Peak", known(cgroup.peak_bytes)],
    ["Usage at the event", known(cgroup.usage_bytes)],
    ["Container", cgroup.container && [cgroup.container.id, cgroup.container.runtime].filter(Boolean).join(", ")],
    ["Pod", cgroup.kubernetes && [cgroup.kubernetes.pod_uid, cgroup.kubernetes.qos].filter(Boolean).join(", ")],
    ["Ended with", ending(incident.recording)],
    ["Host", incident.host && [incident.host.hostname, incident.host.kernel].filter(Boolean).join(", Linux ")],
  ];
  fill(byId("facts"), ...facts.filter(([, value]) => value).map(([name, value]) => fact(name, value)));
  const evidence = list((incident.verdict || {}).evidence);
  byId("evidence-box").hidden = evidence.length === 0;
  fill(byId("evidence"), ...evidence.map((one) => make("li", "", one)));
  const losses = list(incident.losses).filter(Boolean);
  byId("losses-box").hidden = losses.length === 0;
  fill(byId("losses-box").querySelector("summary"), `What is missing from this file (${losses.length})`);
  fill(byId("losses"), ...losses.map((loss) => make("li", "", loss.what + (Number.isFinite(loss.count) ? `: ${loss.count}` : ""))));
  fill(byId("foot"), `Incident ${incident.id || "without id"}, schema ${incident.schema ?? "unknown"}. Everything on this page is in this file; it loads nothing.`);
}

function headline(incident, kind) {
  const victims = list((incident.oom || {}).victims).filter(Boolean);
  if (victims.length > 0) {
    const [first] = victims;
    const more = victims.length > 1 ? ` and ${victims.length - 1} more` : "";
    return `${first.comm} (pid ${first.pid})${more} ${first.killed === false ? "chosen by the OOM killer" : "killed for memory"}`;
  }
  const command = list((incident.recording || {}).command);
  if (command.length > 0) return command.join(" ");
  const path = (incident.cgroup || {}).path;
  return path ? `${kind} in ${path}` : kind;
}

function ending(recording) {
  if (!recording) return null;
  const took = `after ${duration(recording.duration_ns)}`;
  if (Number.isFinite(recording.signal)) return `signal ${recording.signal} ${took}`;
  return Number.isFinite(recording.exit_code) ? `exit code ${recording.exit_code} ${took}` : null;
}

function fact(name, value) {
  return make("div", "", make("dt", "", name), make("dd", "", value));
}

function known(value) {
  return Number.isFinite(value) ? bytes(value) : null;
}

/** Totals of the chosen stretch. */
function showTotals(element, store, stretch) {
  const totals = store.totals(stretch);
  const known = (value) => (value === null ? "" : String(value));
  Object.assign(element.dataset, {
    fromNs: String(stretch.from),
    untilNs: String(stretch.until),
    growthBytes: known(totals.growth),
    attributedBytes: known(totals.attributed),
    unattributedBytes: known(totals.unattributed),
  });
  const when = (ns) => {
    const apart = ns - store.eventNs;
    return apart === 0 ? "the event" : `${duration(Math.abs(apart))} ${apart < 0 ? "before" : "after"}`;
  };
  fill(
    element,
    figure("Stretch", duration(stretch.until - stretch.from), `${when(stretch.from)} to ${when(stretch.until)}`),
    figure("Growth", totals.growth === null ? "unknown" : bytes(totals.growth), "resident memory, nothing subtracted"),
    figure("With a stack", bytes(totals.attributed), totals.growth === null ? "" : percent(totals.attributed, totals.growth)),
    figure("Without", totals.unattributed === null ? "unknown" : bytes(totals.unattributed), totals.growth === null ? "" : percent(totals.unattributed, totals.growth)),
  );
}

function figure(name, value, aside) {
  return make("div", "figure", make("span", "name", name), make("strong", "", value), make("span", "faint", aside));
}

/** The heaviest functions, by own bytes or with callees. */
function showFunctions(element, store, choice, order, reorder) {
  const { whole, rows } = store.functions(choice);
  const most = 25;
  rows.sort((one, other) => other[order] - one[order] || other.total - one.total);
  if (rows.length === 0) {
    fill(element, make("p", "note", "No stack with this cause in this stretch."));
    return;
  }
  const head = (text, key) => {
    const button = make("button", "sort", text + (order === key ? " \u2193" : ""));
    button.type = "button";
    button.setAttribute("aria-pressed", String(order === key));
    button.addEventListener("click", () => reorder(key));
    return button;
  };
  fill(element, table(
    rows.length > most ? `The first ${most} of ${rows.length} functions` : "Functions",
    [["Function", false], [head("Own", "self"), true], ["", true], [head("With callees", "total"), true], ["", true]],
    rows.slice(0, most).map(({ frame, self, total }) => [
      make("span", "", make("code", "", frame.label), " ", make("span", "faint", frame.places[0] || frame.module || "")),
      bytes(self), percent(self, whole), bytes(total), percent(total, whole),
    ]),
  ));
}

/** The sections that do not depend on the stretch. */
function showAbout(element, incident) {
  const oom = incident.oom || {};
  const parts = [];
  const part = (title, ...content) => parts.push(make("section", "", make("h2", "", title), ...content));
  const victims = list(oom.victims).filter(Boolean);
  if (victims.length > 0) {
    part("Victims", table("Victims",
      [["Process", false], ["Anonymous", true], ["File", true], ["Shared", true], ["Swap", true], ["Score adj.", true], ["", false]],
      victims.map((one) => [
        `${one.comm} (${one.pid})`, bytes(one.anon_bytes), bytes(one.file_bytes), bytes(one.shmem_bytes), bytes(one.swap_bytes),
        String(one.oom_score_adj ?? "unknown"), one.killed ? (one.shares_mm ? "killed, shares memory" : "killed") : "chosen, was exiting",
      ])));
  }
  const tasks = list(oom.tasks).concat(list((incident.pressure || {}).tasks)).filter(Boolean);
  if (tasks.length > 0) {
    part("Processes of the cgroup", table("Processes, largest first",
      [["Process", false], ["Anonymous", true], ["File", true], ["Shared", true], ["Swap", true], ["Peak", true]],
      tasks.map((one) => [
        make("span", one.victim ? "alarm" : "", `${one.comm} (${one.pid})`),
        bytes(one.anon_bytes), bytes(one.file_bytes), bytes(one.shmem_bytes), bytes(one.swap_bytes), bytes(one.peak_bytes),
      ])));
  }
  const recorded = list((incident.recording || {}).processes).filter(Boolean);
  if (recorded.length > 0) {
    part("Processes", table("Processes that ran, by peak", [["Process", false], ["Peak", true], ["Kernel's peak", true]],
      recorded.slice(0, 200).map((one) => [`${one.comm} (${one.pid})`, bytes(one.peak_bytes), bytes(one.max_rss_bytes)])));
  }
  const composition = incident.composition || {};
  const made = [["Anonymous", "anon_bytes"], ["File", "file_bytes"], ["Shared", "shmem_bytes"], ["Swapped out", "swap_bytes"], ["Unattributed", "unattributed_bytes"]];
  part("What memory was made of", make("dl", "facts", ...made.map(([name, key]) => fact(name, bytes(composition[key])))),
    make("p", "note", "Unattributed: usage without anonymous and shared memory of the processes: page cache, kernel memory, sockets, processes that were not followed."));
  const growth = list(incident.growth).filter(Boolean);
  if (growth.length > 0) {
    part("Growth of processes up to the event", table("Largest growth first",
      [["Process", false], ["Resident", true], ["Last 100 ms", true], ["Last 1 s", true], ["Last 10 s", true]],
      growth.slice(0, 50).map((one) => [`${one.comm} (${one.pid})`, bytes(one.rss_bytes), bytes(one.last_100ms_bytes), bytes(one.last_1s_bytes), bytes(one.last_10s_bytes)])));
  }
  const allocations = incident.allocations || {};
  const without = list(allocations.unattributed).filter(Boolean);
  if (without.length > 0) {
    part("Growth without a stack", table("In the whole window", [["Why", false], ["Bytes", true]], without.map((one) => [one.why, bytes(one.bytes)])));
  }
  if (Number.isFinite(allocations.sample_bytes)) {
    const notes = [`A stack is taken about every ${bytes(allocations.sample_bytes)} a process grows.`];
    if (allocations.thinned > 0) notes.push(`${allocations.thinned} stacks were left out to keep to the budget; the next of the same process stands for their bytes.`);
    if (allocations.joined > 0) notes.push(`${allocations.joined} samples were joined with a neighbour of the same path: totals are exact, times coarser.`);
    parts.push(make("p", "note", notes.join(" ")));
  }
  fill(element, ...parts);
}
