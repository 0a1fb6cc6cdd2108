"""Tokens of a training step are counted where the batches are, and read once a step."""

import pytest
import torch

from sqft_export.adapters.training import Throughput


@pytest.fixture
def readings(monkeypatch) -> list[int]:
    """Every number that is read out of a tensor, which waits for an accelerator."""
    found: list[int] = []
    read = torch.Tensor.__int__

    def reading(self):
        found.append(read(self))
        return found[-1]

    monkeypatch.setattr(torch.Tensor, "__int__", reading)
    monkeypatch.setattr(torch.Tensor, "item", lambda self: pytest.fail("read in a batch"))
    return found


def mask(*lengths: int) -> torch.Tensor:
    return (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()


def test_a_step_is_read_once_however_many_batches_it_has(readings):
    pace = Throughput()
    for _ in range(3):
        pace.add(mask(3, 5))
    assert not readings
    assert pace.end_step() == {"tokens": 24, "padded": 30}
    assert readings == [24]
    pace.add(mask(2, 4))
    assert pace.end_step() == {"tokens": 6, "padded": 8}
    assert pace.trained == 6  # the first step warms up
