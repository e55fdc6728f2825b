"""How long `/livez` takes, from a process of its own: `python -m veilhead_benchmarks.livez_probe`.

Asks on one connection until standard input closes, then prints the seconds of every answer as a
JSON list. A client that shares its interpreter with the load would measure the load.
"""

from __future__ import annotations

import http.client
import json
import select
import sys
import time
from typing import Final

_PAUSE_SECONDS: Final = 0.02


def main(port: int) -> None:
    """Probe the service on this port of loopback."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    seconds = []
    while not select.select([sys.stdin], [], [], _PAUSE_SECONDS)[0]:
        started = time.perf_counter()
        connection.request("GET", "/livez")
        response = connection.getresponse()
        response.read()
        seconds.append(time.perf_counter() - started)
        if response.status != 200:
            raise RuntimeError(f"/livez answered {response.status}, expected 200")
    json.dump(seconds, sys.stdout)


if __name__ == "__main__":
    main(int(sys.argv[1]))
