"""An AsyncClient with the face of a Client, so that one test can ask both the same."""

from __future__ import annotations

import contextlib
import functools
import inspect

from anyio.from_thread import start_blocking_portal

from veilhead import AsyncClient


class Driven:
    """An AsyncClient on an event loop of its own: its coroutines become calls."""

    def __init__(self, *arguments, **options):
        self._client = AsyncClient(*arguments, **options)
        with contextlib.ExitStack() as stack:
            self._portal = stack.enter_context(start_blocking_portal())
            stack.enter_context(self._portal.wrap_async_context_manager(self._client))
            self._stack = stack.pop_all()

    def __getattr__(self, name):
        found = getattr(self._client, name)
        if inspect.iscoroutinefunction(found):
            return lambda *arguments, **options: self._portal.call(
                functools.partial(found, *arguments, **options)
            )
        return found

    def classify_many(self, texts, **options):
        rows = self._client.classify_many(texts, **options)

        def drive():
            try:
                with contextlib.suppress(StopAsyncIteration):
                    while True:
                        yield self._portal.call(rows.__anext__)
            finally:
                self._portal.call(rows.aclose)

        return drive()

    def close(self):
        """Close the client on its loop, then end the loop."""
        with contextlib.suppress(RuntimeError):  # the loop has ended: closed twice
            self._portal.call(self._client.close)
        self._stack.close()
