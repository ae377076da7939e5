"""Fit a condition from twenty images
==================================

A condition from twenty labelled images: fit a head, guide with it, keep what it accepts.

Runs on the built-in digits in a minute or two; pass a model directory or hub id for others.
"""

# %% The model: nobody trained it on labels
import sys
import tempfile
from pathlib import Path

import torch
from torchvision.utils import save_image

import guidekit
from guidekit import Condition, Denoiser
from guidekit.heads import FitOptions, accepted_images, fit, read_examples
from guidekit.worlds import digits

model = sys.argv[1] if len(sys.argv) > 1 else "digits-ddpm"
steps = int(sys.argv[2]) if len(sys.argv) > 2 else 50
denoiser = Denoiser(guidekit.load(model))

# %% The shots: a folder per class, two images in each
folder = Path(tempfile.mkdtemp())
digits.write_shots(folder / "shots", per_class=2)
channels, height, width = denoiser.latent_shape(None, None)
size = (height * denoiser.factor, width * denoiser.factor)
examples = read_examples(
    folder / "shots", size, channels=channels if denoiser.vae is None else 3
)  # in [-1, 1], read when they are needed
print(f"{len(examples)} images of {', '.join(examples.classes)}")

# %% The head: logistic regression on the denoiser's features of the clean images
head, report = fit(denoiser, examples, FitOptions())
head.save(folder / "head")
print(f"cross-validated accuracy {report.scores['accuracy']:.2f} in {report.seconds:.1f} s")

# %% Guidance: the same seeds with and without
sevens = guidekit.make("fewshot", head=folder / "head", label="7")
guided = guidekit.sample(denoiser, Condition(), [sevens], seeds=range(4), steps=steps).finish()
unguided = guidekit.sample(denoiser, Condition(), seeds=range(4), steps=steps).finish()
save_image(torch.cat([guided.images, unguided.images]), "sevens.png", nrow=4)  # guided above
first, last = guided.account.first_and_last("fewshot")
print(f"energy of fewshot {first:.3f} -> {last:.3f}")
for name, images in (("guided", guided.images), ("unguided", unguided.images)):
    p = head.predict(denoiser, images * 2 - 1).softmax(1)[:, head.index("7")]
    print(f"{name}: the head sees a 7 with probability {', '.join(f'{v:.2f}' for v in p)}")

# %% Rejection: draw until four are accepted, or twelve are drawn
images, drawn, kept = accepted_images(denoiser, sevens, 4, batch=4, steps=steps)
print(f"{kept} of {drawn} accepted")
