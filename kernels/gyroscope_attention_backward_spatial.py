"""Gyroscope attention, backward of the spatial part; gyroscope_attention_backward.py explains it.

With validity by position every kernel is launched twice. The first launch weights all dates of a
tile relative to the shared `spatial_lse` of a query. The second, OWN, computes the rows that the
first had to leave out (finite in `reference`), a date at a time with its own reference and keys,
and adds to what the first wrote.

p_delta holds (B, T, N, H) numbers with validity by position, else their sums (B, tiles, N, H). The
former are taken off where a key is valid at a date: a product with p_columns, see `columns`.

dk_median comes from one of the two first launches, DK: from that of the keys, which adds it up in
registers, or from that of the queries, which has dE already and adds to memory atomically.
"""

import triton
import triton.language as tl

from timo.kernels.gyroscope_attention_forward import (
    BITS,
    BY_POSITION,
    date_columns,
    key_columns,
    only_keys,
    place,
)


@triton.jit
def spatial_key_kernel(
    p_qm, p_km, p_v, p_do, p_valid, p_reference, p_delta, p_any, p_dv, p_dk,
    qm_s, km_s, v_s, do_s, valid_s, reference_s, delta_s, any_s, dv_s, dk_s,
    p_columns, H, T, N, scale,
    VALIDITY: tl.constexpr, OWN: tl.constexpr, DK: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    WIDTHS: tl.constexpr, TT: tl.constexpr, TV: tl.constexpr,
):  # fmt: skip
    """One program: BN keys, TT dates (OWN: all dates in turn), loop over all queries.

    Tiles are transposed (keys are rows), so that P^T is a left operand from registers. dk
    (tiles, B, N, H, D) is float32, undefined at keys that are valid on no date; without DK it is
    not touched. p_any (B, T, H): whether a date has rows for the second launch.
    """
    tiles = tl.cdiv(T, TT)
    block, tile, b, h = place(tl.cdiv(N, BN), 1 if OWN else tiles, H)
    first = (block * BN).to(tl.int64)
    keys = block * BN + tl.arange(0, BN)
    d = tl.arange(0, DP)
    p_qm += b * qm_s[0] + h * qm_s[2]
    p_km += b * km_s[0] + h * km_s[2] + first * km_s[1]
    p_v += b * v_s[0] + h * v_s[3] + first * v_s[2]
    p_do += b * do_s[0] + h * do_s[3]
    p_dv += b * dv_s[0] + h * dv_s[3] + first * dv_s[2]
    p_valid += b * valid_s[0] + keys.to(tl.int64) * valid_s[2]  # [BN]
    p_reference += b * reference_s[0] + h * reference_s[3]
    p_delta += b * delta_s[0] + h * delta_s[3]
    p_columns += (b * tiles + tile) * N * TV
    m = (keys < N)[:, None] & (d < D)[None, :]
    o = (tl.arange(0, BN) * km_s[1])[:, None] + d[None, :]
    k = tl.load(p_km + o, mask=m, other=0.0)
    dk = tl.zeros([BN, DP], tl.float32)
    t = tile.to(tl.int64)
    for _ in range(T if OWN else 1):
        end = N
        if OWN:
            end *= tl.load(p_any + b * any_s[0] + t * any_s[1] + h * any_s[2]).to(tl.int32)
        dk = key_tile(
            dk, k, t, end, block, p_qm, p_v, p_do, p_valid, p_columns, p_reference, p_delta,
            p_dv, qm_s, v_s, do_s, valid_s, reference_s, delta_s, dv_s, T, N, scale,
            VALIDITY, OWN, DK, PRECISION, D, DP, BM, BN, WIDTHS, TT, TV,
        )  # fmt: skip
        t += 1
    if DK:
        p_dk += tile.to(tl.int64) * dk_s[0] + b * dk_s[1] + h * dk_s[3] + first * dk_s[2]
        p_dk += (tl.arange(0, BN) * dk_s[2])[:, None] + d[None, :]
        dk = dk * scale
        if OWN:
            dk += tl.load(p_dk, mask=m, other=0.0)
            tl.debug_barrier()  # dk is read and overwritten; threads may hold copies
        tl.store(p_dk, dk, mask=m)


