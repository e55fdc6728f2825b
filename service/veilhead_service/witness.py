"""The access log as the witness of revocations: does it know the state that is here?

A backup of the state, put back, would let in again whoever was revoked since. So each command that
ends keys raises the state's epoch, and is recorded in the access log, which no backup of the state
brings back. A state that lacks what the log knows is refused, until `tenants accept-restored` has
ended the keys again.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from veilhead_protocol.errors import AccessLogError, StateError
from veilhead_service.access_log import AccessLog
from veilhead_service.access_log_chain import FILE_NAME, Witness, end_of, holds, records_of
from veilhead_service.state import Ending, Identity, State

#: A service that runs records what a command did within this.
_RECORD_SECONDS: Final = 5.0
_NEVER_FULL: Final = 2**62

_ADVICE: Final = (
    "nobody is let in until `veilhead-server tenants accept-restored` has looked through it "
    "(docs/operations/tenants.md, Backup)"
)


def witness_of(state: State) -> Witness:
    """What the log is to say of a state."""
    endings = state.endings()
    last = endings[-1] if endings else None
    return Witness(state.identity().id, last.epoch if last else 0, last.token if last else "")


def check_agreement(state: State, known: Witness | None, log: Path | None = None) -> None:
    """See that a state is not older than what the log knows of it, and has lost nothing of it.

    Args:
        state: the state.
        known: the log's last witness.
        log: look in this log for the record that the state remembers; not while it is being
            written, where that was done at the start.

    Raises:
        StateError: when it must not be used.
        AccessLogError: when the log cannot be read.
    """
    identity = state.identity()
    if known is None:
        if identity.log_sequence:
            raise StateError(
                "the access log that this state was recorded in is gone, and with it the record of "
                f"which keys were revoked: {_ADVICE}"
            )
    elif known.state != identity.id:
        raise StateError(f"this is another state than the access log knows: {_ADVICE}")
    elif known.epoch:
        found = {item.epoch: item.token for item in state.endings(known.epoch - 1)}
        if found.get(known.epoch) != known.token:
            raise StateError(
                "this state is older than the access log, or another branch of it: keys were "
                f"revoked since: {_ADVICE}"
            )
    if log is not None and _is_cut(log, identity):
        raise StateError(
            f"the access log lacks the record {identity.log_sequence} that this state "
            f"remembers: its end was cut off, or it was written anew: {_ADVICE}"
        )
    _check_applied(state)


def _is_cut(log: Path, identity: Identity) -> bool:
    """Whether a log lacks the record that a state remembers."""
    sequence = identity.log_sequence
    return sequence > 0 and holds(log, sequence, identity.log_head) is False


def _check_applied(state: State) -> None:
    """See that every key that was ended has ended: a file patched together may say both."""
    keys = {key.id: key for key in state.api_keys()}
    for ending in state.endings():
        for key in (keys[found] for found in ending.api_keys if found in keys):
            ends = key.revoked if ending.how == "revoked" else key.expires
            if key.revoked is None and (ends is None or ends > ending.ends):
                raise StateError(
                    f"the state says that the API key {key.id} was {ending.how}, and lets it in: "
                    "it was put together from parts of several; restore a whole backup"
                )


def record_of(ending: Ending, state_id: str) -> dict[str, Any]:
    """What the log says of keys that were ended."""
    return {
        "event": "keys-ended",
        "tenant": ending.tenant,
        "how": ending.how,
        "api_keys": list(ending.api_keys),
        "ends": ending.ends,
        **Witness(state_id, ending.epoch, ending.token).fields(),
    }


def _ending_of(record: dict[str, Any]) -> Ending | None:
    known = Witness.of(record)
    how, tenant, ids, ends = (record.get(name) for name in ("how", "tenant", "api_keys", "ends"))
    if known is None or how not in ("revoked", "rotated") or not isinstance(ids, list):
        return None
    if not isinstance(ends, float | int) or not isinstance(tenant, str):
        return None
    return Ending(known.epoch, known.token, how, tenant, tuple(map(str, ids)), float(ends))


def check_command(state: State, directory: Path) -> None:
    """Refuse a command on a state that the service would refuse.

    Raises:
        StateError: when the state must not be used.
        AccessLogError: when the log cannot be read.
    """
    log = directory / FILE_NAME
    check_agreement(state, end_of(log).witness, log)


def record_endings(state: State, directory: Path) -> None:
    """Have the log say what a command ended: by the service that writes it, or else here.

    Raises:
        StateError: when it does not say so in time; the keys have ended all the same.
    """
    last = max((ending.epoch for ending in state.endings()), default=0)
    log = AccessLog(directory / FILE_NAME, sync_seconds=0, file_bytes=_NEVER_FULL)
    deadline = time.monotonic() + _RECORD_SECONDS
    reason = ""
    while state.identity().logged_epoch < last:
        try:
            log.start()
        except AccessLogError as error:  # usually: the service has it
            reason = str(error)
            if time.monotonic() > deadline:
                raise StateError(
                    "the keys have ended in this state, but the access log does not say so yet "
                    f"({reason}). Does the service run on this state, and is it ready? Until it "
                    "is recorded, a restored backup would let them in again"
                ) from error
            time.sleep(0.05)
            continue
        try:
            write_endings(state, log)
        finally:
            log.stop()


def write_endings(state: State, log: AccessLog, *, introduce: bool = False) -> None:
    """Append what the log does not know yet, and note in the state that it does.

    With `introduce`, the log names the state although nothing has ended.

    Raises:
        AccessLogError: when the log cannot be written.
        StateError: when the state fails.
    """
    known = log.end.witness
    identity = state.identity()
    after = known.epoch if known is not None and known.state == identity.id else 0
    for ending in state.endings(after):
        log.append(sync=True, **record_of(ending, identity.id)).result()
    if introduce:
        log.append(sync=True, event="state", **witness_of(state).fields()).result()
    end = log.end
    epoch = 0 if end.witness is None else end.witness.epoch
    state.note_logged(epoch, end.sequence, end.head)


@dataclass(frozen=True)
class Acceptance:
    """What `accept` did.

    Attributes:
        ended: API keys that had not ended in the restored state, with what the log says of them.
        missing: those that the log names and that the state does not know.
    """

    ended: tuple[tuple[str, Ending], ...]
    missing: tuple[tuple[str, Ending], ...]


def accept(state: State, directory: Path, *, without_log: bool) -> Acceptance:
    """Take a restored state for the one to go on with, once what the log knows has ended.

    Args:
        state: the restored state.
        directory: where the log is.
        without_log: go on although the log, or a part of it, is gone.

    Raises:
        StateError: when the log does not hold all that was ended.
        AccessLogError: when the log cannot be read.
    """
    log = directory / FILE_NAME
    end = end_of(log)
    given = [ending for record in records_of(log, "keys-ended") if (ending := _ending_of(record))]
    last = end.witness
    if last is not None:
        given = _of_one_history(given)
    if not without_log:
        _check_log(state, log, last, given)
    held = {item.epoch: item for item in state.endings()}
    tokens = {ending.token for ending in given}
    epochs = {ending.epoch for ending in given}
    kept = [item for item in held.values() if item.epoch not in epochs and item.token not in tokens]
    if last is not None:
        given += [item for item in kept if item.epoch <= last.epoch]
        if last.epoch and last.epoch not in {ending.epoch for ending in given}:
            # Nobody knows any more what it ended, only that there was such a command.
            given.append(Ending(last.epoch, last.token, "revoked", "", (), time.time()))
        given.sort(key=_epoch)
    identity = replace(
        state.identity(),
        id=state.identity().id if last is None else last.state,
        logged_epoch=0 if last is None else last.epoch,
        log_sequence=0 if last is None else end.sequence,
        log_head="" if last is None else end.head,
    )
    known = {key.id for key in state.api_keys()}
    ended = set(state.accept(given, identity))
    pairs = [(found, ending) for ending in given for found in ending.api_keys]
    return Acceptance(
        tuple(pair for pair in pairs if pair[0] in ended),
        tuple(pair for pair in pairs if pair[0] not in known),
    )


def _check_log(state: State, log: Path, last: Witness | None, given: list[Ending]) -> None:
    """Raises StateError when the log cannot say what was ended."""
    identity = state.identity()
    known = {ending.epoch for ending in (*given, *state.endings())}
    absent = set() if last is None else set(range(1, last.epoch + 1)) - known
    cut = last is not None and last.state == identity.id and _is_cut(log, identity)
    if last is not None and not absent and not cut:
        return
    if last is None:
        lack = "there is no access log that knows which keys were revoked"
    elif absent:
        lack = f"the access log lacks {len(absent)} of {last.epoch} commands that ended keys"
    else:
        lack = f"the access log lacks the record {identity.log_sequence} and what followed"
    raise StateError(
        f"{lack}: put the files back that were moved away, beside it. Where they are lost, "
        "`--without-log` goes on without them: then revoke again whom you revoked since the backup"
    )


def _of_one_history(endings: Iterable[Ending]) -> list[Ending]:
    """The last one of each epoch: that of the state which the log knew last."""
    return sorted({ending.epoch: ending for ending in endings}.values(), key=_epoch)


def _epoch(ending: Ending) -> int:
    return ending.epoch
