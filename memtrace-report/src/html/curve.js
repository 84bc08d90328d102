// The memory curve, drawn by uPlot. Dragging over it selects a stretch of time for the whole page.
"use strict";

class Curve {
  /** Calls `chosen` with the dragged stretch {from, until} in nanoseconds, or with null after a double click. */
  constructor(element, incident, store, chosen) {
    Object.assign(this, { element, store, chosen });
    this.stretch = null;
    this.magnified = false;
    this.data = curveRows(incident, store.eventNs);
    this.marks = eventMarks(incident, store);
    this.plot = null;
    if (this.data[0].length === 0) {
      fill(element, make("p", "note", "This file has no readings of the curve."));
      return;
    }
    this.plot = new uPlot(this.options(incident), this.data, element);
    onWidth(element, () => this.resize());
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.plot.redraw(false, false));
  }

  options(incident) {
    const colour = (name) => () => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
    const value = (_, one) => (one === null || one === undefined ? "\u2013" : bytes(one));
    const axis = { stroke: colour("--faint"), grid: { stroke: colour("--line"), width: 1 }, ticks: { stroke: colour("--line"), width: 1 }, font: "12px system-ui, sans-serif" };
    const line = (label, name, more = {}) => ({ label, stroke: colour(name), width: 1.5, value, points: { show: false }, spanGaps: false, ...more });
    const series = [
      { label: "Time", value: (_, one) => (one === null || one === undefined ? "\u2013" : duration(one * 1e9)) },
      line("Usage", "--usage", { width: 2, fill: colour("--usage-fill") }),
      line("Anonymous", "--anon"),
      line("File and shared", "--file"),
      line("Limit", "--limit", { dash: [6, 4] }),
    ];
    // A series without any reading is hidden.
    series.forEach((one, i) => { if (i > 0 && this.data[i].every((reading) => reading === null)) one.show = false; });
    return {
      width: Math.max(this.element.clientWidth, 200),
      height: this.height(),
      scales: {
        x: { time: false },
        y: { range: (_, low, high) => [0, Math.max(high || 0, 1) * 1.08] },
      },
      axes: [
        { ...axis, space: 70, values: (_, splits) => splits.map((one) => (one === 0 ? "0" : duration(one * 1e9))) },
        { ...axis, size: 76, incrs: Array.from({ length: 50 }, (_, power) => 2 ** power), values: (_, splits) => splits.map((one) => bytes(one)) },
      ],
      series,
      cursor: {
        drag: { x: true, y: false, setScale: false, dist: 4 },
        y: false,
        bind: { dblclick: () => () => this.chosen(null) },
      },
      hooks: {
        setSelect: [(plot) => this.dragged(plot)],
        draw: [(plot) => this.drawMarks(plot, colour)],
      },
    };
  }

  height() {
    return this.element.clientWidth < 600 ? 200 : 260;
  }

  dragged(plot) {
    const { left, width } = plot.select;
    if (width < 2) return;
    const ns = (px) => Math.round(this.store.eventNs + plot.posToVal(px, "x") * 1e9);
    this.chosen({ from: ns(left), until: ns(left + width) });
  }

  drawMarks(plot, colour) {
    const { ctx, bbox } = plot;
    const ratio = devicePixelRatio || 1;
    ctx.save();
    ctx.strokeStyle = ctx.fillStyle = colour("--alarm")();
    ctx.lineWidth = ratio;
    ctx.font = `${12 * ratio}px system-ui, sans-serif`;
    for (const { ns, label } of this.marks) {
      const x = plot.valToPos((ns - this.store.eventNs) / 1e9, "x", true);
      if (x < bbox.left || x > bbox.left + bbox.width) continue;
      ctx.beginPath();
      ctx.moveTo(x, bbox.top);
      ctx.lineTo(x, bbox.top + bbox.height);
      ctx.stroke();
      const isRight = x > bbox.left + bbox.width / 2;
      ctx.textAlign = isRight ? "right" : "left";
      ctx.fillText(label, x + (isRight ? -5 : 5) * ratio, bbox.top + bbox.height - 8 * ratio);
    }
    ctx.restore();
  }

  resize() {
    this.plot.setSize({ width: Math.max(this.element.clientWidth, 200), height: this.height() });
    this.mark(this.stretch);
  }

  /** Marks a stretch as chosen; null for none. */
  mark(stretch) {
    this.stretch = stretch;
    if (!this.plot) return;
    if (!stretch) {
      this.plot.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
      return;
    }
    const end = this.plot.over.clientWidth;
    const px = (ns) => Math.min(Math.max(this.plot.valToPos((ns - this.store.eventNs) / 1e9, "x"), 0), end);
    const [left, right] = [px(stretch.from), px(stretch.until)];
    const height = this.plot.over.clientHeight;
    this.plot.setSelect({ left, top: 0, width: Math.max(right - left, 1), height }, false);
  }

  /** Shows only a stretch, or all of the curve again for null. */
  magnify(stretch) {
    if (!this.plot) return;
    const { whole, eventNs } = this.store;
    const { from, until } = stretch || whole;
    this.plot.setScale("x", { min: (from - eventNs) / 1e9, max: (Math.max(until, from + 1000) - eventNs) / 1e9 });
    // uPlot commits scales in a microtask; the rectangle has to be placed on the new ones.
    queueMicrotask(() => queueMicrotask(() => this.mark(this.stretch)));
  }
}

/** Columns for uPlot: seconds from the event, usage, anonymous, file and shared, limit; unknown is null. */
function curveRows(incident, eventNs) {
  const columns = (incident.timeline || {}).columns || {};
  const at = (name, i) => number(list(columns[name])[i]);
  const order = list(columns.boot_ns).map((ns, i) => [ns, i]).filter(([ns]) => Number.isFinite(ns));
  order.sort((one, other) => one[0] - other[0]);
  const rows = order.map(([ns, i]) => {
    const [file, shmem] = [at("file_bytes", i), at("shmem_bytes", i)];
    const shared = file === null && shmem === null ? null : (file || 0) + (shmem || 0);
    return [(ns - eventNs) / 1e9, at("usage_bytes", i), at("anon_bytes", i), shared, at("limit_bytes", i)];
  });
  return [0, 1, 2, 3, 4].map((column) => rows.map((row) => row[column]));
}

/** Marks for the curve: kills, or the moment of the event. */
function eventMarks(incident, store) {
  const victims = list((incident.oom || {}).victims).filter((victim) => victim && Number.isFinite(victim.at_boot_ns));
  if (victims.length > 0) {
    // At most 8, so that the marks of a storm of kills do not cover the curve.
    return victims.slice(0, 8).map((victim, i) => ({ ns: victim.at_boot_ns, label: i === 0 ? "kill" : "" }));
  }
  if (incident.kind === "recording") return [];
  return [{ ns: store.eventNs, label: incident.kind === "spike" ? "spike" : "limit hit" }];
}
