"""What gpu_session.py carries to a machine without a network: wheels, and kernels compiled ahead for it."""

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LARGEST = 60 * 2**20
"""Bytes of all that is carried."""
PEERS = (
    "flash-linear-attention==0.6.0",
    "fla-core==0.6.0",
    "torchao==0.18.0",
    "pytest-xdist==3.8.0",
    "execnet==2.1.2",
)
"""Packages that the machine may not have; without their dependencies, which it has."""
TRITON = "triton==3.6.0"
MACHINE = ("--python-version", "3.12", "--implementation", "cp", "--only-binary=:all:")
PLATFORMS = [f"manylinux_2_{n}_x86_64" for n in (28, 27, 24, 17)] + ["manylinux2014_x86_64", "any"]
PIP = (sys.executable, "-m", "pip")


def build(folder: Path, python: str) -> None:
    """Fill `folder` with wheels/*.whl and cache.tar.xz.

    Args:
        folder: emptied first.
        python: a Python of the machine's version. Triton's cache is keyed by the library of that version.

    Raises:
        SystemExit: all of it is larger than `LARGEST`.
        CalledProcessError: pip or a compilation failed; their output says why.
    """
    shutil.rmtree(folder, ignore_errors=True)
    wheels = folder / "wheels"
    wheels.mkdir(parents=True)
    subprocess.run([*PIP, "wheel", "--quiet", "--no-deps", "--wheel-dir", str(wheels), str(ROOT)], check=True)
    download(wheels, *PEERS)
    with tempfile.TemporaryDirectory() as scratch:
        cache = Path(scratch) / "cache"
        compile_ahead(Path(scratch), cache, python)
        with tarfile.open(folder / "cache.tar.xz", "w:xz") as archive:
            for entry in sorted(cache.iterdir()):
                archive.add(entry, entry.name)
    total = 0
    for path in sorted(folder.rglob("*.*")):
        if path.is_file():
            total += path.stat().st_size
            print(f"{path.stat().st_size / 2**20:8.2f} MiB  {path.relative_to(folder)}")
    print(f"{total / 2**20:8.2f} MiB  in all, in {folder}")
    if total > LARGEST:
        raise SystemExit(
            f"{total / 2**20:.1f} MiB are too much: at most {LARGEST / 2**20:.0f} MiB can be carried."
        )


def download(folder: Path, *packages: str) -> None:
    """Fetch wheels for the machine, without their dependencies."""
    platforms = [option for name in PLATFORMS for option in ("--platform", name)]
    command = [
        *PIP,
        "download",
        "--quiet",
        "--no-deps",
        *MACHINE,
        *platforms,
        "--dest",
        str(folder),
        *packages,
    ]
    subprocess.run(command, check=True)


def compile_ahead(scratch: Path, cache: Path, python: str) -> None:
    """Fill Triton's cache for sm_90 with the machine's release of Triton.

    A cache is keyed by Triton's files, and its library differs from one version of Python to the next, though the code
    that it makes does not. So kernels are compiled here by the release for this Python, under the key of that for the
    machine's.
    """
    ours, theirs = scratch / "ours", scratch / "theirs"
    install = [*PIP, "install", "--quiet", "--no-deps", "--target", str(ours), TRITON]
    subprocess.run(install, check=True)
    download(scratch, TRITON)
    shutil.unpack_archive(next(scratch.glob("triton-*.whl")), theirs, "zip")
    key = subprocess.run(
        [python, "-c", "from triton.runtime.cache import triton_key; print(triton_key())"],
        env={**os.environ, "PYTHONPATH": str(theirs)},
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    environment = {
        **os.environ,
        "PYTHONPATH": str(ours),
        "TRITON_CACHE_DIR": str(cache),
        "TRITON_INTERPRET": "0",
    }
    command = [sys.executable, str(ROOT / "tests" / "gpu_launches.py"), key]
    subprocess.run(command, env=environment, check=True)
