"""Our parameters under Hugging Face's names: a table a family, and one way through it each way.

A family's table (convert_bert.py, convert_gpt.py, convert_seq2seq.py) says for each of our modules
which of theirs it is. Where several are joined in one product of ours, their rows are laid end to
end; where theirs is a Conv1D, its matrix is transposed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from slimkernels.models.config import TransformerConfig, expected


class Source(NamedTuple):
    """What one of our modules, or parameters, is in theirs.

    names       theirs; the rows of several are joined
    rows        of each, where they are not equal
    transposed  their weight is (in, out)
    """

    names: tuple[str, ...]
    rows: tuple[int, ...] | None = None
    transposed: bool = False


Names = dict[str, Source]


@dataclass(frozen=True)
class Family:
    """How Hugging Face writes one kind of model.

    model_type   in config.json
    prefix       of their names in a model with a head; a bare model's have none
    names        the table of a config: our modules and parameters, and theirs
    from_theirs  our config for config.json's dictionary
    to_theirs    the entries of config.json that are ours to say
    ties         of a config: their names of one tensor's second places, and the first
    constants    the ends of names that are no parameters
    defaults     entries of config.json for a model that comes from no folder
    untied       their name of the vocabulary's matrix, where it may be one of its own
    today        a name in an old checkpoint to the one it has now
    """

    model_type: str
    prefix: str
    names: Callable[[TransformerConfig], Names]
    from_theirs: Callable[[Mapping], TransformerConfig]
    to_theirs: Callable[[TransformerConfig], dict]
    ties: Callable[[TransformerConfig], Mapping[str, str]]
    constants: tuple[str, ...] = ()
    defaults: Mapping[str, object] = field(default_factory=dict)
    untied: str | None = None
    today: Callable[[str], str] = str

    def as_stored(
        self, config: TransformerConfig, state: Mapping[str, Tensor]
    ) -> TransformerConfig:
        """The config of what is in `state`: its vocabulary's matrix may be another than the tied
        one, whatever config.json says.
        """
        first = self.ties(config).get(self.untied)
        if first in state and self.untied in state:
            is_tied = torch.equal(state[first], state[self.untied])
            return replace(config, tie_embeddings=is_tied)
        return config


class Converted(NamedTuple):
    """Our parameters by name; their names that we need and are not there; those we do not need.

    missing  our name to theirs
    """

    state: dict[str, Tensor]
    missing: dict[str, list[str]]
    unused: list[str]


def table(entries: Mapping[str, str | tuple[str, ...]], layers: int | None = None) -> Names:
    """A table from `ours: theirs`, or for each of `layers` blocks with its number for {}."""
    if layers is None:
        return {ours: Source((t,) if isinstance(t, str) else t) for ours, t in entries.items()}
    names: Names = {}
    for layer in range(layers):
        for ours, source in table(entries).items():
            filled = tuple(theirs.format(layer) for theirs in source.names)
            names[ours.format(layer)] = source._replace(names=filled)
    return names


def norm_chain(stack: str, layers: int, each: str, last: str) -> Names:
    """The norms before their blocks and the one after the last, which with us are the norm of the
    embedding and those that end a block.
    """
    ours = [f"{stack}.embedding.norm", *(f"{stack}.layers.{i}.output_norm" for i in range(layers))]
    theirs = [*(each.format(i) for i in range(layers)), last]
    return table(dict(zip(ours, theirs, strict=True)))


def tied(config: TransformerConfig, name: str, first: str) -> dict[str, str]:
    """The one tie of a language model, if it has it."""
    return {name: first} if config.tie_embeddings else {}


def to_ours(state: Mapping[str, Tensor], names: Names, wanted: Iterable[str]) -> Converted:
    """The parameters `wanted`, by our names, from Hugging Face's `state`."""
    ours: dict[str, Tensor] = {}
    missing: dict[str, list[str]] = {}
    used: set[str] = set()
    for name in wanted:
        source, theirs = _theirs(names, name)
        absent = [their for their in theirs if their not in state]
        used.update(theirs)
        if absent:
            missing[name] = absent
            continue
        parts = [state[their] for their in theirs]
        tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
        ours[name] = tensor.T if source.transposed and tensor.dim() == 2 else tensor
    return Converted(ours, missing, [name for name in state if name not in used])


