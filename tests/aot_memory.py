"""How a compiled kernel reads and writes global memory: where in fewer than 128 bits at a time.

TTGIR says which lines of the source load and store blocks of which a thread's share is 128 bits or
more, and SASS, which names its lines too, what instructions became of each line. All of those must
be wide; scalars, and vectors too short for that, are lines of their own.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

# Blocks that are loaded and stored, in TTGIR, with their location.
BLOCKS = {
    "load": r"(?:tt\.load|ttg\.async_copy_global_to_local)\b.*?tensor<([\dx]+)x!tt\.ptr<\w*?(\d+)>"
    r".*loc\((.*)\)$",
    "store": r"tt\.store\b.*?tensor<([\dx]+)x!tt\.ptr<\w*?(\d+)>.*loc\((.*)\)$",
}
# Instructions, and how many bits they name: none are 32.
ACCESSES = {
    "load": r"\b(?:LDG|LDGSTS)\b(\S*)",
    "store": r"\bSTG\b(\S*)",
}
WIDE = re.compile(r"\.(?:128|256)\b")
LINE = re.compile(r'//## File "([^"]*)", line (\d+)')


def accesses(way: str, ttgir: str, sass: str, threads: int) -> dict[str, dict[str, int]]:
    """{"file.py:line": {"wide": n, "narrow": m}} for each line with a block to load (store).

    way      "load" or "store"
    sass     with line information
    threads  of a program: how many share a block
    """
    found = {line: {"wide": 0, "narrow": 0} for line in _lines_of_blocks(way, ttgir, threads)}
    line = None
    for text in sass.splitlines():
        if place := LINE.search(text):
            line = _named(*place.groups())
        elif line in found and (instruction := re.search(ACCESSES[way], text)):
            found[line]["wide" if WIDE.search(instruction[1]) else "narrow"] += 1
    return found


def described(way: str, found: dict[str, dict[str, int]]) -> str:
    """Counts, and where in the source they are not what they should be."""
    places = [
        f"{counts['narrow']} of {sum(counts.values())} narrow at {line}"
        for line, counts in sorted(found.items())
        if counts["narrow"] or not counts["wide"]
    ]
    wide = sum(counts["wide"] for counts in found.values())
    return f"{way}s of 128 bits: {wide}" + "".join(f", {place}" for place in places)


def _lines_of_blocks(way: str, ttgir: str, threads: int) -> set[str]:
    """Where blocks are accessed that have 128 bits for each thread of the program, or of four warps
    if it has more."""
    places = dict(re.findall(r"^(#loc\d*) = loc\((.*)\)$", ttgir, re.MULTILINE))
    lines = set()
    for shape, bits, place in re.findall(BLOCKS[way], ttgir, re.MULTILINE):
        size = math.prod(map(int, shape.split("x"))) * int(bits)
        if size >= 128 * min(threads, 128):
            lines.add(_innermost(place, places))
    return lines


def _innermost(place: str, places: dict[str, str]) -> str:
    """The line of the function that was called last, of #loc7, "x"(#loc7), callsite(a at b)."""
    while not (line := re.match(r'"([^"]*)":(\d+):', place)):
        place = places[re.search(r"#loc\d*", place)[0]]
    return _named(*line.groups())


def _named(file: str, line: str) -> str:
    return f"{Path(file).name}:{line}"
