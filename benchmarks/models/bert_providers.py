"""The contenders of bert_training.py: one BERT, the same weights, batch and optimizer for all."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import slimkernels
from slimkernels.data.batch import Batch
from slimkernels.models.bert import BertForPreTraining
from slimkernels.models.convert_bert import bert_from_hugging_face, config_from_hugging_face
from slimkernels.testing import assert_no_worse
from slimkernels.training.loop import ragged_losses
from slimkernels.training.speed import padded_losses

VOCABULARY, MASK_ID, MASKED_SHARE = 30522, 103, 0.15

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# layers, width, heads; minilm is of Wang et al. (2020), base of Devlin et al. (2019)
SIZES = {"tiny": (2, 128, 2), "minilm": (6, 384, 12), "base": (12, 768, 12)}


@dataclass(frozen=True)
class Shape:
    """A batch of `size`'s model: B sequences, the longest of T tokens."""

    size: str
    B: int
    T: int
    padding: bool = False

    def __str__(self) -> str:
        return f"{self.size} {self.B}x{self.T}{' 40% padding' if self.padding else ''}"


@dataclass
class Provider:
    """A model, its optimizer and the loss it computes of the batch."""

    name: str
    model: nn.Module
    loss: Callable[[], Tensor]
    precision: torch.dtype
    backend: str | None = None
    note: str = ""

    def __post_init__(self) -> None:
        self.device = next(self.model.parameters()).device
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.first_loss: float | None = None

    def step(self) -> None:
        """One training step: forward, backward, AdamW."""
        with self.context():
            loss = self.loss()
        with slimkernels.use_backend(self.backend):
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    @contextlib.contextmanager
    def context(self):
        """The backend and the precision that the forward pass runs in."""
        mixed = self.precision != torch.float32
        with (
            slimkernels.use_backend(self.backend),
            torch.autocast(self.device.type, self.precision, enabled=mixed),
        ):
            yield

    def loss_without_dropout(self) -> float:
        self.model.eval()
        with torch.no_grad(), self.context():
            loss = self.loss().item()
        self.model.train()
        return loss