def to_theirs(state: Mapping[str, Tensor], names: Names) -> dict[str, Tensor]:
    """Hugging Face's state_dict from ours; its tensors share no memory with each other.

    Errors  ValueError for a parameter that the table does not have
    """
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        source, theirs = _theirs(names, name)
        if len(theirs) == 1:
            result[theirs[0]] = tensor.T if source.transposed and tensor.dim() == 2 else tensor
            continue
        rows = source.rows or [len(tensor) // len(theirs)] * len(theirs)
        for their, part in zip(theirs, tensor.split(list(rows)), strict=True):
            result[their] = part.clone()
    return result


def without_ties(
    state: Mapping[str, Tensor], ties: Mapping[str, str], caller: str
) -> dict[str, Tensor]:
    """`state` with each tied tensor in its first place only.

    Errors  ValueError, of `caller`, where the two places differ
    """
    state = dict(state)
    for name, first in ties.items():
        if name not in state:
            continue
        tensor = state.pop(name)
        if not torch.equal(tensor, state.setdefault(first, tensor)):
            raise ValueError(
                f"{caller}: {name} must equal {first}, to which ours is tied; it differs"
            )
    return state


def chosen(caller: str, name: str, value: object, known: Mapping[str, str]) -> str:
    """Ours for the value of an entry in config.json, or a ValueError that lists the known ones."""
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{caller}: {name} must be {' or '.join(known)}; got {value!r}")
    return known[value]


def name_of(value: str, known: Mapping[str, str]) -> str:
    """Theirs for a value of ours: the first of those that mean it."""
    for theirs, ours in known.items():
        if ours == value:
            return theirs
    raise ValueError(f"to Hugging Face: it has {' or '.join(known.values())}; got {value!r}")


def taken(caller: str, theirs: Mapping, fields: Mapping[str, str]) -> dict:
    """Our fields from entries of config.json, or a ValueError that names the one that is missing
    or is not what the field must be."""
    for ours, name in fields.items():
        if name not in theirs:
            raise ValueError(f"{caller}: config.json must have {name}; it has not")
        check_entry(caller, name, ours, theirs[name])
    return {ours: theirs[name] for ours, name in fields.items()}


def entry(caller: str, theirs: Mapping, name: str, ours: str, default: object) -> object:
    """Our field from an entry of config.json, or `default` where it has none or null."""
    value = theirs.get(name)
    value = default if value is None else value
    check_entry(caller, name, ours, value)
    return value


def flag(caller: str, theirs: Mapping, name: str, default: bool) -> bool:
    """An entry of config.json that is true or false, or `default` where it has none or null."""
    value = theirs.get(name)
    value = default if value is None else value
    if not isinstance(value, bool):
        raise ValueError(f"{caller}: {name} must be True or False; got {value!r}")
    return value


def check_entry(caller: str, name: str, ours: str, value: object) -> None:
    """A ValueError that names config.json's entry where our field could not be `value`."""
    wanted = expected(ours, value)
    if wanted is not None:
        raise ValueError(f"{caller}: {name} must be {wanted}; got {value!r}")


def given(config: TransformerConfig, fields: Mapping[str, str]) -> dict:
    """Entries of config.json from our fields."""
    return {name: getattr(config, ours) for ours, name in fields.items()}


def require(caller: str, theirs: Mapping, **wanted: object) -> None:
    """Entries of config.json have the one value that is implemented, or are not there."""
    for name, value in wanted.items():
        if theirs.get(name, value) not in (value, None):
            raise ValueError(f"{caller}: {name} must be {value!r}; got {theirs[name]!r}")


def _theirs(names: Names, name: str) -> tuple[Source, list[str]]:
    if name in names:
        return names[name], list(names[name].names)
    module, _, kind = name.rpartition(".")
    if module not in names:
        raise ValueError(f"to Hugging Face: the model has no parameter {name}")
    return names[module], [f"{their}.{kind}" for their in names[module].names]
