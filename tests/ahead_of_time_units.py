"""Shipped configurations of the unit kernels, for tests/ahead_of_time.py."""

import os
from collections.abc import Iterator
from itertools import product

from timo.kernels import gather_units

FLOATS = ("*bf16", "*fp16", "*fp32")
RAW = ("*u8", "*u16", *FLOATS)
SIZES = dict.fromkeys("CTHWK", "i32")
X_STRIDES = dict.fromkeys(("x_b", "x_t", "x_c", "x_h"), "i64") | {"x_w": "i32"}
V_STRIDES = dict.fromkeys(("v_b", "v_t", "v_h", "v_w"), "i64")
# Unit, halo and bands: the default, one band, and sizes that are no powers of two.
GEOMETRIES = ((32, (3, 2), 10), (32, (3, 2), 1), (7, (9, 0), 3))


def cases() -> Iterator[tuple]:
    """Every pair of dtypes at the default geometry, and with TIMO_AOT=all at the others."""
    signature = {"p_ids": "*i64", "p_places": "*i32", "K": "i32", "units": "i32", "step": "i32"}
    yield "places of units", gather_units.place_kernel, signature, {"BLOCK": 256}, 4, 3
    for frames, tiles in product(RAW, FLOATS):
        for geometry, has in product(GEOMETRIES, (True, False)):
            if (geometry, has) == (GEOMETRIES[0], True) or every(frames, tiles):
                yield from gather_cases(frames, tiles, has, *geometry)


def every(*dtypes: str) -> bool:
    """Whether all variants are compiled: of one pair of dtypes, or asked for."""
    return dtypes == ("*u16", "*bf16") or os.environ.get("TIMO_AOT") == "all"


def gather_cases(frames, tiles, has, unit, halo, C) -> Iterator[tuple]:
    """Of a pair of dtypes; `has` scale, offset and validity, or none of them."""
    before, after = halo
    config = gather_units.bands(C)
    warps = config.pop("num_warps")
    label = f"{frames} {tiles} unit={unit} halo={halo} C={C} with={has}"
    optional, missing = given(has, p_scale="*fp32", p_offset="*fp32", p_valid="*u8")
    signature = {
        "p_x": frames, "p_ids": "*i64", "p_places": "*i32", **optional, "p_tiles": tiles,
        **SIZES, **X_STRIDES, **V_STRIDES,
    }  # fmt: skip
    flags = {"HAS_SCALE": has, "HAS_OFFSET": has, "HAS_VALID": has}
    constants = {
        "UNIT": unit, "BEFORE": before, "SIZE": before + unit + after, **config, **flags, **missing
    }  # fmt: skip
    yield f"gather_units {label}", gather_units.gather_kernel, signature, constants, warps, 3
    if frames in FLOATS:
        optional, missing = given(has, p_scale="*fp32", p_valid="*u8")
        signature = {
            "p_grad": tiles, "p_places": "*i32", **optional, "p_out": frames, **SIZES, **V_STRIDES
        }  # fmt: skip
        flags.pop("HAS_OFFSET")
        constants = {
            "UNIT": unit, "BEFORE": before, "AFTER": after, **config, **flags, **missing
        }  # fmt: skip
        kernel = gather_units.gather_backward_kernel
        yield f"gather_units_backward {label}", kernel, signature, constants, warps, 3


def given(has: bool, **pointers: str) -> tuple[dict[str, str], dict[str, None]]:
    """Optional arguments as a signature, and as constants None where they are not given."""
    if has:
        return pointers, {}
    return dict.fromkeys(pointers, "constexpr"), dict.fromkeys(pointers)
