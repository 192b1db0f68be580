"""KD: absorb a finished direction into the old magnitudes, so that it ships no factors.

It is absorbed if what would be lost is at most a share tau of all that was learned so far:

    c = argmin_c ||D_t - sum_{k<t} c_k D_k||_F^2
    residual = alpha_t^2 ||D_t - sum_{k<t} c_k D_k||_F^2 / ||sum_{k<=t} alpha_k D_k||_F^2
    if residual <= tau:  alpha_k += alpha_t c_k

It is ONE least-squares fit over all projections together, because alpha is shared by all of them.
The paper leaves alpha_t out of the absorption, which would change the model's function even at
residual 0; and its residual is absolute, of D_t without alpha_t. numpy only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ..formats.encoding import Factors


def fit(
    directions: Sequence[Mapping[str, Factors]], magnitudes: np.ndarray
) -> tuple[np.ndarray, float]:
    """Fit the last direction by the others.

    Args:
        directions: Of tasks 1 to t, {projection: factors}. A task that was absorbed has none, and
            gets c = 0.
        magnitudes: alpha, float64 (t,).

    Returns:
        (c float64 (t-1,), residual). The residual of the first direction is 1.
    """
    inner = np.array([[_inner(a, b) for b in directions] for a in directions])
    right = inner[:-1, -1]
    shares = np.linalg.lstsq(inner[:-1, :-1], right, rcond=1e-10)[0] if len(right) else right
    left = inner[-1, -1] - shares @ right  # the fit is orthogonal to what it leaves
    whole = magnitudes @ inner @ magnitudes
    return shares, max(0.0, float(magnitudes[-1] ** 2 * left / whole)) if whole > 0 else 0.0


def _inner(a: Mapping[str, Factors], b: Mapping[str, Factors]) -> float:
    """Compute sum over projections of <B_a A_a, B_b A_b>_F.

    It equals tr( (B_a^T B_b) (A_b A_a^T) ), which takes r x r products only.
    """
    total = 0.0
    for name in a.keys() & b.keys():
        f, g = a[name], b[name]
        B = f.B.astype(np.float64).T @ g.B.astype(np.float64)  # (rank of a, rank of b)
        total += float((B * (f.A.astype(np.float64) @ g.A.astype(np.float64).T)).sum())
    return total
