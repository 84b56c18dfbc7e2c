"""Models assembled from the library's ops: one config, one block, thin assemblies."""

from slimkernels.models.auto import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from slimkernels.models.bert import Bert, BertForPreTraining
from slimkernels.models.bert_heads import (
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
)
from slimkernels.models.config import TransformerConfig
from slimkernels.models.gpt import GPT2LMHeadModel, LlamaForCausalLM
from slimkernels.models.seq2seq import BartForConditionalGeneration, T5ForConditionalGeneration
from slimkernels.models.tokenizer import AutoTokenizer

BertTokenizer = AutoTokenizer

__all__ = [
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForMaskedLM",
    "AutoModelForQuestionAnswering",
    "AutoModelForSeq2SeqLM",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoTokenizer",
    "BartForConditionalGeneration",
    "Bert",
    "BertForMaskedLM",
    "BertForPreTraining",
    "BertForQuestionAnswering",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BertModel",
    "BertTokenizer",
    "GPT2LMHeadModel",
    "LlamaForCausalLM",
    "T5ForConditionalGeneration",
    "TransformerConfig",
]
