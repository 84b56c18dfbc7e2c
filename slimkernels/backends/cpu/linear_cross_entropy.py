"""Cross-entropy of a linear layer's logits on the CPU: chunks of rows, torch's products, and the
kernels of csrc/cpu/cross_entropy.cpp on each chunk.

Tiling    The rows that are kept, in chunks whose logits fit in CHUNK bytes. A chunk's logits
          become their own gradient in place, from which the products of backward follow.
Traffic   For "mean" and "sum" all of it happens in forward: three products of N * V * C, as eager
          PyTorch has, and CHUNK bytes beside the gradients. For "none" backward has the logits'
          product once more.
Numerics  Logits are rounded to x's dtype, as a linear layer's are, and so is what flows into the
          products. dweight and dbias are added up over the chunks in float32.
"""

import torch
import torch.nn.functional as F

from slimkernels.backends._positions import scatter_rows
from slimkernels.backends.cpu import linear
from slimkernels.backends.cpu._common import unsupported_tensor
from slimkernels.backends.cpu.cross_entropy import float_of, losses_of, write_gradient

CHUNK = 1 << 27  # bytes of logits; less, and the passes over dweight cost more than they save
SLAB = 1 << 22  # elements of dweight that are rounded before they are added up
# What a call costs besides its products. Eager's time over ours, one thread, float32 / bfloat16:
#     N x C x V            forward, backward   forward alone
#     64 x 128 x 1000      0.79 / 0.79         0.54 / 0.49
#     128 x 128 x 1000     0.82 / 0.81         0.68 / 0.59
#     64 x 128 x 4000      1.10 / 0.87         0.88 / 0.78
#     160 x 128 x 4000     1.09 / 0.99         0.94 / 0.81
#     64 x 768 x 8000      1.00 / 1.00         0.96 / 0.91
MIN_MULTIPLICATIONS = 1 << 28  # in one product, or in three for a call that wants gradients


def unsupported(
    x,
    weight,
    target,
    bias,
    positions,
    ignore_index,
    label_smoothing,
    z_loss,
    softcap,
    return_correct,
    reduction,
    wanted,
):
    multiplications = target.shape[0] * weight.numel() * (3 if any(wanted) else 1)
    reason = unsupported_tensor(x)
    if x.shape[1] == 0:
        return "input has no features"
    if reason is None and multiplications < MIN_MULTIPLICATIONS:
        return (
            f"eager PyTorch is faster below {MIN_MULTIPLICATIONS} multiplications, gradients "
            f"included, and this call has {multiplications}"
        )
    return reason


def forward(
    x,
    weight,
    target,
    bias,
    positions,
    ignore_index,
    label_smoothing,
    z_loss,
    softcap,
    return_correct,
    reduction,
    wanted,
):
    rows = _Rows(x, weight, target, bias, positions, ignore_index)
    losses = x.new_zeros(target.shape, dtype=torch.float32)
    stats = x.new_zeros((3, *target.shape), dtype=torch.float32)
    correct = x.new_zeros(target.shape if return_correct else 0, dtype=torch.bool)
    divisor = x.new_full((1,), float(rows.count), dtype=torch.float32)
    in_forward = reduction != "none"
    gradients = _Gradients(rows, wanted if in_forward else [False] * 3)
    how = ignore_index, reduction, label_smoothing, z_loss, softcap
    one = x.new_ones(1, dtype=torch.float32)
    for part in rows.parts:
        logits, labels = rows.logits(part), rows.target[part]
        loss, _, row_stats, _, hits = losses_of(logits, labels, None, *how, return_correct)
        rows.put(losses, part, loss)
        rows.put(stats, part, row_stats)
        if return_correct:
            rows.put(correct, part, hits)
        if gradients.wants_any:
            write_gradient(logits, one, None, logits, labels, None, row_stats, divisor, *how)
            gradients.add(part, logits)
    if in_forward:
        total = losses.sum(dtype=torch.float64)
        losses = (total / rows.count if reduction == "mean" else total).to(torch.float32)
    return losses, stats, divisor, correct, *gradients.results()


def backward(
    dy,
    x,
    weight,
    target,
    bias,
    positions,
    stats,
    divisor,
    ignore_index,
    label_smoothing,
    z_loss,
    softcap,
    reduction,
    wanted,
):
    rows = _Rows(x, weight, target, bias, positions, ignore_index)
    gradients = _Gradients(rows, wanted)
    how = ignore_index, reduction, label_smoothing, z_loss, softcap
    dy = float_of(dy)
    for part in rows.parts:
        logits, labels = rows.logits(part), rows.target[part]
        dloss = rows.get(dy, part) if reduction == "none" else dy
        row_stats = rows.get(stats, part)
        write_gradient(logits, dloss, None, logits, labels, None, row_stats, divisor, *how)
        gradients.add(part, logits)
    return gradients.results()


