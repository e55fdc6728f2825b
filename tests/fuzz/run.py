"""Fuzz every parser by coverage, each in a process of its own: `python tests/fuzz/run.py`.

Needs the extra `fuzz`. Exit status 1 when a parser raised what it does not declare; the input is
then in the directory of findings.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import atheris

PACKAGES = ["veilhead_protocol", "veilhead_service"]

#: Longer than any message of the tests, so that good ones are reached.
MAX_BYTES = 60_000


def names() -> list[str]:
    from targets import TARGETS

    return list(TARGETS)


def fuzz(name: str, seconds: int, findings: Path) -> None:
    """Fuzz one parser in this process, and end it."""
    with atheris.instrument_imports(include=[*PACKAGES, "targets"]):
        from targets import TARGETS
    target = TARGETS[name]
    corpus = findings / "corpus" / name
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(target.seeds):
        (corpus / f"seed-{number}").write_bytes(seed)
    options = [f"-max_total_time={seconds}", f"-max_len={MAX_BYTES}", "-timeout=10", "-seed=1"]
    options += [f"-artifact_prefix={findings / name}-", "-print_final_stats=1", "-verbosity=0"]
    atheris.Setup([sys.argv[0], *options, str(corpus)], target)
    atheris.Fuzz()


def main() -> int:
    """Fuzz what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=20, help="for each parser")
    parser.add_argument("--findings", type=Path, help="where inputs that fail are kept")
    parser.add_argument("--one", help="fuzz this parser in this process")
    parser.add_argument("targets", nargs="*", help="parsers; all of them when there are none")
    arguments = parser.parse_args()
    findings = arguments.findings or Path(tempfile.mkdtemp(prefix="veilhead-fuzz-findings-"))
    findings.mkdir(parents=True, exist_ok=True)
    if arguments.one:
        fuzz(arguments.one, arguments.seconds, findings)
    failed = []
    for name in arguments.targets or names():
        command = [sys.executable, __file__, "--one", name, "--findings", str(findings)]
        # libFuzzer ends its process without clean-up: this directory is removed for it.
        scratch = findings / "corpus"
        scratch.mkdir(exist_ok=True)
        done = subprocess.run(
            [*command, "--seconds", str(arguments.seconds)],
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"TMPDIR": str(scratch)},
        )
        shutil.rmtree(scratch, ignore_errors=True)
        runs = [line for line in done.stderr.splitlines() if "number_of_executed_units" in line]
        executed = runs[-1].split()[-1] if runs else "?"
        print(f"{name}: {executed} inputs, {'nothing found' if not done.returncode else 'FAILED'}")
        if done.returncode:
            failed.append(name)
            print("\n".join((done.stdout + done.stderr).splitlines()[-30:]))
    if failed:
        print(f"{len(failed)} parsers failed; the inputs are in {findings}")
    elif not any(findings.iterdir()):
        findings.rmdir()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
