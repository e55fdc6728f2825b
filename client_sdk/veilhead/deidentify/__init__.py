"""De-identification: values that point at a person leave a text before it is embedded.

A reduction of risk, not anonymisation: names, addresses and whatever else has no form of its own
stay where they are. docs/deidentify.md has the measured recall and precision.
"""

from veilhead.deidentify.deidentifier import (
    Deidentified,
    Deidentifier,
    Span,
    chosen_deidentifier,
)
from veilhead.deidentify.detectors import default_detectors
from veilhead.deidentify.findings import Detector, Finding

__all__ = [
    "Deidentified",
    "Deidentifier",
    "Detector",
    "Finding",
    "Span",
    "chosen_deidentifier",
    "default_detectors",
]
