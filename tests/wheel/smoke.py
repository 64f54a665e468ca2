"""What an installed wheel must do with core dependencies alone. Argument: nvcc there, yes or no."""

import sys
from pathlib import Path

import torch

import timo
from timo import _C
from timo.ops import dispatch

assert "site-packages" in timo.__file__, timo.__file__
assert Path(timo.__file__).with_name("py.typed").exists(), "type checkers would not look at timo"
if sys.argv[1] == "yes":
    assert _C.has_cuda, "nvcc was there, but the wheel has no CUDA kernels"
x = torch.randn(2, 5, 3, 2, 8)
values, indices = timo.ops.temporal_median(x, backend="cpp")
assert torch.equal(values, x.median(1).values) and torch.equal(indices, x.median(1).indices)
deviation = timo.ops.median_deviation(x, torch.ones(8), backend="cpp")[2]
assert torch.allclose(deviation, (x - values[:, None]).sum(-1), atol=1e-5)
import timo.kernels.median_deviation  # noqa: E402, F401

model = timo.create_model("timo_tiny", task="segmentation", in_chans=5, num_classes=3)
logits = model.eval()(torch.randn(1, 2, 5, 64, 96))
assert logits.shape == (1, 3, 64, 96)
from timo.cli import main  # noqa: E402

tiny = ["temporal_median", "--shape", "1,3,9,2,8", "--seconds", "0.01", "--device", "cpu"]
assert main(["bench", *tiny, "--backend", "cpp,reference"]) == 0
assert not {"lightning", "rasterio", "torchvision", "matplotlib"} & set(sys.modules)
print(f"wheel: 1 passed ({dispatch.explain('temporal_median', x).backend}, CUDA {_C.has_cuda})")
