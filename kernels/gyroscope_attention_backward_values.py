"""Gyroscope attention, backward of the spatial part: gradient of the values.

gyroscope_attention_backward.py explains it, and the second launches, OWN. Positions are adjacent in
p_reference.
"""

import triton
import triton.language as tl

from timo.kernels.gyroscope_attention_blocks import (
    BY_POSITION,
    COLUMNS,
    date_columns,
    load_gradients,
    load_numbers,
    load_rows,
    pieces,
    place,
    weights_of_keys,
)


@triton.jit
def spatial_value_kernel(
    p_qm, p_km, p_do, p_valid, p_reference, p_any, p_dv,
    qm_s, km_s, do_s, valid_s, reference_s, any_s, dv_s,
    H, T, N, scale,
    VALIDITY: tl.constexpr, OWN: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    WIDTHS: tl.constexpr, TT: tl.constexpr,
):  # fmt: skip
    """One program: BN keys, TT dates (OWN: all dates in turn), loop over all queries.

    Adds P^T do' to dv. Tiles are transposed (keys are rows), so that P^T is a left operand from
    registers. p_any (B, T, H): whether a date has rows for the second launch.
    """
    block, tile, b, h = place(tl.cdiv(N, BN), 1 if OWN else tl.cdiv(T, TT), H)
    first = (block * BN).to(tl.int64)
    keys = block * BN + tl.arange(0, BN)
    d = tl.arange(0, DP)
    p_qm += b * qm_s[0] + h * qm_s[2]
    p_km += b * km_s[0] + h * km_s[2] + first * km_s[1]
    p_do += b * do_s[0] + h * do_s[3]
    p_dv += b * dv_s[0] + h * dv_s[3] + first * dv_s[2]
    p_valid += b * valid_s[0] + keys.to(tl.int64) * valid_s[2]  # [BN]
    p_reference += b * reference_s[0] + h * reference_s[3]
    o = (tl.arange(0, BN) * km_s[1])[:, None] + d[None, :]
    k = tl.load(p_km + o, mask=(keys < N)[:, None] & (d < D)[None, :], other=0.0)
    t = tile.to(tl.int64)
    for _ in range(T if OWN else 1):
        end = N
        if OWN:
            end *= tl.load(p_any + b * any_s[0] + t * any_s[1] + h * any_s[2]).to(tl.int32)
        value_tile(
            k, t * TT, end, block, p_qm, p_do, p_valid, p_reference, p_dv,
            qm_s, do_s, valid_s, reference_s, dv_s, T, N, scale,
            VALIDITY, OWN, EXACT, PRECISION, D, DP, BM, BN, WIDTHS,
        )  # fmt: skip
        t += 1


@triton.jit
def value_tile(
    k, t, end, block, p_qm, p_do, p_valid, p_reference, p_dv,
    qm_s, do_s, valid_s, reference_s, dv_s, T, N, scale,
    VALIDITY: tl.constexpr, OWN: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, WIDTHS: tl.constexpr,
):  # fmt: skip
    """dv of the dates of a tile, from date t on."""
    inside = block * BN + tl.arange(0, BN) < N
    usable = inside
    if OWN:
        p_reference += t * reference_s[1]
        usable = tl.load(p_valid + t * valid_s[1], mask=inside, other=0) != 0
    dv = ()
    for i in tl.static_range(len(WIDTHS)):
        dv = dv + (tl.zeros([BN, WIDTHS[i] * DP], tl.float32),)
    o_q = (tl.arange(0, BM) * qm_s[1])[:, None] + tl.arange(0, DP)[None, :]
    whole = end // BM * BM
    for start in tl.range(0, whole, BM):
        dv = add_queries(
            dv, k, usable, p_qm + o_q, p_do, p_reference, start, t, do_s, T, N, scale,
            OWN, False, EXACT, PRECISION, D, DP, WIDTHS,
        )  # fmt: skip
        p_qm += BM * qm_s[1]
        p_do += BM * do_s[2]
    if whole < end:
        dv = add_queries(
            dv, k, usable, p_qm + o_q, p_do, p_reference, whole, t, do_s, T, N, scale,
            OWN, True, EXACT, PRECISION, D, DP, WIDTHS,
        )  # fmt: skip
    for i in tl.static_range(len(WIDTHS)):
        parts = pieces(dv[i], COLUMNS if DP < COLUMNS else DP)
        for j in tl.static_range(len(parts)):
            add_to_dates(
                parts[j], p_dv, p_valid, inside, block * BN, t, dv_s, valid_s, T, N,
                VALIDITY == BY_POSITION and not OWN, D, DP,
            )  # fmt: skip
            t += parts[j].shape[1] // DP


@triton.jit
def add_queries(
    dv, k, usable, p_q, p_do, p_reference, start, t, do_s, T, N, scale,
    OWN: tl.constexpr, TAIL: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, WIDTHS: tl.constexpr,
):  # fmt: skip
    """dv with the queries from `start` on added."""
    BM: tl.constexpr = p_q.shape[0]
    q = load_rows(p_q, N - start, TAIL, D, DP)
    reference = load_numbers(p_reference + start, N - start, BM, float("inf"), TAIL)
    p = weights_of_keys(k, q, reference, usable, scale, OWN, PRECISION)  # [BN, BM]
    p = p.to(k.dtype)
    added = ()
    for i in tl.static_range(len(WIDTHS)):
        do = load_gradients(
            p_do, reference, start, t, do_s, T, N, WIDTHS[i], OWN, TAIL, EXACT, D, DP
        )
        added = added + (tl.dot(p, do, dv[i], input_precision=PRECISION),)
        t += WIDTHS[i]
    return added


@triton.jit
def add_to_dates(
    x, p_dv, p_valid, inside, start, t, dv_s, valid_s, T, N,
    BY_VALID: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """x [BN, dates * DP] is added to dv from date t on."""
    W: tl.constexpr = x.shape[1] // DP
    p_t, m_t = date_columns(p_dv, start, t, dv_s[1], dv_s[2], T, N, x.shape[0], W, D, DP)
    total = tl.load(p_t, mask=m_t, other=0.0).to(tl.float32)
    if BY_VALID:
        ok = date_bytes(p_valid, inside, t, valid_s[1], T, W, DP)
        x = tl.where(ok != 0, x, 0.0)
    tl.debug_barrier()  # dv is read and overwritten; threads may hold copies
    tl.store(p_t, (total + x).to(p_dv.dtype.element_ty), mask=m_t)


@triton.jit
def date_bytes(p_valid, inside, t, stride_t, T, W: tl.constexpr, DP: tl.constexpr):
    """Validity of dates t ... t + W - 1 of positions p_valid [R], spread: [R, W * DP]."""
    date = t + tl.arange(0, W * DP) // DP
    return tl.load(
        p_valid[:, None] + date[None, :] * stride_t,
        mask=inside[:, None] & (date < T)[None, :],
        other=0,
    )
