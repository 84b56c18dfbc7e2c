import torch

from slimkernels.training.optim import adamw, learning_rate


def test_the_rate_rises_then_falls_in_straight_lines():
    rates = [learning_rate(s, peak=8.0, warmup_steps=4, total_steps=12) for s in range(13)]
    assert rates[:4] == [2.0, 4.0, 6.0, 8.0]
    assert rates[4:] == [8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.0]


def test_no_warmup():
    assert learning_rate(0, peak=1.0, warmup_steps=0, total_steps=2) == 1.0


def test_only_matrices_decay():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    decayed, others = adamw(model, 1e-3, weight_decay=0.1).param_groups
    assert decayed["weight_decay"] == 0.1 and [p.dim() for p in decayed["params"]] == [2]
    assert others["weight_decay"] == 0.0 and [p.dim() for p in others["params"]] == [1, 1, 1]
