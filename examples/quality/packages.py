"""Download the pinned packages of the corpus, and read text files out of them.

    python -m examples.quality.packages --out data/quality

packages.txt is a requirements file of pip: wheels by version and sha256, whose code is read and never run. debian.txt
names Debian's documentation packages by version and sha256. Files that are there with the right sha256 stay.
"""

from __future__ import annotations

import argparse
import email
import gzip
import hashlib
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from . import ROOT

HERE = Path(__file__).parent
PIP = ("--no-deps", "--only-binary=:all:", "--python-version=3.12", "--implementation=cp")
ABIS = ("cp312", "abi3", "none")
PLATFORMS = ("any", "manylinux2014_x86_64", "manylinux_2_17_x86_64", "manylinux_2_27_x86_64", "manylinux_2_28_x86_64")
CODE = (".py", ".pyi", ".pyx", ".pxd", ".pxi")
TEXT = (".md", ".rst", ".txt", ".rst.gz", ".txt.gz", ".md.gz")


@dataclass(frozen=True)
class Package:
    """A package whose text is read."""

    name: str
    version: str
    sha256: str
    """Of its archive; empty of a folder."""
    licence: str
    archive: Path


def pip_pins(text: str) -> dict[str, tuple[str, str]]:
    """name -> (version, sha256) of a requirements file.

    Raises:
        ValueError: a line that is not ``name==version --hash=sha256:...``.
    """
    pins = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        match = re.fullmatch(r"([\w.-]+)==(\S+) --hash=sha256:([0-9a-f]{64})", line.strip())
        if match is None:
            raise ValueError(f"line {number} is {line!r}; write name==version --hash=sha256:HEX")
        pins[match[1]] = (match[2], match[3])
    return pins


def debian_pins(text: str) -> dict[str, tuple[str, str]]:
    """name -> (version, sha256) of lines ``name=version sha256``."""
    rows = [line.split() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return {pin.partition("=")[0]: (pin.partition("=")[2], digest) for pin, digest in rows}


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download(out: Path, pip_file: Path, debian_file: Path) -> None:
    """Bring what the two files pin into ``out``. pip and apt-get fetch, and pip checks hashes itself.

    Raises:
        subprocess.CalledProcessError: pip does not find a wheel.
        ValueError: apt-get does not find a package, or its file has another sha256.
    """
    out.mkdir(parents=True, exist_ok=True)
    if pip_pins(pip_file.read_text("utf-8")):
        choice = [*PIP, *(f"--abi={x}" for x in ABIS), *(f"--platform={x}" for x in PLATFORMS)]
        command = [sys.executable, "-m", "pip", "download", "--require-hashes", *choice, "-r", str(pip_file)]
        subprocess.run([*command, "-d", str(out)], check=True)
    there = {path.name.partition("_")[0]: path for path in out.glob("*.deb")}
    for name, (version, digest) in debian_pins(debian_file.read_text("utf-8")).items():
        if name not in there or sha256(there[name]) != digest:
            if subprocess.run(["apt-get", "download", f"{name}={version}"], cwd=out).returncode:
                raise ValueError(
                    f"apt-get finds no {name} {version}, which {debian_file} pins: run apt-get update first; where "
                    f"Debian's index has dropped that version, put its file of snapshot.debian.org into {out}"
                )
            there[name] = next(path for path in out.glob("*.deb") if path.name.startswith(f"{name}_"))
        if (found := sha256(there[name])) != digest:
            raise ValueError(f"{there[name]} has sha256 {found}, and {debian_file} pins {digest}")


def pinned(folder: Path, pip_file: Path, debian_file: Path) -> list[Package]:
    """The downloaded packages, sorted by name. Archives that are not pinned are left out.

    Raises:
        ValueError: a pinned one is missing.
    """
    wanted = {digest: (name, version) for name, (version, digest) in pip_pins(pip_file.read_text("utf-8")).items()}
    wanted |= {x: (name, version) for name, (version, x) in debian_pins(debian_file.read_text("utf-8")).items()}
    found = {}
    for path in sorted((*folder.glob("*.whl"), *folder.glob("*.deb"))):
        if (digest := sha256(path)) in wanted:
            name, version = wanted[digest]
            found[digest] = Package(name, version, digest, licence(path), path)
    if missing := [f"{name} {version}" for digest, (name, version) in wanted.items() if digest not in found]:
        raise ValueError(f"{folder} lacks {', '.join(missing[:5])} ({len(missing)} in all): download them first")
    return sorted(found.values(), key=lambda package: package.name)


def licence(archive: Path) -> str:
    """What a wheel says of its licence; of Debian's package, where its copyright file is."""
    if archive.suffix == ".deb":
        return f"see /usr/share/doc/{archive.name.partition('_')[0]}/copyright"
    with zipfile.ZipFile(archive) as wheel:
        metadata = email.message_from_bytes(wheel.read(_metadata(wheel)))
    classifiers = [x.split(" :: ")[-1] for x in metadata.get_all("Classifier", []) if x.startswith("License ::")]
    told = metadata.get("License-Expression") or ", ".join(classifiers) or metadata.get("License") or "not told"
    return " ".join(str(told).split())[:80]


def _metadata(wheel: zipfile.ZipFile) -> str:
    return next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))


