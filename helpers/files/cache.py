"""Where this package keeps on this machine what it has downloaded or made."""

import os
from pathlib import Path


def cache_folder(*parts: str) -> Path:
    """A folder of this package's own in the user's cache: `$XDG_CACHE_HOME/streaming-llm/PARTS`, by default
    under `~/.cache`. The hub's files stay in the hub's own cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").joinpath("streaming-llm", *parts)
