"""Every error that Veilhead raises on purpose.

VeilheadError
├── ProtocolError                what both sides agreed on was broken
│   ├── ParameterError           a parameter set that is unknown, unsafe or below a minimum
│   ├── ScaleError               a head whose weights no scale of its parameter set can carry
│   ├── LayoutError              counts for which no layout exists
│   ├── ManifestError            a manifest that is malformed, inconsistent or too new
│   │   └── SignatureError       a manifest without the vendor's signature, or a malformed one
│   └── WireError                a message that is not what it must be
│       ├── MessageLengthError
│       ├── MessageTypeError
│       ├── FormatVersionError
│       ├── ParameterMismatchError
│       ├── PrngError
│       ├── DomainError
│       ├── MessageLayoutError
│       ├── ResidueRangeError
│       ├── ZeroPolynomialError
│       ├── PaddingError
│       ├── SeedReuseError
│       ├── ModelMismatchError
│       ├── KeyMismatchError
│       └── QueryMismatchError
├── ModelError                   the vendor's side, before anything is served
│   ├── DatasetError
│   ├── BackboneError            also raised on the client, which runs the backbone
│   ├── PrivacyError             a privacy budget that means nothing, or that the data cannot meet
│   ├── CheckpointError          a checkpoint that cannot be imported
│   └── ArtifactError
├── ServiceError                 the service cannot do what it was asked
│   ├── StoreError
│   │   ├── ModelUnavailableError    a published version that cannot be served
│   │   │   ├── HeadKeyError         its head is encrypted under a key that is not here
│   │   │   └── SelfTestError        it answers a known embedding wrongly
│   │   ├── ModelRetiredError        a version that the vendor has taken out of service
│   │   └── SecretFileError          a file of a signing or head key that cannot be used
│   ├── StateError               tenants, keys and budgets cannot be read or written
│   ├── TenantError              a tenant that is unknown, known already or badly named
│   ├── ConfigurationError       a setting that is unknown, not valid, or at odds with another
│   ├── AccessLogError           an access log that cannot be written, or that is not whole
│   └── WorkerError              no worker could answer; the same request can succeed later
│       ├── QueueFullError       too many queries wait, or too many bodies are on their way
│       └── DrainingError        the service is about to stop
└── ClientError                  the data owner's side
    ├── InsecureTransportError   plain HTTP to something that is not loopback
    ├── TransportError           no complete answer, after the retries
    │   └── CallTimeoutError     none within the time that the user gave the whole call
    ├── ServiceResponseError     the service answered with a problem
    │   ├── AccessError          no API key, a wrong one, or one that lacks a scope
    │   └── BudgetExhaustedError no queries left in this period; `retry_after` says how long
    ├── ReplyError               the service answered with something that is not a reply
    ├── NoBackboneError          `classify` on a model that takes embeddings
    ├── InputError               a value that cannot be classified (not text, wrong shape)
    │   └── NotFiniteError       an embedding with NaN or infinity
    ├── DeidentifyError          a detector that failed: the text was not sent
    ├── GatewayError             the gateway refuses a caller
    │   ├── CallerError          no token of a caller, or another one
    │   ├── RequestSizeError     more texts or bytes than one request may have
    │   ├── GatewayFullError     too many texts wait already
    │   ├── GatewayTimeoutError  the request took longer than any may
    │   └── GatewayClosedError   the gateway is about to stop
    ├── NotSentError             a row left unsent, since an earlier one failed for all of them
    └── BatchError               some rows failed; `results` keeps the others, `errors` says which

`code` is stable, names the error on the wire (`problems.py` in the service), and never changes.
Messages say what was got and what was expected, and never contain text, values or key material.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar


class VeilheadError(Exception):
    """Base of every error raised on purpose."""

    code: ClassVar[str] = "veilhead-error"


class ProtocolError(VeilheadError):
    """What both sides agreed on was broken."""

    code = "protocol-error"


class ParameterError(ProtocolError):
    """A parameter set that is unknown, unsafe or below a required minimum."""

    code = "parameters"


class ScaleError(ProtocolError):
    """A head whose weights no scale of its parameter set can carry."""

    code = "scale"


class LayoutError(ProtocolError):
    """Counts for which no layout exists."""

    code = "layout"


class ManifestError(ProtocolError):
    """A manifest that is malformed, inconsistent or made by a newer version."""

    code = "manifest"


class SignatureError(ManifestError):
    """A manifest that no accepted vendor key has signed, or a signature or key that is not one."""

    code = "signature"


class WireError(ProtocolError):
    """A message that is not what it must be."""

    code = "malformed-message"


class MessageLengthError(WireError):
    """Fewer or more bytes than the header's counts require."""

    code = "wrong-length"