class _Rows:
    """The rows that are kept, without gaps, and the parts that they are cut into.

    index   where they are among the targets, None for all of them; rows  where they are in x
    """

    def __init__(self, x, weight, target, bias, positions, ignore_index):
        kept = target != ignore_index
        self.given, self.may_repeat = (x, weight, bias), positions is not None
        self.index = None if kept.all() else kept.nonzero().squeeze(1)
        self.target = (target if self.index is None else target[self.index]).contiguous()
        self.rows = self.index if positions is None else positions
        if self.may_repeat and self.index is not None:
            self.rows = positions[self.index]
        self.x = x.contiguous() if self.rows is None else x.index_select(0, self.rows)
        self.weight, self.bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        self.count = self.x.shape[0]
        most = max(CHUNK // (weight.shape[0] * x.element_size()), 1)
        chunks = -(-self.count // most)
        ends = [self.count * i // chunks for i in range(chunks + 1)] if chunks else [0]
        self.parts = [slice(a, b) for a, b in zip(ends, ends[1:], strict=False)]

    def logits(self, part):
        x, weight, bias = self.x[part], self.weight, self.bias
        if linear.unsupported(x, weight, bias) is None:
            return linear.forward(x, weight, bias)
        return F.linear(x, weight, bias)

    def get(self, values, part):
        """What stands at a part's rows in the last dimension of a tensor of all rows."""
        if self.index is None:
            return values[..., part].contiguous()
        return values.index_select(-1, self.index[part])

    def put(self, values, part, new):
        if self.index is None:
            values[..., part] = new
        else:
            values.index_copy_(-1, self.index[part], new)


class _Gradients:
    """dx, dweight and dbias, to which each part's logits add theirs."""

    def __init__(self, rows, wanted):
        self.rows, self.wanted = rows, wanted
        self.wants_any = any(wanted)
        self.dx, self.dweight, self.dbias = None, None, None

    def add(self, part, dlogits):
        rows, (wants_dx, wants_dweight, wants_dbias) = self.rows, self.wanted
        if wants_dx:
            if self.dx is None:
                self.dx = torch.empty_like(rows.x)
            self._write_dx(self.dx[part], dlogits)
        if wants_dweight:
            self._add_dweight(dlogits.t(), rows.x[part])
        if wants_dbias:
            share = dlogits.sum(0)  # summed in float32, and rounded as a part of dweight is
            self.dbias = self._first(share) if self.dbias is None else self.dbias.add_(share)

    def _write_dx(self, dx, dlogits):
        x, weight = self.rows.x, self.rows.weight
        if linear.unsupported(x, weight, None) is None:
            dx.copy_(linear.backward(dlogits, x, weight, (True, False, False))[0])
        else:
            torch.mm(dlogits, weight, out=dx)

    def _first(self, share):
        return share if len(self.rows.parts) == 1 else share.to(torch.float32)

    def _add_dweight(self, dlogits, x):
        if self.dweight is None:
            self.dweight = self._first(torch.mm(dlogits, x))
        elif x.dtype == torch.float32:
            self.dweight.addmm_(dlogits, x)
        else:
            step = max(SLAB // x.shape[1], 1)
            slabs = zip(self.dweight.split(step), dlogits.split(step), strict=True)
            for total, share in slabs:
                total += torch.mm(share, x)

    def _put_back(self, dx):
        x, rows = self.rows.given[0], self.rows.rows
        if self.rows.may_repeat:
            return scatter_rows(dx, rows, x.shape[0])
        whole = torch.zeros_like(x, memory_format=torch.contiguous_format)
        return whole.index_copy_(0, rows, dx)

    def results(self):
        """In the dtypes and the shapes of what came; empty for what is not wanted."""
        rows, results = self.rows, []
        gradients = self.dx, self.dweight, self.dbias
        if self.dx is not None and rows.rows is not None:
            gradients = self._put_back(self.dx), *gradients[1:]
        for given, gradient, is_wanted in zip(rows.given, gradients, self.wanted, strict=True):
            if given is None or not is_wanted:
                results.append(rows.x.new_empty(0))
            elif gradient is None:  # no row is kept
                results.append(torch.zeros_like(given, memory_format=torch.contiguous_format))
            else:
                results.append(gradient.to(given.dtype))
        return tuple(results)
