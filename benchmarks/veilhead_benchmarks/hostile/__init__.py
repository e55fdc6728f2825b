"""Hostile requests and connections: many, of every kind, and what each is answered with.

The service is a real one, in processes of its own, with tenants; everything goes over real sockets
on loopback. `requests` mutates what is asked, `shapes` what is done to a connection; `promises`
judges answers, and `run` what a whole run must leave as it was.
"""

from veilhead_benchmarks.hostile.promises import PROBLEMS
from veilhead_benchmarks.hostile.run import HostileReport, run_hostile, show

__all__ = ["PROBLEMS", "HostileReport", "run_hostile", "show"]
