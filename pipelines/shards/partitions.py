"""How many partitions the samples of a training run are cut into, and how many workers can share them."""

from __future__ import annotations

from pipelines.errors import MisuseError


def count_partitions(batch_size: int, most: int, samples: int | None = None) -> int:
    """Return the largest divisor of the batch size that is neither above `most` nor above the number of samples.

    Args:
        batch_size: samples of a global batch; each partition gives an equal part of it.
        most: the most partitions there may be.
        samples: samples that are trained on; None if it is not known yet.
    """
    return max(each for each in divisors(batch_size) if each <= most and (samples is None or each <= samples))


def check_workers(workers: int, batch_size: int, most: int, samples: int | None = None) -> None:
    """Check that each of `workers` can serve the same number of partitions.

    Raises:
        MisuseError: it cannot; says which numbers of workers can.
    """
    partitions = count_partitions(batch_size, most, samples)
    if partitions % workers:
        why = f"batch_size {batch_size}, at most {most}" + (f", {samples} samples" if samples is not None else "")
        allowed = ", ".join(map(str, divisors(partitions)))
        raise MisuseError(
            f"training.workers must be one of {allowed}, to share {partitions} partitions of the samples equally "
            f"({why}), got {workers}; another training.partitions or batch_size allows others, and begins another "
            "training"
        )


def divisors(number: int) -> list[int]:
    """Return the divisors of a positive number, ascending."""
    return [each for each in range(1, number + 1) if number % each == 0]
