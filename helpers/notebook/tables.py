"""Tables: rows that a reader can compare, the versions in use, and work in progress."""

from __future__ import annotations

import importlib.metadata
import math
import platform
from collections.abc import Iterable, Mapping
from typing import Any

# What a reader wants to know when something behaves differently elsewhere.
PACKAGES = ("apache-beam", "torch", "transformers", "google-cloud-aiplatform", "google-cloud-pubsub")


def versions() -> Table:
    """The versions in use, as a table."""
    rows = [("Python", platform.python_version())]
    for package in PACKAGES:
        try:
            rows.append((package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            rows.append((package, "not installed"))
    return table({"package": name, "version": version} for name, version in rows)


class Table:
    """Rows as a table: text in full and left-aligned, no index; in a terminal, plain text."""

    def __init__(self, rows: Iterable[Mapping[str, object]]) -> None:
        import pandas as pd

        frame = pd.DataFrame(list(rows))
        # A column that is empty in every row tells nothing.
        self.frame = frame[[name for name in frame if any(value != "" for value in frame[name])]]

    def _repr_html_(self) -> str:
        import pandas as pd

        text = [name for name in self.frame if not pd.api.types.is_numeric_dtype(self.frame[name])]
        styler = self.frame.style.hide(axis="index").format(_text, escape="html")
        styler.set_properties(subset=text, **{"text-align": "left", "white-space": "pre-wrap"})
        # Each header is aligned like its column: text to the left, numbers to the right.
        styler.set_table_styles(
            {name: [{"selector": "th", "props": "text-align: left"}] for name in text}, overwrite=False
        )
        return styler.to_html()

    def __repr__(self) -> str:
        return self.frame.to_string(index=False, max_colwidth=72, float_format=_text)


def _text(value: object) -> object:
    """A measured number with at most three significant digits: more would promise what no run repeats. One
    that was rounded before gets no zeros."""
    if not isinstance(value, float) or not math.isfinite(value):
        return value
    if 0 < abs(value) < 1e-3:
        return f"{value:.3g}"
    digits = 3 - 1 - math.floor(math.log10(abs(value))) if value else 2
    own = len(str(float(value)).partition(".")[2])
    return f"{value:,.{min(max(digits, 0), own, 4)}f}"


def table(rows: Iterable[Mapping[str, object]]) -> Table:
    """Rows with the same keys, as a table for a notebook."""
    return Table(rows)


class Board:
    """A table that is redrawn in place, for work in progress: its first row and the last ones."""

    def __init__(self, most_rows: int = 12) -> None:
        self._rows: list[Mapping[str, object]] = []
        self._most_rows = most_rows
        self._shown: Any = None

    def add(self, row: Mapping[str, object]) -> None:
        """Adds a row; drops the second when there are too many."""
        from IPython.display import display

        if len(self._rows) == self._most_rows:
            del self._rows[1]
        self._rows.append(row)
        if self._shown is None:
            self._shown = display(table(self._rows), display_id=True)
        else:
            self._shown.update(table(self._rows))
