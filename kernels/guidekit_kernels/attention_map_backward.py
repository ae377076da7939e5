"""Backward kernels of `attention_map`: dQ, then dK and dV where they are wanted.

With P = exp(logits - lse), gradients dO of the output and g of this head's P W,

    dP = dO V^T + g W^T,   delta = rowsum(P * dP),   dS = P * (dP - delta),
    dQ = scale dS K,       dK = scale dS^T Q,        dV = P^T dO.

Against the backward of plain attention only g W^T is new, of rank S, inside dP. The row sum is
never formed from P over all keys: rowsum(P * dO V^T) = rowsum(dO * O), and
rowsum(P * g W^T) = rowsum(g * P W), the maps that forward wrote. Where all keys fit in one block
(cross-attention with 77 tokens) the dQ kernel has the whole row of P at hand and computes
softmax and row sum itself: then neither O, nor lse, nor maps are saved or read.

dQ is one program per block of queries and head; dK and dV one per block of keys and key head, so
every sum has a fixed order and no atomics are needed. When keys are few and queries many, the
queries are cut in parts, summed outside.
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
def whole_rows(s):
    """P, maximum and sum beside it for logits in base 2 that hold all keys of their rows.

    Scaled by their sums, rows of P sum to one closer than exp(s - lse), and dP - delta may cancel.
    """
    top = tl.max(s, 1)
    top = tl.where(top == float("-inf"), 0.0, top)
    p = tl.exp2(s - top[:, None])
    total = tl.sum(p, 1)
    total = tl.where(total == 0.0, 1.0, total)
    return p * (1.0 / total)[:, None], top, total


@triton.jit
def saved_row_sums(
    OUT,
    out_offset,
    out_n,
    MAPS,
    do,
    g,
    rows,
    row_start,
    span,
    N,
    S,
    D: tl.constexpr,
    BD: tl.constexpr,
    BS: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """delta = rowsum(dO * O) + rowsum(g * P W), from what forward wrote; do or g may be None.

    MAPS (S, span) are of one head, and multiplied by map_scale already: g must not be.
    """
    delta = tl.zeros_like(rows).to(tl.float32)
    if do is not None:
        o = load_tile(OUT, out_offset, rows, out_n, N, D, BD, ALIGN)
        delta += tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    if g is not None:
        delta += tl.sum(g * load_columns(MAPS, rows - row_start, 1, span, span, S, BS), 1)
    return delta


@triton.jit
def query_kernel(
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
    DELTA,
    DOUT,
    DMAPS,
    DQ,
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
    do_b,
    do_h,
    do_n,
    dm_b,
    dm_h,
    dm_s,
    dm_n,
    dq_b,
    dq_h,
    dq_n,
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
    ONE: tl.constexpr,
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
    """Grid (blocks of BM queries * B * H,). DOUT or DMAPS None: that gradient is zero.

    ONE: BN holds all keys; OUT and MAPS are not read, and LSE and LOG, if not None, are written.
    Else they and MAPS (B, H, S, rows) are forward's. DELTA (B, H, N) is written if not None.
    """
    block, image, head = place(H, N, BM)
    k_head = head // SHARED
    first = block * BM
    rows = first + tl.arange(0, BM)
    row = (image * H + head) * N + rows
    span = row_stop - row_start
    reads = (first < row_stop) & (first + BM > row_start)
    q = load_tile(Q, image * q_b + head * q_h, rows, q_n, N, D, BD, ALIGN)
    segments = None
    if SEGMENTS is not None:
        segments = load_columns(SEGMENTS + image * seg_b, rows, seg_n, N, seg_s, C, BC)
    do = None
    g = None
    if DOUT is not None:
        do = load_tile(DOUT, image * do_b + head * do_h, rows, do_n, N, D, BD, ALIGN)
    if DMAPS is not None:
        at = DMAPS + image * dm_b + head * dm_h
        g = load_columns(at, rows - row_start, dm_n, span, dm_s, S, BS)
    lse = tl.zeros([BM], tl.float32)
    total = tl.zeros([BM], tl.float32)
    delta = tl.zeros([BM], tl.float32)
    if not ONE:
        lse = tl.load(LSE + row, mask=rows < N, other=0.0)
        if LOG is not None:
            total = tl.load(LOG + row, mask=rows < N, other=0.0)
        delta = saved_row_sums(
            OUT,
            image * o_b + head * o_h,
            o_n,
            MAPS + (image * H + head) * S * span,
            do,
            g,
            rows,
            row_start,
            span,
            N,
            S,
            D,
            BD,
            BS,
            ALIGN,
        )
    if DMAPS is not None:
        g = g * map_scale

    dq = tl.zeros([BM, BD], tl.float32)
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
        dp = tl.zeros([BM, BN], tl.float32)
        if DOUT is not None:
            v = load_tile(V, image * v_b + k_head * v_h, keys, v_t, T, D, BD, ALIGN)
            dp = tl.dot(do, tl.trans(v), dp, input_precision=DOT)
        if DMAPS is not None:
            if reads & (start < key_stop) & (start + BN > key_start):
                w = load_columns(W + image * w_b, keys, w_t, T, w_s, S, BS)
                dp = fine_dot(g, tl.trans(w), dp, SPLIT, DOT)
        if ONE:
            p, lse, total = whole_rows(s)
            delta = tl.sum(p * dp, 1)
        else:
            s = s - lse[:, None]
            if LOG is not None:
                s = s - total[:, None]
            p = tl.exp2(s)
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=DOT)
    store_tile(DQ, image * dq_b + head * dq_h, rows, dq_n, N, dq * scale, D, BD, ALIGN)
    if DELTA is not None:
        tl.store(DELTA + row, delta, mask=rows < N)
        if ONE:
            store_sums(LSE, LOG, row, rows < N, lse, total)


@triton.jit
def key_kernel(
    Q,
    K,
    V,
    W,
    MASK,
    SEGMENTS,
    WORDS,
    LSE,
    LOG,
    DELTA,
    DOUT,
    DMAPS,
    DK,
    DV,
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
    do_b,
    do_h,
    do_n,
    dm_b,
    dm_h,
    dm_s,
    dm_n,
    dk_p,
    dk_b,
    dk_h,
    dk_t,
    H,
    N,
    T,
    S,
    C,
    row_start,
    row_stop,
    key_start,
    key_stop,
    part_rows,
    SHARED: tl.constexpr,
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
    """Grid (blocks of BN keys * B * H / SHARED, parts of part_rows queries, a multiple of BM).

    DK and DV (parts, B, H / SHARED, T, D) have one set of strides. Everything is computed
    transposed, P^T = exp(K Q^T - lse), so that P^T and dS^T enter their products as they are.
    """
    block, image, k_head = place(H // SHARED, T, BN)
    part = tl.program_id(1)
    first = block * BN
    keys = first + tl.arange(0, BN)
    k = load_tile(K, image * k_b + k_head * k_h, keys, k_t, T, D, BD, ALIGN)
    v = load_tile(V, image * v_b + k_head * v_h, keys, v_t, T, D, BD, ALIGN)
    words = None
    if SEGMENTS is not None:
        words = load_columns(WORDS + image * word_b, keys, word_t, T, word_s, C, BC)
    if DMAPS is not None:
        w = load_columns(W + image * w_b, keys, w_t, T, w_s, S, BS)
    in_map = (first < key_stop) & (first + BN > key_start)

    dk = tl.zeros([BN, BD], tl.float32)
    dv = tl.zeros([BN, BD], tl.float32)
    for i in range(SHARED):
        head = k_head * SHARED + i
        for start in range(part * part_rows, min(N, (part + 1) * part_rows), BM):
            rows = start + tl.arange(0, BM)
            q = load_tile(Q, image * q_b + head * q_h, rows, q_n, N, D, BD, ALIGN)
            segments = None
            if SEGMENTS is not None:
                segments = load_columns(SEGMENTS + image * seg_b, rows, seg_n, N, seg_s, C, BC)
            s = scores(
                k,
                q,
                words,
                segments,
                rows[None, :],
                keys[:, None],
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
            row = (image * H + head) * N + rows
            # Rows past N have weight zero, not exp2(mask), which may not be a number in fp16.
            s = s - tl.load(LSE + row, mask=rows < N, other=float("inf"))[None, :]
            if LOG is not None:
                s = s - tl.load(LOG + row, mask=rows < N, other=0.0)[None, :]
            delta = tl.load(DELTA + row, mask=rows < N, other=0.0)
            p = tl.exp2(s)
            dp = tl.zeros([BN, BM], tl.float32)
            if DOUT is not None:
                do = load_tile(DOUT, image * do_b + head * do_h, rows, do_n, N, D, BD, ALIGN)
                dv = tl.dot(p.to(do.dtype), do, dv, input_precision=DOT)
                dp = tl.dot(v, tl.trans(do), dp, input_precision=DOT)
            if DMAPS is not None:
                if in_map & (start < row_stop) & (start + BM > row_start):
                    at = DMAPS + image * dm_b + head * dm_h
                    span = row_stop - row_start
                    g = load_columns(at, rows - row_start, dm_n, span, dm_s, S, BS) * map_scale
                    dp = fine_dot(w, tl.trans(g), dp, SPLIT, DOT)
            ds = p * (dp - delta[None, :])
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=DOT)
    offset = part.to(tl.int64) * dk_p + image * dk_b + k_head * dk_h
    store_tile(DK, offset, keys, dk_t, T, dk * scale, D, BD, ALIGN)
    store_tile(DV, offset, keys, dk_t, T, dv, D, BD, ALIGN)
