"""Gyroscope attention, forward kernels (specification: gyroscope.md, Factored form).

1. `temporal_kernel`: softmax over the other dates of a position. Leaves its normalised output in
   `out` and its log-sum-exp in `lse`; bound by memory.
2. `spatial_kernel`: the score tile and its exponentials once for all dates of a tile, whose values
   ride along as columns of several accumulators. It merges what the first kernel left.

Work of 2 per sample and head: 2 N² D (T + 2 date tiles) FLOP and N² exponentials a date tile.
All logarithms are to base 2. The last stride of series and medians is 1, and so is that of
positions in `bias`; the others are free.
"""

import triton
import triton.language as tl

from timo.kernels.gyroscope_attention_blocks import (
    BITS,
    BY_POSITION,
    COLUMNS,
    NONE,
    date_columns,
    date_rows,
    date_series,
    date_usable,
    key_columns,
    load_dates,
    load_rows,
    only_keys,
    pieces,
    place,
    spread,
)


@triton.jit
def add_keys(
    sums, q, top, p_k, p_v, p_bias, p_columns, start, t0, T, N, scale, v_s,
    VALIDITY: tl.constexpr, BY_MASS: tl.constexpr, TAIL: tl.constexpr, EXACT: tl.constexpr,
    PRECISION: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, WIDTHS: tl.constexpr,
    TV: tl.constexpr,
):  # fmt: skip
    """Mass, mass by date and weighted values, with those of the keys from `start` on added."""
    BN: tl.constexpr = p_k.shape[0]
    mass, date_mass, acc = sums
    k = load_rows(p_k, N - start, TAIL, D, DP)
    e = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * BITS)
    p = tl.exp2(only_keys(e - top[:, None], p_bias, start, N, VALIDITY, TAIL))
    mass += tl.sum(p, 1)
    p = p.to(p_v.dtype.element_ty)
    if BY_MASS:
        usable = key_columns(p_columns, start, N, BN, TV, TAIL)  # [BN, TV]
        date_mass = tl.dot(p, usable, date_mass, input_precision=PRECISION)
    added = ()
    t = t0
    for i in tl.static_range(len(WIDTHS)):
        v = load_dates(p_v, N - start, t, v_s[1], v_s[2], T, BN, WIDTHS[i], TAIL, EXACT, D, DP)
        added = added + (tl.dot(p, v, acc[i], input_precision=PRECISION),)
        t += WIDTHS[i]
    return mass, date_mass, added


