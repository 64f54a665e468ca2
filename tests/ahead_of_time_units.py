"""Shipped configurations of the unit kernels, for tests/ahead_of_time.py."""

import os
from collections.abc import Iterator
from itertools import product

from timo.kernels import gather_units, masked_pixel_loss, scatter_units

FLOATS = ("*bf16", "*fp16", "*fp32")
RAW = ("*u8", "*u16", *FLOATS)
SIZES = dict.fromkeys("CTHWK", "i32")
X_STRIDES = dict.fromkeys(("x_b", "x_t", "x_c", "x_h"), "i64") | {"x_w": "i32"}
V_STRIDES = dict.fromkeys(("v_b", "v_t", "v_h", "v_w"), "i64")
# Unit, halo and bands: usual ones, one band, and sizes that are no powers of two.
DEFAULT = (32, (3, 2), 10)
GEOMETRIES = (DEFAULT, (32, (3, 2), 1), (7, (9, 0), 3))


def cases() -> Iterator[tuple]:
    """The default geometry in every pair of dtypes, or with TIMO_AOT=all every class of launch."""
    signature = {"p_ids": "*i64", "p_places": "*i32", "K": "i32", "units": "i32", "step": "i32"}
    yield "places of units", gather_units.place_kernel, signature, {"BLOCK": 256}, 4, 3
    every = os.environ.get("TIMO_AOT") == "all"
    for frames, floats in product(RAW, FLOATS):
        for geometry, has in product(GEOMETRIES, (True, False)) if every else ((DEFAULT, True),):
            yield from gather_cases(frames, floats, has, *geometry)
            if every or floats == "*bf16":
                yield from loss_cases(frames, floats, has, geometry, 16)
            if every or (frames, floats) == ("*u8", "*bf16"):
                yield from loss_cases(frames, floats, has, geometry, 1)
    units = {"units": "i32"}
    pointers = dict.fromkeys(("p_mean", "p_rstd"), "*fp32") | {"p_count": "*i32"}
    kernel = masked_pixel_loss.batch_kernel
    yield "masked_pixel_loss batch", kernel, pointers | units, {"BLOCK": 2048}, 8, 3
    pointers = {"p_sum": "*fp32", "p_count": "*i32", "p_loss": "*fp32", "p_total": "*i64"}
    kernel = masked_pixel_loss.total_kernel
    yield "masked_pixel_loss total", kernel, pointers | units, {"BLOCK": 2048}, 8, 3
    for dtype, D in product(FLOATS, (512, 33)):
        yield from scatter_cases(dtype, D)


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
        launch = warps, 3, gather_units.backward_registers(unit)
        yield f"gather_units_backward {label}", kernel, signature, constants, *launch


def loss_cases(frames, pred, has, geometry, step) -> Iterator[tuple]:
    """Of a pair of dtypes; `step` as the launch finds it from the strides."""
    unit, _, C = geometry
    config = masked_pixel_loss.tile(C, unit, step)
    launch = config.pop("num_warps"), 3, config.pop("maxnreg")
    optional, missing = given(has, p_scale="*fp32", p_offset="*fp32", p_valid="*u8")
    sizes = dict.fromkeys("CTHWM", "i32")
    strides = {**X_STRIDES, "x_w": "constexpr"} if step == 16 else X_STRIDES
    numbers = {**sizes, **strides, **V_STRIDES}
    constants = {
        "STEP": step, "HAS_SCALE": has, "HAS_OFFSET": has, "HAS_VALID": has, "UNIT": unit,
        **config, **missing, **({"x_w": 1} if step == 16 else {}),
    }  # fmt: skip
    signature = {
        "p_pred": pred, "p_x": frames, "p_ids": "*i64", **optional, "p_mean": "*fp32",
        "p_rstd": "*fp32", "p_sum": "*fp32", "p_count": "*i32", **numbers,
    }  # fmt: skip
    label = f"{frames} {pred} unit={unit} C={C} with={has} step={step}"
    for norm, loss in (("none", True), ("patch", True), ("batch", False), ("batch", True)):
        yield (
            f"masked_pixel_loss {norm} {loss} {label}", masked_pixel_loss.loss_kernel,
            signature, constants | {"NORM": norm, "LOSS": loss}, *launch,
        )  # fmt: skip
    signature = {
        "p_grad": "*fp32", "p_pred": pred, "p_x": frames, "p_ids": "*i64", **optional,
        "p_mean": "*fp32", "p_rstd": "*fp32", "p_total": "*i64", "p_out": pred, **numbers,
    }  # fmt: skip
    kernel = masked_pixel_loss.loss_backward_kernel
    yield f"masked_pixel_loss_backward {label}", kernel, signature, constants, *launch


def scatter_cases(dtype: str, D: int) -> Iterator[tuple]:
    config = scatter_units.tile(D)
    warps = config.pop("num_warps")
    sizes = {"K": "i32", "units": "i32", "D": "i32"}
    signature = {
        "p_tokens": dtype, "p_places": "*i32", "p_mask_token": "*fp32", "p_position": "*fp32",
        "p_out": dtype, **sizes,
    }  # fmt: skip
    yield f"scatter_units {dtype} {D}", scatter_units.scatter_kernel, signature, config, warps, 3
    signature = {
        "p_grad": dtype, "p_places": "*i32", "p_tokens": dtype, "p_partial": "*fp32", **sizes
    }  # fmt: skip
    kernel = scatter_units.scatter_backward_kernel
    yield f"scatter_units_backward {dtype} {D}", kernel, signature, config, warps, 3


def given(has: bool, **pointers: str) -> tuple[dict[str, str], dict[str, None]]:
    """Optional arguments as a signature, and as constants None where they are not given."""
    if has:
        return pointers, {}
    return dict.fromkeys(pointers, "constexpr"), dict.fromkeys(pointers)
