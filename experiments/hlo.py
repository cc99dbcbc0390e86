"""The operations between chips in a compiled program, read off its text."""

import dataclasses
import math
import re
from collections import Counter

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """Operations of one kind between chips, in a step.

    Attributes:
      count: how many there are.
      bytes: of the arrays in them, on one chip, where they are whole: what is reduced, what was gathered, what is
        about to be scattered or sent.
      sent_bytes: that a chip sends. An operation goes around a ring of its group of n chips: (n − 1)/n of the bytes,
        and twice that to reduce them for all. A permutation sends them all.
    """

    count: int
    bytes: int
    sent_bytes: int


def collectives(hlo: str, chips: int) -> dict[str, Collective]:
    """The operations between chips in a compiled program, by kind.

    An operation that goes on beside computations stands in the program more than once, under the same channel; it is
    counted once.

    Args:
      hlo: the program as text.
      chips: that run it.
    """
    counts: dict[str, int] = Counter()
    sizes: dict[str, int] = Counter()
    sent: dict[str, int] = Counter()
    computation, channels = "", set()
    for line in hlo.splitlines():
        if head := re.match(r"(?:ENTRY )?%(\S+) \(", line):
            computation = head[1]
        match = re.search(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(", line)
        if match is None:
            continue
        channel = re.search(r"channel_id=(\d+)", line)
        if channel is not None:
            if channel[1] in channels:
                continue
            channels.add(channel[1])
        result, kind, start = match.groups()
        n = _group_size(line, chips)
        size = _result_bytes(result, with_operands=start is not None and kind != "all-reduce")
        if kind == "reduce-scatter":
            size *= n
        elif computation.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"  # so a TPU writes one: reduced as a whole in a computation that keeps a part
        counts[kind] += 1
        sizes[kind] += size
        if kind == "collective-permute":
            sent[kind] += size
        else:
            sent[kind] += round((2 if kind == "all-reduce" else 1) * size * (n - 1) / n)
    return {
        kind: Collective(count=counts[kind], bytes=sizes[kind], sent_bytes=sent[kind])
        for kind in KINDS
        if kind in counts
    }


def _result_bytes(result: str, with_operands: bool) -> int:
    """The bytes of an operation's results, which stand behind its operands in what some asynchronous ones return."""
    arrays = re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", result)
    if with_operands:
        arrays = [array for array in arrays if array != ("u32", "")]  # what the runtime keeps of it, at the end
        arrays = arrays[len(arrays) // 2 :]
    return sum(_width(dtype) * math.prod(map(int, filter(None, dims.split(",")))) for dtype, dims in arrays)


def _width(dtype: str) -> int:
    """The bytes of one element: of ``bf16``, ``f8e4m3fn`` and their like by the bits in the name, one of ``pred``."""
    bits = re.search(r"\d+", dtype)
    return 1 if bits is None else -(-int(bits[0]) // 8)


def _group_size(line: str, chips: int) -> int:
    """How many chips an operation is between: ``{{0,1},{2,3}}``, ``[2,4]<=[8]``, or axes of a mesh; else all."""
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return len(match[1].split(","))
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]<=", line):
        return int(match[1])
    if match := re.search(r"replica_groups=mesh\[(.*?)\][^{]*\{(.*?)\}", line):
        axes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        return math.prod(int(axes[name]) for name in re.findall(r"'(\w+)'", match[2]))
    return chips
