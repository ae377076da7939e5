"""Images of the tiny pipelines by their own calls, bare or attached."""

import functools

import torch

import pipelines


def draw(pipe, seeds=(5, 6), **options):
    """Images of the pipeline's own call."""
    given = {
        "prompt": ["a red circle"] * len(seeds),
        "negative_prompt": ["blue"] * len(seeds),
        "num_inference_steps": 3,
        "guidance_scale": 5.0,
        "height": 32,
        "width": 48,
        "output_type": "pt",
        "generator": [torch.Generator().manual_seed(seed) for seed in seeds],
    }
    return pipe(**given | options).images


@functools.cache
def transformer(family):
    """The one pipeline of a transformer family."""
    return getattr(pipelines, f"{family}_pipeline")()


def draw_family(family, pipe=None, **options):
    """Images of a transformer family, with what its call needs besides."""
    more = {"pixart": {"use_resolution_binning": False, "clean_caption": False}}.get(family, {})
    if family == "flux":
        more["negative_prompt"] = None
    return draw(pipe or transformer(family), max_sequence_length=24, **more | options)
