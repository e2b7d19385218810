"""Many linear SVMs on the same rows at once: squared hinge, by Newton's method in products of whole matrices.

Each problem is what scikit-learn's LinearSVC minimises, |w|^2 / 2 + sum_i c_i max(0, 1 - s_i <z_i, w>)^2, the last
number of a row z being 1. Problems differ in signs s and costs c alone (c = 0: the row is held out), so that all
classes share every product with the rows. Rows are turned to their principal axes, where the Hessian I + 2 Z' D Z is
nearly diagonal: conjugate gradients need few steps there. The function is strongly convex with modulus 1, so weights
are no farther from the minimum than the gradient is long.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]
LENGTH = 1e-4  # of the gradient at the end: scores of rows of length 1 are off by 1.5 times that at most
STEPS, INNER = 100, 60  # of Newton's method, and of conjugate gradients in each
SLOPE = 1e-3  # share of the promised descent that a step must keep
TURNED = 1024  # rows or numbers of a row up to which principal axes are found
AT_ONCE = 2**22  # products of rows and problems: 32 MiB in each of about ten matrices


class Rows(NamedTuple):
    """Rows as the SVMs see them: (n, r) float64, and what turns (m, d + 1) others with a 1 at their end to them."""

    numbers: Matrix
    axes: Matrix | None

    def of(self, others: NDArray[np.float32]) -> Matrix:
        """(m, d) other rows, transformed in the same way: (m, r)."""
        wide = _augmented(others)
        return wide if self.axes is None else wide @ self.axes


def prepared(rows: NDArray[np.float32]) -> Rows:
    """(n, d) rows, a 1 put at the end of each, along their principal axes; as they are, where finding these is dear."""
    wide = _augmented(rows)
    count, columns = wide.shape
    if min(count, columns) > TURNED:
        return Rows(wide, None)
    if count >= columns:
        values, axes = np.linalg.eigh(wide.T @ wide)
    else:
        values, left = np.linalg.eigh(wide @ wide.T)
        axes = wide.T @ (left / np.sqrt(np.maximum(values, 1e-300)))
    axes = np.ascontiguousarray(axes[:, values > 1e-12 * values[-1]])
    return Rows(wide @ axes, axes)


def minimise(rows: Rows, signs: Matrix, costs: Matrix, start: Matrix | None = None) -> Matrix:
    """(r, p) weights of p SVMs.

    Args:
        signs: (n, p), 1 or -1. costs: (n, p) >= 0.
        start: (r, p) weights to begin with; 0 when not given.
    """
    squares = np.einsum("ij,ij->j", rows.numbers, rows.numbers)
    found = np.zeros((rows.numbers.shape[1], signs.shape[1])) if start is None else start.copy()
    at_once = max(1, AT_ONCE // len(signs))
    for first in range(0, signs.shape[1], at_once):
        some = slice(first, first + at_once)
        found[:, some] = _minimise(rows.numbers, squares, signs[:, some], costs[:, some], found[:, some])
    return found


def _minimise(rows: Matrix, squares: Matrix, signs: Matrix, costs: Matrix, own: Matrix) -> Matrix:
    """Newton's steps; a problem that is solved takes part in no further product."""
    weights = own.copy()
    left = np.arange(own.shape[1])
    gaps = 1 - signs * (rows @ own)
    for _ in range(STEPS):
        active = np.where(gaps > 0, costs, 0.0)
        gradient = own - 2 * rows.T @ (active * gaps * signs)
        lengths = np.linalg.norm(gradient, axis=0)
        going = lengths > LENGTH
        weights[:, left] = own
        if not going.any():
            break
        if not going.all():
            left, lengths = left[going], lengths[going]
            own, signs, costs, gaps, active, gradient = (
                part[:, going] for part in (own, signs, costs, gaps, active, gradient)
            )
        step, change = _direction(rows, squares, active, gradient, lengths)
        size = _size(own, step, gaps, -signs * change, costs, gradient)
        own = own + size * step
        gaps = gaps - size * signs * change
    return weights


def _direction(
    rows: Matrix, squares: Matrix, active: Matrix, gradient: Matrix, lengths: Matrix
) -> tuple[Matrix, Matrix]:
    """Newton's step (r, p), nearly, and what it adds to the products of the rows, (n, p): conjugate gradients."""
    scale = 1 / (1 + 2 * squares[:, None] * active.mean(axis=0))
    goal = np.minimum(0.1, np.sqrt(lengths)) * lengths
    step, change = np.zeros_like(gradient), np.zeros_like(active)
    rest = -gradient
    eased = scale * rest
    way = eased
    power = np.einsum("ij,ij->j", rest, eased)
    for _ in range(INNER):
        along = rows @ way
        bent = way + 2 * rows.T @ (active * along)
        ratio = _over(power, np.einsum("ij,ij->j", way, bent))
        step += ratio * way
        change += ratio * along
        rest = rest - ratio * bent
        if (np.linalg.norm(rest, axis=0) <= goal).all():
            break
        eased = scale * rest
        fresh = np.einsum("ij,ij->j", rest, eased)
        way = eased + _over(fresh, power) * way
        power = fresh
    return step, change


def _over(above: Matrix, below: Matrix) -> Matrix:
    """Quotients, 0 of 0 by 0: a problem that is solved to the last digit while others go on."""
    found: Matrix = np.divide(above, below, out=np.zeros_like(above), where=below != 0)
    return found


def _size(own: Matrix, step: Matrix, gaps: Matrix, change: Matrix, cost: Matrix, gradient: Matrix) -> Matrix:
    """(p,) how far to go along each step: 1, halved until the function falls enough."""

    def value(size: Matrix) -> Matrix:
        short = np.maximum(gaps + size * change, 0)
        there = own + size * step
        total: Matrix = np.einsum("ij,ij->j", there, there) / 2 + np.einsum("ij,ij,ij->j", cost, short, short)
        return total

    promised = SLOPE * np.einsum("ij,ij->j", step, gradient)
    size = np.ones(own.shape[1])
    now = value(np.zeros_like(size))
    for _ in range(40):
        short = value(size) > now + size * promised + 1e-12 * now
        if not short.any():
            break
        size[short] /= 2
    return size


def _augmented(rows: NDArray[np.float32]) -> Matrix:
    wide: Matrix = np.concatenate([rows.astype(np.float64), np.ones((len(rows), 1))], axis=1)
    return wide
