"""Gyroscope attention, backward kernels (specification: gyroscope.md, Backward).

The weights are computed again from the logarithms that forward saved. With
`c[t, n] = 2 ** (spatial_lse[n] + gate[t, n] - lse[t, n])` and the spatial softmax P:

1. `temporal_query_kernel`: gradients of q and of the gate, and per query what the others need:
   `do' = c * do`, `delta = do . out` and `c * delta`.
2. `temporal_key_kernel`: gradient of k, and the temporal part of that of v.
3. `spatial_value_kernel`: `dv[t] += P^T do'[t]`.
4. `spatial_key_kernel`: `dk_median = dE^T q_median`, dE = P * sum_t (do'[t] . v[t] - c delta[t]).
5. `spatial_query_kernel`: `dq_median = dE k_median`.

A pass per operand: 2 N² D (3 T + 5 date tiles) FLOP per sample and head. One pass over the keys for
3 and 4 would save a product per date tile, but sums and factors together fill the registers.
Partial sums in one pass for all would need 2 N² D (2 T + 3 date tiles), but hold a dk_median and a
dv per block of queries: (T + 1) N² D / 128 numbers a head, which is what the factored form exists
to avoid. dE is a sum over dates, so date tiles give independent dq_median and dk_median: one slot a
tile, added up at the end in the same order every time.

On request 5 takes the place of 4: it adds dE^T q_median of its queries to memory atomically. That
is 2 N² D (2 T + 4 date tiles) FLOP, and a result that differs from run to run in its last bits.

With validity by position 3 to 5 are launched twice. The first launch weights all dates of a tile
relative to the shared `spatial_lse` of a query. The second, OWN, computes the rows that the first
had to leave out (finite in `reference`), a date at a time with its own reference and keys, and adds
to what the first wrote.
"""

import triton
import triton.language as tl

from timo.kernels.gyroscope_attention_blocks import (
    BITS,
    BY_POSITION,
    NONE,
    date_rows,
    date_series,
    date_usable,
    place,
)


