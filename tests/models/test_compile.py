"""Models compile into one graph, and export into one for any batch and number of dates."""

import pytest
import torch

from tests.models.build import build, clouds, series
from tests.models.oracle import assert_same

IDS = torch.tensor([[0, 3, 4], [1, 2, 5]])


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()


@pytest.mark.parametrize("valid", [None, clouds()])
def test_encoder(valid):
    model, frames = build(depths=(1, 1, 1, 1)).train(), series()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    expected = model(frames, valid=valid)
    sum(x.square().sum() for x in expected).backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.load_state_dict(state)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    maps = compiled(frames, valid=valid)
    sum(x.square().sum() for x in maps).backward()
    for got, exact in zip(maps, expected):
        assert_same(got, exact)
    for p, exact in zip(model.parameters(), grads):
        assert_same(p.grad, exact)


def test_checkpointed_blocks():
    """Gradients, and statistics of the gates that move once though blocks run twice."""
    tokens, results = torch.randn(2, 3, 4, 4, 16, dtype=torch.float64), []
    for backend in (None, "aot_eager"):
        stage = build(checkpoint_blocks=True).stage1.train()
        run = torch.compile(stage, fullgraph=True, backend=backend) if backend else stage
        x = tokens.clone().requires_grad_()
        run(x, None).square().sum().backward()
        grads = [p.grad for p in stage.blocks.parameters()]
        results.append([x.grad, *grads, *(b.double() for b in stage.blocks.buffers())])
    for got, exact in zip(*results):
        assert_same(got, exact)


@pytest.mark.parametrize("statistics", ["visible", "all"])
def test_masked_autoencoder(statistics):
    options = dict(depths=(1, 1, 1, 1), decoder_depth=1, stem_statistics=statistics)
    model, frames = build("mae", **options).train(), series()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    expected = model(frames, visible_ids=IDS)
    expected.loss.backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.load_state_dict(state)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    out = compiled(frames, visible_ids=IDS)
    out.loss.backward()
    assert_same(out.loss, expected.loss)
    for p, exact in zip(model.parameters(), grads):
        assert_same(p.grad, exact)
    assert compiled(frames).visible_ids.shape == (2, 1)  # drawn within the graph


@pytest.mark.parametrize(
    "task, options, clouded",
    [
        ("classification", {}, True),
        ("segmentation", {}, True),
        ("segmentation", {}, False),
        ("segmentation", {"per_frame": True}, True),
        ("segmentation", {"temporal_pool": "encoder"}, True),
        ("segmentation", {"head": "linear"}, True),
    ],
)
def test_exported_models_take_any_batch_and_dates(task, options, clouded):
    model = build(task, num_classes=3, depths=(1, 1, 1, 1), **options).float()
    sizes = {0: torch.export.Dim("B", max=64), 1: torch.export.Dim("T", max=64)}

    def inputs(*shape):
        return series(*shape).float(), None, clouds(*shape) if clouded else None

    shapes = (sizes, None, sizes if clouded else None)
    exported = torch.export.export(model, inputs(2, 3), dynamic_shapes=shapes).module()
    for shape in ((2, 3), (1, 5), (5, 1)):
        torch.testing.assert_close(exported(*inputs(*shape)), model(*inputs(*shape)))


def test_the_exported_head_takes_any_size():
    head = build("segmentation", num_classes=3).float().eval().upernet
    rows, columns = (torch.export.Dim(name, min=2, max=64) for name in ("rows", "columns"))

    def inputs(M, h, w):
        dims = build().embed_dims
        return [torch.randn(M, dim, h >> i, w >> i) for i, dim in enumerate(dims)], [None] * 4

    M = torch.export.Dim("M", max=64)
    strides = (8, 4, 2, 1)
    sizes = [{0: M, 2: stride * rows, 3: stride * columns} for stride in strides]
    exported = torch.export.export(head, inputs(2, 16, 24), dynamic_shapes=(sizes, [None] * 4))
    for shape in ((2, 16, 24), (3, 32, 16)):
        given = inputs(*shape)
        torch.testing.assert_close(exported.module()(*given), head(*given))
