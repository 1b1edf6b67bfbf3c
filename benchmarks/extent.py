"""How much a benchmark of servers measures."""

from dataclasses import dataclass

from benchmarks.contestants import (
    CENTER,
    FULL,
    LITSERVE,
    LITSERVE_SINGLE,
    NAIVE,
    NAIVE_SAME,
    QUICK_WORKLOADS,
    SINGLE,
    WORKLOADS,
)


@dataclass(frozen=True)
class Extent:
    """How much is measured. Times in s, shares of the capacity.

    - rounds, seconds: of closed loops, of each cell in each round
    - parts: into which a round of single views is divided, each with every cell: their claims are about a few percent,
      and machines drift within a minute
    - sustained_tries: loads of that length at most, where the machine's pace changes meanwhile
    - of_peers: the workloads that other servers have, too
    """

    rounds: int
    seconds: float
    parts: int = 4
    clients: tuple[int, ...] = (1, 8, 32)
    shares: tuple[float, ...] = (0.3, 0.5, 0.7, 0.8, 0.9, 1.0, 1.2)
    open_rounds: int = 3
    open_seconds: float = 5.0
    sustained_seconds: float = 60.0
    sustained_tries: int = 3
    overload_share: float = 3.0
    overload_seconds: float = 15.0
    limit: float = 1.0  # of the wait, under overload
    workloads: tuple[str, ...] = tuple(workload.name for workload in WORKLOADS)
    peers: tuple[str, ...] = (NAIVE, NAIVE_SAME, LITSERVE, LITSERVE_SINGLE)
    of_peers: tuple[str, ...] = (*SINGLE, FULL)


# Whether everything works, in as little time as possible.
QUICK = Extent(
    rounds=1,
    seconds=0.1,
    parts=1,
    clients=(1, 8),
    shares=(0.5, 1.2),
    open_rounds=1,
    open_seconds=0.2,
    sustained_seconds=0.2,
    sustained_tries=1,
    overload_seconds=0.5,
    limit=0.2,
    workloads=QUICK_WORKLOADS,
    peers=(NAIVE,),
    of_peers=(CENTER,),
)
