"""Writes the README's table of APIs and roles from `helpers.files.access`."""

from __future__ import annotations

import re
from pathlib import Path

from helpers.files import access

README = Path(__file__).parents[1] / "README.md"
WHEN = {
    "series": "",
    "topic": "for `--messages-topic` only",
    "image": "for an image of your own only",
    "check": "for the preflight only",
}


def table() -> str:
    """The table, in Markdown."""
    rows = ["| who | role | to | when |", "|---|---|---|---|"]
    rows += [
        f"| {need.who} | `roles/{need.role}` | {need.purpose} | {WHEN[need.feature]} |"
        for need in access.TABLE
    ]
    return "\n".join(rows)


def commands() -> str:
    """The command that enables the APIs, those for images apart."""
    series = access.apis("series", "check", "topic")
    images = [name for name in access.apis("image") if name not in series]
    return (
        f"```sh\n{access.enable_command('YOUR-PROJECT', series)}\n"
        f"{access.enable_command('YOUR-PROJECT', images)}    # for an image of your own\n```"
    )


def write(text: str) -> str:
    """A page with the parts between its marks written anew."""
    for name, content in (("apis", commands()), ("roles", table())):
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        match = re.search(pattern, text, re.DOTALL)
        text = text[: match.end(1)] + content + "\n" + text[match.start(2) :]
    return text


if __name__ == "__main__":
    README.write_text(write(README.read_text()))