class MessageTypeError(WireError):
    """Not a Veilhead message, or one of another type."""

    code = "wrong-message-type"


class FormatVersionError(WireError):
    """A format version that this side does not speak."""

    code = "unsupported-format-version"


class ParameterMismatchError(WireError):
    """A parameter id that is unknown, or not the one in use here."""

    code = "wrong-parameters"


class PrngError(WireError):
    """A seed expansion that does not exist."""

    code = "unknown-prng"


class DomainError(WireError):
    """A polynomial domain that does not exist."""

    code = "unknown-domain"


class MessageLayoutError(WireError):
    """Counts or layout that differ from the canonical ones."""

    code = "wrong-layout"


class ResidueRangeError(WireError):
    """A residue at or above its prime."""

    code = "residue-out-of-range"


class ZeroPolynomialError(WireError):
    """A polynomial whose residues are all zero."""

    code = "zero-polynomial"


class PaddingError(WireError):
    """Reserved bytes or padding bits that are not zero."""

    code = "nonzero-padding"


class SeedReuseError(WireError):
    """A seed that occurs twice, in one request or in the request and its key."""

    code = "seed-reused"


class ModelMismatchError(WireError):
    """A message that names another model than the one asked."""

    code = "wrong-model"


class KeyMismatchError(WireError):
    """A message under another key than the one expected."""

    code = "wrong-key"


class QueryMismatchError(WireError):
    """A reply to another query."""

    code = "wrong-query"


class ModelError(VeilheadError):
    """The vendor's side, before anything is served."""

    code = "model-error"


class DatasetError(ModelError):
    """A data set that is unknown, unreadable or not what its digest says."""

    code = "dataset"


class BackboneError(ModelError):
    """A backbone that cannot be loaded, or is not what its digests say."""

    code = "backbone"


class PrivacyError(ModelError):
    """A privacy budget that means nothing, or that the training data cannot meet."""

    code = "privacy-budget"


class CheckpointError(ModelError):
    """A checkpoint that cannot be imported: unreadable, unsafe to read, or not to be split."""

    code = "checkpoint"


class ArtifactError(ModelError):
    """An artefact directory that is incomplete, inconsistent or cannot be written."""

    code = "artifact"


class ServiceError(VeilheadError):
    """The service cannot do what it was asked."""

    code = "service-error"


class StoreError(ServiceError):
    """A model store that cannot give or take what was asked."""

    code = "model-store"


class ModelUnavailableError(StoreError):
    """A published version that cannot be served, for a reason that only its vendor can mend."""

    code = "model-unavailable"


class HeadKeyError(ModelUnavailableError):
    """A head that is encrypted under a key that is missing or another one, or was altered."""

    code = "head-key"


class SelfTestError(ModelUnavailableError):
    """A version that answers a known embedding wrongly."""

    code = "self-test"


class SecretFileError(StoreError):
    """A file of a signing or head key that is absent, malformed or would be overwritten."""

    code = "secret-file"


class ModelRetiredError(StoreError):
    """A version, or a name's current version, that the vendor has taken out of service."""

    code = "model-retired"


class StateError(ServiceError):
    """Tenants, keys and budgets cannot be read or written."""

    code = "state-unavailable"


class TenantError(ServiceError):
    """A tenant or an API key that is unknown, known already, or not one that can be made."""

    code = "tenant"


class WorkerError(ServiceError):
    """The evaluating process died, or none is free."""

    code = "worker-unavailable"


