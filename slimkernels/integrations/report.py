"""What became of each module of a model, as rows and as a table that prints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch.nn import Module

UNKNOWN = "not known; its parts were looked at"
UNKNOWN_LEAF = "nothing of ours takes its place"


@dataclass(frozen=True)
class Row:
    """One module.

    path     as in model.named_modules(); "" is the model itself. A shared module has its first.
    kind     its class before, with the package it comes from: "torch.nn.LayerNorm"
    outcome  "swapped", "already", "left" or "restored"
    detail   the class that it has now, or why it was left
    """

    path: str
    kind: str
    outcome: str
    detail: str


@dataclass(frozen=True)
class Report:
    """What replace() or restore() did to `model`, which is the model that it was done to.

    ``print(report)`` shows a table of it, with modules of which the same is to be said in one line.
    """

    model: Module
    rows: Sequence[Row]

    def _with(self, outcome: str) -> list[Row]:
        return [row for row in self.rows if row.outcome == outcome]

    @property
    def swapped(self) -> list[Row]:
        return self._with("swapped")

    @property
    def already(self) -> list[Row]:
        """Modules that had been swapped before, or were made of slimkernels.nn."""
        return self._with("already")

    @property
    def left(self) -> list[Row]:
        return self._with("left")

    @property
    def restored(self) -> list[Row]:
        return self._with("restored")

    def __str__(self) -> str:
        counts = {row.outcome: len(self._with(row.outcome)) for row in self.rows}
        order = ("swapped", "already", "restored", "left")
        head = ", ".join(f"{counts[name]} {name}" for name in order if name in counts)
        title = f"{type(self.model).__name__}: {head or 'nothing to restore'}"
        # What is left for a reason is read before what is merely unknown.
        unknown = (UNKNOWN, UNKNOWN_LEAF)
        rows = sorted(self.rows, key=lambda r: (order.index(r.outcome), r.detail in unknown))
        groups: dict[tuple[str, str, str], list[str]] = {}
        for row in rows:
            groups.setdefault((row.outcome, row.kind, row.detail), []).append(row.path or "(model)")
        table = [("", "", "class", "first of them", "now, or why not")]
        table += [
            (outcome, str(len(paths)), kind, paths[0], detail)
            for (outcome, kind, detail), paths in groups.items()
        ]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [
            f"  {a:<{widths[0]}}  {b:>{widths[1]}}  {c:<{widths[2]}}  {d:<{widths[3]}}  {e}"
            for a, b, c, d, e in table
        ]
        return "\n".join([title, *lines]) if groups else title

    def _repr_pretty_(self, printer, cycle) -> None:
        printer.text(str(self))  # what a notebook shows


def kind_of(cls: type) -> str:
    """A class's name as one would import it."""
    cls = vars(cls).get("_slimkernels_class", cls)  # one made for a class at hand
    module = cls.__module__
    for public in ("torch.nn", "slimkernels.nn"):
        if module == public or module.startswith(public + "."):
            module = public
    return f"{module}.{cls.__qualname__}" if module != "builtins" else cls.__qualname__
