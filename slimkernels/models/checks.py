"""What a model says of a batch it cannot take, before any kernel runs.

Shapes are always checked. Values are looked at where that is free: on the CPU, in eager code.
On a GPU it would wait for the device, and under torch.compile it would break the graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slimkernels.models.config import TransformerConfig


def check_batch(
    config: TransformerConfig,
    input_ids: Tensor,
    cu_seqlens: Tensor | None,
    model: str = "Bert",
) -> None:
    """Token ids (T,) with cu_seqlens (B+1,) of B >= 1 sequences without an empty one, or (B, T)."""
    check_ids("input_ids", input_ids, config.vocab_size, model=model)
    shape = tuple(input_ids.shape)
    if cu_seqlens is None:
        if len(shape) != 2 or 0 in shape:
            raise ValueError(
                f"{model}: input_ids must be (B, T) with B and T at least 1 if there is no "
                f"cu_seqlens; got {shape}"
            )
        return
    if len(shape) != 1:
        raise ValueError(f"{model}: input_ids must be (T,) if there is cu_seqlens; got {shape}")
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype != torch.int32:
        actual = getattr(cu_seqlens, "dtype", type(cu_seqlens).__name__)
        raise ValueError(f"{model}: cu_seqlens must be an int32 tensor; got {actual}")
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2:
        raise ValueError(
            f"{model}: the batch is empty: cu_seqlens must be (B+1,) of B >= 1 sequences; "
            f"got {tuple(cu_seqlens.shape)}"
        )
    if not _readable(cu_seqlens):
        return
    first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
    if (first, last) != (0, shape[0]):
        raise ValueError(
            f"{model}: cu_seqlens must go from 0 to {shape[0]}, the tokens in input_ids; "
            f"got {first} to {last}"
        )
    shortest = int(cu_seqlens.diff().min())
    if shortest < 1:
        raise ValueError(
            f"{model}: cu_seqlens must grow by at least 1 a sequence; it grows by {shortest}"
        )


def check_ids(
    name: str,
    ids: Tensor,
    limit: int,
    shape: tuple[int, ...] | None = None,
    model: str = "Bert",
) -> None:
    """`ids` are integers of the given shape, each in [0, limit)."""
    _check_integers(model, name, ids, shape, " like input_ids")
    if not _readable(ids) or ids.numel() == 0:
        return
    least, most = (int(bound) for bound in torch.aminmax(ids))
    if least < 0 or most >= limit:
        raise ValueError(
            f"{model}: {name} must be in [0, {limit}); got {least if least < 0 else most}"
        )


def check_masked(
    config: TransformerConfig, tokens: int, masked_positions: Tensor, masked_labels: Tensor
) -> None:
    """Places (K,) of `tokens` tokens, and the label of each."""
    check_ids("masked_positions", masked_positions, tokens)
    if masked_positions.dim() != 1:
        raise ValueError(
            f"Bert: masked_positions must be (K,); got {tuple(masked_positions.shape)}"
        )
    shape = tuple(masked_positions.shape)
    _check_integers("Bert", "masked_labels", masked_labels, shape, " like masked_positions")
    _check_labels("Bert", "masked_labels", masked_labels, config.vocab_size)


def check_next_sentences(name: str, labels: Tensor | None, sequences: int) -> None:
    """Labels 0 or 1, one a sequence, or None."""
    if labels is not None:
        check_labels(name, labels, 2, (sequences,), ", one a sequence")


def check_labels(
    name: str,
    labels: Tensor,
    limit: int,
    shape: tuple[int, ...],
    why: str = " like input_ids",
    model: str = "Bert",
) -> None:
    """Labels in [0, limit), or -100 for none, of the given shape."""
    _check_integers(model, name, labels, shape, why)
    _check_labels(model, name, labels, limit)


def check_padded(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    token_type_ids: Tensor | None = None,
    model: str = "Bert",
) -> None:
    """Rectangles (B, T), all alike, with something in every row; ids are the ragged form's."""
    if not isinstance(input_ids, Tensor) or input_ids.dim() != 2 or 0 in input_ids.shape:
        actual = getattr(input_ids, "shape", type(input_ids).__name__)
        raise ValueError(
            f"{model}: input_ids must be (B, T) with B and T at least 1; "
            f"got {actual if isinstance(actual, str) else tuple(actual)}"
        )
    shape = tuple(input_ids.shape)
    if token_type_ids is not None:
        _check_integers(model, "token_type_ids", token_type_ids, shape, " like input_ids")
    if attention_mask is None:
        return
    if not isinstance(attention_mask, Tensor):
        actual = type(attention_mask).__name__
        raise ValueError(f"{model}: attention_mask must be a tensor; got {actual}")
    _check_shape(model, "attention_mask", attention_mask, shape, " like input_ids")
    if _readable(attention_mask):
        empty = ~attention_mask.any(1)
        if empty.any():
            raise ValueError(
                f"{model}: attention_mask must leave a token in every row; "
                f"row {int(empty.nonzero()[0])} has none"
            )


def spread(name: str, ids: Tensor, shape: tuple[int, int], model: str = "Bert") -> Tensor:
    """Integers (B, T), from what broadcasts to that."""
    _check_integers(model, name, ids, None, "")
    B, T = shape
    if tuple(ids.shape) not in (shape, (1, T), (T,)):
        raise ValueError(
            f"{model}: {name} must have shape {shape} like input_ids, or ({T},); "
            f"got {tuple(ids.shape)}"
        )
    return ids.expand(shape)


def _check_integers(model, name, ids, shape, why):
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32):
        actual = getattr(ids, "dtype", type(ids).__name__)
        raise ValueError(f"{model}: {name} must be an int64 or int32 tensor; got {actual}")
    if shape is not None:
        _check_shape(model, name, ids, shape, why)


def _check_shape(model, name, x, shape, why):
    if tuple(x.shape) != shape:
        raise ValueError(f"{model}: {name} must have shape {shape}{why}; got {tuple(x.shape)}")


def _check_labels(model, name, labels, limit):
    if not _readable(labels):
        return
    wrong = ((labels < 0) | (labels >= limit)) & (labels != -100)
    if wrong.any():
        got = int(labels[wrong][0])
        raise ValueError(f"{model}: {name} must be in [0, {limit}), or -100 for none; got {got}")


def _readable(ids: Tensor) -> bool:
    return ids.device.type == "cpu" and not torch.compiler.is_compiling()
