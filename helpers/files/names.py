"""Names that come from outside, as paths inside a folder: one function admits them, or refuses."""

from pathlib import Path


class UnsafeNameError(ValueError):
    """A name from outside that would lead out of its folder."""


def check_plain(name: str) -> str:
    """The name itself, if it is that of a file in a folder or below it: `tokenizer.json`,
    `templates/a.jinja`.

    Raises:
        UnsafeNameError: it is absolute, leads upwards, or holds what no file should be named by.
    """
    parts = name.split("/") if isinstance(name, str) else [""]
    is_plain = all(part not in ("", ".", "..") and part.isprintable() and "\\" not in part for part in parts)
    if not is_plain or Path(name).drive:
        raise UnsafeNameError(f"{name!r} is not the plain name of a file inside a folder")
    return name


def inside(folder: str | Path, name: str) -> Path:
    """The path to write a file at, inside a folder, for a name that somebody else has written.

    Manifests, archives and the names of objects come from outside: none of them may name a file anywhere
    else, nor one behind a link.

    Args:
        folder: where the file must be.
        name: relative to it, with forward slashes.

    Raises:
        UnsafeNameError: as `check_plain`, or there is a link on the way to the file.
    """
    path = Path(folder)
    for part in check_plain(name).split("/"):
        path /= part
        if path.is_symlink():
            raise UnsafeNameError(f"{path} is a link, which may lead out of {folder}: remove it")
    return path
