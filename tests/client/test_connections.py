"""Which connections a client uses, in processes that were forked and in one event loop after the other."""

import asyncio
import gc
import os
import subprocess
import sys

import pytest

from resnet_ensemble.client import AsyncClient

FORKED = """
import os, sys
from resnet_ensemble.client import Client

client = Client(sys.argv[1], max_retries=0)
labels = {client.classify(b"x").label, client.classify(b"x").label}
child = os.fork()
labels.add(client.with_options(timeout=5).classify(b"x").label)
if child:
    os.waitpid(child, 0)
print(len(labels), flush=True)
"""


def test_a_forked_process_does_not_share_its_parents_connections(ports: str) -> None:
    command = [sys.executable, "-c", FORKED, ports]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}

    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)

    assert done.stdout.split() == ["2", "1"]  # the child's has one of its own, the parent's none


# that a connection was not closed with its event loop
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_asynchronous_client_may_be_used_in_one_event_loop_after_the_other(ports: str) -> None:
    client = AsyncClient(ports, max_retries=0)

    async def twice() -> set[str]:
        return {(await client.classify(b"x")).label, (await client.with_options(timeout=5).classify(b"x")).label}

    found = [asyncio.run(twice()) for _ in range(3)]
    asyncio.run(client.close())
    gc.collect()

    assert [len(labels) for labels in found] == [1, 1, 1]  # within a loop they are kept alive
    assert len(set.union(*found)) == 3
    with pytest.raises(RuntimeError, match="closed"):
        asyncio.run(client.classify(b"x"))
