"""Gyroscope attention: blocks of numbers as the kernels read and take them apart.

Loops over positions take whole blocks, which need no masks, and then a tail.
"""

import triton
import triton.language as tl

BITS = tl.constexpr(1.4426950408889634)  # e ** x is 2 ** (BITS * x)
COLUMNS = tl.constexpr(64)  # that an epilogue takes at a time; more spill
NONE, BY_DATE, BY_POSITION = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # validity


@triton.jit
def place(blocks, tiles, H):
    """Block of positions, tile of dates, sample and head of this program.

    Blocks vary fastest: programs that run at one time share keys and values in L2.
    """
    i = tl.program_id(0)
    block = i % blocks
    i = i // blocks
    tile = i % tiles
    i = i // tiles
    return block, tile, (i // H).to(tl.int64), (i % H).to(tl.int64)


@triton.jit
def date_pointers(
    p, t, stride_t, stride_n, T, R: tl.constexpr, W: tl.constexpr, D: tl.constexpr, DP: tl.constexpr
):  # fmt: skip
    """Pointers [R, W * DP] and what exists [1, W * DP]: dates t ... t + W - 1 of R positions.

    p points at the first position. Offsets are 64-bit but within a block of positions, where the
    launch keeps them below 2^31: 64-bit ones for every row cost registers that the accumulators
    need.
    """
    r = tl.arange(0, R)
    c = tl.arange(0, W * DP)
    p += t * stride_t
    p = p + (r * stride_n)[:, None] + ((c // DP).to(tl.int64) * stride_t + c % DP)[None, :]
    return p, ((t + c // DP < T) & (c % DP < D))[None, :]


@triton.jit
def date_columns(
    p, start, t, stride_t, stride_n, T, N,
    R: tl.constexpr, W: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """`date_pointers` and what exists of positions from `start`, at p, on: [R, W * DP]."""
    p, m = date_pointers(p, t, stride_t, stride_n, T, R, W, D, DP)
    return p, m & (start + tl.arange(0, R) < N)[:, None]


@triton.jit
def date_rows(n, t, stride_t, stride_n, T, N):
    """Offsets and mask of [rows, dates] numbers."""
    o = n.to(tl.int64)[:, None] * stride_n + t.to(tl.int64)[None, :] * stride_t
    return o, (n < N)[:, None] & (t < T)[None, :]


@triton.jit
def date_usable(p, n, t, stride_t, stride_n, T, N, HAS_VALID: tl.constexpr):
    """[rows, dates]: what exists and is valid."""
    o, m = date_rows(n, t, stride_t, stride_n, T, N)
    if HAS_VALID:
        m = tl.load(p + o, mask=m, other=0) != 0
    return m


@triton.jit
def date_series(p, n, t, stride_t, stride_n, m, D: tl.constexpr, DP: tl.constexpr):
    """[rows, dates, DP], 0 where not m [rows, dates]."""
    o = n.to(tl.int64)[:, None] * stride_n + t.to(tl.int64)[None, :] * stride_t
    d = tl.arange(0, DP)
    p += o[:, :, None] + d[None, None, :]
    return tl.load(p, mask=m[:, :, None] & (d < D)[None, None, :], other=0.0)


@triton.jit
def pieces(x, C: tl.constexpr):
    """x [R, columns] as a tuple of at most C columns each: an epilogue takes them one by one."""
    R: tl.constexpr = x.shape[0]
    HALF: tl.constexpr = x.shape[1] // 2
    if x.shape[1] <= C:
        out = (x,)
    else:
        a, b = tl.split(tl.permute(tl.reshape(x, [R, 2, HALF]), (0, 2, 1)))
        out = pieces(a, C) + pieces(b, C)
    return out


@triton.jit
def spread(x, R: tl.constexpr, W: tl.constexpr, DP: tl.constexpr):
    """[R, W], a number a date -> [R, W * DP]."""
    return tl.reshape(tl.broadcast_to(x[:, :, None], [R, W, DP]), [R, W * DP])


@triton.jit
def load_rows(p, count, TAIL: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """[rows, DP] at p; of the rows of a tail `count` exist, the others are 0."""
    m = (tl.arange(0, DP) < D)[None, :]
    if TAIL:
        m = m & (tl.arange(0, p.shape[0]) < count)[:, None]
    if TAIL or D < DP:
        x = tl.load(p, mask=m, other=0.0)
    else:
        x = tl.load(p)
    return x


@triton.jit
def load_numbers(p, count, R: tl.constexpr, other, TAIL: tl.constexpr):
    """R adjacent numbers at p; of those of a tail `count` exist, in place of the rest `other`."""
    r = tl.arange(0, R)
    if TAIL:
        x = tl.load(p + r, mask=r < count, other=other)
    else:
        x = tl.load(p + r)
    return x


@triton.jit
def only_keys(e, p_bias, start, N, VALIDITY: tl.constexpr, TAIL: tl.constexpr):
    """Energies [queries, keys], -inf where a key from `start` on does not take part or exist."""
    if VALIDITY == BY_POSITION:
        bias = load_numbers(p_bias + start, N - start, e.shape[1], float("-inf"), TAIL)
        e += bias[None, :]
    elif TAIL:
        e = tl.where((start + tl.arange(0, e.shape[1]) < N)[None, :], e, float("-inf"))
    return e


@triton.jit
def key_columns(p, start, N, R: tl.constexpr, TV: tl.constexpr, TAIL: tl.constexpr):
    """Validity of R keys from `start` on at the dates of a tile, [R, TV]."""
    p += start * tl.cast(TV, tl.int64)
    p = p + tl.arange(0, R)[:, None] * TV + tl.arange(0, TV)[None, :]
    return load_rows(p, N - start, TAIL, TV, TV)


@triton.jit
def load_dates(
    p, count, t, stride_t, stride_n, T, R: tl.constexpr, W: tl.constexpr,
    TAIL: tl.constexpr, EXACT: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """[R, W * DP]: dates t ... t + W - 1 of the R positions at p, of a tail's `count`, 0 elsewhere.

    EXACT: all dates exist, and D is DP.
    """
    p, m = date_pointers(p, t, stride_t, stride_n, T, R, W, D, DP)
    if TAIL:
        m = m & (tl.arange(0, R) < count)[:, None]
    if TAIL or not EXACT:
        x = tl.load(p, mask=m, other=0.0)
    else:
        x = tl.load(p)
    return x


@triton.jit
def in_registers(x):
    """x, a left operand of many products, in the layout of a product's result.

    Products take it from registers then. From shared memory they would read it every time, and at
    32 columns that takes longer than the product.
    """
    nothing = tl.zeros([x.shape[0], 16], x.dtype)
    return tl.dot(nothing, tl.zeros([16, x.shape[1]], x.dtype), x.to(tl.float32)).to(x.dtype)


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
def date_numbers(
    p, count, t, stride_t, T, R: tl.constexpr, TT: tl.constexpr, TV: tl.constexpr,
    TAIL: tl.constexpr,
):  # fmt: skip
    """Float32 numbers [TV, R] of the TT dates from t on at R positions, of a tail's `count`.

    p points at the first of them.
    """
    i = tl.arange(0, TV)
    n = tl.arange(0, R)
    m = ((i < TT) & (t + i < T))[:, None]
    if TAIL:
        m = m & (n < count)[None, :]
    return tl.load(p + i.to(tl.int64)[:, None] * stride_t + n[None, :], mask=m, other=0.0)


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
def weights_of_keys(
    k, q, reference, usable, scale, OWN: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Weights [keys, queries] relative to the queries' `reference`, OWN of `usable` keys alone."""
    e = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * BITS)
    p = tl.exp2(e - reference[None, :])
    if OWN:
        p = tl.where(usable[:, None], p, 0.0)
    return p


@triton.jit
def load_gradients(
    p_do, reference, start, t, do_s, T, N, W: tl.constexpr, OWN: tl.constexpr,
    TAIL: tl.constexpr, EXACT: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """do of the queries from `start`, at p_do, on, [queries, W * DP], OWN of finite `reference`."""
    R: tl.constexpr = reference.shape[0]
    if OWN:  # elsewhere do may be anything
        p, m = date_columns(p_do, start, t, do_s[1], do_s[2], T, N, R, W, D, DP)
        do = tl.load(p, mask=m & (reference < float("inf"))[:, None], other=0.0)
    else:
        do = load_dates(p_do, N - start, t, do_s[1], do_s[2], T, R, W, TAIL, EXACT, D, DP)
    return do


@triton.jit
def to_slot(x, p, m, stride_n, scale, OWN: tl.constexpr):
    """Float32 sums x [positions, DP] times scale to p, OWN added to what is there.

    m: what exists.
    """
    p += (tl.arange(0, x.shape[0]) * stride_n)[:, None] + tl.arange(0, x.shape[1])[None, :]
    x = x * scale
    if OWN:
        x += tl.load(p, mask=m, other=0.0)
        tl.debug_barrier()  # sums are read and overwritten; threads may hold copies
    tl.store(p, x, mask=m)
