"""`python -m veilhead_service`, the same as `veilhead-server`."""

from veilhead_service.cli import app

app()
