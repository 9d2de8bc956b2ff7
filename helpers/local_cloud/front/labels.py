"""Labels of jobs, checked as the services check them."""

import re
from collections.abc import Mapping

from .grpc_service import invalid_argument

MOST = 64
# https://cloud.google.com/resource-manager/docs/labels-overview#requirements; letters without capitals count
# too.
_KEY = re.compile(r"(?=[^\W\d_])[\w-]{1,63}")
_RESERVED = re.compile(r"goog(?!-dataflow-)")  # Beam adds goog-dataflow-notebook to the jobs of a notebook
_VALUE = re.compile(r"[\w-]{0,63}")


def check_labels(labels: Mapping[str, str]) -> None:
    """Raises RpcError for labels that the services refuse."""
    if len(labels) > MOST:
        raise invalid_argument(f"A job has at most {MOST} labels, and there are {len(labels)}.")
    for key, value in labels.items():
        if not _KEY.fullmatch(key) or key != key.lower() or _RESERVED.match(key):
            raise invalid_argument(
                f"The label key {key!r} is invalid: it has up to 63 lower-case letters, digits, underscores "
                "and dashes, begins with a letter, and not with goog."
            )
        if not _VALUE.fullmatch(value) or value != value.lower():
            raise invalid_argument(
                f"The value {value!r} of the label {key!r} is invalid: it has up to 63 lower-case letters, "
                "digits, underscores and dashes."
            )
