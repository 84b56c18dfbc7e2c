"""Logits that are computed when somebody looks at them; a loss over them needs none.

In training the product with the vocabulary's matrix gives a LazyLogits: a tensor with the shape,
dtype and gradient of the logits, and no memory. F.cross_entropy of it, which is what transformers'
losses and nn.CrossEntropyLoss call, runs linear_cross_entropy, which computes the rows that have a
label. Any other operation computes the logits first, once, as they would have been.
"""

from __future__ import annotations

import contextlib
import weakref

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from slimkernels.dispatch import may_skip_dispatcher
from slimkernels.ops.linear import linear
from slimkernels.ops.linear_cross_entropy import linear_cross_entropy


class VocabularyLinear(torch.nn.Linear):
    """nn.Linear that gives LazyLogits in training."""

    def forward(self, input: Tensor) -> Tensor:
        tensors = input, self.weight, self.bias
        if self.training and _may_wait(*tensors):
            return _Project.apply(*tensors, _Source(*tensors), None, None)
        if type(self.weight) is not torch.nn.Parameter:  # quantised or sharded
            return super().forward(input)
        return linear(*tensors)


def _may_wait(x, weight, bias):
    """Whether the product may be computed later: by this process, from tensors that stay."""
    if x.is_meta or not (torch.is_grad_enabled() and may_skip_dispatcher((x, weight, bias))):
        return False
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return False  # FSDP takes the weight away when the model has returned
    return weight.requires_grad or x.requires_grad


class _Source:
    """The product of hidden states and weight, before and after it is computed."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        self.tensors = hidden, weight, bias
        self.versions = [t if t is None else t._version for t in self.tensors]
        device = hidden.device.type
        self.autocast = None
        if torch.is_autocast_enabled(device):
            self.autocast = torch.get_autocast_dtype(device)
        self.shape = *hidden.shape[:-1], weight.shape[0]
        self.dtype = self.autocast or hidden.dtype
        self.value: Tensor | None = None
        self.forms: list[weakref.ref] = []  # every LazyLogits of it

    def as_recorded(self):
        """Autocast as it was for the product."""
        device = self.tensors[0].device.type
        if self.autocast is None:
            return torch.autocast(device, enabled=False)
        return torch.autocast(device, dtype=self.autocast)

    def compute(self) -> Tensor:
        if self.value is None:
            if self.versions != [t if t is None else t._version for t in self.tensors]:
                raise RuntimeError(
                    "logits are computed when they are first read, and what they are computed from "
                    "has changed since, as an optimizer's step does: read them before it, or call "
                    "slimkernels.integrations.huggingface.keep_logits(model) once"
                )
            with torch.no_grad(), self.as_recorded():
                self.value = linear(*(t if t is None else t.detach() for t in self.tensors))
        return self.value


class LazyLogits(Tensor):
    """The logits of a _Source, in a shape and dtype."""

    @staticmethod
    def __new__(cls, source: _Source, shape, dtype):
        device = source.tensors[0].device
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)

    def __init__(self, source: _Source, shape, dtype) -> None:
        self._source = source
        self._plain: Tensor | None = None
        source.forms.append(weakref.ref(self))

    def _computed(self) -> Tensor:
        others = [x for form in self._source.forms if (x := form()) is not None and x is not self]
        if any(x._version for x in others):
            raise RuntimeError(
                "logits were written in place after view(), reshape() or float() had made others "
                "of them, whose gradients do not know: make those after the writing"
            )
        if self._plain is None:
            self._plain = self._source.compute().view(self.shape).to(self.dtype)
        return self._plain

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            result = None
            if function in _KEPT:
                result = _kept(function, *args, **kwargs)
            elif function is F.cross_entropy:
                result = _loss(*args, **kwargs)
            elif function in _SEES_GRADIENTS:
                args[0]._source.compute()  # so that a loss is computed from these logits
            elif function in _READS_MEMORY:
                args = [torch.ops.aten.alias(a) if isinstance(a, cls) else a for a in args]
            return function(*args, **kwargs) if result is None else result

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        def plain(x):
            return x._computed() if isinstance(x, cls) else x

        lazy = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, cls)]
        args, kwargs = pytree.tree_map(plain, (args, kwargs or {}))
        output = function(*args, **kwargs)
        for x in lazy:  # written in place: the same tensor comes back
            if output is x._plain:
                return x
        return output


_ADDS = {Tensor.add, Tensor.__add__}
_KEPT = {Tensor.float, Tensor.view, Tensor.reshape, Tensor.contiguous, *_ADDS}
# Past torch's dispatcher, which would have computed the logits for them.
_READS_MEMORY = {
    *(Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.__dlpack__, Tensor.__deepcopy__),
    *(Tensor.__reduce_ex__, Tensor.data_ptr, Tensor.storage, Tensor.untyped_storage),
    *(Tensor.share_memory_, Tensor.data.__get__),
}
_SEES_GRADIENTS = {Tensor.retain_grad, Tensor.register_hook, Tensor.backward}


class _Project(torch.autograd.Function):
    """hidden @ weight^T + bias, with the product left out of forward."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, source, shape, dtype):
        ctx.save_for_backward(hidden, weight)
        ctx.source = source
        return LazyLogits(source, shape or source.shape, dtype or source.dtype)

    @staticmethod
    def backward(ctx, dy):
        hidden, weight = ctx.saved_tensors
        dtype = ctx.source.dtype
        dy = dy.reshape(-1, weight.shape[0]).to(dtype)
        wanted = ctx.needs_input_grad
        dx = dweight = dbias = None
        with torch.autocast(dy.device.type, enabled=False):
            if wanted[0]:
                dx = (dy @ weight.to(dtype)).view(hidden.shape).to(hidden.dtype)
            if wanted[1]:
                x = hidden.reshape(-1, hidden.shape[-1]).to(dtype)
                dweight = (dy.mT @ x).to(weight.dtype)
            if wanted[2]:
                dbias = dy.sum(0).to(ctx.source.tensors[2].dtype)
        return dx, dweight, dbias, None, None, None


