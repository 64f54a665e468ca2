"""Guard bands and poison do find what they are for."""

import pytest
import torch

from tests.guards import guarded


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8])
@pytest.mark.parametrize("beside", [-1, 6])
def test_a_write_beside_is_found(dtype, beside):
    with pytest.raises(AssertionError, match=r"outside its output .* \(2, 3\)"):
        with guarded():
            x = torch.empty((2, 3), dtype=dtype)
            x.fill_(0)
            # NaN too, which a kernel may well write
            wrong = float("nan") if dtype.is_floating_point else 0
            x.as_strided((1,), (1,), x.storage_offset() + beside).fill_(wrong)


def test_what_is_not_written_shows():
    like = torch.zeros(4, dtype=torch.float16)
    with guarded():
        for x in (torch.empty(4), torch.empty((4,)), torch.empty_like(like), like.new_empty(4)):
            assert x.shape == (4,) and x.isnan().all()
        assert (torch.empty(4, dtype=torch.int64).abs() > 2**61).all()
