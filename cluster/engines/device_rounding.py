"""Rows and centroids as float16 on a device, and how far scores made of them can be off.

With X = x - o and C = c - o for an origin o near the data, the score of a pair is s = X.C - |C|^2 / 2, and the
nearest centroid has the largest. The device multiplies q.p instead, float16 vectors with X ~ a q and C ~ b p, where a
(of the row) and b (of all centroids) are powers of two, so that scaling rounds nothing and nothing overflows. All
below is in units of b^2; r = a / b, u = 2^-24, and |.| of a row is in units of a.

ROUNDING TO FLOAT16. e_x = |X/a - q| and e_c = |C/b - p| are measured, not estimated: the subtraction of a number and
its rounding is exact. With L = |X/a|, M the largest |C/b|, E the largest e_c and P the largest |p|,
    |r q.p - s'| <= r (e_x M + (L + e_x) E),   s' being the score without its last term,
by Cauchy-Schwarz on q.p - (X/a).(C/b) = (q - X/a).(C/b) + q.(p - C/b). The subtraction x - o is rounded once to
float32: another r u L M. C itself is computed in float64.

ACCUMULATION. Products of float16 numbers, also of subnormal ones, are exact in a tensor core. It adds 4 or more of
them to its accumulator at a time, each cut off (not rounded) below the last of at least 24 bits of the largest of all
terms, as is the result (Fasi, Higham, Mikaitis, Pranesh: "Numerical behavior of NVIDIA tensor cores", PeerJ Computer
Science 7, 2021). No term or partial sum exceeds sum |q_j p_j| <= |q| |p|. So one step over b products loses at most
(b + 2) 2^-23 |q| |p|, and d columns with b >= 4 lose at most 1.5 d 2^-23 |q| |p| = 3 d u |q| |p|. Additions in IEEE
float32, in any order and with or without FMA, lose less: d u. That later tensor cores are no coarser than the model
is an assumption, which benchmarks/gpu.py measures against this bound.

EPILOGUE. score = r (q.p) - |C/b|^2 / 2: multiplying by r is exact, the bias is rounded once and the sum once:
    u (r (L + e_x) P + M^2 / 2) + u M^2 / 2.

So a score is off by at most the sum of these, and a row whose best two differ by more than twice that, and by the
width of what counts as a tie (engine.TIE), has its nearest centroid. `doubt` is that number, with 5 % for higher
orders of u and for its own rounding; it is infinite where a number left the range of float32, so that no NaN and no
overflow ever decides.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .engine import TIE

UNIT = 2.0**-24  # half the distance of 1 to the next float32
SAFETY = 1.05
LEVEL = 8  # the largest number of a row is scaled to just below 2^LEVEL: far from the ends of float16
COLUMNS_OF = 16  # float16 vectors are padded by zeros to a multiple, as tensor cores want them
LARGEST_RATIO = 2.0**60  # of a row's scale to that of the centroids, beyond which float64 decides
FLOOR = 2.0**-50  # more than squares lose by underflow, in numbers of up to 2^LEVEL
TINY = 2.0**-80  # the same for what scaling, products and sums lose


class Operand(NamedTuple):
    """Rows as float16.

    Attributes:
        half: (m, w) float16, q; w is d rounded up to a multiple of 16, with zeros.
        scale: (m,) float32, a, a power of two.
        error: (m,) float32, at least |X/a - q|; infinite where x - o is beyond float32.
        length: (m,) float32, at least |X/a|.
    """

    half: Tensor
    scale: Tensor
    error: Tensor
    length: Tensor


class HalfCentroids(NamedTuple):
    """Centroids of one pass; numbers of the device stay there as tensors without dimensions.

    Attributes:
        raw: (k, d) float32.
        middle: (d,) float32, their mean: near-ties are decided from there.
        widest: float64, the largest squared distance of a centroid to the middle.
        half: (k, w) float16, p.
        bias: (k,) float32, -|C/b|^2 / 2.
        unit: float64, b.
        length, error, kept: float64, the largest |C/b|, |C/b - p| and |p|.
    """

    raw: Tensor
    middle: Tensor
    widest: Tensor
    half: Tensor
    bias: Tensor
    unit: Tensor
    length: Tensor
    error: Tensor
    kept: Tensor


def padded(columns: int) -> int:
    """The length of a float16 vector for rows of so many columns."""
    return columns + -columns % COLUMNS_OF


def halve(rows: Tensor, origin: Tensor) -> Operand:
    """(m, d) float32 rows as float16, centred on the origin (d,) float32."""
    d = rows.shape[1]
    centred = rows - origin
    top = centred.abs().amax(dim=1)
    finite = top < torch.inf
    exponent = torch.frexp(torch.where(finite, top, 0)).exponent.clamp(-110, 128) - LEVEL
    centred *= torch.where(finite, _power32(-exponent), 0)[:, None]
    centred.nan_to_num_(0, 0, 0)
    half = centred.new_zeros((len(rows), padded(d)), dtype=torch.float16)
    half[:, :d] = centred
    up = 1 + (d + 8) * UNIT  # of a sum of d squares in any order, and its root
    length = centred.square().sum(dim=1).sqrt() * up + FLOOR
    error = centred.sub_(half[:, :d]).square_().sum(dim=1).sqrt() * up + FLOOR
    return Operand(half, _power32(exponent), torch.where(finite, error, torch.inf), length)


def halve_centroids(centroids: Tensor, origin: Tensor) -> HalfCentroids:
    """(k, d) float32 centroids as float16, centred on the rows' origin."""
    d = centroids.shape[1]
    middle = centroids.mean(dim=0, dtype=torch.float64).float()
    widest = (centroids.double() - middle).square().sum(dim=1).amax()
    wide = centroids.double() - origin
    unit = _power64(torch.frexp(wide.abs().amax()).exponent - LEVEL)
    wide /= unit
    half = wide.new_zeros((len(wide), padded(d)), dtype=torch.float16)
    half[:, :d] = wide
    squares = wide.square().sum(dim=1)
    error = (wide - half[:, :d]).square().sum(dim=1).amax().sqrt()
    kept = half.double().square().sum(dim=1).amax().sqrt()
    bias = (squares / -2).float()
    return HalfCentroids(centroids, middle, widest, half, bias, unit, squares.amax().sqrt(), error, kept)


