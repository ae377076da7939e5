"""Tiny tokenizers and text encoders of the families, with random weights.

The words of `WORDS` are one token each; others fall into letters.
"""

from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from guidekit.testing.weights import frozen_model

WORDS = ("a", "and", "red", "blue", "green", "circle", "square", "on", "white")
# Merges in this order leave no word a part of another's: the "re" of "red" splits "green".
LONGEST = sorted(WORDS, key=len, reverse=True)


def joins(parts: list[str]) -> list[tuple[str, str]]:
    """Merges of byte-pair encoding that make one token of the parts, from left to right."""
    return [("".join(parts[:i]), parts[i]) for i in range(1, len(parts))]


def tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer over bytes, with merges for `WORDS` only: others fall into letters."""
    letters = sorted(ByteLevel.alphabet())
    vocab = letters + [letter + "</w>" for letter in letters]
    merges = []
    for word in WORDS:
        pairs = joins([*word[:-1], word[-1] + "</w>"])  # r e d</w> -> re d</w> -> red</w>
        merges += pairs
        vocab += map("".join, pairs)
    vocab = [*dict.fromkeys(vocab), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: i for i, token in enumerate(vocab)},
        merges=list(dict.fromkeys(merges)),
        model_max_length=77,
    )


def text_encoder(tokenizer: CLIPTokenizer, projection: bool = False) -> nn.Module:
    """A 32-channel CLIP text encoder of two layers over `tokenizer`'s vocabulary."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=32,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return frozen_model((CLIPTextModelWithProjection if projection else CLIPTextModel)(config))


def t5_tokenizer() -> T5Tokenizer:
    """A T5 tokenizer of `WORDS`; other words fall into letters."""
    words = [("\u2581" + word, -1.0) for word in WORDS]
    letters = [(chr(c), -9.0) for c in range(97, 123)]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    return T5Tokenizer(vocab=[*special, *words, *letters], extra_ids=0)


def t5_encoder(tokenizer: T5Tokenizer) -> T5EncoderModel:
    """A T5 encoder of one layer with 64 channels."""
    config = T5Config(
        vocab_size=len(tokenizer), d_model=64, d_kv=16, d_ff=64, num_layers=1, num_heads=2
    )
    return frozen_model(T5EncoderModel(config))


def gemma_tokenizer() -> GemmaTokenizer:
    """A Gemma tokenizer of `WORDS`, with the space before them; others fall into letters."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    letters = ["\u2581", "\n", *map(chr, range(33, 127)), *(f"<0x{i:02X}>" for i in range(256))]
    merges = [pair for word in LONGEST for pair in joins([*word])]
    merges += [("\u2581", word) for word in WORDS]
    vocab = dict.fromkeys([*special, *letters, *map("".join, merges)])
    return GemmaTokenizer(
        vocab={token: i for i, token in enumerate(vocab)},
        merges=list(dict.fromkeys(merges)),
        add_bos_token=True,
    )


def gemma_encoder(tokenizer: GemmaTokenizer) -> Gemma2Model:
    """A Gemma 2 decoder of two layers with 32 channels."""
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
    )
    return frozen_model(Gemma2Model(config))


def qwen_tokenizer() -> Qwen2Tokenizer:
    """A Qwen 2 tokenizer over bytes, with merges for `WORDS` only."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    merges = [pair for word in LONGEST for pair in joins([*word])]
    merges += [("\u0120", word) for word in WORDS]  # a space before the word
    vocab = dict.fromkeys([*sorted(ByteLevel.alphabet()), *map("".join, merges), *special])
    return Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate(vocab)},
        merges=list(dict.fromkeys(merges)),
        extra_special_tokens=special[1:],
    )


def qwen_encoder(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    """A Qwen 2.5 VL of two layers with 32 channels and an eye of one layer."""
    ends = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = dict(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
        **ends,
    )
    eye = dict(depth=1, hidden_size=16, intermediate_size=32, num_heads=2, out_hidden_size=32)
    config = Qwen2_5_VLConfig(text_config=text, vision_config=eye, **ends)
    return frozen_model(Qwen2_5_VLForConditionalGeneration(config))
