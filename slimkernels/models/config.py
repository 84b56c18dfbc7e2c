"""The sizes and rates of a transformer: one dataclass for every model in the package."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

ACTIVATIONS = ("gelu", "gelu_tanh")

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


@dataclass(frozen=True)
class TransformerConfig:
    """What a model is built from; the defaults are BERT base's (Devlin et al. 2019).

    vocab_size           ids of tokens are in [0, vocab_size)
    hidden_size          C, the width of the model; a multiple of num_heads
    num_layers           transformer blocks
    num_heads            attention heads of hidden_size / num_heads each
    intermediate_size    width inside the feed-forward layer
    max_positions        tokens in the longest sequence
    type_vocab_size      ids of segments are in [0, type_vocab_size)
    dropout_p            of embeddings, and of each branch before its residual connection
    attention_dropout_p  of attention's weights
    layer_norm_eps       added to the variance
    activation           "gelu" (exact) or "gelu_tanh"
    norm_first           normalise before each branch instead of after its residual connection
    initializer_std      standard deviation of the weights at the start
    Errors               ValueError naming the field, what it must be and what it is
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

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "int":
                least = 0 if field.name == "num_layers" else 1
                whole = isinstance(value, int) and not isinstance(value, bool)
                _require(whole and value >= least, field.name, f"an integer >= {least}", value)
            elif field.name.endswith("dropout_p"):
                _require(0.0 <= value < 1.0, field.name, "in [0, 1)", value)
        _require(
            self.hidden_size % self.num_heads == 0,
            "hidden_size",
            f"a multiple of num_heads, {self.num_heads}",
            self.hidden_size,
        )
        _require(self.layer_norm_eps > 0, "layer_norm_eps", "positive", self.layer_norm_eps)
        _require(self.initializer_std > 0, "initializer_std", "positive", self.initializer_std)
        known = self.activation in ACTIVATIONS
        _require(known, "activation", " or ".join(ACTIVATIONS), repr(self.activation))

    @property
    def head_size(self) -> int:
        """D, the width of one attention head."""
        return self.hidden_size // self.num_heads

    @classmethod
    def preset(cls, name: str, **changes) -> TransformerConfig:
        """One of PRESETS by name, with any field changed: ``preset("minilm", dropout_p=0.0)``."""
        _require(name in PRESETS, "preset", " or ".join(PRESETS), repr(name))
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
            _require(name in known, "a field", "one of " + ", ".join(known), repr(name))
        return cls(**fields)


def _require(holds: bool, name: str, expected: str, actual: object) -> None:
    if not holds:
        raise ValueError(f"TransformerConfig: {name} must be {expected}; got {actual}")
