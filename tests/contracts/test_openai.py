"""The HTTP library that openai's client stands on, which ours use."""

from __future__ import annotations

import openai

from tokalign.internals.openai import http


def test_the_client_is_of_that_library() -> None:
    assert issubclass(openai.DefaultHttpxClient, http.Client)
    assert issubclass(openai.DefaultAsyncHttpxClient, http.AsyncClient)


def test_it_has_what_our_clients_use() -> None:
    assert issubclass(http.TimeoutException, http.RequestError) and not issubclass(http.InvalidURL, http.RequestError)
    http.Client(
        timeout=http.Timeout(3.0, connect=1.0),
        limits=http.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=4.0),
        follow_redirects=True,
    ).close()
