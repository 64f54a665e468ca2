"""`import timo` stays light."""

import subprocess
import sys

HEAVY = {"torchvision", "lightning", "rasterio", "matplotlib", "torchmetrics", "timm", "pyarrow"}
COMPILERS = {"torch._dynamo", "torch._inductor", "triton", "sympy"}  # over a second of imports
SCRIPT = f"""
import sys
import torch, safetensors.torch
before = set(sys.modules)
import timo
print(*{HEAVY | COMPILERS} & (set(sys.modules) - before))
assert timo.create_model and timo.load_checkpoint and timo.save_checkpoint and timo.__version__
assert timo.ops.gyroscope_attention and timo.layers.GyroscopeAttention and timo.models.Encoder
"""


def test_import_leaves_heavy_packages_alone():
    loaded = subprocess.check_output([sys.executable, "-c", SCRIPT], text=True).strip()
    assert not loaded, f"import timo loads {loaded}"
