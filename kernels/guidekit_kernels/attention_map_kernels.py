"""The two Triton kernels of `attention_map`: output and maps, and the gradient of the queries.

One program holds BM queries of one head and all T <= BT keys, so that softmax needs no running
maximum, nothing is saved for backward, and no product waits for another program's. With P = softmax
over the keys,

    forward    O = P V,  M = P W
    backward   dP = dO V^T + g W^T,  dS = P * (dP - rowsum(P * dP)),  dQ = scale dS K

which is the backward of flash attention (Dao et al. 2022, arXiv 2205.14135) with g W^T, of rank S,
beside dO V^T.

A tensor comes as a tuple: pointer, then the strides of image, head and row, its numbers adjacent.
Loads are raw pointers with a mask and `other`: what lies outside is a fault on a GPU, while the
interpreter reads it.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def place(H, N, BM: tl.constexpr):
    """Rows, image and head of a program in a grid (blocks of BM rows * B * H,).

    Blocks come first, so that programs which run together read the same keys. One grid dimension:
    the others end at 65,535. Image and head in 64 bits: offsets may pass 2**31 numbers.
    """
    blocks = tl.cdiv(N, BM)
    pair = tl.program_id(0) // blocks
    rows = tl.program_id(0) % blocks * BM + tl.arange(0, BM)
    return rows, (pair // H).to(tl.int64), (pair % H).to(tl.int64)


@triton.jit
def load_rows(x, image, head, index, count, D: tl.constexpr, BD: tl.constexpr, ALIGN: tl.constexpr):
    """Rows `index` of one head as (len(index), BD), zeros outside (count, D).

    ALIGN divides every offset. Without that hint a head of 40 or 72 numbers, no multiple of 16,
    would be loaded two bytes at a time.
    """
    columns = tl.arange(0, BD)
    start = x[0] + (image * x[1] + head * x[2]) // ALIGN * ALIGN
    steps = tl.multiple_of(index * x[3], [ALIGN])
    inside = (index < count)[:, None] & (columns < D)[None, :]
    return tl.load(start + steps[:, None] + columns[None, :], mask=inside, other=0.0)


@triton.jit
def store_rows(x, image, head, index, count, tile, D: tl.constexpr, ALIGN: tl.constexpr):
    """The reverse of `load_rows`, in the dtype of the tensor."""
    columns = tl.arange(0, tile.shape[1])
    start = x[0] + (image * x[1] + head * x[2]) // ALIGN * ALIGN
    steps = tl.multiple_of(index * x[3], [ALIGN])
    inside = (index < count)[:, None] & (columns < D)[None, :]
    tile = tile.to(x[0].dtype.element_ty)
    tl.store(start + steps[:, None] + columns[None, :], tile, mask=inside)


@triton.jit
def load_weights(w, image, BT: tl.constexpr, BS: tl.constexpr):
    """W (BT, BS) of an image; it is stored padded."""
    keys, columns = tl.arange(0, BT), tl.arange(0, BS)
    return tl.load(w[0] + image * w[1] + keys[:, None] * BS + columns[None, :])


@triton.jit
def load_bias(bias, image, head, rows, N, BT: tl.constexpr, ROWS: tl.constexpr):
    """Bias (BM, BT) in fp32, or (1, BT) that is the same for all queries; stored padded by -inf."""
    keys = tl.arange(0, BT)
    at = bias[0] + image * bias[1] + head * bias[2] + keys[None, :]
    if ROWS:
        given = tl.load(at + rows[:, None] * bias[3], mask=(rows < N)[:, None], other=0.0)
    else:
        given = tl.load(at)
    return given.to(tl.float32)


@triton.jit
def softmax(q, k, bias, scale):
    """exp(logits - maximum) and the reciprocal of its row sums, of a row without any key zero.

    exp of -inf + inf would be no number: such a row's maximum counts as 0.
    """
    s = tl.dot(q, tl.trans(k)) * scale + bias
    top = tl.max(s, 1)
    p = tl.exp2((s - tl.where(top == float("-inf"), 0.0, top)[:, None]) * LOG2E)
    total = tl.sum(p, 1)
    return p, 1.0 / tl.where(total == 0.0, 1.0, total)


@triton.jit
def forward_kernel(
    q,
    k,
    v,
    w,
    bias,
    out,
    maps,
    scale,
    H,
    N,
    T,
    S,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BT: tl.constexpr,
    BS: tl.constexpr,
    ROWS: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Writes out (B, H, N, D) and maps (B, H, S, N), each head's own, in fp32.

    Maps are finished before V is loaded: the other way round the registers spill.
    """
    rows, image, head = place(H, N, BM)
    keys, columns = tl.arange(0, BT), tl.arange(0, BS)
    queries = load_rows(q, image, head, rows, N, D, BD, ALIGN)
    k_tile = load_rows(k, image, head, keys, T, D, BD, ALIGN)
    p, inverse = softmax(queries, k_tile, load_bias(bias, image, head, rows, N, BT, ROWS), scale)
    half = p.to(queries.dtype)
    m = tl.dot(half, load_weights(w, image, BT, BS).to(half.dtype)) * inverse[:, None]
    at = maps + (image * H + head) * S * N + columns[None, :].to(tl.int64) * N + rows[:, None]
    tl.store(at, m, mask=(rows < N)[:, None] & (columns < S)[None, :])
    v_tile = load_rows(v, image, head, keys, T, D, BD, ALIGN)
    o = tl.dot(half, v_tile) * inverse[:, None]
    store_rows(out, image, head, rows, N, o, D, ALIGN)


@triton.jit
def query_kernel(
    q,
    k,
    v,
    w,
    bias,
    dout,
    dmaps,
    dq,
    scale,
    H,
    N,
    T,
    S,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BT: tl.constexpr,
    BS: tl.constexpr,
    ROWS: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Writes dq (B, H, N, D); dmaps is pointer and strides of image, head, map and query."""
    rows, image, head = place(H, N, BM)
    keys, columns = tl.arange(0, BT), tl.arange(0, BS)
    queries = load_rows(q, image, head, rows, N, D, BD, ALIGN)
    do = load_rows(dout, image, head, rows, N, D, BD, ALIGN)
    k_tile = load_rows(k, image, head, keys, T, D, BD, ALIGN)
    v_tile = load_rows(v, image, head, keys, T, D, BD, ALIGN)
    w_tile = load_weights(w, image, BT, BS)
    at = dmaps[0] + image * dmaps[1] + head * dmaps[2]
    at = at + columns[None, :].to(tl.int64) * dmaps[3] + rows[:, None].to(tl.int64) * dmaps[4]
    g = tl.load(at, mask=(rows < N)[:, None] & (columns < S)[None, :], other=0.0)
    p, inverse = softmax(queries, k_tile, load_bias(bias, image, head, rows, N, BT, ROWS), scale)
    p = p * inverse[:, None]
    dp = tl.dot(do, tl.trans(v_tile))
    dp = tl.dot(g.to(w_tile.dtype), tl.trans(w_tile), dp)
    ds = p * (dp - tl.sum(p * dp, 1)[:, None])
    result = tl.dot(ds.to(k_tile.dtype), k_tile) * scale
    store_rows(dq, image, head, rows, N, result, D, ALIGN)
