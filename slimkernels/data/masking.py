"""The masked-language-model corruption of BERT (Devlin et al. 2019, section 3.1).

Of the ordinary tokens 15% are chosen; of those 80% become [MASK], 10% a random ordinary token and
10% stay. Every choice is a function of (seed, epoch, example, position in the example), so an
example is masked alike in whatever batch it stands, and a resumed run needs no generator state.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from slimkernels.data.counter_random import Stream, counter_bits, counter_uniform

_MASKED_SHARE = 0.8
_RANDOM_SHARE = 0.1

# The last counter: which of the three draws at a position this is.
_CHOICE, _ACTION, _TOKEN = range(3)


class Masker:
    """Chooses the tokens to predict and hides them.

    vocab_size   random tokens are below this
    mask_id      what 80% of the chosen become
    special_ids  ids never chosen and never put in as the random token
    seed         any int
    probability  of choosing a token, in (0, 1); an example where none came up gives the one that
                 came nearest, so that none is without a label
    """

    def __init__(
        self,
        vocab_size: int,
        mask_id: int,
        special_ids: Sequence[int],
        *,
        seed: int = 0,
        probability: float = 0.15,
    ) -> None:
        if not 0.0 < probability < 1.0:
            raise ValueError(f"Masker: probability must be in (0, 1); got {probability}")
        outside = [token for token in (mask_id, *special_ids) if not 0 <= token < vocab_size]
        if outside:
            raise ValueError(
                f"Masker: mask_id and special_ids must be below vocab_size {vocab_size}; "
                f"got {outside[0]}"
            )
        self._is_ordinary = np.ones(vocab_size, dtype=bool)
        self._is_ordinary[[mask_id, *special_ids]] = False
        self._ordinary = np.flatnonzero(self._is_ordinary)
        if not len(self._ordinary):
            raise ValueError("Masker: special_ids leave no ordinary token")
        self.mask_id = mask_id
        self.seed = seed
        self.probability = probability

    def __call__(
        self, input_ids: np.ndarray, cu_seqlens: np.ndarray, examples: np.ndarray, *, epoch: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Masks a ragged batch.

        input_ids   (T,) int64, not written
        cu_seqlens  (B+1,) where each example begins in input_ids; none is empty
        examples    (B,) int64, each example's number in its corpus
        Returns     masked input_ids (T,), masked_positions (K,) ascending, masked_labels (K,): what
                    stood there; all int64
        """
        starts, lengths = cu_seqlens[:-1], np.diff(cu_seqlens)
        example = np.repeat(examples, lengths)
        position = np.arange(len(input_ids)) - np.repeat(starts, lengths)

        draw = counter_uniform(self.seed, Stream.MASKS, epoch, example, position, _CHOICE)
        draw = np.where(self._is_ordinary[input_ids], draw, np.inf)
        nearest = np.repeat(np.minimum.reduceat(draw, starts), lengths)
        is_chosen = np.isfinite(draw) & ((draw < self.probability) | (draw == nearest))

        chosen = np.flatnonzero(is_chosen)
        labels = input_ids[chosen]
        key = (self.seed, Stream.MASKS, epoch, example[chosen], position[chosen])
        action = counter_uniform(*key, _ACTION)
        random_token = self._ordinary[counter_bits(*key, _TOKEN) % np.uint64(len(self._ordinary))]
        masked = input_ids.copy()
        masked[chosen] = np.select(
            [action < _MASKED_SHARE, action < _MASKED_SHARE + _RANDOM_SHARE],
            [self.mask_id, random_token],
            default=labels,
        )
        return masked, chosen, labels
