"""The memory of the machine that this runs on."""

from pathlib import Path


def machine_memory_bytes() -> int:
    """The memory of this machine, or as much of it as the container it runs in may use."""
    import psutil

    total = psutil.virtual_memory().total
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            return min(total, int(Path(limit).read_text()))
        except (OSError, ValueError):  # there is no such file, or it says "max"
            continue
    return total


def available_memory_bytes() -> int:
    """The memory that this machine could give to a new process now, without swapping."""
    import psutil

    return psutil.virtual_memory().available