def batch_of(shape: Shape, device: torch.device) -> Batch:
    """Random words; lengths from a fifth of the longest to the longest, so their mean is 60 %."""
    generator = torch.Generator().manual_seed(0)
    share = torch.linspace(0.2, 1.0, shape.B) if shape.padding else torch.ones(shape.B)
    lengths = (share * shape.T).round().long()
    ids, segments, positions, places, start = [], [], [], [], 0
    for length in lengths.tolist():
        ids.append(torch.randint(1000, VOCABULARY, (length,), generator=generator))
        positions.append(torch.arange(length))
        segments.append((positions[-1] >= length // 2).long())
        count = max(1, round(MASKED_SHARE * length))
        chosen = torch.randperm(length, generator=generator)[:count].sort().values
        places.append(start + chosen)
        start += length
    words, masked = torch.cat(ids), torch.cat(places)
    batch = Batch(
        input_ids=words.index_fill(0, masked, MASK_ID),
        segment_ids=torch.cat(segments),
        position_ids=torch.cat(positions),
        cu_seqlens=torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int(),
        masked_positions=masked,
        masked_labels=words[masked],
        next_sentence_labels=torch.arange(shape.B) % 2,
    )
    return batch.to(device)


def hugging_face(size: str, device: torch.device) -> nn.Module:
    """Hugging Face's BertForPreTraining with sdpa, dropout 0.1 as it comes, fixed weights."""
    from transformers import AutoModelForPreTraining, BertConfig

    layers, width, heads = SIZES[size]
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
    )
    torch.manual_seed(0)
    model = AutoModelForPreTraining.from_config(config, attn_implementation="sdpa")
    return model.to(device).train()


def ours_from(theirs: nn.Module) -> BertForPreTraining:
    """Our model with the same weights."""
    model = BertForPreTraining(config_from_hugging_face(theirs.config))
    model.load_state_dict(bert_from_hugging_face(theirs.state_dict()))
    device, dtype = next(theirs.parameters()).device, next(theirs.parameters()).dtype
    return model.to(device, dtype).train()


def hugging_face_loss(model: nn.Module, batch: Batch) -> Tensor:
    rectangles = batch.padded()
    if batch.padding_saved == 0:
        rectangles.pop("attention_mask")  # nothing to mask: the fastest way to call it
    return model(**rectangles).loss


def masked_only_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Hugging Face's own modules, the vocabulary's product at masked positions alone, as ours.

    The baseline of the gate: a product of other sizes rounds otherwise in the BLAS, by up to six
    times in the float32 gradient (seen with MKL on two threads), which is no kernel's doing.
    """
    rectangles = batch.padded()
    labels, following = rectangles.pop("labels"), rectangles.pop("next_sentence_label")
    output = model.bert(**rectangles)
    hidden = output.last_hidden_state[labels != -100]
    scores, pair = model.cls(hidden, output.pooler_output)
    return F.cross_entropy(scores, labels[labels != -100]) + F.cross_entropy(pair, following)


def ragged_loss(model: BertForPreTraining, batch: Batch) -> Tensor:
    return ragged_losses(model, batch).loss


def padded_loss(model: BertForPreTraining, batch: Batch) -> Tensor:
    """The same kernels on rectangles: what leaving the padding in costs."""
    return padded_losses(model, batch).loss


def providers(names: list[str], shape: Shape, precision: torch.dtype, batch: Batch):
    """The named providers, each with its own copy of the same weights; hf_sdpa is the baseline."""
    device = batch.input_ids.device
    theirs = hugging_face(shape.size, device)
    made = []
    for name in names:
        if name.startswith("hf"):
            model = hugging_face(shape.size, device)
            model.load_state_dict(theirs.state_dict())
            called = torch.compile(model, dynamic=False) if name == "hf_compiled" else model
            loss = functools.partial(hugging_face_loss, called, batch)
        else:
            model = ours_from(theirs)
            loss = functools.partial(FORMS[name], model, batch)
        backend = "torch" if name == "slim_torch" else None
        made.append(Provider(name, model, loss, precision, backend, NOTES[name]))
    return made


FORMS = {"slim": ragged_loss, "slim_padded": padded_loss, "slim_torch": padded_loss}
NOTES = {
    "hf_sdpa": "Hugging Face BertForPreTraining, attn_implementation sdpa",
    "hf_compiled": "the same under torch.compile; only its eager form passes the gate",
    "slim": "slimkernels, no padding, and the last block only where a loss reads it",
    "slim_padded": "the same kernels with the padding left in",
    "slim_torch": 'slimkernels, padded, under use_backend("torch")',
}


def gate(shape: Shape, device: torch.device, names: list[str]) -> dict[str, str]:
    """Dropout off, float32: are losses and gradients as near to float64 as Hugging Face's?

    The losses of the batch and of a second one of single sequences, and the gradient of the token
    embedding, which every layer and both heads flow into, by the twice-eager rule.
    """
    batches = [batch_of(shape, device), *_singles(shape, device)]
    theirs = hugging_face(shape.size, device).eval()
    baseline = _losses_and_gradient(theirs, masked_only_loss, batches)
    wide = hugging_face(shape.size, device).double().eval()
    truth = _losses_and_gradient(wide, hugging_face_loss, batches)
    verdicts = {}
    for name in names:
        if name.startswith("hf"):
            verdicts[name] = "baseline" if name == "hf_sdpa" else "not run"
            continue
        with slimkernels.use_backend("torch" if name == "slim_torch" else None):
            actual = _losses_and_gradient(ours_from(theirs).eval(), FORMS[name], batches)
        verdicts[name] = "pass"
        try:
            for what in ("losses", "gradient"):
                assert_no_worse(actual[what], baseline[what], truth[what], what=what)
        except AssertionError as error:
            verdicts[name] = f"FAIL {error}"
    return verdicts


def _singles(shape: Shape, device: torch.device) -> list[Batch]:
    """Batches of one sequence: with them the losses are a vector, whose worst error is no luck."""
    lengths = [shape.T // 4, shape.T // 3, shape.T // 2, shape.T - 1]
    return [batch_of(Shape(shape.size, 1, length), device) for length in lengths]


def _losses_and_gradient(model: nn.Module, loss_of: Callable, batches: list) -> dict[str, Tensor]:
    with torch.no_grad():
        losses = [loss_of(model, batch) for batch in batches[1:]]
    loss = loss_of(model, batches[0])
    loss.backward()
    tables = [p for p in model.parameters() if p.dim() == 2 and p.shape[0] == VOCABULARY]
    return {"losses": torch.stack([loss.detach(), *losses]), "gradient": tables[0].grad}
