"""Text side of the built-in model: a byte-pair tokenizer and a CLIPTextModel that reads captions.

The encoder is trained before the denoiser, as Stable Diffusion's was: at every token it must know
which object the sentence is speaking of and which have been named so far. The model is causal, so
`red` in `red circle` learns the colour only and `circle` both.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from guidekit.worlds import scenes

END = "<|endoftext|>"
READ = 4000  # scenes of a world whose captions the tokenizer learns from
# Other ways to say it; `{}` are the phrases with articles. Most captions are scenes.caption's.
FORMS = (", ", " , ", " and ", " next to ", " with ", " ")
OPENINGS = ("", "", "", "an image of ", "a photo of ", "an image of ", "there is ")


@dataclass(kw_only=True)
class TextOptions:
    """Size of the text encoder."""

    width: int = 128
    layers: int = 3
    heads: int = 4
    length: int = 32  # tokens of a prompt, with start, end and padding
    vocabulary: int = 700
    source: str = "scenes"  # scenes | cutouts
    cutouts: str = ""  # folder of the cut-outs; `guidekit train --cutouts` sets it


def varied_caption(plan: scenes.Scene, rng: np.random.Generator) -> str:
    """The scene's caption in one of many wordings: order, joints, opening, background or not."""
    if rng.random() < 0.5:
        return plan.caption
    phrases = [thing.phrase for thing in plan.things]
    order = rng.permutation(len(phrases))
    bare = rng.random() < 0.3
    named = [
        phrases[i] if bare else scenes.caption([phrases[i]], "").split(" on a ")[0] for i in order
    ]
    text = OPENINGS[rng.integers(len(OPENINGS))] + FORMS[rng.integers(len(FORMS))].join(named)
    return text if rng.random() < 0.4 else f"{text} on a {plan.background} background"


def train_tokenizer(options: TextOptions, texts: list[str] | None = None) -> CLIPTokenizer:
    """Learns byte pairs from captions; every byte is a token, so any prompt can be encoded.

    texts: the captions; by default those of the shapes' scenes.
    """
    if texts is None:
        rng = np.random.default_rng(0)
        texts = [varied_caption(scenes.scene(i), rng) for i in range(READ)]
    trainer = trainers.BpeTrainer(
        vocab_size=options.vocabulary,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        end_of_word_suffix="</w>",
        show_progress=False,
        min_frequency=2,
    )
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Lowercase()
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"), "removed", True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    learner.train_from_iterator(texts, trainer)
    return _clip_tokenizer(learner, options.length)


def _clip_tokenizer(learner: Tokenizer, length: int) -> CLIPTokenizer:
    """The learned merges as a CLIPTokenizer; a byte that ends a word is a token of its own."""
    import json

    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = alphabet + [a + "</w>" for a in alphabet] + ["".join(pair) for pair in merges]
    # Ids 0 to 2 stay unused: CLIPTextModel takes an end id of 2 for a sign of old checkpoints.
    names = ["<|unused0|>", "<|unused1|>", "<|unused2|>", *dict.fromkeys(words)]
    vocabulary = {name: i for i, name in enumerate([*names, "<|startoftext|>", END])}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=length)


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """Token ids `(B, length)`, padded and cut as diffusers does."""
    return tokenizer(
        texts,
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids


class Reader(nn.Module):
    """CLIPTextModel with the linear read-outs that it is trained by; they are thrown away later."""

    def __init__(self, encoder: CLIPTextModel):
        super().__init__()
        self.encoder = encoder
        width = encoder.config.hidden_size
        self.colour = nn.Linear(width, len(scenes.COLOURS) + 1)
        self.shape = nn.Linear(width, len(scenes.SHAPES) + 1)
        self.named = nn.Linear(width, len(scenes.CLASSES) + len(scenes.BACKGROUNDS))

    def forward(
        self, ids: Tensor, colours: Tensor, shapes: Tensor, named: Tensor
    ) -> dict[str, Tensor]:
        """Losses of ids `(B, T)` against the current colour and shape and all named so far."""
        states = self.encoder(ids).last_hidden_state
        return {
            "colour": F.cross_entropy(self.colour(states).flatten(0, 1), colours.flatten()),
            "shape": F.cross_entropy(self.shape(states).flatten(0, 1), shapes.flatten()),
            "named": 10 * F.binary_cross_entropy_with_logits(self.named(states), named),
        }


class TextTask:
    """Trains the text encoder to read captions."""

    def __init__(self, options: TextOptions, tokenizer: CLIPTokenizer | None = None):
        self.tokenizer = tokenizer or train_tokenizer(options)
        config = CLIPTextConfig(
            vocab_size=len(self.tokenizer),
            hidden_size=options.width,
            intermediate_size=4 * options.width,
            num_hidden_layers=options.layers,
            num_attention_heads=options.heads,
            max_position_embeddings=options.length,
            projection_dim=options.width,
            bos_token_id=self.tokenizer.bos_token_id,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        self.net = Reader(CLIPTextModel(config))

    def batch(self, numbers: range, generator: torch.Generator) -> dict[str, Tensor]:
        """Captions and, for every token, what has been read by then."""
        plans = [scenes.scene(i) for i in numbers]
        texts = [varied_caption(p, np.random.default_rng(p.number)) for p in plans]
        encoded = self.tokenizer(
            texts,
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            return_offsets_mapping=True,
        )
        rows = zip(texts, encoded["offset_mapping"], plans, strict=True)
        colours, shapes, named = zip(*(_targets(*row) for row in rows), strict=True)
        return {
            "ids": torch.tensor(encoded["input_ids"]),
            "colours": torch.tensor(colours),
            "shapes": torch.tensor(shapes),
            "named": torch.tensor(np.array(named), dtype=torch.float32),
        }

    def preview(self) -> Image.Image:
        """Which object each token of three captions speaks of, as a strip of colours."""
        texts = [scenes.scene(i, "test").caption for i in range(3)]
        states = self.net.encoder(tokenize(self.tokenizer, texts).to(self.net.encoder.device))
        found = self.net.colour(states.last_hidden_state).argmax(-1).cpu()
        palette = torch.tensor([(90, 90, 90), *scenes.COLOURS.values()], dtype=torch.uint8)
        return Image.fromarray(palette[found].numpy()).resize((found.shape[1] * 16, 48), 0)

    def export(self, folder: Path) -> None:
        """Saves tokenizer and encoder as a Stable Diffusion pipeline holds them."""
        self.tokenizer.save_pretrained(folder / "tokenizer")
        self.net.encoder.save_pretrained(folder / "text_encoder")


def _targets(text: str, offsets: list[tuple[int, int]], plan: scenes.Scene):
    """Per token: index of the current colour and shape (0: none) and the multi-hot of all named."""
    spans = [(text.index(t.phrase), t) for t in plan.things]
    colours, shapes, rows = [], [], []
    named = np.zeros(len(scenes.CLASSES) + len(scenes.BACKGROUNDS), np.float32)
    for start, end in offsets:
        colour = shape = 0
        for begin, thing in spans:
            if begin <= start < end <= begin + len(thing.phrase):
                colour = 1 + scenes.COLOUR_NAMES.index(thing.colour)
                if start >= begin + len(thing.colour):
                    shape = 1 + scenes.SHAPES.index(thing.shape)
                    named[scenes.CLASSES.index(thing.phrase)] = 1
        if end > start and text[start:end].strip() == plan.background:
            named[len(scenes.CLASSES) + scenes.BACKGROUND_NAMES.index(plan.background)] = 1
        colours.append(colour)
        shapes.append(shape)
        rows.append(named.copy())
    return colours, shapes, rows
