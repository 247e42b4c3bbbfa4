"""Prints what a wheel and an sdist hold, and fails if that is not what git tracks of them."""

from pathlib import Path
import re
import subprocess
import sys
import tarfile
import zipfile

LOWERING = "lowering/"
KERNEL = "adamw_xla_lowering/libadamw_xla_cpu.so"
NEWEST_GLIBC = (2, 28)


def tracked(*paths: str) -> set[str]:
    """The files that git knows."""
    command = ["git", "ls-files", "--", *paths]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


def check(what: Path, held: set[str], wanted: set[str]) -> None:
    """Fails where an archive holds too much or too little."""
    print(f"{what.name}: {what.stat().st_size:,} bytes, {len(held)} files")
    if held != wanted:
        sys.exit(f"too much: {sorted(held - wanted)}; missing: {sorted(wanted - held)}")


def check_wheel(path: Path) -> None:
    """The two packages, the kernel and the metadata, for many Linuxes."""
    with zipfile.ZipFile(path) as wheel:
        members = [member for member in wheel.infolist() if not member.is_dir()]
    for member in members:
        print(f"{member.file_size:9,} {member.filename}")
    held = {member.filename for member in members}
    python = tracked("adamw_xla", f"{LOWERING}adamw_xla_lowering")
    names = ("METADATA", "WHEEL", "RECORD", "licenses/LICENSE")
    metadata = {f"{'-'.join(path.name.split('-')[:2])}.dist-info/{name}" for name in names}
    check(path, held, {name.removeprefix(LOWERING) for name in python} | metadata | {KERNEL})
    tag = re.search(r"-py3-none-manylinux_(\d+)_(\d+)_x86_64", path.name)
    if tag is None or tuple(map(int, tag.groups())) > NEWEST_GLIBC:
        sys.exit(f"{path.name} is not for py3-none-manylinux_2_28_x86_64 or older")


def check_sdist(path: Path) -> None:
    """All that git tracks, but for what CI and git alone read."""
    with tarfile.open(path) as sdist:
        members = [member.name for member in sdist.getmembers() if member.isfile()]
    held = {name.partition("/")[2] for name in members}
    check(path, held, tracked() - tracked(".ci", ".gitignore") | {"PKG-INFO"})


if __name__ == "__main__":
    check_wheel(Path(sys.argv[1]))
    check_sdist(Path(sys.argv[2]))
