"""The mask half of attn_implementation="slimkernels": masks that also say what they mean.

transformers builds a mask once a forward pass and hands it to every layer. Ours is the mask that
"sdpa" gets, bool and (B, 1, L, Lk), right whatever a model does to it; and it carries a Pattern,
the same statement in attention's own arguments, from which kernels skip what is hidden. An
operation on the mask makes a tensor without the Pattern, or one that is newer than its Pattern:
then the mask itself is used.
"""

from __future__ import annotations

import inspect
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import masking_utils

_PATTERN = "_slimkernels_pattern"
_PACKING = "_slimkernels_packing"


class Pattern(NamedTuple):
    """What a mask shows, as arguments of scaled_dot_product_attention; nothing else is hidden.

    shape        (B, L, Lk) of the mask
    window       (left, right) neighbours that a query sees, None for no limit
    offset       the first query's position less the first key's
    key_lengths  (B,) int32 where sequences are padded on the right
    lengths      the same on the host
    cu_seqlens   (sequences + 1,) int32 where rows hold several sequences, over all B * L tokens
    """

    shape: tuple[int, int, int]
    window: tuple[int | None, int | None]
    offset: int
    key_lengths: Tensor | None = None
    lengths: tuple[int, ...] | None = None
    cu_seqlens: Tensor | None = None


def pattern_of(mask: Tensor | None) -> Pattern | None:
    """The Pattern that the mask function left on `mask`, if it is still that tensor."""
    if mask is None or torch.compiler.is_compiling():
        return None
    pattern, version = getattr(mask, _PATTERN, (None, None))
    return pattern if version == _version(mask) else None


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def mask(
    batch_size,
    q_length,
    kv_length,
    q_offset=0,
    kv_offset=0,
    mask_function=masking_utils.causal_mask_function,
    attention_mask=None,
    **options,
) -> Tensor | None:
    """transformers' sdpa_mask, with its arguments and values, and a Pattern where there is one.

    Waits once for the device to learn how long the sequences are, as sdpa_mask does to learn
    whether any is padded; not at all where it is traced.
    """
    shape = batch_size, q_length, kv_length
    given = *shape, q_offset, kv_offset, mask_function
    padding = masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset)
    parts = _parts(mask_function) if is_readable(padding, q_offset, kv_offset) else None
    if parts is None:
        return masking_utils.sdpa_mask(*given, attention_mask, **options)
    *window, ids = parts
    lengths = key_lengths = made = None
    if padding is not None:
        keys = padding[:, kv_offset : kv_offset + kv_length]
        lengths, key_lengths = _lengths(keys) if len(keys) == batch_size else (None, None)
        if lengths is not None and min(lengths) == kv_length:
            attention_mask = lengths = key_lengths = None
        elif window == [None, None]:  # all queries alike: one row serves them
            made = keys[:, None, None, :].expand(batch_size, 1, q_length, kv_length)
    if made is None:
        # A cache that is longer than what is in it needs no mask in its first call.
        is_first = q_offset == 0 and lengths == (q_length,) * batch_size
        if attention_mask is not None and not is_first:  # so sdpa_mask need not wait again
            options |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        made = masking_utils.sdpa_mask(*given, attention_mask, **options)
    if made is not None and (attention_mask is None or lengths is not None):
        boundaries = None if ids is None else _boundaries(ids)
        offset = q_offset - kv_offset
        pattern = Pattern(shape, tuple(window), offset, key_lengths, lengths, boundaries)
        setattr(made, _PATTERN, (pattern, _version(made)))
    return made


def mask_function():
    """`mask`, or transformers' own where it is given other arguments, as by the first of 5."""
    given = inspect.signature(masking_utils.sdpa_mask).parameters
    is_known = {"q_length", "q_offset", "kv_length", "kv_offset"} <= set(given)
    return mask if is_known and hasattr(masking_utils, "is_tracing") else masking_utils.sdpa_mask


