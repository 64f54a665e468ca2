"""Gyroscope attention: launches of the forward and backward kernels.

Memory beside inputs and results: with validity one copy of v; with validity by position a byte a
query forward, and validity as a number a position and date (`columns`), tiles of dates padded to
16. Backward one series (do'), two numbers a query and their sums by tile of dates (with validity by
position three), and a float32 dq_median per tile of dates and as many dk_median, or with atomic
additions one.
"""

from functools import cache

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from timo.kernels import gyroscope_attention_config as config
from timo.kernels.gyroscope_attention_backward import temporal_key_kernel, temporal_query_kernel
from timo.kernels.gyroscope_attention_backward_keys import spatial_key_kernel
from timo.kernels.gyroscope_attention_backward_queries import spatial_query_kernel
from timo.kernels.gyroscope_attention_backward_values import spatial_value_kernel
from timo.kernels.gyroscope_attention_blocks import BY_DATE, BY_POSITION, NONE
from timo.kernels.gyroscope_attention_forward import spatial_kernel, temporal_kernel
from timo.kernels.launch import grid


def forward(q, k, v, q_median, k_median, gate, valid, scale) -> tuple[Tensor, Tensor, Tensor]:
    """Out, lse and spatial_lse of `timo.ops.gyroscope_attention.reference`, on q's device."""
    B, T, N, H, D = q.shape
    q, k, v, q_median, k_median = map(near, (q, k, v, q_median, k_median))
    out = torch.empty((B, T, N, H, D), dtype=q.dtype, device=q.device)
    lse = torch.empty((B, T, N, H), dtype=torch.float32, device=q.device)
    spatial = torch.empty((B, N, H), dtype=torch.float32, device=q.device)
    kind, usable, seen, (v, q_median, k_median) = validity(valid, v, q_median, k_median)
    tile = config.temporal_tile(T, D, q.dtype, 4096)
    with torch.cuda.device_of(q):
        temporal_kernel[programs(N, tile["BP"], T, tile["TQ"], B * H)](
            q, k, v, usable, out, lse,
            *map(Tensor.stride, (q, k, v, usable, out, lse)),
            H, T, N, float(scale), HAS_VALID=kind != NONE.value, D=D, **tile,
        )  # fmt: skip
        far = lse
        if kind == BY_POSITION.value:
            far = torch.empty((B, T, N, H), dtype=torch.uint8, device=q.device)

        def spatial_pass(dates, take_part, own):
            launch = 2 if own else int(kind == BY_POSITION.value)
            tile = config.tile("forward", dates, D, q.dtype, launch, capability(q))
            TT, TV = sizes(tile)
            flags = usable
            if kind == BY_POSITION.value and not own:
                flags = columns(usable, TT, TV, q.dtype)
            spatial_kernel[programs(N, tile.queries, T, TT, B * H)](
                q_median, k_median, v, gate, usable, take_part, flags, out, lse, spatial, far,
                *map(Tensor.stride, (
                    q_median, k_median, v, gate, usable, take_part, out, lse, spatial
                )),
                H, T, N, float(scale),
                VALIDITY=kind, OWN=own, EXACT=exact(tile, dates, D), LEAST=1 / most(q.dtype),
                PRECISION=precision(q.dtype), D=D, DP=config.padded(D),
                BM=tile.queries, BN=tile.keys, BK=config.first_keys(tile, q.dtype),
                WIDTHS=tile.widths, TT=TT, TV=TV,
                num_warps=tile.num_warps, num_stages=tile.num_stages, maxnreg=tile.registers,
            )  # fmt: skip

        spatial_pass(T, on_any_date(seen, kind), own=False)
        if kind == BY_POSITION.value:
            spatial_pass(1, bias(usable), own=True)
    return out, lse, spatial


