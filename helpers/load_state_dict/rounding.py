"""Rounds weights to a smaller dtype, and reports what that did to them.

float16 has 10 bits of fraction and ranges from 6e-8 to 65504; bfloat16 has 7, and float32's range. So
float16 is more exact for weights of ordinary size, but overflows above 65504, and very small ones become 0.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from helpers.models.dtypes import dtype_name

CHUNK = 2**17
"""Numbers rounded, and so in memory, at once, however large the tensor. They fit a core's cache."""


class RoundingError(ValueError):
    """A tensor with values that the dtype cannot hold, or that are not numbers to begin with."""


@dataclass
class RoundingReport:
    """What rounding did.

    Attributes:
        numbers: how many were seen, those of integer tensors included.
        flushed: how many non-zero numbers became zero.
        largest_relative_error: the largest |rounded - exact| / |exact| of those that did not become zero.
    """

    numbers: int = 0
    flushed: int = 0
    largest_relative_error: float = 0.0

    def __iadd__(self, other: "RoundingReport") -> "RoundingReport":
        self.numbers += other.numbers
        self.flushed += other.flushed
        self.largest_relative_error = max(self.largest_relative_error, other.largest_relative_error)
        return self

    @property
    def flushed_share(self) -> float:
        """The share of numbers that became zero, 0 to 1."""
        return self.flushed / max(self.numbers, 1)


def rounded_dtype(source: torch.dtype, target: torch.dtype) -> torch.dtype:
    """What a tensor of dtype `source` is stored as: integers and booleans stay what they are."""
    return target if source.is_floating_point else source


def rounded(
    tensor: torch.Tensor, dtype: torch.dtype, name: str, report: RoundingReport, may_be_infinite: bool = False
) -> Iterator[torch.Tensor]:
    """Rounds a tensor of any size in constant memory.

    Args:
        tensor: of any dtype and shape; it may be mapped from a file.
        dtype: what to round floating-point numbers to.
        name: the tensor's name, for error messages.
        report: the report to add to.
        may_be_infinite: whether infinity is a value like others, as for a bound that a buffer holds.

    Yields:
        The numbers in order, as one-dimensional tensors of `rounded_dtype(tensor.dtype, dtype)`.

    Raises:
        RoundingError: the tensor holds NaN, or infinity that it may not hold, or a number that overflows
            `dtype`.
    """
    for chunk in tensor.reshape(-1).split(CHUNK):
        report.numbers += chunk.numel()
        if not chunk.numel():  # of an empty tensor
            yield chunk.to(rounded_dtype(chunk.dtype, dtype))
        elif chunk.dtype.is_floating_point:
            yield _round(chunk, dtype, name, report, may_be_infinite)
        else:
            yield chunk


def _round(
    exact: torch.Tensor, dtype: torch.dtype, name: str, report: RoundingReport, may_be_infinite: bool
) -> torch.Tensor:
    if exact.dtype.itemsize == 1:  # float8 has no arithmetic of its own
        exact = exact.float()
    result = exact.to(dtype)
    if exact.dtype == dtype:
        _check_range(exact, dtype, name, may_be_infinite)
        return result
    wide = exact if exact.dtype == torch.float64 else exact.float()
    error = result.to(wide.dtype, copy=True).sub_(wide).div_(wide)
    lowest, highest = (value.item() for value in error.aminmax())
    # Usually there is nothing more to check. A number that became zero has an error of -1, one that
    # overflowed an error of infinity; one that was zero, or not a number, gives NaN.
    if not -1 < lowest <= highest < 1:
        _check_range(exact, dtype, name, may_be_infinite)
        report.flushed += int(exact.count_nonzero() - result.count_nonzero())
        kept = torch.where(error.abs() < 1, error, 0)
        lowest, highest = (value.item() for value in kept.aminmax())
    report.largest_relative_error = max(report.largest_relative_error, -lowest, highest)
    return result


def _check_range(exact: torch.Tensor, dtype: torch.dtype, name: str, may_be_infinite: bool) -> None:
    if may_be_infinite:
        exact = torch.where(exact.isinf(), 0, exact)
    lowest, highest = exact.aminmax()  # NaN if there is one
    if not (lowest.isfinite() and highest.isfinite()):
        raise RoundingError(f"{name} holds NaN or infinity: the checkpoint is damaged; download it again")
    if not (lowest.to(dtype).isfinite() and highest.to(dtype).isfinite()):
        largest = max(-lowest.item(), highest.item())
        raise RoundingError(
            f"{name} holds {largest:.6g}, and {dtype_name(dtype)} reaches {torch.finfo(dtype).max:.6g}: "
            "convert with --dtype bfloat16, or float32"
        )