def _kept(function, x: LazyLogits, *args, **kwargs) -> LazyLogits | None:
    """What a change of shape or dtype, or a bias, makes of logits that are not computed yet."""
    if not isinstance(x, LazyLogits) or x._source.value is not None:
        return None
    if function in _ADDS:
        return _with_bias(x, *args) if len(args) == 1 and not kwargs else None
    shape, dtype = x.shape, x.dtype
    if function is Tensor.float and not kwargs:
        dtype = torch.float32
    elif function in (Tensor.view, Tensor.reshape) and args and not kwargs:
        wanted = args[0] if isinstance(args[0], tuple | list) else args
        if not all(isinstance(n, int) for n in wanted):
            return None
        shape = torch.empty(shape, device="meta").view(*wanted).shape
        if shape[-1:] != x.shape[-1:]:
            return None
    elif function is not Tensor.contiguous or args or kwargs:
        return None
    if (shape, dtype) == (x.shape, x.dtype):
        return x
    source = x._source
    return _Project.apply(*source.tensors, source, tuple(shape), dtype)


def _with_bias(x: LazyLogits, bias) -> LazyLogits | None:
    """x + bias, where that is one number for each word, as BART's final_logits_bias."""
    hidden, weight, own = x._source.tensors
    if type(bias) is not Tensor or bias.shape not in ((weight.shape[0],), (1, weight.shape[0])):
        return None
    if bias.requires_grad or bias.dtype != x.dtype or bias.device != hidden.device:
        return None
    if x.shape != x._source.shape or own is not None:
        return None
    bias = bias.flatten()
    with x._source.as_recorded():
        source = _Source(hidden, weight, bias)
    return _Project.apply(hidden, weight, bias, source, None, None)


def _loss(
    input,
    target,
    weight=None,
    size_average=None,
    ignore_index=-100,
    reduce=None,
    reduction="mean",
    label_smoothing=0.0,
) -> Tensor | None:
    """F.cross_entropy of logits that are not computed yet; None where it needs them."""
    if not isinstance(input, LazyLogits) or input._source.value is not None:
        return None
    if not (weight is size_average is reduce is None) or not torch.is_grad_enabled():
        return None
    is_labels = isinstance(target, Tensor) and target.dtype in (torch.int64, torch.int32)
    if not is_labels or input.dim() != 2 or target.shape != input.shape[:1]:
        return None
    source = input._source
    hidden, matrix, bias = source.tensors
    # The op's loss is float32 under autocast alone, which logits.float() asks for without.
    context = contextlib.nullcontext() if source.autocast is None else source.as_recorded()
    if source.autocast is None and input.dtype != hidden.dtype:
        context = torch.autocast(hidden.device.type, dtype=hidden.dtype)
    with context:
        loss = linear_cross_entropy(
            hidden.reshape(-1, hidden.shape[-1]),
            matrix,
            target,
            bias,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
        )
    # As torch's would be: float32 under autocast, whatever the logits are.
    return loss if torch.is_autocast_enabled(hidden.device.type) else loss.to(input.dtype)