@triton.jit
def merge_dates(
    x, mass, date_mass, top, p_gate, p_valid, p_out, p_lse, p_far, start, t0, t, T, N,
    gate_s, valid_s, out_s, lse_s,
    VALIDITY: tl.constexpr, OWN: tl.constexpr, BY_MASS: tl.constexpr, LEAST: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """x [BM, dates * DP], spatial sums from date t on, with the temporal part in `out`."""
    R: tl.constexpr = x.shape[0]
    W: tl.constexpr = x.shape[1] // DP
    n = start + tl.arange(0, R)
    tw = t + tl.arange(0, W)
    o, m = date_rows(n, tw, lse_s[1], lse_s[2], T, N)
    own_mass = tl.broadcast_to(mass[:, None], [R, W])
    live = m
    if VALIDITY != NONE:
        o_valid, _ = date_rows(n, tw, valid_s[1], valid_s[2], T, N)
        live = tl.load(p_valid + o_valid, mask=m, other=0) != 0
    if OWN:
        computes = tl.load(p_far + o, mask=m, other=0) != 0
    elif BY_MASS:
        column = tl.broadcast_to((tw - t0).to(tl.int32)[None, :], [R, W])
        own_mass = tl.gather(date_mass, column, 1)
        computes = (own_mass >= LEAST) | (live == 0)
        tl.store(p_far + o, (computes == 0).to(tl.uint8), mask=m)
    o_gate, _ = date_rows(n, tw, gate_s[1], gate_s[2], T, N)
    gate = tl.load(p_gate + o_gate, mask=live, other=0.0).to(tl.float32) * BITS
    temporal = tl.load(p_lse + o, mask=m, other=float("-inf"))
    greatest = tl.maximum(top[:, None] + gate, temporal)
    share = tl.exp2(top[:, None] + gate - greatest)
    rest = tl.exp2(temporal - greatest)
    total = share * own_mass + rest
    total = tl.where(live & (total > 0.0), total, 1.0)
    lse = tl.where(live, greatest + tl.log2(total), float("inf"))
    share = tl.where(live, share / total, 0.0)
    rest = tl.where(live, rest / total, 0.0)
    if VALIDITY == BY_POSITION:  # what the other launch computes stays as it is, bit for bit
        lse = tl.where(computes, lse, temporal)
        share = tl.where(computes, share, 0.0)
        rest = tl.where(computes, rest, 1.0)
    p_o, m_o = date_columns(p_out, start, t, out_s[1], out_s[2], T, N, R, W, D, DP)
    dates = tl.load(p_o, mask=m_o, other=0.0).to(tl.float32)
    out = x * spread(share, R, W, DP) + dates * spread(rest, R, W, DP)
    if VALIDITY != NONE:  # a share of 0 does not cancel NaN
        out = tl.where(spread(live, R, W, DP), out, 0.0)
    tl.debug_barrier()  # `out` and `lse` are read and overwritten; threads may hold copies
    tl.store(p_o, out.to(p_out.dtype.element_ty), mask=m_o)
    tl.store(p_lse + o, lse, mask=m)


@triton.jit
def temporal_kernel(
    p_q, p_k, p_v, p_valid, p_out, p_lse,
    q_s, k_s, v_s, valid_s, out_s, lse_s,
    H, T, N, scale,
    HAS_VALID: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    BP: tl.constexpr, TQ: tl.constexpr, TK: tl.constexpr, ONCE: tl.constexpr,
):  # fmt: skip
    """One program: BP positions, TQ query dates, loop over all key dates, or ONCE through it.

    TK key dates at a time on tensor cores, or with TK = 1 one by one, by fp32 multiply-adds.
    """
    block, tile, b, h = place(tl.cdiv(N, BP), tl.cdiv(T, TQ), H)
    n = block * BP + tl.arange(0, BP)
    t = tile * TQ + tl.arange(0, TQ)
    d = tl.arange(0, DP)
    p_k += b * k_s[0] + h * k_s[3]
    p_v += b * v_s[0] + h * v_s[3]
    m_n = n < N
    p_valid += b * valid_s[0]
    o, m = date_rows(n, t, valid_s[1], valid_s[2], T, N)  # [BP, TQ]
    live = m
    if HAS_VALID:
        live = tl.load(p_valid + o, mask=m, other=0) != 0
    o, m = date_rows(n, t, q_s[1], q_s[2], T, N)
    p_q += b * q_s[0] + h * q_s[3] + o[:, :, None] + d[None, None, :]
    q = tl.load(p_q, mask=live[:, :, None] & (d < D)[None, None, :], other=0.0)

    top = tl.full([BP, TQ], -1e30, tl.float32)
    mass = tl.zeros([BP, TQ], tl.float32)
    acc = tl.zeros([BP, TQ, DP], tl.float32)
    if TK > 1:
        for s in range(0, TK if ONCE else T, TK):
            u = s + tl.arange(0, TK)
            usable = date_usable(p_valid, n, u, valid_s[1], valid_s[2], T, N, HAS_VALID)
            k = date_series(p_k, n, u, k_s[1], k_s[2], usable, D, DP)  # [BP, TK, DP]
            v = date_series(p_v, n, u, v_s[1], v_s[2], usable, D, DP)
            e = tl.dot(q, tl.permute(k, (0, 2, 1))) * (scale * BITS)  # [BP, TQ, TK]
            others = t[:, None] != u[None, :]
            e = tl.where(others[None, :, :] & usable[:, None, :], e, float("-inf"))
            new = tl.maximum(top, tl.max(e, 2))
            p = tl.exp2(e - new[:, :, None])
            if ONCE:
                mass = tl.sum(p, 2)
                acc = tl.dot(p.to(v.dtype), v)
            else:
                factor = tl.exp2(top - new)
                mass = mass * factor + tl.sum(p, 2)
                acc = tl.dot(p.to(v.dtype), v, acc * factor[:, :, None])
            top = new
    else:
        q = q.to(tl.float32)
        p_valid += n.to(tl.int64) * valid_s[2]
        p_k += n.to(tl.int64)[:, None] * k_s[2] + d[None, :]  # [BP, DP]
        p_v += n.to(tl.int64)[:, None] * v_s[2] + d[None, :]
        for s in range(T):
            m_s = m_n
            if HAS_VALID:
                m_s = m_n & (tl.load(p_valid, mask=m_n, other=0) != 0)
                p_valid += valid_s[1]
            k = tl.load(p_k, mask=m_s[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
            v = tl.load(p_v, mask=m_s[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
            p_k += k_s[1]
            p_v += v_s[1]
            e = tl.sum(q * k[:, None, :], 2) * (scale * BITS)
            e = tl.where((t != s)[None, :] & m_s[:, None], e, float("-inf"))
            new = tl.maximum(top, e)
            factor = tl.exp2(top - new)
            p = tl.exp2(e - new)
            mass = mass * factor + p
            acc = acc * factor[:, :, None] + p[:, :, None] * v[:, None, :]
            top = new

    acc = acc * (1.0 / tl.where(mass > 0.0, mass, 1.0))[:, :, None]
    o, m = date_rows(n, t, out_s[1], out_s[2], T, N)
    p_out += b * out_s[0] + h * out_s[3] + o[:, :, None] + d[None, None, :]
    tl.store(p_out, acc.to(p_out.dtype.element_ty), mask=m[:, :, None] & (d < D)[None, None, :])
    o, m = date_rows(n, t, lse_s[1], lse_s[2], T, N)
    lse = tl.where(mass > 0.0, top + tl.log2(tl.where(mass > 0.0, mass, 1.0)), float("-inf"))
    tl.store(p_lse + b * lse_s[0] + h * lse_s[3] + o, lse, mask=m)


@triton.jit
def spatial_kernel(
    p_qm, p_km, p_v, p_gate, p_valid, p_bias, p_columns, p_out, p_lse, p_spatial, p_far,
    qm_s, km_s, v_s, gate_s, valid_s, bias_s, out_s, lse_s, spatial_s,
    H, T, N, scale,
    VALIDITY: tl.constexpr, OWN: tl.constexpr, EXACT: tl.constexpr, LEAST: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    WIDTHS: tl.constexpr, TT: tl.constexpr, TV: tl.constexpr,
):  # fmt: skip
    """One program: BM queries, TT = sum(WIDTHS) dates, all keys, twice.

    The first loop finds the greatest energy of every query, BK keys at a time, so that the second
    need not rescale its sums, TT * D numbers a query: a product of D against one of (1 + TT) * D.

    With validity by position a date may be unable to use the keys that hold the greatest energy.
    Its mass relative to the shared maximum is then tiny: rows below LEAST are left alone and marked
    in `far` (the strides of lse). A second launch, OWN, with one date a program and that date's
    keys alone, computes the marked rows and nothing else.

    p_bias (B, T, N): 0 for keys that take part, else -inf; strided 0 over dates in the first
    launch. p_columns: validity by position as it multiplies weights, see `columns`.
    """
    block, tile, b, h = place(tl.cdiv(N, BM), tl.cdiv(T, TT), H)
    BY_MASS: tl.constexpr = VALIDITY == BY_POSITION and not OWN
    t0 = (tile * TT).to(tl.int64)
    n = block * BM + tl.arange(0, BM)
    d = tl.arange(0, DP)
    p_qm += b * qm_s[0] + h * qm_s[2] + n.to(tl.int64)[:, None] * qm_s[1] + d[None, :]
    p_km += b * km_s[0] + h * km_s[2]
    p_v += b * v_s[0] + h * v_s[3]
    p_gate += b * gate_s[0] + h * gate_s[3]
    p_valid += b * valid_s[0]
    p_bias += b * bias_s[0] + t0 * bias_s[1]
    p_columns += (b * tl.cdiv(T, TT) + tile) * N * TV
    p_out += b * out_s[0] + h * out_s[3]
    p_lse += b * lse_s[0] + h * lse_s[3]
    p_far += b * lse_s[0] + h * lse_s[3]
    q = tl.load(p_qm, mask=(n < N)[:, None] & (d < D)[None, :], other=0.0)
    end = N
    if OWN:
        o_far, m_far = date_rows(n, t0 + tl.arange(0, 1), lse_s[1], lse_s[2], T, N)
        far = tl.load(p_far + o_far, mask=m_far, other=0).to(tl.int32)
        end = tl.where(tl.max(tl.max(far, 1), 0) > 0, N, 0)

    acc = ()
    for i in tl.static_range(len(WIDTHS)):
        acc = acc + (tl.zeros([BM, WIDTHS[i] * DP], tl.float32),)
    o_k = (tl.arange(0, BK) * km_s[1])[:, None] + d[None, :]
    p_k = p_km
    greatest = tl.full([BM, BK], -1e30, tl.float32)
    whole = end // BK * BK
    for start in tl.range(0, whole, BK):
        k = load_rows(p_k + o_k, N - start, False, D, DP)
        e = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * BITS)
        e = only_keys(e, p_bias, start, N, VALIDITY, False)
        greatest = tl.maximum(greatest, e)
        p_k += BK * km_s[1]
    if whole < end:
        k = load_rows(p_k + o_k, N - whole, True, D, DP)
        e = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * BITS)
        e = only_keys(e, p_bias, whole, N, VALIDITY, True)
        greatest = tl.maximum(greatest, e)
    top = tl.max(greatest, 1)

    sums = tl.zeros([BM], tl.float32), tl.zeros([BM, TV], tl.float32), acc
    o_k = (tl.arange(0, BN) * km_s[1])[:, None] + d[None, :]
    whole = end // BN * BN
    for start in tl.range(0, whole, BN):
        sums = add_keys(
            sums, q, top, p_km + o_k, p_v, p_bias, p_columns, start, t0, T, N, scale, v_s,
            VALIDITY, BY_MASS, False, EXACT, PRECISION, D, DP, WIDTHS, TV,
        )  # fmt: skip
        p_km += BN * km_s[1]
        p_v += BN * v_s[2]
    if whole < end:
        sums = add_keys(
            sums, q, top, p_km + o_k, p_v, p_bias, p_columns, whole, t0, T, N, scale, v_s,
            VALIDITY, BY_MASS, True, EXACT, PRECISION, D, DP, WIDTHS, TV,
        )  # fmt: skip
    mass, date_mass, acc = sums

    if not OWN:
        if tile == 0:
            spatial = top + tl.log2(mass)
            if VALIDITY != NONE:
                seen = tl.load(p_bias + n, mask=n < N, other=0.0) == 0.0
                spatial = tl.where(seen, spatial, float("inf"))
            o = b * spatial_s[0] + h * spatial_s[2] + n.to(tl.int64) * spatial_s[1]
            tl.store(p_spatial + o, spatial, mask=n < N)

    t = t0
    p_out += (block * BM).to(tl.int64) * out_s[2]
    for i in tl.static_range(len(WIDTHS)):
        parts = pieces(acc[i], COLUMNS if DP < COLUMNS else DP)
        for j in tl.static_range(len(parts)):
            merge_dates(
                parts[j], mass, date_mass, top, p_gate, p_valid, p_out, p_lse, p_far, block * BM,
                t0, t, T, N, gate_s, valid_s, out_s, lse_s,
                VALIDITY, OWN, BY_MASS, LEAST, D, DP,
            )  # fmt: skip
            t += parts[j].shape[1] // DP