class QueueFullError(WorkerError):
    """Too many queries wait already, or too many bodies are on their way."""

    code = "queue-full"


class DrainingError(WorkerError):
    """The service is about to stop, and takes no new queries."""

    code = "draining"


class ConfigurationError(ServiceError):
    """A setting that is unknown, not valid, or at odds with another one."""

    code = "configuration"


class AccessLogError(ServiceError):
    """An access log that cannot be written, or whose chain of records is broken."""

    code = "access-log-unavailable"


class ClientError(VeilheadError):
    """The data owner's side."""

    code = "client-error"


class InsecureTransportError(ClientError):
    """Plain HTTP to something that is not loopback."""

    code = "insecure-transport"


class TransportError(ClientError):
    """No complete answer came, after the retries."""

    code = "transport"


class CallTimeoutError(TransportError):
    """No answer within the time that the user gave the whole call, `call_timeout`."""

    code = "call-timeout"


class ServiceResponseError(ClientError):
    """The service answered with a problem.

    Attributes: `status` (HTTP status), `problem` (the stable code in the problem's type),
    `request_id` (quote it to the vendor), `retryable`, `retry_after` (whole seconds that the
    service asks to wait before another try; None where it does not say).
    """

    code = "service-response"

    def __init__(
        self,
        message: str,
        *,
        status: int,
        problem: str,
        request_id: str | None,
        retryable: bool,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.problem = problem
        self.request_id = request_id
        self.retryable = retryable
        self.retry_after = retry_after


class AccessError(ServiceResponseError):
    """The service wants an API key, or another one than it got."""

    code = "access"


class BudgetExhaustedError(ServiceResponseError):
    """The tenant has no queries left for this model in this period.

    Attributes: `retry_after`, whole seconds until the period ends.
    """

    code = "budget-exhausted"
    retry_after: int

    def __init__(self, message: str, *, retry_after: int, **details: Any) -> None:
        super().__init__(message, retry_after=retry_after, **details)


class ReplyError(ClientError):
    """The service answered with something that is not a reply to this query."""

    code = "reply"


class NoBackboneError(ClientError):
    """`classify` was called on a model that takes embeddings only."""

    code = "no-backbone"


class InputError(ClientError):
    """A value that cannot be classified: not text, or an array of the wrong shape."""

    code = "input"


class EncryptionError(ClientError):
    """A row could not be encrypted: a decoy was sent in its place."""

    code = "encryption"


class NotFiniteError(InputError):
    """An embedding that contains NaN or infinity."""

    code = "not-finite"


class DeidentifyError(ClientError):
    """A detector of the de-identification failed, so that the text was not embedded."""

    code = "deidentify"


class GatewayError(ClientError):
    """The gateway refuses a caller."""

    code = "gateway"


class CallerError(GatewayError):
    """A request without the token of a caller."""

    code = "caller"


class RequestSizeError(GatewayError):
    """More texts or bytes than one request may have."""

    code = "request-size"


class GatewayFullError(GatewayError):
    """Too many texts wait already."""

    code = "gateway-full"


class GatewayTimeoutError(GatewayError):
    """A request that took longer than any may, most often since the service does not answer."""

    code = "gateway-timeout"


class GatewayClosedError(GatewayError):
    """The gateway is about to stop, and takes no new texts."""

    code = "gateway-closed"


class NotSentError(ClientError):
    """A row left unsent, because an earlier one showed that none can succeed."""

    code = "not-sent"


class BatchError(ClientError):
    """Some rows of a batch failed; the others kept their answers.

    Attributes: `results`, one entry a row in order, None where the row failed; `errors`, from row
    number to its error.
    """

    code = "batch"

    def __init__(self, results: Sequence[Any], errors: Mapping[int, VeilheadError]) -> None:
        first = min(errors)
        super().__init__(
            f"{len(errors)} of {len(results)} rows failed, the first is row {first}: "
            f"{errors[first]} The answers of the other rows are in `.results`, "
            "the errors by row number in `.errors`."
        )
        self.results = list(results)
        self.errors = dict(errors)
