"""docs/attention.md: its table is what the backends say, and its example computes what it says."""

import importlib.util
import re

import pytest
import torch
from op_cases import device_of

pytest.importorskip("triton", reason="the page asks Triton's backend")
pytest.importorskip("slimkernels._cpu", reason="the page asks the C++ backend")

import slimkernels as sk
from benchmarks import features
from slimkernels.testing import assert_no_worse, run_with_gradients

PAGE = features.ROOT / "docs/attention.md"
VERDICTS = features.verdicts_of("triton")
TRITON = features.features(device_of("triton"))


def test_the_page_is_up_to_date(capsys):
    assert features.main(["--check"]) == 0, "run python -m benchmarks.features"


def test_a_page_out_of_date_is_noticed_and_mended(tmp_path, capsys):
    page = tmp_path / "attention.md"
    page.write_text(PAGE.read_text().replace("| causal | yes |", "| causal | no |"))
    assert features.main(["--page", str(page), "--check"]) == 1
    assert features.main(["--page", str(page)]) == 0
    assert page.read_text() == PAGE.read_text()
    assert capsys.readouterr().out.splitlines() == [
        "attention.md: is out of date",
        "attention.md: written",
    ]


def test_a_refusal_is_a_footnote_in_the_words_of_the_backend(monkeypatch):
    monkeypatch.setitem(features.OP.modules, "cpu", "the extension is not built")
    lines = features.table()
    assert "| causal | yes | no (1) | yes |" in lines
    assert "1. cpu: the extension is not built" in lines


def test_a_yes_that_raises_does_not_reach_the_page(monkeypatch):
    def backward(*args):
        raise RuntimeError("no gradient")

    monkeypatch.setattr(features.OP.modules["cpu"], "backward", backward)
    with pytest.raises(RuntimeError, match="no gradient"):
        features.verdicts_of("cpu")


@pytest.mark.parametrize("feature", TRITON)
def test_what_triton_says_it_can_do_it_does(feature):
    tensors, options = TRITON[feature]
    if VERDICTS[feature] is not None:
        with pytest.raises(sk.BackendError):
            features.run("triton", tensors, options)
        return
    found = features.run("triton", tensors, options)
    wanted = features.run("torch", tensors, options)
    assert [x.shape for x in found] == [x.shape for x in wanted]  # tests/ops has the numbers
    assert all(x.isfinite().all() for x in found)


def test_the_example_of_a_score_function(tmp_path):
    """In a file, since Triton reads a kernel's source."""
    (example,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    path = tmp_path / "example.py"
    path.write_text(example)
    spec = importlib.util.spec_from_file_location("example", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    device = device_of("triton")
    inputs = tuple(x.to(device) for x in (module.query, module.key, module.value))
    limits = module.limits.to(device)

    def attention(backend, dtype=torch.float32):
        variant = module.variant._replace(score_tensors=(limits.to(dtype),))
        return lambda q, k, v: sk.scaled_dot_product_attention(
            q, k, v, is_causal=True, variant=variant, backend=backend
        )

    kernels = run_with_gradients(attention("triton"), inputs)
    eager = run_with_gradients(attention("torch"), inputs)
    wide = tuple(x.double() for x in inputs)
    truth = run_with_gradients(attention("torch", torch.float64), wide)
    plain = run_with_gradients(
        lambda q, k, v: sk.scaled_dot_product_attention(q, k, v, is_causal=True), inputs
    )
    assert len(kernels) == 4
    for name, right in truth.items():
        assert_no_worse(kernels[name], eager[name], right, what=name)
        assert not torch.allclose(eager[name], plain[name], atol=1e-3)  # it does something
