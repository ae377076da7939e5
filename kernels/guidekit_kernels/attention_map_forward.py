"""Forward kernel of `attention_map`: output, log-sum-exp and partial maps in one pass over keys.

One program holds BM queries of one image and G heads, one after the other. For each head it
walks the keys in blocks of BN with the online softmax (Milakov and Gimelshein 2018,
arXiv 1805.02867; Dao et al. 2022, arXiv 2205.14135): with m the running maximum and

    p = exp(logits - m),  l <- l a + rowsum(p),  acc <- acc a + p V,  part <- part a + p W,

where a = exp(m_old - m) rescales what earlier blocks left. At the end O = acc / l,
lse = m + log(l), and part / l is this head's P W. The heads of a program are summed in
registers and written once; the few groups that remain are summed outside by one reduction of
fixed order. Float atomics would give another sum on every run.
"""

import triton
import triton.language as tl

from guidekit_kernels.attention_blocks import (
    fine_dot,
    load_columns,
    load_tile,
    place,
    scores,
    store_sums,
    store_tile,
)


@triton.jit
def forward_kernel(
    Q,
    K,
    V,
    W,
    MASK,
    SEGMENTS,
    WORDS,
    OUT,
    MAPS,
    LSE,
    LOG,
    scale,
    map_scale,
    q_b,
    q_h,
    q_n,
    k_b,
    k_h,
    k_t,
    v_b,
    v_h,
    v_t,
    w_b,
    w_t,
    w_s,
    mask_b,
    mask_h,
    mask_n,
    mask_t,
    seg_b,
    seg_s,
    seg_n,
    word_b,
    word_t,
    word_s,
    o_b,
    o_h,
    o_n,
    H,
    N,
    T,
    S,
    C,
    row_start,
    row_stop,
    key_start,
    key_stop,
    SHARED: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BS: tl.constexpr,
    BC: tl.constexpr,
    MASKED: tl.constexpr,
    ALIGN: tl.constexpr,
    DOT: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Grid (blocks of BM queries * B * H / G,).

    MAPS (B, H / G, S, rows) receives map_scale times the group's sum; LSE (B, H, N), in base 2,
    or None. With LOG (B, H, N) LSE is the maximum and LOG the rest: beside a mask of finfo.min the
    logarithm of a sum is lost. SHARED query heads read one key head. SEGMENTS (B, C, N) and
    WORDS (B, T, C), or None, are the factors of an additive bias. Maps are computed for queries
    row_start to row_stop, from keys key_start to key_stop.
    """
    groups = H // G
    block, image, group = place(groups, N, BM)
    first = block * BM
    rows = first + tl.arange(0, BM)
    columns = tl.arange(0, BS)
    reads = (first < row_stop) & (first + BM > row_start)
    maps = tl.zeros([BM, BS], tl.float32)
    segments = None
    if SEGMENTS is not None:
        segments = load_columns(SEGMENTS + image * seg_b, rows, seg_n, N, seg_s, C, BC)

    for i in range(G):
        head = group * G + i
        k_head = head // SHARED
        q = load_tile(Q, image * q_b + head * q_h, rows, q_n, N, D, BD, ALIGN)
        top = tl.full([BM], float("-inf"), tl.float32)
        total = tl.zeros([BM], tl.float32)
        acc = tl.zeros([BM, BD], tl.float32)
        part = tl.zeros([BM, BS], tl.float32)
        for start in range(0, T, BN):
            keys = start + tl.arange(0, BN)
            k = load_tile(K, image * k_b + k_head * k_h, keys, k_t, T, D, BD, ALIGN)
            words = None
            if SEGMENTS is not None:
                words = load_columns(WORDS + image * word_b, keys, word_t, T, word_s, C, BC)
            s = scores(
                q,
                k,
                segments,
                words,
                rows[:, None],
                keys[None, :],
                MASK,
                image * mask_b + head * mask_h,
                mask_n,
                mask_t,
                N,
                T,
                scale,
                MASKED,
                DOT,
                SPLIT,
            )
            new = tl.maximum(top, tl.max(s, 1))
            # A row without any allowed key so far has maximum -inf; exp2(-inf - 0) is 0, while
            # exp2(-inf + inf) would be nan.
            safe = tl.where(new == float("-inf"), 0.0, new)
            shrink = tl.exp2(top - safe)
            p = tl.exp2(s - safe[:, None])
            total = total * shrink + tl.sum(p, 1)
            v = load_tile(V, image * v_b + k_head * v_h, keys, v_t, T, D, BD, ALIGN)
            acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=DOT)
            part = part * shrink[:, None]
            if reads & (start < key_stop) & (start + BN > key_start):
                w = load_columns(W + image * w_b, keys, w_t, T, w_s, S, BS)
                part = fine_dot(p, w, part, SPLIT, DOT)
            top = new

        # Zero, not nan, for a row without any allowed key, as in SDPA.
        empty = total == 0.0
        inverse = 1.0 / tl.where(empty, 1.0, total)
        acc = acc * inverse[:, None]
        store_tile(OUT, image * o_b + head * o_h, rows, o_n, N, acc, D, BD, ALIGN)
        if LSE is not None:
            store_sums(
                LSE,
                LOG,
                (image * H + head) * N + rows,
                rows < N,
                tl.where(empty, 0.0, top),
                tl.where(empty, 1.0, total),
            )
        maps += part * inverse[:, None]

    if reads:
        inside = (rows >= row_start) & (rows < row_stop) & (rows < N)
        at = (image * groups + group) * S * (row_stop - row_start)
        at = at + columns[None, :].to(tl.int64) * (row_stop - row_start)
        at = at + (rows - row_start)[:, None]
        tl.store(MAPS + at, maps * map_scale, mask=inside[:, None] & (columns < S)[None, :])
