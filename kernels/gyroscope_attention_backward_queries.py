"""Gyroscope attention, backward of the spatial part: gradient of the median queries.

gyroscope_attention_backward.py explains it, and the second launches, OWN. p_reference and p_delta
are those of gyroscope_attention_backward_keys.py.
"""

import triton
import triton.language as tl

from timo.kernels.gyroscope_attention_blocks import (
    BITS,
    BY_POSITION,
    date_columns,
    date_numbers,
    in_registers,
    key_columns,
    load_dates,
    load_numbers,
    load_rows,
    only_keys,
    place,
    plus_product,
    rows_by_rows,
    to_slot,
)


@triton.jit
def spatial_query_kernel(
    p_qm, p_km, p_v, p_do, p_bias, p_reference, p_delta, p_dq, p_dk,
    qm_s, km_s, v_s, do_s, bias_s, reference_s, delta_s, dq_s, dk_s,
    p_columns, H, T, N, scale,
    VALIDITY: tl.constexpr, OWN: tl.constexpr, DK: tl.constexpr, EXACT: tl.constexpr,
    HELD: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
    WIDTHS: tl.constexpr, TT: tl.constexpr, TV: tl.constexpr,
):  # fmt: skip
    """One program: BM queries, TT dates (OWN: all dates in turn), loop over all keys.

    dq (tiles, B, N, H, D) is float32. With DK all programs of a head add to dk (1, B, N, H, D).
    p_bias (B, T, N): 0 for keys that take part, else -inf; strided 0 over dates in the first
    launch.
    """
    tiles = tl.cdiv(T, TT)
    block, tile, b, h = place(tl.cdiv(N, BM), 1 if OWN else tiles, H)
    first = (block * BM).to(tl.int64)
    rows = block * BM + tl.arange(0, BM)
    d = tl.arange(0, DP)
    p_qm += b * qm_s[0] + h * qm_s[2] + first * qm_s[1]
    p_km += b * km_s[0] + h * km_s[2]
    p_v += b * v_s[0] + h * v_s[3]
    p_do += b * do_s[0] + h * do_s[3] + first * do_s[2]
    p_bias += b * bias_s[0]
    p_columns += (b * tiles + tile) * N * TV
    p_reference += b * reference_s[0] + h * reference_s[3] + rows
    p_delta += b * delta_s[0] + h * delta_s[3]
    m = (rows < N)[:, None] & (d < D)[None, :]
    o = (tl.arange(0, BM) * qm_s[1])[:, None] + d[None, :]
    q = tl.load(p_qm + o, mask=m, other=0.0)
    p_dk += b * dk_s[1] + h * dk_s[3]
    dq = tl.zeros([BM, DP], tl.float32)
    t = tile.to(tl.int64)
    for _ in range(T if OWN else 1):
        dq = query_tile(
            dq, q, t, block, p_km, p_v, p_do, p_columns, p_bias, p_reference, p_delta,
            p_dk, km_s, v_s, do_s, bias_s, reference_s, delta_s, dk_s, T, N, scale,
            VALIDITY, OWN, DK, EXACT, HELD, PRECISION, D, DP, BM, BN, WIDTHS, TT, TV,
        )  # fmt: skip
        t += 1
    p_dq += tile.to(tl.int64) * dq_s[0] + b * dq_s[1] + h * dq_s[3] + first * dq_s[2]
    to_slot(dq, p_dq, m, dq_s[2], scale, OWN)


