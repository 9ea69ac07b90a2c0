"""The errors of openai's HTTP library while an answer is streamed."""

from __future__ import annotations

import openai
import pytest

from tokalign.internals.openai import http, reading_stream


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [("ReadTimeout", openai.APITimeoutError), ("RemoteProtocolError", openai.APIConnectionError)],
)
def test_the_librarys_errors_become_openais(theirs, ours) -> None:
    request = http.Request("GET", "http://127.0.0.1/")
    with pytest.raises(ours) as caught, reading_stream():
        raise getattr(http, theirs)("silence", request=request)
    assert caught.value.request is request
    assert issubclass(openai.APITimeoutError, openai.APIConnectionError)


def test_the_client_is_of_that_library() -> None:
    assert issubclass(openai.DefaultHttpxClient, http.Client)
