import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny networks run fastest, and sums come out the same twice, on one thread; tests of other parts may use more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