def ratio(rows: Operand, target: HalfCentroids) -> Tensor:
    """(m,) float32, r: what turns q.p into the unit of the bias."""
    return (rows.scale.double() / target.unit).clamp(max=LARGEST_RATIO).float()


def doubt(rows: Operand, target: HalfCentroids) -> Tensor:
    """(m,) float64: two scores of a row that differ by more than this are in the right order, and no tie.

    NaN or infinite where nothing is known.
    """
    by = rows.scale.double() / target.unit
    length, error = by * rows.length, by * rows.error
    accumulated = 3 * (rows.half.shape[1] + COLUMNS_OF) * UNIT
    off = error * target.length + (length + error) * (target.error + (accumulated + UNIT) * target.kept)
    off += UNIT * (length * target.length + target.length.square())
    # The width of a tie is TIE (|x - middle|^2 + widest) / 2, and |middle - o| <= M, widest <= 4 M^2.
    width = TIE * (length.square() + 3 * target.length.square())
    found = 2 * SAFETY * off + SAFETY * width + TINY * (1 + by)
    return torch.where(by > LARGEST_RATIO, torch.inf, found)


def _power32(exponent: Tensor) -> Tensor:
    """2**exponent for int32 in [-126, 127], from its bits: pow() need not be exact on every device."""
    return ((exponent + 127) << 23).view(torch.float32)


def _power64(exponent: Tensor) -> Tensor:
    return ((exponent.long() + 1023) << 52).view(torch.float64)
