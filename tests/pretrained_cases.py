"""What the tests of pretrained models share: Hugging Face's with random parameters, and results."""

from __future__ import annotations

import torch
from torch import Tensor

from slimkernels.models import files
from slimkernels.models.convert import to_theirs
from slimkernels.models.pretrained import Pretrained


def randomised(model, std=0.2):
    """Every parameter and constant random, so that none can be left out unseen.

    Biases are small, or they alone would decide what is generated.
    """
    for name, parameter in model.named_parameters():
        is_bias = name.endswith("bias")
        is_norm = parameter.dim() == 1 and not is_bias
        torch.nn.init.normal_(parameter, float(is_norm), 0.2 * std if is_bias else std)
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias.normal_(std=0.2 * std)
    return model.eval()


def results(model, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """`outputs`, and the gradients of a random dy of each, under Hugging Face's names."""
    model.zero_grad()
    generator = torch.Generator().manual_seed(3)
    ys = list(outputs.values())
    dys = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y) for y in ys]
    torch.autograd.backward(ys, dys)
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    if isinstance(model, Pretrained):
        gradients = to_theirs(gradients, model.family.names(model.config))
        if model.bare:
            prefix = model.family.prefix
            gradients = {n.removeprefix(prefix): g for n, g in gradients.items()}
    return {n: y.detach() for n, y in outputs.items()} | gradients


def assert_written_as_read(library, path, ours, tmp_path):
    """transformers reads what `ours` writes: the tensors and the config of the folder `path`."""
    kind = getattr(library, type(ours).__name__)
    ours.save_pretrained(tmp_path)
    written, read = (files.read_weights(folder, "") for folder in (tmp_path, path))
    assert written.keys() == read.keys()
    first = kind.from_pretrained(path)
    theirs, report = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    expected, actual = (model.config.to_diff_dict() for model in (first, theirs))
    # Entries at the default of versions that need them are no change.
    assert expected.items() <= actual.items(), (expected, actual)
    assert theirs.state_dict().keys() == first.state_dict().keys()
    for name, tensor in first.state_dict().items():
        assert torch.equal(theirs.state_dict()[name], tensor), name
