"""Writes where this repository is published: badges, and the address that the set-up cells fetch from.

    python tools/badges.py [--repository OWNER/NAME] [--branch BRANCH] [--check]

The address is the argument's; without it the setting's, `repository` under `[tool.notebooks]` in
pyproject.toml; without that GITHUB_REPOSITORY, which GitHub's workflows have; without that the git remote
`origin`. Without any, what stands there is taken out: no badge is better than a wrong one. `--check` writes
nothing, and finds badges that do not lead to their own notebook at the address of the set-up cells.
"""

import argparse
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from urllib.parse import quote, urlsplit, urlunsplit

import nbformat

ROOT = Path(__file__).parents[1]
MARKED = re.compile(r"(<!-- badges (\S+) -->).*?(<!-- /badges -->)", re.DOTALL)
ADDRESS = re.compile(r'^REPOSITORY = ("[^"]*")\nREVISION = ("[^"]*")', re.MULTILINE)
CLOUD_SHELL = "cloud_shell"
# Where a badge may lead: a link to one of these is a badge's, and stands between the marks.
HOSTS = ("colab.research.google.com/github/", "/colab/import/", "/workbench/instances?", "/cloudshell/open?")


def address(argument: str | None, root: Path) -> tuple[str, str]:
    """The repository's address as it was given, and where it was found; both empty if nowhere."""
    if argument:
        return argument, "the argument"
    if setting := settings(root).get("repository"):
        return setting, "pyproject.toml"
    if ours := os.environ.get("GITHUB_REPOSITORY"):
        return ours, "GITHUB_REPOSITORY"
    command = ["git", "-C", str(root), "remote", "get-url", "origin"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:  # no git here
        return "", ""
    remote = done.stdout.strip()
    # A clone of a folder of this machine is published nowhere: a path may only be an argument.
    is_path = remote.startswith((".", "/", "file:", "~")) or re.match(r"[A-Za-z]:[\\/]", remote)
    return (remote, "the git remote") if done.returncode == 0 and not is_path else ("", "")


def settings(root: Path) -> dict[str, str]:
    """The table `[tool.notebooks]` of pyproject.toml."""
    return tomllib.loads((root / "pyproject.toml").read_text()).get("tool", {}).get("notebooks", {})


def normal(address: str) -> str:
    """The address to clone from, without a user's name or token: `owner/name` is one on GitHub.

    Raises:
        ValueError: it is neither `owner/name`, nor an address, nor an absolute path.
    """
    if match := re.fullmatch(r"(?:ssh://)?git@([\w.-]+?)(?::\d+(?=/))?[:/](.+?)(?:\.git)?/?", address):
        # GitHub's host for port 443, and the names that people with several accounts give to it.
        host = "github.com" if re.match(r"(ssh\.)?github\.com(-|$)", match[1]) else match[1]
        return f"https://{host}/{match[2]}"
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", address):
        return f"https://github.com/{address.removesuffix('.git')}"
    parts = urlsplit(address)
    if parts.scheme in ("http", "https") and parts.hostname and '"' not in address:
        host = parts.hostname + (f":{parts.port}" if parts.port else "")
        path = parts.path.rstrip("/").removesuffix(".git")
        return urlunsplit((parts.scheme, host, path, "", ""))
    if not address or ((parts.scheme == "file" or address.startswith("/")) and '"' not in address):
        return address
    raise ValueError(f"{address!r} is not a repository's address: give OWNER/NAME, or https://HOST/PATH")


def badges(repository: str, branch: str, path: str) -> str:
    """The badges of a notebook, or of the repository for `cloud_shell`; none if it is not on GitHub.

    Args:
        repository: the address to clone from.
        branch: the branch, or a tag.
        path: of the notebook, in the repository; or `cloud_shell`.
    """
    if not repository.startswith("https://github.com/"):
        return ""
    name = repository.removeprefix("https://github.com/")
    if path == CLOUD_SHELL:
        link = f"https://console.cloud.google.com/cloudshell/open?git_repo={repository}&page=editor"
        picture = "https://gstatic.com/cloudssh/images/open-btn.svg"
        return f"[![Open in Cloud Shell]({picture})]({link}&git_branch={quote(branch, safe='')})"
    console = "https://console.cloud.google.com/agent-platform"
    raw = f"raw.githubusercontent.com/{name}/{branch}/{path}"
    links = {
        "Colab": f"https://colab.research.google.com/github/{name}/blob/{branch}/{path}",
        "Colab Enterprise": f"{console}/colab/import/https:%2F%2F{quote(raw, safe='')}",
        "Workbench": f"{console}/workbench/instances?download_url=https://{raw}",
        "GitHub": f"https://github.com/{name}/blob/{branch}/{path}",
    }
    return " ".join(
        f"[![Open in {place}](https://img.shields.io/badge/open_in-{quote(place)}-1b3a57)]({link})"
        for place, link in links.items()
    )


def rewritten(text: str, repository: str, branch: str) -> str:
    """A text with the badges between its marks `<!-- badges PATH --><!-- /badges -->` made anew."""

    def fill(found: re.Match) -> str:
        return found[1] + badges(repository, branch, found[2]) + found[3]

    return MARKED.sub(fill, text)


def documents(root: Path) -> list[Path]:
    """The files that have badges."""
    return [root / "README.md", *sorted((root / "notebooks").glob("*.ipynb"))]


def write(root: Path, repository: str, branch: str) -> list[str]:
    """Writes the badges and addresses; returns the names of the files that changed."""
    changed = []
    for path in documents(root):
        before = path.read_text()
        if path.suffix == ".md":
            after = rewritten(before, repository, branch)
        else:
            notebook = nbformat.reads(before, as_version=4)
            for cell in notebook.cells:
                if cell.cell_type == "markdown":
                    cell.source = rewritten(cell.source, repository, branch)
                else:
                    lines = f'REPOSITORY = "{repository}"\nREVISION = "{branch}"'
                    cell.source = ADDRESS.sub(lambda _, lines=lines: lines, cell.source)
            after = nbformat.writes(notebook) + "\n"
        if after != before:
            path.write_text(after)
            changed.append(path.name)
    return changed


def problems(root: Path) -> list[str]:
    """Badges and addresses that are not what follows from the set-up cells' address."""
    found, addresses = [], {}
    for path in documents(root)[1:]:
        cells = nbformat.read(path, as_version=4).cells
        matches = [match for c in cells if c.cell_type == "code" and (match := ADDRESS.search(c.source))]
        if len(matches) != 1:
            found.append(f"{path.name}: {len(matches)} cells set REPOSITORY and REVISION")
        else:
            addresses[path.name] = tuple(group.strip('"') for group in matches[0].groups())
    if len(set(addresses.values())) > 1:
        return [*found, f"the set-up cells name more than one address: {addresses}"]
    repository, branch = next(iter(addresses.values()), ("", "main"))
    for path in documents(root):
        if path.suffix == ".md":
            texts = [path.read_text()]
        else:
            cells = nbformat.read(path, as_version=4).cells
            texts = [cell.source for cell in cells if cell.cell_type == "markdown"]
            own = path.relative_to(root).as_posix()
            marks = [match[2] for text in texts for match in MARKED.finditer(text)]
            if marks != [own]:
                found.append(f"{path.name}: marks for badges of {marks}, and not of {own} once")
        for text in texts:
            for match in MARKED.finditer(text):
                if match[2] != CLOUD_SHELL and not (root / match[2]).is_file():
                    found.append(f"{path.name}: badges of {match[2]}, which is not there")
                if match[0] != match[1] + badges(repository, branch, match[2]) + match[3]:
                    found.append(f"{path.name}: badges that do not lead to {match[2]} at {repository!r}")
            rest = MARKED.sub("", text)
            found += [f"{path.name}: a badge outside the marks: …{host}…" for host in HOSTS if host in rest]
    return found


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Writes badges, and the address of the set-up cells.")
    parser.add_argument("--repository", help="OWNER/NAME on GitHub, or another git address")
    parser.add_argument("--branch", help="the branch or tag to lead to; by default pyproject.toml's, or main")
    parser.add_argument("--check", action="store_true", help="write nothing, and tell what is wrong")
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.check:
        found = problems(arguments.root)
        print("\n".join(found) or "The badges are right.")
        return 1 if found else 0
    given, source = address(arguments.repository, arguments.root)
    try:
        repository = normal(given)
    except ValueError as error:
        parser.error(f"{error} (found in {source})")
    branch = arguments.branch or settings(arguments.root).get("branch") or "main"
    if not re.fullmatch(r"[\w./-]+", branch):
        parser.error(f"{branch!r} is not a branch's name")
    changed = write(arguments.root, repository, branch)
    if not repository:
        print("No address is known, so there are no badges: give one with REPOSITORY=OWNER/NAME.")
    else:
        print(f"The address is {repository}, branch {branch}, from {source}.")
        if not badges(repository, branch, CLOUD_SHELL):
            print("It is not on GitHub, so the set-up cells fetch from it, and there are no badges.")
    print(f"Changed: {', '.join(changed) or 'nothing'}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
