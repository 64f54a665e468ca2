"""Gyroscope attention, backward of the spatial part: gradient of the median keys.

gyroscope_attention_backward.py explains it, and the second launches, OWN.

Positions are adjacent in p_reference and p_delta. The latter holds (B, T, N, H) numbers with
validity by position, else their sums (B, tiles, N, H). The former are taken off where a key is
valid at a date: a product with p_columns, see `columns`.
"""

import triton
import triton.language as tl

from timo.kernels.gyroscope_attention_blocks import (
    BY_POSITION,
    date_columns,
    date_numbers,
    in_registers,
    key_columns,
    load_gradients,
    load_numbers,
    load_rows,
    place,
    plus_product,
    rows_by_rows,
    to_slot,
    weights_of_keys,
)


@triton.jit
def spatial_key_kernel(
    p_qm, p_km, p_v, p_do, p_valid, p_reference, p_delta, p_any, p_dk,
    qm_s, km_s, v_s, do_s, valid_s, reference_s, delta_s, any_s, dk_s,
    p_columns, H, T, N, scale,
    VALIDITY: tl.constexpr, OWN: tl.constexpr, EXACT: tl.constexpr, HELD: tl.constexpr,
    PRECISION: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    WIDTHS: tl.constexpr, TT: tl.constexpr, TV: tl.constexpr,
):  # fmt: skip
    """One program: BN keys, TT dates (OWN: all dates in turn), loop over all queries.

    Tiles are transposed (keys are rows), so that dE^T is a left operand from registers. dk
    (tiles, B, N, H, D) is float32, undefined at keys that are valid on no date. p_any (B, T, H):
    whether a date has rows for the second launch.
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
            qm_s, v_s, do_s, valid_s, reference_s, delta_s, T, N, scale,
            VALIDITY, OWN, EXACT, HELD, PRECISION, D, DP, BM, BN, WIDTHS, TT, TV,
        )  # fmt: skip
        t += 1
    p_dk += tile.to(tl.int64) * dk_s[0] + b * dk_s[1] + h * dk_s[3] + first * dk_s[2]
    to_slot(dk, p_dk, m, dk_s[2], scale, OWN)


@triton.jit
def key_tile(
    dk, k, tile, end, block, p_qm, p_v, p_do, p_valid, p_columns, p_reference, p_delta,
    qm_s, v_s, do_s, valid_s, reference_s, delta_s, T, N, scale,
    VALIDITY: tl.constexpr, OWN: tl.constexpr, EXACT: tl.constexpr, HELD: tl.constexpr,
    PRECISION: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    WIDTHS: tl.constexpr, TT: tl.constexpr, TV: tl.constexpr,
):  # fmt: skip
    """dk with the dates of a tile added.

    `usable` below: where OWN validity of the date, [BN]; with validity by position else minus that
    of the dates of the tile, [BN, TV].
    """
    t0 = tile * TT
    inside = block * BN + tl.arange(0, BN) < N
    values = ()
    t = t0
    for i in tl.static_range(len(WIDTHS)):
        p_t, m_t = date_columns(p_v, block * BN, t, v_s[1], v_s[2], T, N, BN, WIDTHS[i], D, DP)
        x = tl.load(p_t, mask=m_t, other=0.0)
        values = values + (in_registers(x) if HELD else x,)
        t += WIDTHS[i]
    BY_DELTA: tl.constexpr = VALIDITY == BY_POSITION and not OWN
    p_delta += (t0 if BY_DELTA else tile) * delta_s[1]
    p_reference += t0 * reference_s[1]
    usable = inside
    if OWN:
        usable = tl.load(p_valid + t0 * valid_s[1], mask=inside, other=0) != 0
    elif BY_DELTA:
        usable = 0.0 - key_columns(p_columns, block * BN, N, BN, TV, True)  # [BN, TV]
        usable = usable.to(p_columns.dtype.element_ty)
    o_q = (tl.arange(0, BM) * qm_s[1])[:, None] + tl.arange(0, DP)[None, :]
    whole = end // BM * BM
    for start in tl.range(0, whole, BM):
        dk = add_queries(
            dk, k, values, usable, p_qm + o_q, p_do, p_reference, p_delta, start, t0, T, N, scale,
            do_s, delta_s, OWN, BY_DELTA, False, EXACT, PRECISION, D, DP, WIDTHS, TT, TV,
        )  # fmt: skip
        p_qm += BM * qm_s[1]
        p_do += BM * do_s[2]
    if whole < end:
        dk = add_queries(
            dk, k, values, usable, p_qm + o_q, p_do, p_reference, p_delta, whole, t0, T, N, scale,
            do_s, delta_s, OWN, BY_DELTA, True, EXACT, PRECISION, D, DP, WIDTHS, TT, TV,
        )  # fmt: skip
    return dk


@triton.jit
def add_queries(
    dk, k, values, usable, p_q, p_do, p_reference, p_delta, start, t0, T, N, scale, do_s, delta_s,
    OWN: tl.constexpr, BY_DELTA: tl.constexpr, TAIL: tl.constexpr, EXACT: tl.constexpr,
    PRECISION: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    WIDTHS: tl.constexpr, TT: tl.constexpr, TV: tl.constexpr,
):  # fmt: skip
    """dk with the queries from `start` on added."""
    BM: tl.constexpr = p_q.shape[0]
    q = load_rows(p_q, N - start, TAIL, D, DP)
    reference = load_numbers(p_reference + start, N - start, BM, float("inf"), TAIL)
    p = weights_of_keys(k, q, reference, usable, scale, OWN, PRECISION)  # [BN, BM]
    dp = tl.zeros([k.shape[0], BM], tl.float32)
    t = t0
    for i in tl.static_range(len(WIDTHS)):
        do = load_gradients(
            p_do, reference, start, t, do_s, T, N, WIDTHS[i], OWN, TAIL, EXACT, D, DP
        )
        dp = rows_by_rows(values[i], do, dp, PRECISION)
        t += WIDTHS[i]
    if BY_DELTA:
        delta = date_numbers(p_delta + start, N - start, t0, delta_s[1], T, BM, TT, TV, TAIL)
        dp = plus_product(dp, delta, usable, True, PRECISION)
    else:
        dp -= load_numbers(p_delta + start, N - start, BM, 0.0, TAIL)[None, :]
    return tl.dot((p * dp).to(q.dtype), q, dk, input_precision=PRECISION)
