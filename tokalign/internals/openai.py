"""openai's HTTP library, whose errors its client lets through (run with openai 2.25.0, 3.54.0 and 3.57.0).

The client of openai 2 stands on httpx, that of openai 3 on httpx2. An answer that breaks off while it is streamed ends
with that library's own error before openai 3.20, and with openai's since then.
Held by tests/contracts/test_openai.py.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import openai

# Found through the client that openai makes of that library's, so that neither has to be installed by name.
http: Any = sys.modules[openai.DefaultHttpxClient.__mro__[1].__module__.partition(".")[0]]


@contextmanager
def reading_stream() -> Iterator[None]:
    """Raise the errors of openai 3 for a stream that breaks off or falls silent, whichever openai it is."""
    try:
        yield
    except http.TimeoutException as error:
        raise openai.APITimeoutError(request=error.request) from error
    except http.RequestError as error:
        raise openai.APIConnectionError(request=error.request) from error
