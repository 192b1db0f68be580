"""KD: absorb a finished direction into the old magnitudes, so that it ships no factors.

It is absorbed if the old directions reproduce it within a relative squared error tau:

    c = argmin_c ||D_t - sum_{k<t} c_k D_k||_F^2
    residual = ||D_t - sum_k c_k D_k||_F^2 / ||D_t||_F^2, in [0, 1]
    if residual <= tau:  alpha_k += alpha_t c_k

It is ONE least-squares fit over all projections together, because alpha is shared by all of them.
The paper leaves alpha_t out of the absorption, which would change the model's function even at
residual 0; and its residual is absolute. numpy only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ..formats.encoding import Factors


def fit(
    new: Mapping[str, Factors], old: Sequence[Mapping[str, Factors]]
) -> tuple[np.ndarray, float]:
    """Fit a direction by the old ones, each {projection: factors}.

    Returns (c float64 (len(old),), residual). An old task without factors, which was absorbed
    itself, gets c = 0. Without any old direction the residual is 1.
    """
    inner = np.array([[_inner(a, b) for b in old] for a in old]).reshape(len(old), len(old))
    right = np.array([_inner(new, a) for a in old])
    whole = _inner(new, new)
    shares = np.linalg.lstsq(inner, right, rcond=1e-10)[0] if len(old) else right
    left = whole - 2 * shares @ right + shares @ inner @ shares
    return shares, float(np.clip(left / whole, 0.0, 1.0)) if whole > 0 else 0.0


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
