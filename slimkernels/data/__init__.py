"""From text files to batches without padding: documents, a tokenizer, sentence pairs, masks.

    documents = read_documents(sample_path())
    train, heldout = split_documents(documents)
    tokenizer = Tokenizer.train(train)
    examples = pack_examples(tokenizer.encode_documents(train), tokenizer)
    batches = RaggedBatches(examples, tokenizer, tokens_per_batch=1024, seed=0)
    batches[step]  # the same Batch for the same step, always

Nothing here keeps a random state: every choice is a function of a seed and of what it is for.
"""

from slimkernels.data.batch import Batch
from slimkernels.data.masking import Masker
from slimkernels.data.packing import Examples, RaggedBatches, pack_examples
from slimkernels.data.text import read_documents, sample_path, split_documents, split_sentences
from slimkernels.data.tokenizer import Tokenizer

__all__ = [
    "Batch",
    "Examples",
    "Masker",
    "RaggedBatches",
    "Tokenizer",
    "pack_examples",
    "read_documents",
    "sample_path",
    "split_documents",
    "split_sentences",
]
