"""Objects where the masks say
===========================

Objects where the masks say: boxes, a drawn mask, and the same seeds without guidance.

Runs on the built-in model in well under a minute; pass a model directory or hub id for others.
"""

# %% The model: a built-in name, a diffusers directory or a hub id
import sys

import torch
from torchvision.utils import save_image

import guidekit
from guidekit import Condition, Segment, box_mask

model = sys.argv[1] if len(sys.argv) > 1 else "objects"
steps = int(sys.argv[2]) if len(sys.argv) > 2 else 30
pipeline = guidekit.load(model)

# %% The condition: phrases of the prompt with masks of any size
rows, columns = torch.meshgrid(torch.linspace(0, 1, 128), torch.linspace(0, 1, 128), indexing="ij")
disc = ((columns - 0.3) ** 2 + (rows - 0.35) ** 2 < 0.2**2).float()
condition = Condition(
    "a sunflower and a gift on a white background",
    segments=(
        Segment("sunflower", disc),
        Segment("gift", box_mask((0.5, 0.5, 0.9, 0.9))),
    ),
)

# %% Guidance: ZestGuide and Paint-with-Words together, then nothing
guidances = ["pww", "zest"]
options = {"seeds": range(4), "steps": steps, "cfg": 4.0}
guided = guidekit.sample(pipeline, condition, guidances, **options).finish()
unguided = guidekit.sample(pipeline, condition, **options).finish()

# %% The account: the energy falls over the guided steps
first, last = guided.account.first_and_last("zest")
print(f"energy of zest {first:.3f} -> {last:.3f}")
both = torch.cat([guided.images, unguided.images])  # (8, 3, H, W) in [0, 1]
save_image(both, "masks.png", nrow=4)  # guided above, unguided below
print(f"{len(both)} images of {both.shape[-1]}x{both.shape[-2]} pixels")
