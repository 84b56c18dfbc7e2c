"""Models small enough for a test: with every module of torch.nn that is swapped, and BERT."""

import copy

import pytest
import torch
import torch.distributed as dist
from hf_families import FAMILIES
from module_cases import assert_model_no_worse, outputs_and_gradients
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from slimkernels import replace
from slimkernels.nn import _torchs_own

V, C, H = 31, 48, 4


class Model(nn.Module):
    """Encoder, decoder, gated and normed layers, a head tied to the embedding, and the loss."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(V, C)
        layer = nn.TransformerEncoderLayer(C, H, 64, 0.0, "gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, nn.LayerNorm(C))
        layer = nn.TransformerDecoderLayer(C, H, 64, 0.0, batch_first=True, norm_first=True)
        self.decoder = nn.TransformerDecoder(layer, 1, nn.RMSNorm(C))
        self.attention = nn.MultiheadAttention(C, H, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(C, C), nn.SiLU(), nn.GroupNorm(4, C), nn.GELU("tanh"))
        self.again = self.mlp[3]  # a shared module
        self.gate, self.scores = nn.Softmax(-1), nn.LogSoftmax(-1)
        self.head = nn.Linear(C, V, bias=False)
        self.head.weight = self.embedding.weight
        self.loss = nn.CrossEntropyLoss(label_smoothing=0.1)

    def forward(self, ids, target):
        padding = ids == 0
        memory = self.encoder(self.embedding(ids), src_key_padding_mask=padding)
        causal = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        x = self.embedding(target)
        x = self.decoder(x, memory, tgt_mask=causal, memory_key_padding_mask=padding)
        x = x + self.attention(x, memory, memory, key_padding_mask=padding)[0]
        x = x * self.gate(x) + self.mlp(x.flatten(0, 1)).view_as(x) + self.again(x)
        logits = self.head(x)
        return self.loss(logits.flatten(0, 1), target.flatten()), self.scores(logits)


def call(model, *batch):
    return model(*batch)


@pytest.fixture(autouse=True)
def kernels_at_every_size(monkeypatch):
    monkeypatch.setattr(_torchs_own, "MIN_ELEMENTS", 0)


@pytest.fixture(scope="session")
def batch():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, V, (4, 9), generator=generator)
    ids[torch.arange(9) >= torch.tensor([[9], [4], [1], [6]])] = 0  # padding
    return ids, torch.randint(1, V, (4, 7), generator=generator)


@pytest.fixture(scope="session")
def original():
    """Not to be changed: tests take a copy."""
    torch.manual_seed(0)
    return Model()


@pytest.fixture
def model(original):
    return copy.deepcopy(original)


@pytest.fixture(scope="session")
def expected(original, batch):
    """(eager's results, those in float64) of the original."""
    double = copy.deepcopy(original).double()
    return tuple(
        outputs_and_gradients(module, lambda m: m(*batch)) for module in (original, double)
    )


@pytest.fixture(scope="module")
def mesh():
    """Of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.fixture
def assert_right(batch, expected):
    """Whether outputs and gradients of a swapped model are as good as eager's."""

    def check(model, call=call):
        assert_model_no_worse(outputs_and_gradients(model, lambda m: call(m, *batch)), *expected)

    return check


@pytest.fixture(scope="session")
def bert():
    """Hugging Face's, with a masked language model's head. Not to be changed."""
    return FAMILIES["bert-mlm"].make().eval()


@pytest.fixture
def replaced(bert):
    model = copy.deepcopy(bert)
    replace(model)
    return model


@pytest.fixture
def packings(monkeypatch):
    """Every packing of padded hidden states that a test begins."""
    _hf_mask = pytest.importorskip("slimkernels.integrations._hf_mask")
    begun, begin = [], _hf_mask.Packing.begin

    def spy(mask, pattern):
        begun.append(begin(mask, pattern))
        return begun[-1]

    monkeypatch.setattr(_hf_mask.Packing, "begin", spy)
    return begun
