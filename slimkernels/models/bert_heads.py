"""BERT's heads on padded batches, under Hugging Face's names: padding is cut out, and put back.

Every product works on real tokens only, and the last block on those that the head reads: for a
class of the whole sequence that is one token a row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimkernels.models.bert import BertBased
from slimkernels.models.block import Wanted, affine, initialise
from slimkernels.models.checks import check_labels, check_padded, spread
from slimkernels.models.config import TransformerConfig, expected
from slimkernels.models.outputs import LogitsOutput, PoolingOutput, QuestionAnsweringOutput
from slimkernels.models.padding import Ragged, unpad
from slimkernels.ops.cross_entropy import cross_entropy


class _Padded(BertBased):
    """What the heads share: a padded batch through the encoder."""

    def _embed(self, input_ids, attention_mask, token_type_ids, position_ids, multiplies=False):
        check_padded(input_ids, attention_mask, token_type_ids)
        ragged = unpad(input_ids, attention_mask)
        places = ragged.position_ids
        if position_ids is not None:
            places = ragged.take(spread("position_ids", position_ids, tuple(input_ids.shape)))
        ids = ragged.take(input_ids), ragged.take(token_type_ids), places
        return ragged, self.bert.embed(*ids, ragged.cu_seqlens, multiplies=multiplies)

    def _hidden(self, *inputs) -> tuple[Ragged, Tensor]:
        """Hidden states (N, C) of all real tokens."""
        ragged, embedded = self._embed(*inputs)
        return ragged, self.bert.encode(embedded, cu_seqlens=ragged.cu_seqlens)

    def _pooled(self, *inputs) -> Tensor:
        """(B, C) from each row's first real token, the only one that the last block computes."""
        ragged, embedded = self._embed(*inputs)
        B = ragged.shape[0]
        each = torch.arange(B + 1, dtype=torch.int32, device=embedded.hidden.device)
        first = Wanted(ragged.cu_seqlens[:-1].long(), each)
        return self.pool(self.bert.encode(embedded, first, cu_seqlens=ragged.cu_seqlens))


class BertModel(_Padded):
    """The encoder alone, with BERT's pooler."""

    bare = True

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        self.add_pooler()
        initialise(self, config.initializer_std)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> PoolingOutput:
        """Hidden states of every token and a vector a row.

        input_ids       (B, T) int64
        attention_mask  (B, T): 0 where there is padding, wherever it stands; none if None
        token_type_ids  (B, T) int64; 0 everywhere if None
        position_ids    (B, T) int64; each token's column if None
        Errors          ValueError for a wrong shape, an empty row or, on the CPU, an id out of
                        range
        Caution         waits for the device if there is a mask: the host must know how many tokens
                        are real. Without one torch.compile gets one graph
        """
        inputs = input_ids, attention_mask, token_type_ids, position_ids
        ragged, hidden = self._hidden(*inputs)
        first = hidden.index_select(0, ragged.cu_seqlens[:-1])
        return PoolingOutput(ragged.put_back(hidden), self.pool(first))


