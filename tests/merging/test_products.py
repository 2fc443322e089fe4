import pytest
import torch

from gift_trl.merging import products


@pytest.fixture(autouse=True)
def tried_anew():
    products.quickest_addition.cache_clear()
    yield
    products.quickest_addition.cache_clear()


def add_exactly(rows, b, a):
    return torch.mm(b, a).add_(rows)


@pytest.mark.parametrize("shape", [(170, 64, 1536), (29, 64, 896), (16, 1, 33), (40, 512, 300)])
def test_quickest_addition_has_the_bits_of_a_product_and_a_sum(shape):
    rows, rank, columns = shape
    torch.manual_seed(1)
    for dtype in (torch.bfloat16, torch.float16):
        before = torch.randn(rows, columns, dtype=dtype)
        b, a = torch.randn(rows, rank), torch.randn(rank, columns)
        add = products.quickest_addition(rows, rank, columns, torch.get_num_threads())
        assert torch.equal(add(before, b, a, torch.empty(rows, columns)), add_exactly(before, b, a))


def off_by_a_digit(rows, b, a, wide):
    return torch.nextafter(add_exactly(rows, b, a), torch.tensor(torch.inf))


def not_built(rows, b, a, wide):
    raise RuntimeError("not built with oneDNN")


@pytest.mark.parametrize("other", [off_by_a_digit, not_built])
def test_other_bits_and_missing_kernels_are_not_taken(other, monkeypatch):
    first = products.ADDITIONS[0]
    monkeypatch.setattr(products, "ADDITIONS", (first, other))
    monkeypatch.setattr(products, "seconds_of", lambda add, *tensors: 0.0 if add is other else 1.0)
    assert products.quickest_addition(16, 8, 32, 1) is first