@triton.jit
def key_tile(
    dk, k, tile, end, block, p_qm, p_v, p_do, p_valid, p_columns, p_reference, p_delta, p_dv,
    qm_s, v_s, do_s, valid_s, reference_s, delta_s, dv_s, T, N, scale,
    VALIDITY: tl.constexpr, OWN: tl.constexpr, DK: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    WIDTHS: tl.constexpr, TT: tl.constexpr, TV: tl.constexpr,
):  # fmt: skip
    """Adds the dates of a tile to dv in memory, and returns dk, with DK with theirs added."""
    t0 = tile * TT
    d = tl.arange(0, DP)
    inside = block * BN + tl.arange(0, BN) < N
    dv = ()
    values = ()
    t = t0
    for i in tl.static_range(len(WIDTHS)):
        dv = dv + (tl.zeros([BN, WIDTHS[i] * DP], tl.float32),)
        p_t, m_t = date_columns(p_v, block * BN, t, v_s[1], v_s[2], T, N, BN, WIDTHS[i], D, DP)
        if DK:
            values = values + (tl.load(p_t, mask=m_t, other=0.0),)
        t += WIDTHS[i]
    BY_DELTA: tl.constexpr = DK and VALIDITY == BY_POSITION and not OWN
    p_delta += t0 * delta_s[1] if BY_DELTA else tile * delta_s[1]
    if BY_DELTA:
        signs = 0.0 - key_columns(p_columns, block * BN + tl.arange(0, BN), N, TV)  # [BN, TV]
        signs = signs.to(p_columns.dtype.element_ty)
    if OWN:
        p_reference += t0 * reference_s[1]
        usable = tl.load(p_valid + t0 * valid_s[1], mask=inside, other=0) != 0
    o_q = (tl.arange(0, BM) * qm_s[1])[:, None] + d[None, :]
    for start in tl.range(0, end, BM):
        r = start + tl.arange(0, BM)
        q = tl.load(p_qm + o_q, mask=(r < N)[:, None] & (d < D)[None, :], other=0.0)
        p_qm += BM * qm_s[1]
        o = r.to(tl.int64) * reference_s[2]
        reference = tl.load(p_reference + o, mask=r < N, other=float("inf"))
        e = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * BITS)
        p = tl.exp2(e - reference[None, :])  # [BN, BM]
        if OWN:
            p = tl.where(usable[:, None], p, 0.0)
        weights = p.to(k.dtype)
        dp = tl.zeros([BN, BM], tl.float32)
        sums = ()
        s = t0
        for i in tl.static_range(len(WIDTHS)):
            p_s, m_s = date_columns(p_do, start, s, do_s[1], do_s[2], T, N, BM, WIDTHS[i], D, DP)
            if OWN:  # elsewhere do may be anything
                m_s = m_s & (reference < float("inf"))[:, None]
            do = tl.load(p_s, mask=m_s, other=0.0)
            sums = sums + (tl.dot(weights, do, dv[i], input_precision=PRECISION),)
            if DK:
                dp = tl.dot(values[i], tl.trans(do), dp, input_precision=PRECISION)
            s += WIDTHS[i]
        dv = sums
        p_do += BM * do_s[2]
        if DK:
            if BY_DELTA:
                delta = date_numbers(p_delta, r, t0, delta_s[1], delta_s[2], T, N, TT, TV)
                dp = plus_product(dp, delta, signs, True, PRECISION)
            else:
                o = r.to(tl.int64) * delta_s[2]
                dp -= tl.load(p_delta + o, mask=r < N, other=0.0)[None, :]
            dk = tl.dot((p * dp).to(q.dtype), q, dk, input_precision=PRECISION)
    t = t0
    for i in tl.static_range(len(WIDTHS)):
        p_t, m_t = date_columns(p_dv, block * BN, t, dv_s[1], dv_s[2], T, N, BN, WIDTHS[i], D, DP)
        total = tl.load(p_t, mask=m_t, other=0.0).to(tl.float32)
        if VALIDITY == BY_POSITION and not OWN:
            ok = date_bytes(p_valid, inside, t, valid_s[1], T, WIDTHS[i], DP)
            total += tl.where(ok != 0, dv[i], 0.0)
        else:
            total += dv[i]
        tl.debug_barrier()  # dv is read and overwritten; threads may hold copies
        tl.store(p_t, total.to(p_dv.dtype.element_ty), mask=m_t)
        t += WIDTHS[i]
    return dk


@triton.jit
def date_numbers(
    p, n, t, stride_t, stride_n, T, N, TT: tl.constexpr, TV: tl.constexpr
):  # fmt: skip
    """Float32 numbers [TV, positions] of the TT dates from t on; p points at the first of them."""
    i = tl.arange(0, TV)
    o = i.to(tl.int64)[:, None] * stride_t + n.to(tl.int64)[None, :] * stride_n
    return tl.load(p + o, mask=((i < TT) & (t + i < T))[:, None] & (n < N)[None, :], other=0.0)


@triton.jit
def plus_product(acc, numbers, ones, ONES_FIRST: tl.constexpr, PRECISION: tl.constexpr):
    """acc and the product of float32 numbers and zeros and ones, or minus ones.

    bfloat16 `ones` meet the numbers in two parts, 16 bits together.
    """
    PARTS: tl.constexpr = 1 if ones.dtype == tl.float32 else 2
    for _ in tl.static_range(PARTS):
        rounded = numbers.to(ones.dtype)
        if ONES_FIRST:
            acc = tl.dot(ones, rounded, acc, input_precision=PRECISION)
        else:
            acc = tl.dot(rounded, ones, acc, input_precision=PRECISION)
        numbers = numbers - rounded.to(tl.float32)
    return acc


@triton.jit
def date_bytes(p_valid, inside, t, stride_t, T, W: tl.constexpr, DP: tl.constexpr):
    """Validity of dates t ... t + W - 1 of positions p_valid [R], spread: [R, W * DP]."""
    date = t + tl.arange(0, W * DP) // DP
    return tl.load(
        p_valid[:, None] + date[None, :] * stride_t,
        mask=inside[:, None] & (date < T)[None, :],
        other=0,
    )


