"""A method in your own training loop, and what a context promises."""

import pytest
import torch
from torch import nn

import methods
from benchmarks.training.context import own_loop


def loaders(rows: int = 24) -> list[tuple[torch.Tensor, torch.Tensor]]:
    x = torch.rand(rows, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return [(x[:16], torch.arange(16) % 3), (x[16:], torch.arange(rows - 16) % 3)]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))


def test_own_loop_reads_loaders_and_draws_by_place() -> None:
    model = network()
    ctx = own_loop(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        classes=3,
        train=loaders(),
        meta=loaders(),
    )
    assert ctx.spec.rows == 24 and ctx.spec.classes == 3 and ctx.spec.shape == (1, 8, 8)
    assert ctx.meta is not None and len(ctx.meta) == 24
    assert ctx.train.targets.sum() == 24 and ctx.batch_size == 16
    x, y = loaders()[0]
    drawn = []
    for epoch in (0, 1, 0):
        ctx.begin_epoch(epoch)
        ctx._batches = 0  # the same place again
        batch = ctx.batch(x, y)
        assert batch.index.tolist() == [-1] * 16 and float(batch.w.sum()) == pytest.approx(1)
        drawn.append(ctx.train.draw(8).index.tolist())
    assert drawn[0] == drawn[2] != drawn[1]


def test_own_loop_refuses_an_empty_loader() -> None:
    model = network()
    with pytest.raises(ValueError, match="loader is empty"):
        own_loop(model, torch.optim.SGD(model.parameters(), lr=0.1), classes=3, train=[])


def test_own_loop_gives_mixup_the_same_result_as_by_hand() -> None:
    x, y = loaders()[0]
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ctx = own_loop(model, optimizer, classes=3, train=loaders())
    method = methods.build("mixup(alpha=0.5)")
    method.setup(ctx)
    ctx.begin_epoch(0)
    batch = method.augment(ctx.batch(x, y), ctx)
    loss = batch.w @ method.losses(ctx.forward(batch.x), batch, ctx)
    by_hand = torch.nn.functional.cross_entropy(model(batch.x), batch.y)
    torch.testing.assert_close(loss, by_hand)
