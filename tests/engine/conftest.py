"""One thread for the arithmetic of these tests: their models are tiny, and threads that wait for each other on busy
cores take ten times as long."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
