import pytest
import torch


@pytest.fixture
def batches():
    return [torch.randn(16, 8) for _ in range(5)]
