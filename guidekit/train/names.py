"""Text encoder of a world of named things: which thing each token speaks of, and all named so far.

As `text`, but for names of any words and grounds of any wordings, whatever the source.
"""

import re

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTextModel

from guidekit.train.text import TextOptions, TextTask, train_tokenizer
from guidekit.train.worlds import Things
from guidekit.worlds.grounds import GROUNDS


class NamesReader(nn.Module):
    """CLIPTextModel with the linear read-outs that it is trained by; they are thrown away later."""

    def __init__(self, encoder: CLIPTextModel, things: int):
        super().__init__()
        self.encoder = encoder
        self.current = nn.Linear(encoder.config.hidden_size, things + 1)
        self.named = nn.Linear(encoder.config.hidden_size, things)

    def forward(self, ids: Tensor, current: Tensor, named: Tensor) -> dict[str, Tensor]:
        """Losses of ids `(B, T)` against the index of the current thing and all named so far.

        current: `(B, T)`, 0 for none; named: `(B, T, things)` of 0 and 1.
        """
        states = self.encoder(ids).last_hidden_state
        return {
            "current": F.cross_entropy(self.current(states).flatten(0, 1), current.flatten()),
            "named": 10 * F.binary_cross_entropy_with_logits(self.named(states), named),
        }


class NamesTask(TextTask):
    """Trains a text encoder to read the captions of cut-outs; grounds count as things too."""

    def __init__(self, options: TextOptions, world: Things):
        self.world = world
        self.names = (*world.classes, *world.grounds)
        tokenizer = train_tokenizer(options, [self._text(i) for i in range(6000)])
        super().__init__(options, tokenizer)
        self.net = NamesReader(self.net.encoder, len(self.names))

    def _text(self, number: int) -> str:
        """The wording of training scene `number`."""
        return self.world.varied_caption(self.world.scene(number), np.random.default_rng(number))

    def batch(self, numbers: range, generator: torch.Generator) -> dict[str, Tensor]:
        """Captions and, for every token, what it speaks of and what has been read by then."""
        texts = [self._text(i) for i in numbers]
        encoded = self.tokenizer(
            texts,
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_offsets_mapping=True,
        )
        spans = [
            self._spans(text, self.world.scene(i)) for text, i in zip(texts, numbers, strict=True)
        ]
        rows = zip(encoded["offset_mapping"], spans, strict=True)
        current, named = zip(*(self._targets(*row) for row in rows), strict=True)
        return {
            "ids": torch.tensor(encoded["input_ids"]),
            "current": torch.from_numpy(np.stack(current)),
            "named": torch.from_numpy(np.stack(named)),
        }

    def _spans(self, text: str, plan) -> list[tuple[int, int, int]]:
        """Where the text names what: begin, end, index in `names`."""
        spans = [(thing.phrase, self.names.index(thing.kind)) for thing in plan.things]
        spans += [(words, self.names.index(plan.ground)) for words in GROUNDS[plan.ground]]
        found = ((re.search(rf"\b{re.escape(words)}\b", text), index) for words, index in spans)
        return [(*match.span(), index) for match, index in found if match]

    def _targets(self, offsets: list[tuple[int, int]], spans: list[tuple[int, int, int]]):
        """Per token: 1 + index of the current name (0: none), and the multi-hot of all named."""
        current = np.zeros(len(offsets), np.int64)
        named = np.zeros((len(offsets), len(self.names)), np.float32)
        for i, (start, end) in enumerate(offsets):
            for begin, stop, index in spans:
                if begin <= start < end <= stop:
                    current[i] = 1 + index
                if begin < end and stop <= end:
                    named[i:, index] = 1
        return current, named

    def preview(self) -> Image.Image:
        """Of three captions, one row each: tokens read right are light, wrong ones dark."""
        batch = self.batch(range(10**6, 10**6 + 3), torch.Generator())
        device = self.net.encoder.device
        states = self.net.encoder(batch["ids"].to(device)).last_hidden_state
        right = self.net.current(states).argmax(-1).cpu() == batch["current"]
        shown = (right * 170 + 60).to(torch.uint8).numpy()
        return Image.fromarray(shown).resize((shown.shape[1] * 16, 48), Image.Resampling.NEAREST)
