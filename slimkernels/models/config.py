"""The sizes and rates of a transformer: one dataclass for every model in the package."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from numbers import Real

GATED = ("swiglu", "geglu", "geglu_tanh")
ACTIVATIONS = ("gelu", "gelu_tanh", "relu", *GATED)
NORMS = ("layer_norm", "rms_norm")
POSITIONS = ("learned", "rotary", "relative")

# num_layers, hidden_size, num_heads; the feed-forward layer is four times as wide. The first
# four and the last two are of Turc et al., Well-Read Students Learn Better (2019); minilm is of
# Wang et al. (2020), MiniLM.
PRESETS = {
    "tiny": (2, 128, 2),
    "mini": (4, 256, 4),
    "small": (4, 512, 8),
    "medium": (8, 512, 8),
    "minilm": (6, 384, 12),
    "base": (12, 768, 12),
    "large": (24, 1024, 16),
}

_MAY_BE_ZERO = ("num_layers", "type_vocab_size", "num_decoder_layers", "position_offset")
_POSITIVE = ("layer_norm_eps", "initializer_std", "rotary_base")
_CHOICES = {"activation": ACTIVATIONS, "norm": NORMS, "positions": POSITIONS}


@dataclass(frozen=True)
class TransformerConfig:
    """What a model is built from; the defaults are BERT base's (Devlin et al. 2019).

    vocab_size             ids of tokens are in [0, vocab_size)
    hidden_size            C, the width of the model; a multiple of num_heads without head_width
    num_layers             transformer blocks; of the encoder, where there is a decoder too
    num_heads              attention heads
    intermediate_size      width inside the feed-forward layer
    max_positions          tokens in the longest sequence; no limit to relative positions
    type_vocab_size        ids of segments are in [0, type_vocab_size); 0 for no segments
    dropout_p              of embeddings, and of each branch before its residual connection
    attention_dropout_p    of attention's weights
    layer_norm_eps         added to the variance, or to the mean square
    activation             "gelu" (exact), "gelu_tanh" or "relu"; or, gated by a second product,
                           "swiglu", "geglu" or "geglu_tanh"
    norm_first             normalise before each branch instead of after its residual connection
    initializer_std        standard deviation of the weights at the start
    num_key_heads          heads of keys and values, of which num_heads is a multiple; None for as
                           many (Ainslie et al. 2023)
    head_width             of an attention head; None for hidden_size / num_heads
    norm                   "layer_norm", or "rms_norm", which has no bias
    bias                   whether linear layers have one
    positions              "learned", one vector each; "rotary", pairs of each query and key turned;
                           or "relative", T5's bias, learned by distance
    position_offset        rows of the table of learned positions before that of position 0
    rotary_base            of rotary positions' wavelengths
    rotary_stretch         Llama 3.1's (factor, low, high, positions): wavelengths above positions /
                           low are factor times as long, those below positions / high stay as they
                           are, and between the two the frequency changes in proportion; or None
    relative_buckets       rows in the table of relative positions
    relative_max_distance  distances from here on share a row
    attention_scale        multiplies scores; None for 1 / sqrt(head_size)
    activation_dropout_p   inside the feed-forward layer, after the activation
    output_dropout_p       of the last hidden states
    embedding_scale        multiplies the token embedding
    logit_scale            multiplies hidden states before the vocabulary's matrix
    tie_embeddings         the vocabulary's matrix is the token embedding
    num_decoder_layers     blocks of an encoder-decoder model's decoder; 0 without one
    Errors                 ValueError naming the field, what it must be and what it is
    """

    vocab_size: int = 30522
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    intermediate_size: int = 3072
    max_positions: int = 512
    type_vocab_size: int = 2
    dropout_p: float = 0.1
    attention_dropout_p: float = 0.1
    layer_norm_eps: float = 1e-12
    activation: str = "gelu"
    norm_first: bool = False
    initializer_std: float = 0.02
    num_key_heads: int | None = None
    head_width: int | None = None
    norm: str = "layer_norm"
    bias: bool = True
    positions: str = "learned"
    position_offset: int = 0
    rotary_base: float = 10000.0
    rotary_stretch: tuple[float, float, float, float] | None = None
    relative_buckets: int = 32
    relative_max_distance: int = 128
    attention_scale: float | None = None
    activation_dropout_p: float = 0.0
    output_dropout_p: float = 0.0
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    tie_embeddings: bool = True
    num_decoder_layers: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.rotary_stretch, list):  # as JSON gives it
            object.__setattr__(self, "rotary_stretch", tuple(self.rotary_stretch))
        for name in KINDS:
            value = getattr(self, name)
            wanted = expected(name, value)
            _require(wanted is None, name, wanted, value)
        heads = self.num_heads
        if self.head_width is None:
            wanted = f"a multiple of num_heads, {heads}"
            _require(self.hidden_size % heads == 0, "hidden_size", wanted, self.hidden_size)
        _require(
            heads % self.key_heads == 0,
            "num_heads",
            f"a multiple of num_key_heads, {self.key_heads}",
            heads,
        )

    @property
    def head_size(self) -> int:
        """D, the width of one attention head."""
        return self.head_width or self.hidden_size // self.num_heads

    @property
    def is_gated(self) -> bool:
        """Whether the feed-forward layer has a second product, which gates the first."""
        return self.activation in GATED

    @property
    def key_heads(self) -> int:
        """Hkv, the heads of keys and values."""
        return self.num_key_heads or self.num_heads

    @property
    def qkv_widths(self) -> tuple[int, int, int]:
        """Rows of the joined projection that make query, key and value."""
        keys = self.key_heads * self.head_size
        return self.num_heads * self.head_size, keys, keys

    @classmethod
    def preset(cls, name: str, **changes) -> TransformerConfig:
        """One of PRESETS by name, with any field changed: ``preset("minilm", dropout_p=0.0)``."""
        _require(name in PRESETS, "preset", " or ".join(PRESETS), name)
        num_layers, hidden_size, num_heads = PRESETS[name]
        sizes = {
            "num_layers": num_layers,
            "hidden_size": hidden_size,
            "num_heads": num_heads,
            "intermediate_size": 4 * hidden_size,
        }
        return cls.from_dict(sizes | changes)

    def to_dict(self) -> dict[str, object]:
        """Every field by name, fit for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, object]) -> TransformerConfig:
        """The config of `fields`, the rest at their defaults; an unknown name is a ValueError."""
        known = [field.name for field in dataclasses.fields(cls)]
        for name in fields:
            _require(name in known, "a field", "one of " + ", ".join(known), name)
        return cls(**fields)


