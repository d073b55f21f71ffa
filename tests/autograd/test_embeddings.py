"""Rows of an embedding: layers that read them keep nothing and look them up again."""

import copy

import pytest
import torch
from layer_oracles import relative
from support import bytes_kept
from torch import nn
from torch.utils.checkpoint import checkpoint

import fewbit


class LooksUp(nn.Module):
    """Rows of an embedding, and a linear layer that reads them."""

    def __init__(self, rows=50, width=32, **options):
        super().__init__()
        self.embed, self.head = nn.Embedding(rows, width, **options), nn.Linear(width, 7)

    def forward(self, indices):
        return self.head(self.embed(indices))


class TestEmbeddings:
    """Embeddings are looked up again: their readers keep nothing, and gradients are exact."""

    @pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
    @pytest.mark.parametrize("options", [{}, {"padding_idx": 0}, {"scale_grad_by_freq": True}], ids=str)
    def test_readers_keep_nothing(self, options, dtype):
        model, indices = LooksUp(**options), torch.randint(50, (16, 40), dtype=dtype)
        coded = fewbit.convert(copy.deepcopy(model), bits=2)
        results = [each(indices) for each in (model, coded)]
        for each in results:
            each.sin().sum().backward()
        assert torch.equal(*results)
        for one, other in zip(model.parameters(), coded.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad)
        assert bytes_kept(coded, indices, leave_out=[coded.embed.weight]) == 0

    def test_of_indices_that_are_computed(self):
        class Positions(LooksUp):
            def forward(self, x):
                return super().forward(torch.arange(4096) % 50 + 0 * x)

        model = Positions()
        coded, x = fewbit.convert(copy.deepcopy(model), bits=4), torch.zeros(1, dtype=torch.int64)
        for each in (model, coded):
            each(x).sin().sum().backward()
        torch.testing.assert_close(coded.head.weight.grad, model.head.weight.grad)
        assert bytes_kept(coded, x) <= 4096  # a byte an index

    def test_a_weight_that_has_changed_is_seen(self):
        model = fewbit.convert(LooksUp(), bits=4)
        y = model(torch.randint(50, (16, 40)))
        with torch.no_grad():
            model.embed.weight.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()

    def test_rows_that_are_made_shorter_are_coded(self):
        model, indices = LooksUp(max_norm=0.5), torch.randint(50, (16, 40))
        coded = fewbit.convert(copy.deepcopy(model), bits=8)
        for each in (model, coded):
            y = each(indices)
            each(torch.arange(50))  # this changes the weight
            y.sin().sum().backward()
        assert relative(coded.head.weight.grad, model.head.weight.grad) < 0.02

    def test_sharded_weights_are_not_counted_on(self, monkeypatch):
        model, indices = fewbit.convert(LooksUp(), bits=4), torch.randint(50, (16, 40))
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        assert bytes_kept(model, indices) >= 16 * 40 * 32 // 2

    def test_checkpointed(self):
        model = LooksUp()
        coded, indices = fewbit.convert(copy.deepcopy(model), bits=2), torch.randint(50, (16, 40))
        model(indices).sin().sum().backward()
        checkpoint(coded, indices, use_reentrant=False).sin().sum().backward()
        torch.testing.assert_close(coded.head.weight.grad, model.head.weight.grad)