class BertForMaskedLM(_Padded):
    """Scores of every token for every place, or for the masked ones alone."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        self.add_token_head()
        initialise(self, config.initializer_std)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        skip_logits: bool = False,
    ) -> LogitsOutput:
        """Logits (B, T, V), and with labels (B, T), -100 for none, the loss; the rest is as in
        BertModel.forward.

        skip_logits  with labels: logits are None, and the vocabulary's matrix and most of the last
                     block meet only the places that have a label, some 15 % of all in training
        """
        inputs = input_ids, attention_mask, token_type_ids, position_ids
        ragged, embedded = self._embed(*inputs, multiplies=True)
        wanted = None
        if labels is not None:
            check_labels("labels", labels, self.config.vocab_size, tuple(input_ids.shape))
            labels = ragged.take(labels).flatten()
        elif skip_logits:
            raise ValueError("Bert: labels must be given with skip_logits; got None")
        if skip_logits:
            at = (labels != -100).nonzero().squeeze(1)
            ends = torch.searchsorted(at, ragged.cu_seqlens.long()).int()
            wanted, labels = Wanted(at, ends), labels.index_select(0, at)
        hidden = self.bert.encode(embedded, wanted, cu_seqlens=ragged.cu_seqlens)
        logits = self.mlm_logits(hidden, embedded.table)
        loss = None if labels is None else _wide(cross_entropy(logits, labels))
        return LogitsOutput(loss, None if skip_logits else ragged.put_back(logits))


_PROBLEMS = "regression", "single_label_classification", "multi_label_classification"


class _Classifier(_Padded):
    """A layer of num_labels scores.

    num_labels          scores; from_pretrained takes the folder's, or 2
    classifier_dropout  before the layer; None for the config's dropout_p
    id2label            their names, which save_pretrained writes; LABEL_0 and so on if None
    problem_type        "regression", "single_label_classification" or "multi_label_classification";
                        None to tell it by num_labels and the labels' dtype, as Hugging Face does
    """

    has_pooler = False

    def __init__(
        self,
        config: TransformerConfig,
        num_labels: int = 2,
        *,
        classifier_dropout: float | None = None,
        id2label: dict[int, str] | None = None,
        problem_type: str | None = None,
    ) -> None:
        self._check_head(num_labels, classifier_dropout, id2label, problem_type)
        super().__init__(config)
        self.num_labels, self.problem_type = num_labels, problem_type
        if id2label is None:
            id2label = {i: f"LABEL_{i}" for i in range(num_labels)}
        self.id2label = {int(i): label for i, label in id2label.items()}
        self.classifier_dropout = classifier_dropout
        if self.has_pooler:
            self.add_pooler()
        self.classifier = nn.Linear(config.hidden_size, num_labels)
        initialise(self, config.initializer_std)

    @classmethod
    def _check_head(cls, num_labels, classifier_dropout, id2label, problem_type) -> None:
        def require(holds, name, expected, got):
            if not holds:
                raise ValueError(f"{cls.__name__}: {name} must be {expected}; got {got!r}")

        is_whole = isinstance(num_labels, int) and not isinstance(num_labels, bool)
        require(is_whole and num_labels >= 1, "num_labels", "an integer >= 1", num_labels)
        if classifier_dropout is not None:
            wanted = expected("dropout_p", classifier_dropout)
            require(wanted is None, "classifier_dropout", f"{wanted} or None", classifier_dropout)
        known = None, *_PROBLEMS
        require(problem_type in known, "problem_type", " or ".join(map(repr, known)), problem_type)
        if id2label is None:
            return
        is_named = isinstance(id2label, dict) and all(str(i).isdecimal() for i in id2label)
        require(is_named, "id2label", "a dict of numbers to names, or None", id2label)
        if len(id2label) != num_labels:
            raise ValueError(
                f"{cls.__name__}: id2label must name {num_labels} labels; got {len(id2label)}"
            )

    @classmethod
    def _options(cls, theirs, options):
        names = theirs.get("id2label")
        has_names = isinstance(names, dict) and names
        count = options.get("num_labels", len(names) if has_names else theirs.get("num_labels", 2))
        found = {name: theirs.get(name) for name in ("classifier_dropout", "problem_type")}
        # What is no dict the constructor refuses.
        names = names if not has_names or len(names) == count else None
        return found | {"num_labels": count, "id2label": names or None} | options

    def _entries(self):
        entries = {
            "id2label": {str(i): name for i, name in self.id2label.items()},
            "label2id": {name: i for i, name in self.id2label.items()},
            "classifier_dropout": self.classifier_dropout,
        }
        return entries | ({"problem_type": self.problem_type} if self.problem_type else {})

    def _scores(self, x):
        p = self.config.dropout_p if self.classifier_dropout is None else self.classifier_dropout
        return affine(self.classifier, F.dropout(x, p, self.training))


class BertForSequenceClassification(_Classifier):
    """num_labels scores a row."""

    has_pooler = True

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> LogitsOutput:
        """Logits (B, num_labels), and the loss if there are labels: (B,) classes; (B,) numbers for
        regression; or (B, num_labels) of 0 and 1, in floating point, for several classes at once.
        The rest is as in BertModel.forward.
        """
        inputs = input_ids, attention_mask, token_type_ids, position_ids
        logits = self._scores(self._pooled(*inputs))
        return LogitsOutput(None if labels is None else self._loss(logits, labels), logits)

    def _loss(self, logits, labels):
        name, kind = type(self).__name__, self.problem_type
        if not isinstance(labels, Tensor):
            raise ValueError(f"{name}: labels must be a tensor; got {type(labels).__name__}")
        if kind is None:
            whole = not labels.is_floating_point()
            kind = "single_label_classification" if whole else "multi_label_classification"
            kind = "regression" if self.num_labels == 1 else kind
        B = len(logits)
        if kind == "single_label_classification":
            check_labels("labels", labels, self.num_labels, (B,), ", one a row", name)
            return _wide(cross_entropy(logits, labels))
        shape = tuple(logits.shape)
        one_a_row = kind == "regression" and self.num_labels == 1
        if tuple(labels.shape) != shape and not (one_a_row and tuple(labels.shape) == (B,)):
            how = f"({B},) or {shape} for regression" if one_a_row else f"{shape} for {kind}"
            how += "" if kind == "regression" else f", or integers ({B},) for one class a row"
            raise ValueError(
                f"{name}: labels must be {how}; got {labels.dtype} {tuple(labels.shape)}"
            )
        wide = _wide(logits)
        labels = labels.to(wide.dtype)
        if kind == "regression":
            return F.mse_loss(wide, labels.view(wide.shape))
        return F.binary_cross_entropy_with_logits(wide, labels)


class BertForTokenClassification(_Classifier):
    """num_labels scores a token."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> LogitsOutput:
        """Logits (B, T, num_labels), 0 on padding, and with labels (B, T), -100 for none, the loss.

        A label on padding is not counted. The rest is as in BertModel.forward.
        """
        inputs = input_ids, attention_mask, token_type_ids, position_ids
        ragged, hidden = self._hidden(*inputs)
        logits, loss = self._scores(hidden), None
        if labels is not None:
            check_labels("labels", labels, self.num_labels, tuple(input_ids.shape))
            loss = _wide(cross_entropy(logits, ragged.take(labels).flatten()))
        return LogitsOutput(loss, ragged.put_back(logits))


