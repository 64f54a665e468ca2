"""Shipped configurations of the gyroscope attention kernels, for tests/ahead_of_time.py."""

import os
from collections.abc import Iterator
from itertools import product

import torch

from timo.kernels import gyroscope_attention as launches
from timo.kernels import gyroscope_attention_backward as backward
from timo.kernels import gyroscope_attention_backward_spatial as spatial
from timo.kernels import gyroscope_attention_config as config
from timo.kernels import gyroscope_attention_forward as forward

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ROW = ("i32",)  # strides in multiples of a padded head: aligned to 16
SERIES = ROW * 5
ANY = ("i64",)  # strides of validity, gate and logarithms


def cases(capability: int) -> Iterator[tuple]:
    """The tuned head dimensions at 10 dates, or with TIMO_AOT=all every class of shape."""
    if os.environ.get("TIMO_AOT") != "all":
        yield temporal_case("bf16", 10, 32, True)
        yield from temporal_backward_cases("bf16", 10, 32, 2)
        yield from spatial_cases("bf16", 10, 32, 2, False, capability)
        yield from spatial_cases("bf16", 10, 64, 0, False, capability)
        return
    for dtype, head_dim, dates in product(DTYPES, (8, 24, 32, 64, 80, 128), (1, 3, 10, 38)):
        yield temporal_case(dtype, dates, head_dim, True)
        yield from temporal_backward_cases(dtype, dates, head_dim, 2)
        for kind in (0, 1, 2):
            yield from spatial_cases(dtype, dates, head_dim, kind, False, capability)
        if dates == 1:
            yield from spatial_cases(dtype, dates, head_dim, 2, True, capability)


def spatial_cases(dtype, dates, head_dim, kind, own, capability) -> Iterator[tuple]:
    yield spatial_case(dtype, dates, head_dim, kind, own, capability)
    for name in ("keys", "queries") if own else ("keys", "queries", "values", "both"):
        yield spatial_backward_case(dtype, dates, head_dim, kind, own, capability, name)


def launch(kind: int, own: bool) -> int:
    return 2 if own else int(kind == 2)


def common(dtype: str, kind: int, head_dim: int) -> dict:
    return {
        "VALIDITY": kind, "PRECISION": launches.precision(DTYPES[dtype]),
        "D": head_dim, "DP": config.padded(head_dim),
    }  # fmt: skip


def temporal_case(dtype, dates, head_dim, has_valid) -> tuple:
    tile = config.temporal_tile(dates, head_dim, DTYPES[dtype], 4096)
    x = f"*{dtype}"
    signature = {
        "p_q": x, "p_k": x, "p_v": x, "p_valid": "*u8", "p_out": x, "p_lse": "*fp32",
        "q_s": SERIES, "k_s": SERIES, "v_s": SERIES, "valid_s": ANY * 3, "out_s": SERIES,
        "lse_s": ANY * 4, "H": "i32", "T": "i32", "N": "i32", "scale": "fp32",
    }  # fmt: skip
    at = tile.pop("num_warps"), tile.pop("num_stages")
    constants = {"HAS_VALID": has_valid, "D": head_dim, **tile}
    label = f"gyroscope temporal T={dates} D={head_dim} {dtype} valid={has_valid}"
    return label, forward.temporal_kernel, signature, constants, *at


def spatial_case(dtype, dates, head_dim, kind, own, capability) -> tuple:
    tile = config.tile("forward", dates, head_dim, DTYPES[dtype], launch(kind, own), capability)
    x = f"*{dtype}"
    TT, TV = launches.sizes(tile)
    signature = {
        "p_qm": x, "p_km": x, "p_v": x, "p_gate": "*fp32", "p_valid": "*u8", "p_bias": "*fp32",
        "p_columns": x, "p_out": x, "p_lse": "*fp32", "p_spatial": "*fp32", "p_far": "*u8",
        "qm_s": ROW * 4, "km_s": ROW * 4, "v_s": SERIES, "gate_s": ANY * 4, "valid_s": ANY * 3,
        "bias_s": ANY * 3, "out_s": SERIES, "lse_s": ANY * 4, "spatial_s": ANY * 3,
        "H": "i32", "T": "i32", "N": "i32", "scale": "fp32",
    }  # fmt: skip
    constants = common(dtype, kind, head_dim) | {
        "OWN": own, "LEAST": 1 / launches.most(DTYPES[dtype]),
        "BM": tile.queries, "BN": tile.keys, "BK": config.first_keys(tile, DTYPES[dtype]),
        "WIDTHS": tile.widths, "TT": TT, "TV": TV,
    }  # fmt: skip
    label = f"gyroscope spatial T={dates} D={head_dim} {dtype} validity={kind} own={own} {tile}"
    return label, forward.spatial_kernel, signature, constants, *tile[3:]


