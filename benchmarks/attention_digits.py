"""Digits of attention maps in half precision, against float64: relative error by norms.

    python benchmarks/attention_digits.py

At logits of standard deviation 1, 2 and 4: what rounding Q and K loses, and what the core's `sdpa`
(the weights beside V, heads summed in fp32) loses besides.
"""

import click
import torch

from guidekit.attention.call import AttentionCall, attend
from guidekit.attention.maps import token_maps
from measured import Results

DTYPES = (torch.bfloat16, torch.float16)
STDS = (1, 2, 4)


def error(found: torch.Tensor, true: torch.Tensor) -> float:
    """Norm of the difference over the norm of the truth."""
    return ((found.double() - true).norm() / true.norm()).item()


def row(std: float, dtype: torch.dtype, queries: int, device: str, seed: int) -> dict:
    """Errors of one type at one size of the logits; heads of 64 numbers, eight of them."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randn(2, 8, n, 64, generator=generator, dtype=torch.float64)  # noqa: E731
    tensors = draw(queries) * std**0.5, draw(77) * std**0.5, draw(77)
    query, key, value = (x.to(device) for x in tensors)
    weights = torch.zeros(1, 77, 4, dtype=torch.float64, device=device)
    weights[0, 3:5, 0] = 1 / 2
    weights[0, 9, 1] = weights[0, 20:26, 2] = weights[0, 40, 3] = 1
    true = token_maps(query, key, weights)
    halves = [x.to(dtype) for x in (query, key, value)]
    same = token_maps(*(x.double() for x in halves[:2]), weights)
    maps = attend(AttentionCall("", None, 0, *halves), weights.float(), "sdpa")[1]
    return {
        "dtype": str(dtype)[6:],
        "std": std,
        "Q and K rounded": error(same, true),
        "weights beside V": error(maps, same),
        "both": error(maps, true),
    }


@click.command()
@click.option("--quick", is_flag=True, help="128 queries in place of 1024.")
@click.option("--seed", default=0, help="Of the inputs.")
@click.option("--json", "json_file", type=click.Path(), help="Also write the rows here.")
def main(quick, seed, json_file):
    """Prints the errors, a JSON object a row."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results = Results(json_file)
    for dtype in DTYPES:
        for std in STDS:
            results.add(row(std, dtype, 128 if quick else 1024, device, seed))
    results.finish()


if __name__ == "__main__":
    main()
