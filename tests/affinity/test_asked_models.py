"""Models of others that estimates ask: segmenters of transformers, encoders of names."""

import json

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizerFast,
    OneFormerConfig,
)

import panoptic
from guidekit import GuidekitError
from guidekit.affinity.encoders import load_texts
from guidekit.affinity.segmenters import load_segmenter
from segformers import write_segformer

PIXELS = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "blue", "circle"]


def refused(text, call, *args):
    with pytest.raises(GuidekitError, match=text) as error:
        call(*args)
    assert "\n" not in str(error.value)


@pytest.mark.full
@pytest.mark.parametrize("write", [panoptic.write_mask2former, panoptic.write_maskformer])
def test_panoptic_models_of_transformers_segment(tmp_path, write):
    segmenter = load_segmenter(write(tmp_path / "model"))
    assert segmenter.labels.classes == (*reversed(panoptic.NAMES), "dog")
    found = segmenter(PIXELS)
    assert found.shape == (4, 32, 32)
    assert torch.equal(found.sum(0), torch.ones(32, 32))
    assert set(found.unique().tolist()) == {0.0, 1.0}
    assert segmenter(PIXELS.repeat(1, 20, 30)).shape == (4, 341, 512)  # a large one is reduced


def test_a_oneformer_is_refused(tmp_path):
    config = OneFormerConfig(architectures=["OneFormerForUniversalSegmentation"])
    config.save_pretrained(tmp_path)
    refused("is a OneFormerFor.*tells it its task in words; give", load_segmenter, tmp_path)


def test_a_segmenter_may_have_many_classes(tmp_path):
    """255 is a class of it, so that it is not void."""
    names = ["background", *(f"class {i}" for i in range(300))]
    segmenter = load_segmenter(write_segformer(tmp_path, names))
    assert len(segmenter.labels) == 300
    found = segmenter(PIXELS)
    assert found.shape == (300, 8, 8)
    assert (found >= 0).all()
    assert (found.sum(0) < 1).all()


@pytest.mark.gpu
def test_a_segmenter_is_on_the_gpu_where_there_is_one(tmp_path):
    before = torch.cuda.memory_allocated()
    segmenter = load_segmenter("scenes-judge")
    assert torch.cuda.memory_allocated() > before
    assert segmenter(PIXELS).device.type == "cpu"


def sentences(folder, *kinds, **pooling):
    """A tiny BERT as sentence-transformers saves it, with these modules behind it."""
    torch.manual_seed(0)
    (folder / "1_Pooling").mkdir(parents=True)
    (folder / "words.txt").write_text("\n".join(WORDS))
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    BertModel(config).save_pretrained(folder)
    BertTokenizerFast(str(folder / "words.txt")).save_pretrained(folder)
    modules = [
        {"idx": i, "path": "" if i == 0 else f"{i}_{kind}", "type": f"sentence_transformers.{kind}"}
        for i, kind in enumerate(("models.Transformer", *kinds))
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling/config.json").write_text(json.dumps(pooling))
    return folder


@pytest.mark.parametrize("way", ["cls_token", "mean_tokens"])
def test_a_sentence_encoder_pools_as_its_folder_says(tmp_path, way):
    modes = {f"pooling_mode_{own}": own == way for own in ("cls_token", "mean_tokens")}
    folder = sentences(tmp_path / "bert", "Pooling", "Normalize", **modes)
    found = load_texts(str(folder), None)(["red circle", "blue"])
    model, tokenizer = BertModel.from_pretrained(folder), BertTokenizerFast.from_pretrained(folder)
    for row, text in zip(found, ["red circle", "blue"], strict=True):
        with torch.no_grad():
            states = model(**tokenizer([text], return_tensors="pt")).last_hidden_state[0]
        expected = states[0] if way == "cls_token" else states.mean(0)
        torch.testing.assert_close(F.normalize(row, dim=0), F.normalize(expected, dim=0))


def test_sentence_encoders_with_more_are_refused(tmp_path):
    mean = {"pooling_mode_mean_tokens": True}
    dense = sentences(tmp_path / "dense", "Pooling", "Dense", **mean)
    refused("has Transformer, Pooling, Dense, and what is known", load_texts, str(dense), None)
    both = sentences(tmp_path / "both", "Pooling", **mean, pooling_mode_max_tokens=True)
    refused("pools by mean_tokens, max_tokens; .*cls_token or mean", load_texts, str(both), None)
    bare = sentences(tmp_path / "bare")
    refused("has Transformer", load_texts, str(bare), None)
    (bare / "modules.json").write_text('[{"idx": 0}]')
    refused("modules.json is damaged", load_texts, str(bare), None)


def test_names_of_open_clip_reach_it():
    """`ARCHITECTURE/TAG` is no hub id of a pipeline."""
    refused("open_clip has no weights 'nothing' of RN50; there are openai", load_texts,
            "RN50/nothing", None)  # fmt: skip
    refused("not ARCHITECTURE/TAG such as RN50/openai", load_texts, "RN50", None)
