"""Conditions on an object's generation that a request may set:
https://cloud.google.com/storage/docs/request-preconditions"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ..front.http_server import HttpError, Request, natural


@dataclass(frozen=True)
class Preconditions:
    """What must be true of the live object for a request to go ahead; None sets no condition.

    Generation 0 stands for an object that does not exist.
    """

    generation: int | None = None
    not_generation: int | None = None
    etags: tuple[str, ...] | None = None
    not_etags: tuple[str, ...] | None = None

    @classmethod
    def of(cls, request: Request) -> "Preconditions":
        """From a JSON API request: its query, and the entity tags in its headers."""
        return replace(
            cls.of_query(request.query),
            etags=_etags(request.headers.get("If-Match")),
            not_etags=_etags(request.headers.get("If-None-Match")),
        )

    @classmethod
    def of_query(cls, query: Mapping[str, str], prefix: str = "if") -> "Preconditions":
        """From a JSON API request's query; prefix "ifSource" for the object that a copy is made of."""
        names = ("GenerationMatch", "GenerationNotMatch")
        return cls(*(_number(query.get(prefix + name), prefix + name) for name in names))

    def check(self, resource: dict | None, reading: bool = False) -> None:
        """Raises HttpError when they do not hold for a resource (None: it does not exist).

        The status is 412, or 304 for a read that wants any generation but this one.
        """
        generation = int(resource.get("generation", 0)) if resource else 0
        if self.generation not in (None, generation):
            raise _failed(412)
        if self.not_generation == generation:
            raise _failed(304 if reading else 412)
        etag = resource["etag"] if resource else None
        if self.etags is not None and not _matches(etag, self.etags):
            raise _failed(412)
        if self.not_etags is not None and _matches(etag, self.not_etags):
            raise _failed(304 if reading else 412)


def _failed(status: int) -> HttpError:
    return HttpError(
        status, "At least one of the pre-conditions you specified did not hold.", "conditionNotMet"
    )


def _number(value: str | None, name: str) -> int | None:
    return None if value is None else natural(value, name)


def _etags(header: str | None) -> tuple[str, ...] | None:
    """The entity tags of an If-Match or If-None-Match header; None if there is none."""
    if header is None:
        return None
    return tuple(part.strip().removeprefix("W/").strip('"') for part in header.split(","))


def _matches(etag: str | None, wanted: tuple[str, ...]) -> bool:
    return etag is not None and ("*" in wanted or etag in wanted)
