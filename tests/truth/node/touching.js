// Two JavaScript functions that touch buffers: one by its own compiled code, one through a native function.
// Run with --perf-basic-prof, which names compiled code in /tmp/perf-PID.map.
'use strict';

const MIB = 1 << 20;
const PAGE = 4096;
const done = { touchByLoop: 0, touchByFill: 0 };
const held = [];

function touchByLoop(bytes) {
  const buffer = new Uint8Array(bytes);
  for (let at = 0; at < bytes; at += PAGE) buffer[at] = 1;
  held.push(buffer);
  done.touchByLoop += bytes;
}

function touchByFill(bytes) {
  held.push(Buffer.alloc(bytes, 1));
  done.touchByFill += bytes;
}

let state = 19;
while (done.touchByLoop < 128 * MIB || done.touchByFill < 192 * MIB) {
  state = (Math.imul(state, 1103515245) + 12345) >>> 0;
  const pages = 64 + ((state >>> 16) % 190);
  if (done.touchByLoop < 128 * MIB) touchByLoop(pages * PAGE);
  if (done.touchByFill < 192 * MIB) touchByFill((pages + 31) * PAGE);
}
console.log(JSON.stringify({ workload: 'node', touch: done }));
