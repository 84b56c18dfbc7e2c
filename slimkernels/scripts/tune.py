"""slimkernels tune: measures which tiles of a kernel are fastest on this GPU, and keeps them.

The tiles that come with the package were chosen to fit every GPU. This command tries those near
them, one kernel at a time, leaves out what gives wrong numbers, and writes the fastest to a table
that later calls on this GPU use. Entries are written as they are found: an interrupted run loses
nothing, and the next one measures what is left.
"""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
import tyro
from tqdm import tqdm

from slimkernels.dispatch import INTERPRETED, OPS
from slimkernels.training.device import resolve_device

if TYPE_CHECKING:
    from slimkernels.scripts.tune_attention import Session

TUNABLE = {"attention": "scaled_dot_product_attention"}
SECONDS = 2  # Triton 3.6 compiles one of these kernels in 1 to 2 s on a core of 2021


@dataclass
class Options:
    """Measure the fastest tiles on this GPU, and write them to a table that later calls use."""

    op: tyro.conf.Positional[str]
    """what to tune: attention"""
    out: Path | None = None
    """another file than the user's own table, such as one to come with the package"""
    quick: bool = False
    """only 16-bit heads up to 128 wide: a quarter of the entries, which most models need"""
    kernel: Literal["forward", "dq", "dkdv", "dbias"] | None = None
    """only this kernel"""
    width: Literal[64, 128, 256, 512] | None = None
    """only heads up to this width, and above half of it"""
    again: bool = False
    """measure the entries that the table has, too"""
    minutes: float | None = None
    """begin no entry later than this; the next run goes on"""
    device: str = "cuda"
    """cuda or cuda:N"""


def main(argv: list[str] | None = None) -> int:
    """Run the command; 0 when it finished, 1 on a bad table, 2 where it cannot run or does not
    know the op, 130 when interrupted."""
    options = tyro.cli(Options, args=argv, prog="slimkernels tune")
    if reason := _cannot_run(options):
        print(f"slimkernels tune: {reason}", file=sys.stderr)
        return 2
    # Not before: it imports Triton.
    from slimkernels.scripts import tune_attention as attention

    try:
        device = resolve_device(options.device)
        if device.type != "cuda":
            raise ValueError(f"--device must be cuda or cuda:N; got {options.device}")
        name = torch.cuda.get_device_name(device)
        # Kernels are launched on the current device.
        with torch.cuda.device(device):
            session = attention.Session(
                options.out or attention.tiles.user_table(name), device, options.again
            )
            clock = attention.tuning.EventClock(device)
            return tune(options, session, attention.Sizes(), clock, name)
    except KeyboardInterrupt:
        print("\nInterrupted. What was measured is kept; the same command goes on.")
        return 130
    except (ValueError, OSError) as error:
        print(f"slimkernels tune: {error}", file=sys.stderr)
        return 1


def _cannot_run(options: Options) -> str | None:
    """Why there is nothing to be done, in a sentence."""
    if not torch.cuda.is_available():
        return "it measures on a GPU, and torch sees none here"
    if INTERPRETED:
        return "TRITON_INTERPRET=1 is set, and what is interpreted cannot be timed"
    if options.op not in TUNABLE:
        return f"{options.op!r} cannot be tuned; what can is {', '.join(TUNABLE)}"
    module = OPS[TUNABLE[options.op]].modules["triton"]
    if isinstance(module, str):
        return f"Triton cannot be used: {module}"
    return None


def tune(options: Options, session: Session, sizes, clock, name: str) -> int:
    """Measure what the session's table lacks; see main().

    sizes  tune_attention.Sizes
    clock  runs what it is given, and returns how many ms that took
    """
    from slimkernels.scripts.tune_attention import places, tuning

    wanted = places(options.quick, options.kernel, options.width)
    if not wanted:
        raise ValueError("--quick leaves out that --width")
    if options.minutes is not None and not options.minutes > 0:
        raise ValueError(f"--minutes must be positive; got {options.minutes}")
    lacking = session.lacking(wanted)
    if session.note:
        print(session.note)
    if not lacking:
        print(f"{session.path} has all {len(wanted)} entries; --again measures them again.")
        return 0
    try:
        session.write()  # what can be refused is refused before the work
    except OSError as error:
        reason = error.strerror.lower()
        raise ValueError(f"{session.path} cannot be written: {reason}") from error
    total = sum(tuning.most_candidates(keys, session.in_use(keys)) for keys in lacking)
    print(
        f"Tuning {options.op} on {name}: {len(lacking)} of {len(wanted)} entries, at most {total} "
        f"candidates, into {session.path}."
    )
    print(
        f"That is {total * SECONDS / 60:.0f} minutes if one takes {SECONDS} s, nearly all of it to "
        "compile; the bar soon knows better. Ctrl-C keeps what is done."
    )
    deadline = time.monotonic() + 60 * (options.minutes or float("inf"))
    speedups, left = [], 0
    with tqdm(total=total, unit="candidate", dynamic_ncols=True) as bar:
        for number, keys in enumerate(lacking):
            if time.monotonic() > deadline:
                left = len(lacking) - number
                break
            most = bar.n + tuning.most_candidates(keys, session.in_use(keys))
            bar.set_postfix_str("/".join(keys))
            line, speedup = _measured(session, keys, sizes, clock, bar)
            bar.write(line)
            bar.update(most - bar.n)  # those that were pruned or came twice
            speedups.append(speedup)
    _report(session, speedups, left)
    return 0


def _measured(session, keys, sizes, clock, bar) -> tuple[str, float | None]:
    """What became of one entry, in a line, and how much faster it is; None if it has no tiles."""
    name = "/".join(keys)
    try:
        before, found = session.measure(keys, sizes, clock, bar.update)
    except torch.OutOfMemoryError:
        return f"{name}: left out: the GPU has not enough free memory for the call", None
    reasons = ", ".join(f"{n} {reason}" for reason, n in sorted(found.skipped.items()))
    tried = f"{found.tried} tried" + (f"; skipped: {reasons}" if reasons else "")
    if found.entry is None:
        return f"{name}: no tiles run here and are right ({tried})", None
    if found.entry == before:
        return f"{name}: {before} stays ({tried})", found.speedup
    return f"{name}: {before} -> {found.entry}, {found.speedup:.2f}x ({tried})", found.speedup


def _report(session, speedups: list[float | None], left: int) -> None:
    known = [speedup for speedup in speedups if speedup is not None]
    faster = [speedup for speedup in known if speedup > 1]
    print(f"{len(faster)} of {len(speedups)} entries are faster than before", end="")
    if faster:
        middle = statistics.median(faster)
        print(f", in the middle {middle:.2f} times as fast, at most {max(faster):.2f}", end="")
    print(f". The table is {session.path}.")
    if len(known) < len(speedups):
        print(f"{len(speedups) - len(known)} entries have no result; the tiles in use stay.")
    if left:
        print(f"{left} entries are left: the same command goes on.")


if __name__ == "__main__":
    sys.exit(main())
