"""One thread for networks this small, and data sets for them."""

from collections.abc import Iterator

import pytest
import torch

from resnet_ensemble.training import cifar
from tests.training.small import cifar_of_two


@pytest.fixture(autouse=True)
def default_threads() -> Iterator[int]:
    """The number of threads that torch would use. Tests have one, unless they set it to this.

    Several that wait for each other in every small operation are slower than one: on 2 busy cores, three epochs of
    ResNet-8 took 17 s of CPU with two threads, 1.3 s with one.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield threads
    torch.set_num_threads(threads)


@pytest.fixture
def small_cifar(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever reads CIFAR-10 gets `cifar_of_two`."""
    monkeypatch.setattr(cifar, "read", cifar_of_two)