@triton.jit
def spatial_query_kernel(
    p_qm, p_km, p_v, p_do, p_bias, p_reference, p_delta, p_dq, p_dk,
    qm_s, km_s, v_s, do_s, bias_s, reference_s, delta_s, dq_s, dk_s,
    p_columns, H, T, N, scale,
    VALIDITY: tl.constexpr, OWN: tl.constexpr, DK: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
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
    p_reference += b * reference_s[0] + h * reference_s[3] + rows.to(tl.int64) * reference_s[2]
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
            VALIDITY, OWN, DK, PRECISION, D, DP, BM, BN, WIDTHS, TT, TV,
        )  # fmt: skip
        t += 1
    p_dq += tile.to(tl.int64) * dq_s[0] + b * dq_s[1] + h * dq_s[3] + first * dq_s[2]
    p_dq += (tl.arange(0, BM) * dq_s[2])[:, None] + d[None, :]
    dq = dq * scale
    if OWN:
        dq += tl.load(p_dq, mask=m, other=0.0)
        tl.debug_barrier()  # dq is read and overwritten; threads may hold copies
    tl.store(p_dq, dq, mask=m)


@triton.jit
def rows_by_rows(a, b, acc, PRECISION: tl.constexpr):
    """acc [M, N] and the products of the rows of a [M, K] and b [N, K].

    Exact ones of K > 64 come in two halves, even and odd columns: CUDA cores take all of K into
    registers, and two operands of 128 leave none.
    """
    M: tl.constexpr = a.shape[0]
    N: tl.constexpr = b.shape[0]
    K: tl.constexpr = a.shape[1]
    if PRECISION == "ieee" and K > 64:
        a0, a1 = tl.split(tl.reshape(a, [M, K // 2, 2]))
        b0, b1 = tl.split(tl.reshape(b, [N, K // 2, 2]))
        acc = tl.dot(a0, tl.trans(b0), acc, input_precision=PRECISION)
        acc = tl.dot(a1, tl.trans(b1), acc, input_precision=PRECISION)
    else:
        acc = tl.dot(a, tl.trans(b), acc, input_precision=PRECISION)
    return acc


@triton.jit
def query_tile(
    dq, q, tile, block, p_km, p_v, p_do, p_columns, p_bias, p_reference, p_delta, p_dk,
    km_s, v_s, do_s, bias_s, reference_s, delta_s, dk_s, T, N, scale,
    VALIDITY: tl.constexpr, OWN: tl.constexpr, DK: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
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
        own = own + (tl.load(p_t, mask=m_t, other=0.0),)
        t += WIDTHS[i]
    n = block * BM + tl.arange(0, BM)
    BY_DELTA: tl.constexpr = VALIDITY == BY_POSITION and not OWN
    if BY_DELTA:
        deltas = date_numbers(p_delta + t0 * delta_s[1], n, t0, *delta_s[1:3], T, N, TT, TV)
        deltas = tl.trans(0.0 - deltas)  # [BM, TV]
    else:
        delta = tl.load(
            p_delta + n.to(tl.int64) * delta_s[2] + tile * delta_s[1], mask=inside, other=0.0
        )
    o_k = (tl.arange(0, BN) * km_s[1])[:, None] + d[None, :]
    o_dk = (tl.arange(0, BN) * dk_s[2])[:, None] + d[None, :]
    for start in tl.range(0, end, BN):
        c = start + tl.arange(0, BN)
        k = tl.load(p_km + o_k, mask=(c < N)[:, None] & (d < D)[None, :], other=0.0)
        p_km += BN * km_s[1]
        e = rows_by_rows(q, k, tl.zeros([BM, BN], tl.float32), PRECISION) * (scale * BITS)
        # A key beyond the end has energy 0, and its weight could be infinite.
        p = tl.exp2(only_keys(e - reference[:, None], p_bias, c, bias_s[2], N, VALIDITY))
        dp = tl.zeros([BM, BN], tl.float32)
        s = t0
        for i in tl.static_range(len(WIDTHS)):
            p_s, m_s = date_columns(p_v, start, s, v_s[1], v_s[2], T, N, BN, WIDTHS[i], D, DP)
            v = tl.load(p_s, mask=m_s, other=0.0)
            dp = rows_by_rows(own[i], v, dp, PRECISION)
            s += WIDTHS[i]
        if BY_DELTA:
            usable = tl.trans(key_columns(p_columns, c, N, TV))  # [TV, BN]
            dp = plus_product(dp, deltas, usable, False, PRECISION)
        else:
            dp -= delta[:, None]
        p_v += BN * v_s[2]
        de = (p * dp).to(k.dtype)
        dq = tl.dot(de, k, dq, input_precision=PRECISION)
        if DK:
            dk = tl.dot(tl.trans(de), q, input_precision=PRECISION) * scale  # [BN, DP]
            m = (c < N)[:, None] & (d < D)[None, :]
            tl.atomic_add(p_dk + o_dk, dk, mask=m, sem="relaxed")
            p_dk += BN * dk_s[2]
    return dq
