"""Keeps of a journal what concerns one cgroup: `trim.py SEGMENT... OUT`. See README.md beside this file."""

import json
import struct
import sys
import zlib

FACT, RECORD, PREAMBLE = 2, 1, 3
CGROUP = 22
NAME = "/demo/burst"


def frames(path):
    data, at = open(path, "rb").read(), 8
    while at < len(data):
        length, crc, kind = struct.unpack_from("<IIB", data, at)
        payload = data[at + 9 : at + 9 + length]
        assert crc == zlib.crc32(bytes([kind]) + payload)
        yield kind, payload
        at += 9 + length


def change_path(record):
    (length,) = struct.unpack_from("<Q", record, 96)
    return record[104 : 104 + length].decode()


def main(segments, out):
    # The preambles repeat what the frames before them said.
    inputs = [(kind, payload) for path in segments for kind, payload in frames(path) if kind != PREAMBLE]
    facts = [json.loads(payload) for kind, payload in inputs if kind == FACT]
    records = [payload for kind, payload in inputs if kind == RECORD]

    cage = next(r for r in records if struct.unpack_from("<H", r)[0] == CGROUP and b"memtrace-tests-" in r)
    cage_id, parent_id = struct.unpack_from("<Q", cage, 16)[0], struct.unpack_from("<Q", cage, 80)[0]
    path = change_path(cage)
    parent = path.rsplit("/", 1)[0]
    root_id = next((f["id"] for f in facts if f["fact"] == "cgroup" and f["path"] == "/"), None)
    task = lambda r: struct.unpack_from("<IIQ", r, 16)
    # Processes that were ever in it: any record with a task and the cgroup's id in it.
    needle = struct.pack("<Q", cage_id)
    words = lambda r: [r[i : i + 8] for i in range(16, len(r) - 7, 8)]
    inside = {task(r)[2] for r in records if struct.unpack_from("<H", r)[0] in (1, 23) and needle in words(r)}
    starts = {struct.pack("<Q", start) for start in inside}

    paths = {f["path"] for f in facts if f["fact"] == "stack" and f["cgroup_id"] == cage_id}
    frames_kept = [frame for f in facts if f["fact"] == "path" and f["id"] in paths for frame in f["frames"]]
    modules = {frame["m"] for frame in frames_kept if "m" in frame}

    kept = [struct.pack("<4sI", b"MTJR", 1)]
    for kind, payload in inputs:
        if kind == RECORD:
            if needle not in words(payload) and not starts & set(words(payload)):
                continue
            if struct.unpack_from("<H", payload)[0] == CGROUP:
                name = NAME.encode()
                payload = payload[:96] + struct.pack("<Q", len(name)) + name.ljust(len(payload) - 104, b"\0")
        else:
            fact = json.loads(payload)
            if fact["fact"] == "process":
                continue
            if fact["fact"] == "stack" and fact["cgroup_id"] != cage_id:
                continue
            if fact["fact"] == "path" and fact["id"] not in paths:
                continue
            if fact["fact"] == "module":
                if fact["id"] not in modules:
                    continue
                # Where it was built is nobody's concern.
                if fact["path"].endswith("/workload"):
                    fact["path"] = "/demo/workload"
            if fact["fact"] == "cgroup" and fact["id"] not in (cage_id, parent_id, root_id):
                continue
            if fact["fact"] == "cgroup" and fact["id"] == parent_id:
                fact["parent_id"] = root_id
            if fact["fact"] == "start":
                fact["host"] |= {"hostname": "vm", "kernel": fact["host"]["kernel"].split("-")[0]}
            text = json.dumps(fact, separators=(",", ":"))
            payload = text.replace(path, NAME).replace(parent, NAME.rsplit("/", 1)[0]).encode()
        crc = zlib.crc32(bytes([kind]) + payload)
        kept.append(struct.pack("<IIB", len(payload), crc, kind) + payload)
    open(out, "wb").write(b"".join(kept))


main(sys.argv[1:-1], sys.argv[-1])
