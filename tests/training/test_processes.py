import pytest
import torch

from resnet_ensemble.training.processes import Group, join

CPU = torch.device("cpu")


def test_without_torchrun_a_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    with join() as group:
        assert (group.rank, group.world, group.first) == (0, 1, True)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_shares_of_a_batch_are_the_batch(world: int) -> None:
    batch = torch.arange(16)

    shares = [Group(rank, world, CPU).share(batch) for rank in range(world)]

    assert torch.equal(torch.cat(shares), batch)
    assert len({len(share) for share in shares}) == 1


def test_alone_a_sum_is_the_value_and_a_flag_itself() -> None:
    group = Group(0, 1, CPU)

    assert group.sum(torch.tensor([2.5])).tolist() == [2.5]
    assert group.any(torch.tensor([False, True])) == [False, True]
