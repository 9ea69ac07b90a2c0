"""uvicorn's HTTP protocols (run with uvicorn 0.54.0), which wait for a request's headers without end.

Held by tests/routing/test_server.py, through real sockets.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol


def punctual_protocol(seconds: float) -> type[asyncio.Protocol]:
    """The HTTP protocol that uvicorn would choose, which closes a connection whose request headers are not complete
    `seconds` after they could begin: a socket costs its client nothing, and the server's are limited.
    """
    base: Any = AutoHTTPProtocol

    class Punctual(base):
        _deadline: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            if self._deadline is not None:
                self._deadline.cancel()

        def _watch(self) -> None:
            """Between two requests uvicorn's own keep-alive timer runs, until the first byte of the second."""
            if not self._waits():
                if self._deadline is not None:
                    self._deadline.cancel()
                    self._deadline = None
            elif self._deadline is None:
                self._deadline = self.loop.call_later(seconds, self._close)

        def _waits(self) -> bool:
            return self.cycle is None or self.cycle.response_complete  # one is made when the headers are complete

        def _close(self) -> None:
            self._deadline = None
            if self._waits():
                self.transport.close()

    return Punctual
