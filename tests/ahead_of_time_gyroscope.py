"""Shipped configurations of the gyroscope attention kernels, for tests/ahead_of_time.py."""

import os
from collections.abc import Iterator
from itertools import product

import torch

from timo.kernels import gyroscope_attention as launches
from timo.kernels import gyroscope_attention_backward as backward
from timo.kernels import gyroscope_attention_backward_keys as keys
from timo.kernels import gyroscope_attention_backward_queries as queries
from timo.kernels import gyroscope_attention_backward_values as values
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
    for name in ("values", "keys", "queries") if own else ("values", "keys", "queries", "both"):
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
        "OWN": own, "EXACT": launches.exact(tile, dates, head_dim),
        "LEAST": 1 / launches.most(DTYPES[dtype]),
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
    """Of `spatial_value_kernel` ("values"), `spatial_key_kernel` ("keys") or
    `spatial_query_kernel` ("queries", "both").
    """
    tile = config.tile(name, dates, head_dim, DTYPES[dtype], launch(kind, own), capability)
    x, numbers = f"*{dtype}", {"p_reference": "*fp32", "p_delta": "*fp32"}
    medians, number_s = {"p_qm": x, "p_km": x}, {"reference_s": ANY * 4, "delta_s": ANY * 4}
    sizes = {"H": "i32", "T": "i32", "N": "i32", "scale": "fp32"}
    columns = {"p_columns": "*fp32" if dtype == "fp32" else "*bf16"} | sizes
    constants = common(dtype, kind, head_dim) | {
        "OWN": own, "EXACT": launches.exact(tile, dates, head_dim),
        "BM": tile.queries, "BN": tile.keys, "WIDTHS": tile.widths, "TT": sum(tile.widths),
    }  # fmt: skip
    if name == "values":
        kernel = values.spatial_value_kernel
        signature = medians | {"p_do": x, "p_valid": "*u8", "p_reference": "*fp32"}
        signature |= {"p_any": "*u8", "p_dv": x, "qm_s": ROW * 4, "km_s": ROW * 4, "do_s": SERIES}
        signature |= {"valid_s": ANY * 3, "reference_s": ANY * 4, "any_s": ANY * 3}
        signature |= {"dv_s": SERIES, **sizes}
    elif name == "keys":
        kernel = keys.spatial_key_kernel
        signature = medians | {"p_v": x, "p_do": x, "p_valid": "*u8", **numbers, "p_any": "*u8"}
        signature |= {"p_dk": "*fp32", "qm_s": ROW * 4, "km_s": ROW * 4, "v_s": SERIES}
        signature |= {"do_s": SERIES, "valid_s": ANY * 3, **number_s, "any_s": ANY * 3}
        signature |= {"dk_s": SERIES, **columns}
    else:
        kernel = queries.spatial_query_kernel
        signature = medians | {"p_v": x, "p_do": x, "p_bias": "*fp32", **numbers}
        signature |= {"p_dq": "*fp32", "p_dk": "*fp32", "qm_s": ROW * 4, "km_s": ROW * 4}
        signature |= {"v_s": SERIES, "do_s": SERIES, "bias_s": ANY * 3, **number_s}
        signature |= {"dq_s": SERIES, "dk_s": SERIES, **columns}
        constants |= {"DK": name == "both"}
    if name != "values":
        held = config.held(DTYPES[dtype], capability)
        constants |= {"TV": launches.sizes(tile)[1], "HELD": held}
    label = f"gyroscope spatial {name} backward T={dates} D={head_dim} {dtype} validity={kind} "
    return f"{label}own={own} {tile}", kernel, signature, constants, *tile[3:]