@triton.jit
def temporal_query_kernel(
    p_do, p_q, p_k, p_v, p_gate, p_valid, p_out, p_lse, p_spatial,
    p_dq, p_dgate, p_scaled, p_delta, p_share, p_own,
    do_s, q_s, k_s, v_s, gate_s, valid_s, out_s, lse_s, spatial_s, dgate_s, delta_s,
    H, T, N, scale,
    VALIDITY: tl.constexpr, MOST: tl.constexpr, LARGEST: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr,
    BP: tl.constexpr, TQ: tl.constexpr, TK: tl.constexpr, ONCE: tl.constexpr,
):  # fmt: skip
    """One program: BP positions, TQ query dates, loop over key dates, TK at a time as forward.

    dq and scaled (do') have the strides of out; delta, share (c * delta) and own those of delta.
    With validity by position, rows whose c exceeds MOST (a date without the keys that hold the
    greatest energies), or whose do' its dtype would not hold (LARGEST), get c = 0 here and a finite
    reference in own: lse - gate. There the second launches of the spatial kernels start from.
    """
    block, tile, b, h = place(tl.cdiv(N, BP), tl.cdiv(T, TQ), H)
    n = block * BP + tl.arange(0, BP)
    t = tile * TQ + tl.arange(0, TQ)
    d = tl.arange(0, DP)
    m_n = n < N
    m_d = (d < D)[None, None, :]
    o_valid, inside = date_rows(n, t, valid_s[1], valid_s[2], T, N)  # [BP, TQ]
    p_valid += b * valid_s[0]
    live = inside
    if VALIDITY != NONE:
        live = tl.load(p_valid + o_valid, mask=inside, other=0) != 0
    o_q, _ = date_rows(n, t, q_s[1], q_s[2], T, N)
    o_do, _ = date_rows(n, t, do_s[1], do_s[2], T, N)
    o_out, _ = date_rows(n, t, out_s[1], out_s[2], T, N)
    o_out = (b * out_s[0] + h * out_s[3] + o_out)[:, :, None] + d[None, None, :]
    m = live[:, :, None] & m_d
    q = tl.load(
        p_q + (b * q_s[0] + h * q_s[3] + o_q)[:, :, None] + d[None, None, :], mask=m, other=0.0
    )
    do = tl.load(
        p_do + (b * do_s[0] + h * do_s[3] + o_do)[:, :, None] + d[None, None, :], mask=m, other=0.0
    )
    out = tl.load(p_out + o_out, mask=m, other=0.0)
    delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), 2)

    o_gate, _ = date_rows(n, t, gate_s[1], gate_s[2], T, N)
    o_lse, _ = date_rows(n, t, lse_s[1], lse_s[2], T, N)
    gate = tl.load(p_gate + b * gate_s[0] + h * gate_s[3] + o_gate, mask=live, other=0.0)
    gate = gate.to(tl.float32) * BITS
    lse = tl.load(p_lse + b * lse_s[0] + h * lse_s[3] + o_lse, mask=live, other=float("inf"))
    p_spatial += b * spatial_s[0] + h * spatial_s[2] + n.to(tl.int64) * spatial_s[1]
    spatial = tl.load(p_spatial, mask=m_n, other=0.0)
    share = tl.where(live, tl.exp2(tl.where(live, spatial[:, None] + gate - lse, 0.0)), 0.0)
    o_delta, _ = date_rows(n, t, delta_s[1], delta_s[2], T, N)
    o_delta += b * delta_s[0] + h * delta_s[3]
    if VALIDITY == BY_POSITION:
        far = (share > MOST) | (tl.max(tl.abs(do.to(tl.float32)), 2) * share > LARGEST)
        share = tl.where(far, 0.0, share)
        tl.store(p_own + o_delta, tl.where(far, lse - gate, float("inf")), mask=inside)
    tl.store(p_delta + o_delta, delta, mask=inside)
    tl.store(p_share + o_delta, share * delta, mask=inside)
    scaled = (do.to(tl.float32) * share[:, :, None]).to(p_scaled.dtype.element_ty)
    tl.store(p_scaled + o_out, scaled, mask=inside[:, :, None] & m_d)

    p_k += b * k_s[0] + h * k_s[3]
    p_v += b * v_s[0] + h * v_s[3]
    dq = tl.zeros([BP, TQ, DP], tl.float32)
    # Score gradients of one softmax sum to zero; the gate moves all spatial ones.
    dgate = tl.zeros([BP, TQ], tl.float32)
    if TK > 1:
        for s in range(0, TK if ONCE else T, TK):
            u = s + tl.arange(0, TK)
            usable = date_usable(p_valid, n, u, valid_s[1], valid_s[2], T, N, VALIDITY != NONE)
            k = date_series(p_k, n, u, k_s[1], k_s[2], usable, D, DP)  # [BP, TK, DP]
            v = date_series(p_v, n, u, v_s[1], v_s[2], usable, D, DP)
            e = tl.dot(q, tl.permute(k, (0, 2, 1))) * (scale * BITS)  # [BP, TQ, TK]
            others = t[:, None] != u[None, :]
            a = tl.exp2(e - lse[:, :, None])
            a = tl.where(others[None, :, :] & usable[:, None, :], a, 0.0)
            de = a * (tl.dot(do, tl.permute(v, (0, 2, 1))) - delta[:, :, None])
            dgate -= tl.sum(de, 2)
            dq = tl.dot(de.to(k.dtype), k, dq)
    else:
        q = q.to(tl.float32)
        do = do.to(tl.float32)
        p_k += n.to(tl.int64)[:, None] * k_s[2] + d[None, :]  # [BP, DP]
        p_v += n.to(tl.int64)[:, None] * v_s[2] + d[None, :]
        p_valid += n.to(tl.int64) * valid_s[2]
        for s in range(T):
            m_s = m_n
            if VALIDITY != NONE:
                m_s = m_n & (tl.load(p_valid, mask=m_n, other=0) != 0)
                p_valid += valid_s[1]
            k = tl.load(p_k, mask=m_s[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
            v = tl.load(p_v, mask=m_s[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
            p_k += k_s[1]
            p_v += v_s[1]
            e = tl.sum(q * k[:, None, :], 2) * (scale * BITS)
            a = tl.where((t != s)[None, :] & m_s[:, None], tl.exp2(e - lse), 0.0)
            de = a * (tl.sum(do * v[:, None, :], 2) - delta)
            dgate -= de
            dq += de[:, :, None] * k[:, None, :]
    dq = (dq * scale).to(p_dq.dtype.element_ty)
    tl.store(p_dq + o_out, dq, mask=inside[:, :, None] & m_d)
    o_dgate, _ = date_rows(n, t, dgate_s[1], dgate_s[2], T, N)
    p_dgate += b * dgate_s[0] + h * dgate_s[3] + o_dgate
    tl.store(p_dgate, dgate.to(p_dgate.dtype.element_ty), mask=inside)


@triton.jit
def temporal_key_kernel(
    p_do, p_q, p_k, p_v, p_valid, p_lse, p_delta, p_dk, p_dv,
    do_s, q_s, k_s, v_s, valid_s, lse_s, delta_s, dk_s,
    H, T, N, scale,
    HAS_VALID: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    BP: tl.constexpr, TQ: tl.constexpr, TK: tl.constexpr, ONCE: tl.constexpr,
):  # fmt: skip
    """One program: BP positions, TQ key dates, loop over query dates, TK at a time.

    dk and dv share strides.
    """
    block, tile, b, h = place(tl.cdiv(N, BP), tl.cdiv(T, TQ), H)
    n = block * BP + tl.arange(0, BP)
    t = tile * TQ + tl.arange(0, TQ)
    d = tl.arange(0, DP)
    m_n = n < N
    m_d = (d < D)[None, None, :]
    o_valid, inside = date_rows(n, t, valid_s[1], valid_s[2], T, N)  # [BP, TQ]
    p_valid += b * valid_s[0]
    usable = inside
    if HAS_VALID:
        usable = tl.load(p_valid + o_valid, mask=inside, other=0) != 0
    o_k, _ = date_rows(n, t, k_s[1], k_s[2], T, N)
    o_v, _ = date_rows(n, t, v_s[1], v_s[2], T, N)
    m = usable[:, :, None] & m_d
    k = tl.load(
        p_k + (b * k_s[0] + h * k_s[3] + o_k)[:, :, None] + d[None, None, :], mask=m, other=0.0
    )
    v = tl.load(
        p_v + (b * v_s[0] + h * v_s[3] + o_v)[:, :, None] + d[None, None, :], mask=m, other=0.0
    )
    p_q += b * q_s[0] + h * q_s[3]
    p_do += b * do_s[0] + h * do_s[3]
    p_lse += b * lse_s[0] + h * lse_s[3]
    p_delta += b * delta_s[0] + h * delta_s[3]
    dk = tl.zeros([BP, TQ, DP], tl.float32)
    dv = tl.zeros([BP, TQ, DP], tl.float32)
    if TK > 1:
        for s in range(0, TK if ONCE else T, TK):
            u = s + tl.arange(0, TK)
            live = date_usable(p_valid, n, u, valid_s[1], valid_s[2], T, N, HAS_VALID)
            q = date_series(p_q, n, u, q_s[1], q_s[2], live, D, DP)  # [BP, TK, DP]
            do = date_series(p_do, n, u, do_s[1], do_s[2], live, D, DP)
            o, _ = date_rows(n, u, lse_s[1], lse_s[2], T, N)
            lse = tl.load(p_lse + o, mask=live, other=float("inf"))  # [BP, TK]
            o, _ = date_rows(n, u, delta_s[1], delta_s[2], T, N)
            delta = tl.load(p_delta + o, mask=live, other=0.0)
            e = tl.dot(k, tl.permute(q, (0, 2, 1))) * (scale * BITS)  # [BP, TQ, TK]
            others = t[:, None] != u[None, :]
            a = tl.exp2(e - lse[:, None, :])
            a = tl.where(others[None, :, :] & usable[:, :, None], a, 0.0)
            de = a * (tl.dot(v, tl.permute(do, (0, 2, 1))) - delta[:, None, :])
            dv = tl.dot(a.to(do.dtype), do, dv)
            dk = tl.dot(de.to(q.dtype), q, dk)
    else:
        k = k.to(tl.float32)
        v = v.to(tl.float32)
        p_q += n.to(tl.int64)[:, None] * q_s[2] + d[None, :]  # [BP, DP]
        p_do += n.to(tl.int64)[:, None] * do_s[2] + d[None, :]
        p_valid += n.to(tl.int64) * valid_s[2]
        p_lse += n.to(tl.int64) * lse_s[2]
        p_delta += n.to(tl.int64) * delta_s[2]
        for s in range(T):
            m_s = m_n
            if HAS_VALID:
                m_s = m_n & (tl.load(p_valid, mask=m_n, other=0) != 0)
                p_valid += valid_s[1]
            q = tl.load(p_q, mask=m_s[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
            do = tl.load(p_do, mask=m_s[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
            lse = tl.load(p_lse, mask=m_s, other=float("inf"))
            delta = tl.load(p_delta, mask=m_s, other=0.0)
            p_q += q_s[1]
            p_do += do_s[1]
            p_lse += lse_s[1]
            p_delta += delta_s[1]
            e = tl.sum(k * q[:, None, :], 2) * (scale * BITS)
            a = tl.where((t != s)[None, :] & usable, tl.exp2(e - lse[:, None]), 0.0)
            de = a * (tl.sum(v * do[:, None, :], 2) - delta[:, None])
            dv += a[:, :, None] * do[:, None, :]
            dk += de[:, :, None] * q[:, None, :]
    dk = dk * scale
    o, _ = date_rows(n, t, dk_s[1], dk_s[2], T, N)
    o = (b * dk_s[0] + h * dk_s[3] + o)[:, :, None] + d[None, None, :]
    m = inside[:, :, None] & m_d
    tl.store(p_dk + o, dk.to(p_dk.dtype.element_ty), mask=m)
    tl.store(p_dv + o, dv.to(p_dv.dtype.element_ty), mask=m)
