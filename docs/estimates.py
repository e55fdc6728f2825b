"""The security estimates of docs/protocol.md, to be repeated by anybody.

    python3 -m venv estimator-venv
    estimator-venv/bin/pip install passagemath-standard
    git clone https://github.com/malb/lattice-estimator
    git -C lattice-estimator checkout 27a581b
    PYTHONPATH=protocol estimator-venv/bin/python docs/estimates.py lattice-estimator

Nothing imports this file, and the project needs none of these packages. It takes about six minutes
of one core. It ends with status 1 when a figure that `parameters.py` states is not what was
computed.
"""

from __future__ import annotations

import argparse
import importlib
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from veilhead_protocol.parameters import (
    ERROR_VARIANCE,
    MAX_SERVED_EXPONENT,
    PARAMETER_SETS,
    ParameterSet,
)

#: Entropy of a coefficient of a ternary secret.
TERNARY_BITS = math.log2(3)


def costs(estimator: ModuleType, problem: Any, model: Any) -> dict[str, float]:
    """log2 of the cost of each attack on an LWE problem, reduction costing what `model` says."""
    lwe = estimator.LWE
    found = {
        "usvp": lwe.primal_usvp(problem, red_cost_model=model),
        "bdd": lwe.primal_bdd(problem, red_cost_model=model),
        "dual_hybrid": lwe.dual_hybrid(problem, red_cost_model=model),
    }
    return {name: math.log2(cost["rop"]) for name, cost in found.items()}


def block_size(estimator: ModuleType, problem: Any) -> int:
    """The least block size beta of usvp, for core-SVP."""
    model = estimator.RC.ADPS16
    return int(estimator.LWE.primal_usvp(problem, red_cost_model=model)["beta"])


def key_problem(estimator: ModuleType, parameters: ParameterSet) -> Any:
    """The secret key, from any number of ciphertexts."""
    return estimator.LWE.Parameters(
        n=parameters.poly_modulus_degree,
        q=parameters.prime,
        Xs=estimator.ND.Uniform(-1, 1),
        Xe=estimator.ND.DiscreteGaussian(math.sqrt(ERROR_VARIANCE)),
    )


def mask_problem(
    estimator: ModuleType,
    parameters: ParameterSet,
    exponent: int,
    *,
    cut: bool,
) -> Any:
    """The mask's u, out of one reply polynomial, for a client that crafted its key.

    Every coefficient that hints can tell of is known, at log2(3) bits each. What is left is an LWE
    problem in the other coefficients of u: the N coefficients of a u + e1. As they are sent, cut to
    kappa bits, their error is uniform in half a unit of Q / 2^kappa to either side. Without the cut
    it would be that of encryption.
    """
    hints = parameters.max_wanted(exponent) * (exponent + 11)
    unknown = parameters.poly_modulus_degree - math.ceil(hints / TERNARY_BITS)
    half_unit = parameters.prime / 2.0 ** (exponent + 21) / 2
    if cut:
        error = estimator.ND.Uniform(-math.floor(half_unit), math.floor(half_unit))
    else:
        error = estimator.ND.DiscreteGaussian(math.sqrt(ERROR_VARIANCE))
    return estimator.LWE.Parameters(
        n=unknown,
        q=parameters.prime,
        Xs=estimator.ND.Uniform(-1, 1),
        Xe=error,
        m=parameters.poly_modulus_degree,
    )


def lines(estimator: ModuleType, parameters: ParameterSet) -> Iterator[tuple[str, bool]]:
    """What was computed for a set, each line with whether it is what `parameters.py` states."""
    name = parameters.name
    problem = key_problem(estimator, parameters)
    attacks = costs(estimator, problem, estimator.RC.MATZOV)
    least = min(attacks.values())
    each = ", ".join(f"{attack} {bits:.1f}" for attack, bits in attacks.items())
    good = abs(least - parameters.estimated_bits) <= 0.1
    yield f"{name}: MATZOV 2^{least:.1f} ({each}); stated {parameters.estimated_bits}", good

    beta = block_size(estimator, problem)
    classical, quantum = 0.292 * beta, 0.257 * beta
    good = all(
        abs(bits - stated) <= 0.1
        for bits, stated in zip((classical, quantum), parameters.core_svp_bits, strict=True)
    )
    yield (
        (
            f"{name}: core-SVP, beta {beta}: classical 2^{classical:.1f} (0.292 beta), quantum "
            f"2^{quantum:.1f} (0.257 beta; 2^{0.265 * beta:.1f} at 0.265); "
            f"stated {parameters.core_svp_bits}"
        ),
        good,
    )

    for exponent in range(MAX_SERVED_EXPONENT + 1):
        for cut in (True, False):
            problem = mask_problem(estimator, parameters, exponent, cut=cut)
            attacks = costs(estimator, problem, estimator.RC.MATZOV)
            yield (
                (
                    f"{name}: the mask of logits below 2^{exponent}, "
                    f"{parameters.max_wanted(exponent)} wanted, {problem.n} unknown, "
                    f"{f'cut to {exponent + 21} bits' if cut else 'were it not cut'}: "
                    f"2^{min(attacks.values()):.1f}"
                ),
                True,
            )

    beta = block_size(estimator, mask_problem(estimator, parameters, MAX_SERVED_EXPONENT, cut=True))
    yield (
        (
            f"{name}: the mask of logits below 2^{MAX_SERVED_EXPONENT}, core-SVP, beta {beta}: "
            f"classical 2^{0.292 * beta:.1f}, quantum 2^{0.257 * beta:.1f}"
        ),
        True,
    )


def main() -> int:
    """Prints the estimates; 1 when one of them is not what is stated."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("estimator", type=Path, help="a checkout of the lattice-estimator")
    parser.add_argument("--set", choices=PARAMETER_SETS, action="append", help="of this set only")
    arguments = parser.parse_args()
    sys.path.insert(0, str(arguments.estimator))
    estimator = importlib.import_module("estimator")
    failed = False
    for name in arguments.set or PARAMETER_SETS:
        for line, good in lines(estimator, PARAMETER_SETS[name]):
            sys.stdout.write(line + ("" if good else "  <-- not what is stated") + "\n")
            sys.stdout.flush()
            failed = failed or not good
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
