"""`import timo` stays light."""

import subprocess
import sys

HEAVY = ("torchvision", "lightning", "rasterio", "matplotlib", "torchmetrics", "timm", "pyarrow")
SCRIPT = f"""
import sys, time
import torch, safetensors.torch
start = time.perf_counter()
import timo
print(time.perf_counter() - start)
print(*(name for name in {HEAVY} if name in sys.modules))
assert timo.create_model and timo.load_checkpoint and timo.save_checkpoint and timo.__version__
assert timo.ops.gyroscope_attention and timo.layers.GyroscopeAttention and timo.models.Encoder
"""


def test_import_is_quick_and_leaves_heavy_packages_alone():
    best = float("inf")
    for _ in range(3):  # the first may compile bytecode; a busy machine may delay any
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True
        )
        seconds, heavy = done.stdout.split("\n")[:2]
        assert not heavy, f"import timo loads {heavy}"
        best = min(best, float(seconds))
        if best < 1.5:
            return
    raise AssertionError(f"import timo takes {best:.1f} s beyond torch")
