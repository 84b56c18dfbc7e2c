"""One token after the other: how the next is chosen, and when a row has ended."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from slimkernels.models.cache import Cache
from slimkernels.models.checks import check_padded
from slimkernels.ops._checks import check_flag, check_integer, check_number


class Sampling(NamedTuple):
    """How a token is chosen from its logits, in this order.

    do_sample    draw it, from torch's generator; otherwise it is the most likely one
    temperature  divides the logits
    top_k        only the k most likely; None for all
    top_p        only the fewest that have this probability together (Holtzman et al. 2020); None
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def checked(self, caller: str) -> Sampling:
        """Itself, or a ValueError that names what is out of range."""
        k, p = self.top_k, self.top_p
        check_flag(caller, "do_sample", self.do_sample)
        check_number(caller, "temperature", self.temperature)
        if k is not None:
            check_integer(caller, "top_k", k)
        if p is not None:
            check_number(caller, "top_p", p)
        if not self.temperature > 0:
            raise ValueError(f"{caller}: temperature must be positive; got {self.temperature}")
        if k is not None and k < 1:
            raise ValueError(f"{caller}: top_k must be at least 1 or None; got {k}")
        if p is not None and not 0 < p <= 1:
            raise ValueError(f"{caller}: top_p must be in (0, 1] or None; got {p}")
        return self

    def choose(self, logits: Tensor) -> Tensor:
        """(B,) tokens from logits (B, V)."""
        if not self.do_sample:
            return logits.argmax(-1)
        scores = logits.float() / self.temperature
        if self.top_k is not None:
            least = scores.topk(min(self.top_k, scores.shape[-1])).values[:, -1:]
            scores = scores.masked_fill(scores < least, -torch.inf)
        probabilities = scores.softmax(-1)
        if self.top_p is not None and self.top_p < 1:
            ordered, order = probabilities.sort(dim=-1, descending=True)
            # A token stays if those before it have less than top_p; so the first always does.
            ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= self.top_p, 0.0)
            probabilities = torch.zeros_like(probabilities).scatter(-1, order, ordered)
        return probabilities.multinomial(1).squeeze(1)


class Ending(NamedTuple):
    """When a row ends: at an eos token, after which it is padded, or after max_new_tokens.

    first, last  tokens that the first and the last new one are to be, whatever the logits say;
                 None for none
    """

    max_new_tokens: int
    eos: tuple[int, ...]
    pad: int
    first: int | None = None
    last: int | None = None


def ending_of(
    settings: dict,
    max_new_tokens: int,
    eos_token_id: int | Sequence[int] | None,
    pad_token_id: int | None,
    caller: str,
) -> Ending:
    """An Ending of the caller's arguments, or the folder's settings where they are None."""
    check_integer(caller, "max_new_tokens", max_new_tokens)
    if max_new_tokens < 1:
        raise ValueError(f"{caller}: max_new_tokens must be at least 1; got {max_new_tokens}")
    eos = settings.get("eos_token_id") if eos_token_id is None else eos_token_id
    eos = () if eos is None else (eos,) if isinstance(eos, int | str) else tuple(eos)
    for token in eos:
        check_integer(caller, "eos_token_id", token)
    pad = settings.get("pad_token_id") if pad_token_id is None else pad_token_id
    if pad is None:
        pad = eos[0] if eos else 0
    check_integer(caller, "pad_token_id", pad)
    forced = settings.get("forced_bos_token_id"), settings.get("forced_eos_token_id")
    return Ending(max_new_tokens, eos, pad, *forced)


