"""Veilhead's client: classify text with a private model that never sees the text."""

from veilhead.async_client import AsyncClient
from veilhead.client import Client
from veilhead.engine import QueryTrace
from veilhead.predictions import Prediction
from veilhead_protocol.errors import (
    AccessError,
    BackboneError,
    BatchError,
    BudgetExhaustedError,
    CallTimeoutError,
    ClientError,
    DeidentifyError,
    EncryptionError,
    InputError,
    InsecureTransportError,
    ManifestError,
    NoBackboneError,
    NotFiniteError,
    NotSentError,
    ParameterError,
    ProtocolError,
    ReplyError,
    ServiceResponseError,
    SignatureError,
    TransportError,
    VeilheadError,
)

__all__ = [
    "AccessError",
    "AsyncClient",
    "BackboneError",
    "BatchError",
    "BudgetExhaustedError",
    "CallTimeoutError",
    "Client",
    "ClientError",
    "DeidentifyError",
    "EncryptionError",
    "InputError",
    "InsecureTransportError",
    "ManifestError",
    "NoBackboneError",
    "NotFiniteError",
    "NotSentError",
    "ParameterError",
    "Prediction",
    "ProtocolError",
    "QueryTrace",
    "ReplyError",
    "ServiceResponseError",
    "SignatureError",
    "TransportError",
    "VeilheadError",
]
