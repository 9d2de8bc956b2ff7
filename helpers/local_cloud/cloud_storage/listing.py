"""One page of a bucket's listing: https://cloud.google.com/storage/docs/json_api/v1/objects/list"""

import base64
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Self

from ..front.http_server import HttpError, Request, natural

MAX_PAGE = 1000


@dataclass
class Page:
    """The object names and truncated names ("folders") of one page; the token asks for what follows."""

    names: list[str] = field(default_factory=list)
    prefixes: list[str] = field(default_factory=list)
    next_token: str | None = None

    def __len__(self) -> int:
        return len(self.names) + len(self.prefixes)


@dataclass(frozen=True)
class Listing:
    """What a request asks to see of a bucket."""

    prefix: str = ""
    delimiter: str = ""
    start: str = ""
    end: str = ""
    after: str = ""
    limit: int = MAX_PAGE

    @classmethod
    def of_request(cls, request: Request) -> Self:
        """Reads the query; raises HttpError 400 if it makes no sense."""
        query = request.query
        return cls(
            prefix=query.get("prefix", ""),
            delimiter=query.get("delimiter", ""),
            start=query.get("startOffset", ""),
            end=query.get("endOffset", ""),
            after=decode_token(query.get("pageToken", "")),
            limit=page_size(request),
        )

    def page(self, names: Iterable[str]) -> Page:
        """The page, taken from names that are sorted and begin with the prefix."""
        page, last = Page(), self.after
        for name in names:
            if name < self.start:
                continue
            if self.end and name >= self.end:
                break
            at = name.find(self.delimiter, len(self.prefix)) if self.delimiter else -1
            entry = name if at < 0 else name[: at + len(self.delimiter)]
            # Truncated names come in order too: one already seen, on this page or before, does not sort after
            # the last.
            if entry <= last:
                continue
            if len(page) >= self.limit:
                page.next_token = encode_token(last)
                break
            (page.names if at < 0 else page.prefixes).append(entry)
            last = entry
        return page


def page_size(request: Request) -> int:
    """The request's maxResults, at most 1000."""
    value = natural(request.query.get("maxResults", str(MAX_PAGE)), "maxResults")
    return min(value or MAX_PAGE, MAX_PAGE)


def encode_token(last: str) -> str:
    """The page token that asks for what follows this entry, the last of its page."""
    return base64.urlsafe_b64encode(last.encode()).decode()


def decode_token(token: str) -> str:
    """The entry of a page token; raises HttpError 400 if the token is invalid."""
    try:
        return base64.b64decode(token, altchars=b"-_", validate=True).decode()
    except ValueError:
        raise HttpError(400, f"Invalid page token: '{token}'.", "invalidParameter") from None
