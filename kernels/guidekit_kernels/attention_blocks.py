"""Pieces that the forward and backward kernels of `attention_map` share.

A tile is loaded by raw pointers, strides and a mask with `other`: block pointers were removed in
Triton 3.9, and out-of-range loads that pass in the interpreter are faults on a GPU.
"""

import triton
import triton.language as tl


@triton.jit
def place(H, N, BLOCK: tl.constexpr):
    """Block of rows, image and head of a program in a grid (blocks of N rows * B * H,).

    Blocks come first, so that programs which run together read the same keys. One grid dimension:
    the others end at 65,535. Image and head in 64 bits: offsets may pass 2**31 numbers.
    """
    blocks = tl.cdiv(N, BLOCK)
    pair = tl.program_id(0) // blocks
    return tl.program_id(0) % blocks, (pair // H).to(tl.int64), (pair % H).to(tl.int64)


@triton.jit
def load_tile(base, offset, index, stride, count, D: tl.constexpr, BD: tl.constexpr, ALIGN):
    """Rows `index` of a (count, D) matrix as (len(index), BD), zeros outside.

    ALIGN divides every offset. Without that hint a head of 40 or 72 numbers, no multiple of 16,
    would be loaded two bytes at a time.
    """
    columns = tl.arange(0, BD)
    start = base + offset // ALIGN * ALIGN
    steps = tl.multiple_of(index * stride, [ALIGN])
    inside = (index < count)[:, None]
    if D != BD:
        inside = inside & (columns < D)[None, :]
    return tl.load(start + steps[:, None] + columns[None, :], mask=inside, other=0.0)


@triton.jit
def store_tile(base, offset, index, stride, count, tile, D: tl.constexpr, BD: tl.constexpr, ALIGN):
    """The reverse of `load_tile`, in the dtype of `base`."""
    columns = tl.arange(0, BD)
    start = base + offset // ALIGN * ALIGN
    steps = tl.multiple_of(index * stride, [ALIGN])
    inside = (index < count)[:, None]
    if D != BD:
        inside = inside & (columns < D)[None, :]
    tile = tile.to(base.dtype.element_ty)
    tl.store(start + steps[:, None] + columns[None, :], tile, mask=inside)


@triton.jit
def load_columns(base, index, stride, count, step, S, BS: tl.constexpr):
    """Few columns of the rows `index`: (len(index), BS), zeros outside (count, S).

    A negative index is outside too: queries before the range of the maps.
    """
    columns = tl.arange(0, BS)
    inside = ((index >= 0) & (index < count))[:, None] & (columns < S)[None, :]
    at = base + index.to(tl.int64)[:, None] * stride + columns.to(tl.int64)[None, :] * step
    return tl.load(at, mask=inside, other=0.0)


@triton.jit
def store_sums(LSE, LOG, at, inside, top, total):
    """Log-sum-exp of rows in base 2, whole in LSE, or its maximum there and the rest in LOG."""
    if LOG is None:
        tl.store(LSE + at, top + tl.log2(total), mask=inside)
    else:
        tl.store(LSE + at, top, mask=inside)
        tl.store(LOG + at, tl.log2(total), mask=inside)


@triton.jit
def fine_dot(a, b, acc, SPLIT: tl.constexpr, DOT: tl.constexpr):
    """acc + a b for fp32 a and b, with 16 bits of precision from half-precision products.

    a = a0 + a1 and b = b0 + b1 with halves in SPLIT; a1 b1 is below the last bit. Chosen over
    tf32x3, whose parts of p (BM, BN) take twice the registers and made the kernels spill. SPLIT
    None: one product of precision DOT.
    """
    if SPLIT is None:  # no early return: the compiler reads on behind it
        acc = tl.dot(a, b, acc, input_precision=DOT)
    else:
        a0 = a.to(SPLIT)
        b0 = b.to(SPLIT)
        acc = tl.dot((a - a0.to(tl.float32)).to(SPLIT), b0, acc)
        acc = tl.dot(a0, (b - b0.to(tl.float32)).to(SPLIT), acc)
        acc = tl.dot(a0, b0, acc)
    return acc


@triton.jit
def scores(
    a,
    b,
    bias_a,
    bias_b,
    rows,
    keys,
    MASK,
    mask_offset,
    mask_n,
    mask_t,
    N,
    T,
    scale,
    MASKED: tl.constexpr,
    DOT: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Logits in base 2, log2(e) (a b^T scale + bias_a bias_b^T + mask), -inf for keys past T.

    a holds queries and b keys with rows (BM, 1) and keys (1, BN), or the reverse with rows
    (1, BM) and keys (BN, 1): then the result is transposed. A mask without a row dimension
    (mask_n None) is read as one vector. bias_a None: no bias.
    """
    log2e: tl.constexpr = 1.4426950408889634
    s = tl.dot(a, tl.trans(b), input_precision=DOT) * (scale * log2e)
    if bias_a is not None:
        s = fine_dot(bias_a * log2e, tl.trans(bias_b), s, SPLIT, DOT)
    if MASKED != "none":
        steps = keys * mask_t
        inside = keys < T
        if mask_n is not None:
            steps = steps + rows * mask_n
            inside = inside & (rows < N)
        given = tl.load(MASK + mask_offset + steps, mask=inside, other=0)
        if MASKED == "boolean":
            s = tl.where(given != 0, s, float("-inf"))
        else:
            # finfo.min times log2(e) would be -inf, and a row of nothing else an empty one.
            given = given.to(tl.float32)
            s += tl.where(given == float("-inf"), given, tl.maximum(given, -2e38)) * log2e
    return tl.where(keys < T, s, float("-inf"))
