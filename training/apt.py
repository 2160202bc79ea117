"""Debian's archive through apt, without touching the machine's own lists or packages.

apt-get takes its whole state from options, so lists, sources and downloads live in folders of ours
(apt.conf(5), "DIRECTORIES"; sources.list(5)). The archive is the one that the machine itself uses.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from training import WORK

# The first is the one that held-out texts are taken from; older and newer ones add to training.
RELEASES = ("bookworm", "trixie", "sid", "bullseye")
_KEYS = "/usr/share/keyrings/debian-archive-keyring.gpg"
_FOLDER = WORK / "apt"
LISTS = _FOLDER / "lists"


def _options() -> list[str]:
    return [
        *("-o", "Acquire::Languages=en"),
        *("-o", f"Dir::State::Lists={LISTS}"),
        *("-o", f"Dir::Etc::SourceList={_FOLDER / 'sources.list'}"),
        *("-o", "Dir::Etc::SourceParts=-"),
        *("-o", f"APT::Default-Release={RELEASES[0]}"),
        *("-o", "APT::Sandbox::User=root"),
    ]


def archive() -> str:
    """Address of Debian's archive, as the machine's own apt has it.

    Raises:
        RuntimeError: it has none, or its lists were never fetched.
    """
    command = ["apt-get", "indextargets", "--format", "$(REPO_URI)"]
    targets = subprocess.run(
        [*command, "Created-By: Packages", "Origin: Debian"],
        check=True,
        capture_output=True,
        text=True,
    )
    # The security archive stands beside it and has no release whole.
    for address in targets.stdout.split():
        if not address.rstrip("/").endswith("-security"):
            return address
    raise RuntimeError("apt knows no archive of Debian's; `apt-get update` fetches its lists")


def update() -> None:
    """Fetch the lists of all releases.

    Raises:
        RuntimeError: see `archive`.
        subprocess.CalledProcessError: apt-get failed; it has said why.
    """
    (LISTS / "partial").mkdir(parents=True, exist_ok=True)
    address = archive()
    sources = (f"deb [signed-by={_KEYS}] {address} {release} main" for release in RELEASES)
    (_FOLDER / "sources.list").write_text("\n".join(sources) + "\n")
    subprocess.run(["apt-get", *_options(), "update"], check=True)


def download(packages: Sequence[str], folder: Path) -> None:
    """Fetch the .deb files of `packages` into `folder`, those that are not there yet.

    Raises:
        subprocess.CalledProcessError: one is not to be had; apt-get has said which.
    """
    folder.mkdir(parents=True, exist_ok=True)
    there = {path.name.partition("_")[0] for path in folder.glob("*.deb")}
    if missing := [package for package in packages if package not in there]:
        command = ["apt-get", *_options(), "download", *missing]
        subprocess.run(command, check=True, cwd=folder)


def read(path: Path) -> str:
    """A list's text; apt's own helper reads whatever compression apt chose."""
    command = ["/usr/lib/apt/apt-helper", "cat-file", str(path)]
    return subprocess.run(command, check=True, capture_output=True).stdout.decode()