def temporal_backward_cases(dtype, dates, head_dim, kind) -> list[tuple]:
    tile = config.temporal_tile(dates, head_dim, DTYPES[dtype], 2048)
    at = tile.pop("num_warps"), tile.pop("num_stages")
    x = f"*{dtype}"
    sizes = {"H": "i32", "T": "i32", "N": "i32", "scale": "fp32"}
    label = f"T={dates} D={head_dim} {dtype} validity={kind}"
    signature = {
        "p_do": x, "p_q": x, "p_k": x, "p_v": x, "p_gate": "*fp32", "p_valid": "*u8", "p_out": x,
        "p_lse": "*fp32", "p_spatial": "*fp32", "p_dq": x, "p_dgate": "*fp32", "p_scaled": x,
        "p_delta": "*fp32", "p_share": "*fp32", "p_own": "*fp32",
        "do_s": SERIES, "q_s": SERIES, "k_s": SERIES, "v_s": SERIES, "gate_s": ANY * 4,
        "valid_s": ANY * 3, "out_s": SERIES, "lse_s": ANY * 4, "spatial_s": ANY * 3,
        "dgate_s": ANY * 4, "delta_s": ANY * 4, **sizes,
    }  # fmt: skip
    constants = {
        "VALIDITY": kind, "MOST": launches.most(DTYPES[dtype]),
        "LARGEST": torch.finfo(DTYPES[dtype]).max, "D": head_dim, **tile,
    }  # fmt: skip
    query = (
        f"gyroscope temporal queries backward {label}", backward.temporal_query_kernel,
        signature, constants, *at,
    )  # fmt: skip
    signature = {
        "p_do": x, "p_q": x, "p_k": x, "p_v": x, "p_valid": "*u8", "p_lse": "*fp32",
        "p_delta": "*fp32", "p_dk": x, "p_dv": x,
        "do_s": SERIES, "q_s": SERIES, "k_s": SERIES, "v_s": SERIES, "valid_s": ANY * 3,
        "lse_s": ANY * 4, "delta_s": ANY * 4, "dk_s": SERIES, **sizes,
    }  # fmt: skip
    constants = {"HAS_VALID": kind != 0, "D": head_dim, **tile}
    key = (
        f"gyroscope temporal keys backward {label}", backward.temporal_key_kernel,
        signature, constants, *at,
    )  # fmt: skip
    return [query, key]


def spatial_backward_case(dtype, dates, head_dim, kind, own, capability, name) -> tuple:
    """Of `spatial_key_kernel` ("keys", "values") or `spatial_query_kernel` ("queries", "both")."""
    tile = config.tile(name, dates, head_dim, DTYPES[dtype], launch(kind, own), capability)
    x = f"*{dtype}"
    signature = {"p_qm": x, "p_km": x, "p_v": x, "p_do": x}
    strides = {"qm_s": ROW * 4, "km_s": ROW * 4, "v_s": SERIES, "do_s": SERIES}
    if name in ("keys", "values"):
        signature |= {"p_valid": "*u8", "p_reference": "*fp32", "p_delta": "*fp32", "p_any": "*u8"}
        signature |= {"p_dv": x, "p_dk": "*fp32"}
        strides |= {"valid_s": ANY * 3, "reference_s": ANY * 4, "delta_s": ANY * 4}
        strides |= {"any_s": ANY * 3}
        strides |= {"dv_s": SERIES, "dk_s": SERIES}
        kernel = spatial.spatial_key_kernel
    else:
        signature |= {"p_bias": "*fp32", "p_reference": "*fp32", "p_delta": "*fp32"}
        signature |= {"p_dq": "*fp32", "p_dk": "*fp32"}
        strides |= {"bias_s": ANY * 3, "reference_s": ANY * 4, "delta_s": ANY * 4}
        strides |= {"dq_s": SERIES, "dk_s": SERIES}
        kernel = spatial.spatial_query_kernel
    signature |= strides | {"p_columns": "*fp32" if dtype == "fp32" else "*bf16"}
    signature |= {"H": "i32", "T": "i32", "N": "i32", "scale": "fp32"}
    constants = common(dtype, kind, head_dim) | {
        "OWN": own, "DK": name in ("keys", "both"), "BM": tile.queries, "BN": tile.keys,
        "WIDTHS": tile.widths, "TT": sum(tile.widths), "TV": launches.sizes(tile)[1],
    }  # fmt: skip
    label = f"gyroscope spatial {name} backward T={dates} D={head_dim} {dtype} validity={kind} "
    return f"{label}own={own} {tile}", kernel, signature, constants, *tile[3:]