class BertForQuestionAnswering(_Padded):
    """Scores of each token to be an answer's first, and its last."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        initialise(self, config.initializer_std)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
    ) -> QuestionAnsweringOutput:
        """Start and end logits (B, T), and the mean of their losses if both columns (B,) are given.

        A column outside [0, T) is left out of the mean. Padding is -inf: it can be no answer, and
        takes no part in the loss, in which Hugging Face's has the scores of padding as well. The
        rest is as in BertModel.forward.
        """
        inputs = input_ids, attention_mask, token_type_ids, position_ids
        ragged, hidden = self._hidden(*inputs)
        scores = ragged.put_back(affine(self.qa_outputs, hidden))  # (B, T, 2)
        if attention_mask is not None:
            scores = scores.masked_fill((attention_mask == 0).unsqueeze(-1), -torch.inf)
        start, end = (t.contiguous() for t in scores.unbind(-1))
        loss = None
        if start_positions is not None and end_positions is not None:
            both = (start, start_positions), (end, end_positions)
            loss = sum(self._loss(logits, columns) for logits, columns in both) / 2
        return QuestionAnsweringOutput(loss, start, end)

    def _loss(self, logits, columns):
        B, T = logits.shape
        is_tensor = isinstance(columns, Tensor)
        if not is_tensor or columns.is_floating_point() or columns.numel() != B:
            name = type(self).__name__
            got = f"{columns.dtype} {tuple(columns.shape)}" if is_tensor else repr(columns)
            raise ValueError(
                f"{name}: start_positions and end_positions must be integers ({B},); got {got}"
            )
        columns = columns.reshape(B)
        known = (columns >= 0) & (columns < T)
        return _wide(cross_entropy(logits, columns.where(known, -100)))


def _wide(loss: Tensor) -> Tensor:
    """In float32 at least: half precision would round a loss to three digits."""
    return loss.to(torch.promote_types(loss.dtype, torch.float32))