# The fields' annotations.
KINDS = {field.name: field.type for field in dataclasses.fields(TransformerConfig)}


def expected(name: str, value: object) -> str | None:
    """What the field of this name must be, if `value` is not that; None if it is."""
    kind = KINDS[name]
    if value is None and kind.endswith(" | None"):
        return None
    if kind.startswith("int"):
        least = 0 if name in _MAY_BE_ZERO else 1
        whole = isinstance(value, int) and not isinstance(value, bool)
        return None if whole and value >= least else f"an integer >= {least}"
    if kind == "bool":
        return None if isinstance(value, bool) else "True or False"
    if name in _CHOICES:
        return None if value in _CHOICES[name] else " or ".join(_CHOICES[name])
    if name == "rotary_stretch":
        four = isinstance(value, tuple) and len(value) == 4 and all(map(is_number, value))
        return None if four else "four numbers, or None"
    if name.endswith("dropout_p"):
        return None if is_number(value) and 0 <= value < 1 else "a number in [0, 1)"
    if name in _POSITIVE:
        return None if is_number(value) and value > 0 else "a positive number"
    return None if is_number(value) else "a number"


def is_number(value: object) -> bool:
    """Whether `value` is a finite number; True and False are none."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _require(holds: bool, name: str, expected: str | None, actual: object) -> None:
    if not holds:
        raise ValueError(f"TransformerConfig: {name} must be {expected}; got {actual!r}")