def new_tokens(
    logits: Tensor, step: Callable[[Tensor], Tensor], sampling: Sampling, ending: Ending
) -> Tensor:
    """(B, n) tokens: the first from logits (B, V), each other from step(the one before).

    Caution  waits for the device once a token, to see whether all rows have ended
    """
    tokens: list[Tensor] = []
    eos = torch.tensor(ending.eos, dtype=torch.int64, device=logits.device)
    has_ended = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    while True:
        token = sampling.choose(logits)
        forced = ending.last if len(tokens) + 1 == ending.max_new_tokens else None
        forced = ending.first if not tokens and ending.first is not None else forced
        if forced is not None:
            token = torch.full_like(token, forced)
        token = token.masked_fill(has_ended, ending.pad)
        tokens.append(token)
        has_ended |= torch.isin(token, eos)
        if len(tokens) == ending.max_new_tokens or has_ended.all():
            return torch.stack(tokens, 1)
        logits = step(token)


# Entries of generation_config.json that this module does not follow, at what changes nothing.
_NEUTRAL = {
    "num_beams": 1,
    "no_repeat_ngram_size": 0,
    "repetition_penalty": 1.0,
    "min_length": 0,
    "min_new_tokens": 0,
    "bad_words_ids": [],
    "suppress_tokens": [],
    "begin_suppress_tokens": [],
}


def _warn_of(settings: dict, caller: str) -> None:
    asked = {n: settings[n] for n, no in _NEUTRAL.items() if settings.get(n) not in (None, no)}
    if asked:
        entries = ", ".join(f"{name}={value!r}" for name, value in asked.items())
        warnings.warn(
            f"{caller}: the folder asks for {entries}, which is not implemented: tokens are the "
            "most likely ones, or drawn",
            stacklevel=4,
        )


def _refuse_others(others: dict, caller: str) -> None:
    if others:
        takes = ", ".join(list(inspect.signature(Generates.generate).parameters)[1:-1])
        raise TypeError(
            f"{caller}: {next(iter(others))} is not implemented: tokens are the most likely ones, "
            f"or drawn; it takes {takes}"
        )


class Begun(NamedTuple):
    """A model about to make tokens.

    prompt  (B, T): what generate() returns before the new tokens
    tokens  what the first step reads: the prompts, ragged
    cache   for this step's keys and values
    logits  (B, V) after the last token of each row, from a step's tokens
    """

    prompt: Tensor
    tokens: Tensor
    cache: Cache
    logits: Callable[[Tensor], Tensor]


class Generates:
    """A model with generate(). What is its own is in _begin."""

    def _begin(
        self, input_ids: Tensor, attention_mask: Tensor | None, max_new_tokens: int, caller: str
    ) -> Begun:
        raise NotImplementedError

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int = 20,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        **others,
    ) -> Tensor:
        """The text that follows, at most max_new_tokens a row.

        input_ids       (B, T) int64: the prompts; an encoder-decoder's sources
        attention_mask  (B, T): 0 where there is padding. Of a prompt the real tokens are counted
                        from 0, so it may stand left or right, and what follows comes after it
        do_sample       draw tokens; otherwise the most likely one, whatever the next three say
        temperature     divides the logits
        top_k, top_p    draw from the k most likely, and the fewest that have probability top_p
        eos_token_id    one or several, at which a row ends; None for the folder's
        pad_token_id    fills an ended row; None for the folder's, or eos_token_id
        Returns         (B, T + n), the prompts and n new tokens; of an encoder-decoder (B, 1 + n),
                        the start token first
        Errors          ValueError for what is out of range, such as more tokens than positions;
                        TypeError for what only transformers has, such as num_beams
        Caution         drops out in training mode: call eval() before. Waits for the device once a
                        token, to see whether all rows have ended. Of the folder's settings only the
                        ids of tokens count: a warning names those that are not implemented here
        """
        name = f"{type(self).__name__}.generate"
        _refuse_others(others, name)
        _warn_of(self.settings, name)
        check_padded(input_ids, attention_mask, model=name)
        ending = ending_of(self.settings, max_new_tokens, eos_token_id, pad_token_id, name)
        sampling = Sampling(do_sample, temperature, top_k, top_p).checked(name)
        prompt, tokens, cache, logits = self._begin(input_ids, attention_mask, max_new_tokens, name)

        def step(tokens):
            cache.advance()
            return logits(tokens)

        return torch.cat([prompt, new_tokens(logits(tokens), step, sampling, ending)], 1)