def backward(
    grad, q, k, v, q_median, k_median, gate, valid, scale, out, lse, spatial_lse, *, atomic=False
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, q_median, k_median and gate, on q's device.

    `atomic`: that of k_median is added up by atomic additions, in any order.
    """
    B, T, N, H, D = q.shape
    q, k, v, q_median, k_median, grad = map(near, (q, k, v, q_median, k_median, grad))
    out = out.contiguous()
    kind, usable, seen, (v, q_median, k_median) = validity(valid, v, q_median, k_median)
    dq, dk, dv, scaled = (
        torch.empty((B, T, N, H, D), dtype=q.dtype, device=q.device) for _ in range(4)
    )
    dgate = torch.empty((B, T, N, H), dtype=gate.dtype, device=q.device)

    def numbers():
        """A number a query, positions adjacent."""
        x = torch.empty((B, H, T, N), dtype=torch.float32, device=q.device)
        return x.permute(0, 2, 3, 1)

    delta, share = numbers(), numbers()
    own = numbers() if kind == BY_POSITION.value else delta
    tile = config.temporal_tile(T, D, q.dtype, 2048)
    temporal = programs(N, tile["BP"], T, tile["TQ"], B * H)
    with torch.cuda.device_of(q):
        temporal_query_kernel[temporal](
            grad, q, k, v, gate, usable, out, lse, spatial_lse,
            dq, dgate, scaled, delta, share, own,
            *map(Tensor.stride, (
                grad, q, k, v, gate, usable, out, lse, spatial_lse, dgate, delta
            )),
            H, T, N, float(scale), VALIDITY=kind, MOST=most(q.dtype),
            LARGEST=torch.finfo(q.dtype).max, D=D, **tile,
        )  # fmt: skip
        temporal_key_kernel[temporal](
            grad, q, k, v, usable, lse, delta, dk, dv,
            *map(Tensor.stride, (grad, q, k, v, usable, lse, delta, dk)),
            H, T, N, float(scale), HAS_VALID=kind != NONE.value, D=D, **tile,
        )  # fmt: skip
        constants = {
            "VALIDITY": kind, "PRECISION": precision(q.dtype), "D": D, "DP": config.padded(D)
        }  # fmt: skip

        def launch(kernel, tile, dates, block, *tensors, own, columned=False, **options):
            """Over tiles of dates; a second launch, `own`, takes one date after the other.

            `columned`: the kernel takes validity by position as `columns`.
            """
            TT, TV = sizes(tile)
            if columned:
                dtype = torch.float32 if q.dtype == torch.float32 else torch.bfloat16
                by_delta = kind == BY_POSITION.value and not own
                options |= {"p_columns": columns(usable, TT, TV, dtype) if by_delta else usable}
                options |= {"TV": TV, "HELD": config.held(q.dtype, capability(q))}
            kernel[grid(B * H, 1 if own else triton.cdiv(T, TT), triton.cdiv(N, block))](
                *tensors, *map(Tensor.stride, tensors), H=H, T=T, N=N, scale=float(scale),
                OWN=own, EXACT=exact(tile, dates, D), **constants, **options,
                WIDTHS=tile.widths, TT=TT, BM=tile.queries, BN=tile.keys,
                num_warps=tile.num_warps, num_stages=tile.num_stages, maxnreg=tile.registers,
            )  # fmt: skip

        def slots(tiles):
            """A number a channel and tile of dates, added up in one order whatever runs first."""
            return torch.empty((tiles, B, N, H, D), dtype=torch.float32, device=q.device)

        @cache
        def of_tiles(dates):
            """`share`, or where all dates have the same keys its sums over tiles of `dates`."""
            if kind == BY_POSITION.value:
                return share
            parts = share.permute(0, 3, 1, 2).split(dates, 2)  # (B, H, dates, N)
            return torch.stack([x.sum(2) for x in parts], 2).permute(0, 2, 3, 1)

        def tile_of(name, dates, second=False):
            turn = 2 if second else int(kind == BY_POSITION.value)
            return config.tile(name, dates, D, q.dtype, turn, capability(q))

        inputs = q_median, k_median, v
        # As `numbers`: positions adjacent.
        shared = spatial_lse.transpose(1, 2).contiguous().transpose(1, 2)[:, None]
        shared = shared.expand(B, T, N, H)
        tile = tile_of("values", T)
        launch(
            spatial_value_kernel, tile, T, tile.keys,
            q_median, k_median, scaled, usable, shared, seen, dv, own=False,
        )  # fmt: skip
        if atomic:
            dk_slots = slots(1).zero_()
        else:
            tile = tile_of("keys", T)
            dk_slots = slots(triton.cdiv(T, sum(tile.widths)))
            launch(
                spatial_key_kernel, tile, T, tile.keys,
                *inputs, scaled, usable, shared, of_tiles(sum(tile.widths)), seen, dk_slots,
                own=False, columned=True,
            )  # fmt: skip
        tile = tile_of("both" if atomic else "queries", T)
        dq_slots = slots(triton.cdiv(T, sum(tile.widths)))
        launch(
            spatial_query_kernel, tile, T, tile.queries,
            *inputs, scaled, on_any_date(seen, kind), shared, of_tiles(sum(tile.widths)),
            dq_slots, dk_slots, own=False, columned=True, DK=atomic,
        )  # fmt: skip
        if kind == BY_POSITION.value:
            some = own.isfinite().any(2).view(torch.uint8)
            tile = tile_of("values", 1, second=True)
            launch(
                spatial_value_kernel, tile, 1, tile.keys,
                q_median, k_median, grad, usable, own, some, dv, own=True,
            )  # fmt: skip
            tile = tile_of("keys", 1, second=True)
            launch(
                spatial_key_kernel, tile, 1, tile.keys,
                *inputs, grad, usable, own, delta, some, dk_slots, own=True, columned=True,
            )  # fmt: skip
            tile = tile_of("queries", 1, second=True)
            launch(
                spatial_query_kernel, tile, 1, tile.queries,
                *inputs, grad, bias(usable), own, delta, dq_slots, dk_slots,
                own=True, columned=True, DK=False,
            )  # fmt: skip
    dq_median, dk_median = map(over_slots, (dq_slots, dk_slots))
    if valid is not None:
        dk_median = torch.where(seen[:, 0, :, None, None] != 0, dk_median, 0)
    return dq, dk, dv, dq_median.to(q.dtype), dk_median.to(q.dtype), dgate


def validity(valid: Tensor | None, v: Tensor, *medians: Tensor):
    """Kind of validity, its bytes (B, T, N) by date and by position on any date, and v and the
    medians with 0 where not valid: there they may hold NaN, which no weight of 0 cancels.
    """
    B, T, N = v.shape[:3]
    if valid is None:
        nothing = v.new_empty((1,), dtype=torch.uint8).expand(B, T, N)
        return NONE.value, nothing, nothing, (v, *medians)
    kind = (BY_DATE if valid.ndim == 2 else BY_POSITION).value
    usable = valid if valid.ndim == 3 else valid[:, :, None].expand(B, T, N)
    v = torch.where(usable[..., None, None], v, 0)
    seen = usable.any(1)
    clean = [torch.where(seen[..., None, None], x, 0) for x in medians]
    seen = seen[:, None].expand(B, T, N)
    return kind, usable.view(torch.uint8), seen.view(torch.uint8), (v, *clean)


def bias(take_part: Tensor) -> Tensor:
    """Float32 to add to energies of keys: 0 where true, else -inf."""
    return torch.zeros(take_part.shape, device=take_part.device).masked_fill_(
        take_part == 0, float("-inf")
    )


def on_any_date(seen: Tensor, kind: int) -> Tensor:
    """`bias` of keys that are valid on any date, (B, T, N); without validity nothing reads it."""
    return seen if kind == NONE.value else bias(seen[:, :1]).expand(seen.shape)


def columns(usable: Tensor, dates: int, padded: int, dtype: torch.dtype) -> Tensor:
    """Validity (B, T, N) as tiles of dates, (B, tiles, N, padded), 1 where true: what multiplies
    weights of keys.
    """
    B, T, N = usable.shape
    tiles = triton.cdiv(T, dates)
    x = F.pad(usable, (0, 0, 0, tiles * dates - T)).reshape(B, tiles, dates, N).transpose(2, 3)
    return F.pad(x.to(dtype), (0, padded - dates)).contiguous()


def sizes(tile: config.Tile) -> tuple[int, int]:
    """Dates of a tile, and columns of a matrix that holds a number for each."""
    dates = sum(tile.widths)
    return dates, max(16, triton.next_power_of_2(dates))


def over_slots(x: Tensor) -> Tensor:
    """Sum over the slots (slots, ...); a single one costs no pass over memory."""
    return x.sum(0) if len(x) > 1 else x[0]


def exact(tile: config.Tile, dates: int, head_dim: int) -> bool:
    """Whether tiles of dates and heads need no masks."""
    return dates % sum(tile.widths) == 0 and config.padded(head_dim) == head_dim


def most(dtype: torch.dtype) -> float:
    """Weight of a date's own keys relative to the shared maximum at which it needs its own.

    Its inverse must leave room for the smaller weights of that date: bfloat16 and float32 reach
    2^-126, float16 2^-24.
    """
    return 2.0**6 if dtype == torch.float16 else 2.0**60


def precision(dtype: torch.dtype) -> str:
    """tf32 where torch's own products on GPUs may use it, whichever of its settings says so."""
    exact = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32"
    return "ieee" if exact else "tf32"


def capability(x: Tensor) -> int:
    """Compute capability as 90; 80 for CPU tensors, which the interpreter takes."""
    if x.device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


def programs(N: int, block: int, T: int, dates: int, heads: int) -> tuple[int]:
    return grid(heads, triton.cdiv(T, dates), triton.cdiv(N, block))


def near(x: Tensor) -> Tensor:
    """x with last stride 1 and positions so near that a block of 128 spans less than 2^31."""
    return x if x.stride(-1) == 1 and x.stride(-3) < 2**24 else x.contiguous()