@triton.jit
def query_tile(
    dq, q, tile, block, p_km, p_v, p_do, p_columns, p_bias, p_reference, p_delta, p_dk,
    km_s, v_s, do_s, bias_s, reference_s, delta_s, dk_s, T, N, scale,
    VALIDITY: tl.constexpr, OWN: tl.constexpr, DK: tl.constexpr, EXACT: tl.constexpr,
    HELD: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
    WIDTHS: tl.constexpr, TT: tl.constexpr, TV: tl.constexpr,
):  # fmt: skip
    """dq with the dates of a tile added; with DK theirs of dk go to memory."""
    t0 = tile * TT
    d = tl.arange(0, DP)
    inside = block * BM + tl.arange(0, BM) < N
    reference = tl.load(p_reference + t0 * reference_s[1], mask=inside, other=float("inf"))
    end = N
    if OWN:
        end = tl.where(tl.min(reference, 0) < float("inf"), N, 0)
    p_bias += t0 * bias_s[1]
    own = ()
    t = t0
    for i in tl.static_range(len(WIDTHS)):
        p_t, m_t = date_columns(p_do, block * BM, t, do_s[1], do_s[2], T, N, BM, WIDTHS[i], D, DP)
        if OWN:  # elsewhere do may be anything
            m_t = m_t & (reference < float("inf"))[:, None]
        x = tl.load(p_t, mask=m_t, other=0.0)
        own = own + (in_registers(x) if HELD else x,)
        t += WIDTHS[i]
    BY_DELTA: tl.constexpr = VALIDITY == BY_POSITION and not OWN
    p_delta += block * BM + (t0 if BY_DELTA else tile) * delta_s[1]
    if BY_DELTA:
        delta = date_numbers(p_delta, N - block * BM, t0, delta_s[1], T, BM, TT, TV, True)
        delta = tl.trans(0.0 - delta)  # [BM, TV]
    else:
        delta = load_numbers(p_delta, N - block * BM, BM, 0.0, True)
    o_k = (tl.arange(0, BN) * km_s[1])[:, None] + d[None, :]
    o_dk = (tl.arange(0, BN) * dk_s[2])[:, None] + d[None, :]
    whole = end // BN * BN
    for start in tl.range(0, whole, BN):
        dq = add_keys(
            dq, q, own, reference, delta, p_km + o_k, p_v, p_columns, p_bias, p_dk + o_dk,
            start, t0, T, N, scale, v_s,
            VALIDITY, BY_DELTA, DK, False, EXACT, PRECISION, D, DP, WIDTHS, TV,
        )  # fmt: skip
        p_km += BN * km_s[1]
        p_v += BN * v_s[2]
        p_dk += BN * dk_s[2]
    if whole < end:
        dq = add_keys(
            dq, q, own, reference, delta, p_km + o_k, p_v, p_columns, p_bias, p_dk + o_dk,
            whole, t0, T, N, scale, v_s,
            VALIDITY, BY_DELTA, DK, True, EXACT, PRECISION, D, DP, WIDTHS, TV,
        )  # fmt: skip
    return dq


@triton.jit
def add_keys(
    dq, q, own, reference, delta, p_k, p_v, p_columns, p_bias, p_dk, start, t0, T, N, scale,
    v_s,
    VALIDITY: tl.constexpr, BY_DELTA: tl.constexpr, DK: tl.constexpr, TAIL: tl.constexpr,
    EXACT: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    WIDTHS: tl.constexpr, TV: tl.constexpr,
):  # fmt: skip
    """dq with the keys from `start` on added; with DK their dk goes to memory."""
    BN: tl.constexpr = p_k.shape[0]
    k = load_rows(p_k, N - start, TAIL, D, DP)
    e = rows_by_rows(q, k, tl.zeros([q.shape[0], BN], tl.float32), PRECISION) * (scale * BITS)
    # A key beyond the end has energy 0, and its weight could be infinite.
    p = tl.exp2(only_keys(e - reference[:, None], p_bias, start, N, VALIDITY, TAIL))
    dp = tl.zeros([q.shape[0], BN], tl.float32)
    s = t0
    for i in tl.static_range(len(WIDTHS)):
        v = load_dates(p_v, N - start, s, v_s[1], v_s[2], T, BN, WIDTHS[i], TAIL, EXACT, D, DP)
        dp = rows_by_rows(own[i], v, dp, PRECISION)
        s += WIDTHS[i]
    if BY_DELTA:
        usable = tl.trans(key_columns(p_columns, start, N, BN, TV, TAIL))  # [TV, BN]
        dp = plus_product(dp, delta, usable, False, PRECISION)
    else:
        dp -= delta[:, None]
    de = (p * dp).to(k.dtype)
    dq = tl.dot(de, k, dq, input_precision=PRECISION)
    if DK:
        dk = tl.dot(tl.trans(de), q, input_precision=PRECISION) * scale  # [BN, DP]
        if TAIL or D < DP:
            m = (start + tl.arange(0, BN) < N)[:, None] & (tl.arange(0, DP) < D)[None, :]
            tl.atomic_add(p_dk, dk, mask=m, sem="relaxed")
        else:
            tl.atomic_add(p_dk, dk, sem="relaxed")
    return dq
