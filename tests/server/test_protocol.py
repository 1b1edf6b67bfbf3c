"""How answers leave through a connection."""

import asyncio

import pytest

from resnet_ensemble.server.protocol import AtOnce


class Written(asyncio.Transport):
    """A transport that notes what happens to it."""

    def __init__(self) -> None:
        self.happened: list[bytes | str] = []

    def write(self, data: bytes) -> None:
        assert not self.is_closing()
        self.happened.append(data)

    def close(self) -> None:
        self.happened.append("closed")

    def abort(self) -> None:
        self.happened.append("aborted")

    def is_closing(self) -> bool:
        return not {"closed", "aborted"}.isdisjoint(self.happened)


@pytest.mark.parametrize(
    ("then", "happened"),
    [
        ("", [b"head, body", b"next"]),
        ("flush", [b"head, body"]),
        ("close", [b"head, body", "closed"]),
        ("abort", ["aborted"]),  # as when the client has gone
    ],
)
def test_what_a_turn_of_the_event_loop_writes_leaves_together(then: str, happened: list[bytes | str]) -> None:
    written = Written()

    async def answer() -> None:
        transport = AtOnce(written, asyncio.get_running_loop(), lambda whole: whole.close())
        transport.write(b"head, ")
        transport.write(b"body")
        if then:
            getattr(transport, then)()
        await asyncio.sleep(0)
        if not then:
            transport.write(b"next")
        await asyncio.sleep(0)

    asyncio.run(answer())

    assert written.happened == happened