def files(package: Package) -> Iterator[tuple[str, str]]:
    """(path, text) of the code and documentation in a package, sorted by path. What is not UTF-8 is left out."""
    if package.archive.is_dir():
        for path in sorted(package.archive.rglob("*")):
            if path.is_file() and path.name.endswith((*CODE, *TEXT)):
                yield from _decoded(str(path.relative_to(package.archive)), path.read_bytes())
    elif package.archive.suffix == ".py":
        yield from _decoded(package.archive.name, package.archive.read_bytes())
    elif package.archive.suffix == ".whl":
        with zipfile.ZipFile(package.archive) as wheel:
            about = _metadata(wheel)
            description = email.message_from_bytes(wheel.read(about)).get_payload()
            yield "README", str(description)
            for name in sorted(wheel.namelist()):
                if name.endswith((*CODE, *TEXT)) and ".dist-info/" not in name:
                    yield from _decoded(name, wheel.read(name))
    else:
        with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(package.archive)], stdout=subprocess.PIPE) as process:
            with tarfile.open(fileobj=process.stdout, mode="r|") as tar:
                read: list[tuple[str, bytes]] = []
                for member in tar:
                    if member.isfile() and member.name.endswith((*CODE, *TEXT)):
                        file = tar.extractfile(member)
                        assert file is not None
                        read.append((member.name, file.read()))
        for name, data in sorted(read):
            yield from _decoded(name, gzip.decompress(data) if name.endswith(".gz") else data)


def _decoded(name: str, data: bytes) -> Iterator[tuple[str, str]]:
    try:
        yield name, data.decode("utf-8").replace("\r\n", "\n").removeprefix("\ufeff")
    except UnicodeDecodeError:
        return


def local_packages(limit: int | None = None) -> list[Package]:
    """Packages that need no network: those of Python's standard library, and the folders of this repository.

    Args:
        limit: at most so many.
    """
    from text_sources import stdlib_files

    root = Path(next(path for path in stdlib_files() if path.name == "abc.py")).parent
    tops = sorted({root / path.relative_to(root).parts[0] for path in stdlib_files()})
    version = ".".join(map(str, sys.version_info[:3]))
    found = [Package(path.stem, version, "", "PSF-2.0", path) for path in tops]
    folders = ("docs", "lightning_megatron", "patches", "examples", "tests")
    found += [Package(f"this-{name}", "checkout", "", "Apache-2.0", ROOT / name) for name in folders]
    return found[-limit:] if limit else found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the build; archives go to OUT/downloads")
    parser.add_argument("--pip", type=Path, default=HERE / "packages.txt", help="pinned wheels (%(default)s)")
    parser.add_argument("--debian", type=Path, default=HERE / "debian.txt", help="pinned Debian packages (%(default)s)")
    options = parser.parse_args(argv)
    try:
        download(options.out / "downloads", options.pip, options.debian)
        found = pinned(options.out / "downloads", options.pip, options.debian)
    except ValueError as error:
        raise SystemExit(f"packages: {error}") from error
    print(f"{len(found)} packages in {options.out / 'downloads'}")


if __name__ == "__main__":
    main()
