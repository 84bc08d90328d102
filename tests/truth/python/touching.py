"""Python in three ways: two functions of a native library through ctypes, and the interpreter's own bytearray.

The truth of the library's functions is theirs alone; the bytearray's is what grew below the interpreter's loop and not
in the library. The few MiB of the interpreter's start are below its loop too."""

import ctypes
import json
import sys

MIB = 1 << 20
done = {"touch_for_left": 0, "touch_for_right": 0, "_PyEval_EvalFrameDefault": 0}
library = ctypes.CDLL(sys.argv[1])
for name in ("touch_for_left", "touch_for_right"):
    function = getattr(library, name)
    function.argtypes = [ctypes.c_size_t]
    function.restype = ctypes.c_size_t


def left(pages):
    done["touch_for_left"] += library.touch_for_left(pages)


def right(pages):
    done["touch_for_right"] += library.touch_for_right(pages)


def grow(held, size):
    held.append(bytearray(size))
    done["_PyEval_EvalFrameDefault"] += size


state = 17
while done["touch_for_left"] < 128 * MIB or done["touch_for_right"] < 192 * MIB:
    state = (state * 1103515245 + 12345) % (1 << 32)
    if done["touch_for_left"] < 128 * MIB:
        left(3 + (state >> 16) % 190)
    if done["touch_for_right"] < 192 * MIB:
        right(3 + (state >> 20) % 190)
held = []
for _ in range(64):
    grow(held, 6 * MIB)
print(json.dumps({"workload": "python", "touch": done, "within": {"Py_BytesMain": sum(done.values())}}))