def is_readable(padding, *offsets):
    """Whether the host may look at values: nobody traces, and a cache counts on the host."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if padding is not None and masking_utils.is_tracing(padding):
        return False
    return all(isinstance(offset, int) for offset in offsets)


def _lengths(keys):
    """How many keys each row has, on host and device; (None, None) unless they all come first."""
    if keys.numel() == 0:
        return None, None
    if keys.is_cpu and keys.all():  # the quickest to look at, where looking costs no waiting
        return (keys.shape[1],) * len(keys), None
    lengths = keys.sum(-1, dtype=torch.int32)
    first = torch.arange(keys.shape[1], device=keys.device) < lengths[:, None]
    *on_host, is_first = torch.cat((lengths, (first == keys).all()[None])).tolist()
    return (tuple(on_host), lengths) if is_first else (None, None)


def _parts(function) -> tuple[int | None, int | None, Tensor | None] | None:
    """(left, right, sequence ids) of transformers' own mask functions; None for any other.

    They are closures, known by the names they were defined under: a name that changes there makes
    a mask without a Pattern here, not a wrong one.
    """
    if function is masking_utils.causal_mask_function:
        return None, 0, None
    if function is masking_utils.bidirectional_mask_function:
        return None, None, None
    names = getattr(function, "__qualname__", "").split(".<locals>.")
    if getattr(function, "__module__", "") != masking_utils.__name__ or len(names) != 2:
        return None
    cells = function.__closure__ or ()
    inside = [cell.cell_contents for cell in cells]
    inside = dict(zip(function.__code__.co_freevars, inside, strict=True))
    match names[0], inside:
        case "and_masks", {"mask_functions": functions}:
            return _together([_parts(f) for f in functions])
        case "sliding_window_overlay", {"sliding_window": int(window)}:
            return window - 1, None, None
        case "sliding_window_bidirectional_overlay", {"sliding_window": int(window)}:
            return window, window, None
        case "packed_sequence_mask_function", {"packed_sequence_mask": ids}:
            return None, None, ids
        # Positions start again with each sequence, so inside one distances are the same.
        case "remap_positions_for_packed_sequence", {"mask_function": inner}:
            return _parts(inner)
    return None


def _together(parts):
    """What several mask functions hide together."""
    if any(part is None for part in parts):
        return None
    columns = zip(*parts, strict=True)
    left, right, ids = ([value for value in column if value is not None] for column in columns)
    if len(ids) > 1:
        return None
    return min(left, default=None), min(right, default=None), ids[0] if ids else None


def _boundaries(ids):
    """cu_seqlens of all rows of (B, L) ids of sequences, one row after the other."""
    starts = torch.ones_like(ids, dtype=torch.bool)
    starts[:, 1:] = ids[:, 1:] != ids[:, :-1]
    starts = starts.flatten().nonzero().flatten()
    return torch.cat((starts, starts.new_tensor([ids.numel()]))).int()


class Packing:
    """How the T real tokens of a padded batch lie one sequence after the other.

    shape       (B, L) of the padded batch
    indices     (T,): the tokens in the batch flattened to B * L
    cu_seqlens  (B + 1,) int32
    """

    def __init__(self, pattern: Pattern) -> None:
        (B, L, _), lengths = pattern.shape, pattern.key_lengths
        total = sum(pattern.lengths)
        self.shape = B, L
        self.cu_seqlens = torch.cat((lengths.new_zeros(1), lengths.cumsum(0))).int()
        row = torch.arange(B, device=lengths.device)
        row = row.repeat_interleave(lengths, output_size=total)  # so that nobody waits
        within = torch.arange(total, device=lengths.device) - self.cu_seqlens[row]
        self.indices = row * L + within
        self._tables: dict[tuple[int, ...], tuple] = {}

    @classmethod
    def begin(cls, mask: Tensor, pattern: Pattern) -> Packing:
        """A packing that layers, and attention in them, will find on `mask`."""
        packing = cls(pattern)
        setattr(mask, _PACKING, packing)
        return packing

    def pack(self, x: Tensor) -> Tensor:
        """(B, L, ...) to (1, T, ...)."""
        return _Pack.apply(x.reshape(-1, *x.shape[2:]), self.indices)[None]

    def unpack(self, x: Tensor) -> Tensor:
        """(1, T, ...) to (B, L, ...), zeros where padding was."""
        return _Unpack.apply(x[0], self.indices, self.shape)

    def tables(self, tables: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Tables (1 or B, L, D) by position as (1, T, D) by token; made once for all layers."""
        key = tuple(map(id, tables))  # of FSDP's hooks each layer gets another tuple of them
        known = self._tables.get(key)
        if known is None:
            B, L = self.shape
            made = tuple(self.pack(t.expand(B, *t.shape[1:])) for t in tables)
            if len(self._tables) > 3:  # each layer gets tables of its own, and none comes again
                self._tables.clear()
            known = self._tables[key] = tables, made  # kept: ids are theirs while they live
        return known[1]


def packing_of(mask: Tensor | None) -> Packing | None:
    if mask is None or torch.compiler.is_compiling():
        return None
    return getattr(mask, _PACKING, None)


class _Pack(torch.autograd.Function):
    """Rows picked out; each at most once, so the gradient is put back and not added up."""

    @staticmethod
    def forward(ctx, x, indices):
        ctx.save_for_backward(indices)
        ctx.shape = x.shape[:1]
        return x.index_select(0, indices)

    @staticmethod
    def backward(ctx, dy):
        return _Unpack.apply(dy, ctx.saved_tensors[0], ctx.shape), None


class _Unpack(torch.autograd.Function):
    """_Pack's transpose, of rows in any shape. No view comes out: FSDP2 warns of one."""

    @staticmethod
    def forward(ctx, x, indices, shape):
        ctx.save_for_backward(indices)
        ctx.last = len(shape) - 1
        y = x.new_zeros(*shape, *x.shape[1:])
        y.view(-1, *x.shape[1:]).index_copy_(0, indices, x)
        return y

    @staticmethod
    def backward(ctx, dy):
        return _Pack.apply(dy.flatten(0, ctx.last), ctx.saved_tensors[0]), None, None
