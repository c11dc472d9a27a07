"""From a .cpp file to a loaded library: compiled once for this compiler, CPU and torch, kept in a folder of the user's own.

A library's file name is a hash of all it depends on, so that a cache that moved to another machine, or an older compiler, is
simply not found. It is written under another name and renamed: two processes at once, or one that is interrupted, leave nothing
half made. Where it cannot be had, one warning says why and what is lost.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

HERE = Path(__file__).parent
ALWAYS = ["-O3", "-std=c++17", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math"]
TRIES = [["-march=native", "-fopenmp"], ["-march=native"], []]  # the first that compiles; the second on one thread
PATIENCE = 120  # seconds for one compilation


@dataclass(frozen=True)
class Built:
    """What became of a kernel: the library's file, or why there is none."""

    path: Path | None
    flags: tuple[str, ...] = ()
    problem: str = ""
    fresh: bool = False  # compiled by this call


@functools.cache
def library(name: str, numbers: str = "f32") -> ctypes.CDLL | None:
    """The kernel of that name for numbers of that kind, ready to be called, or None after one warning."""
    built = build(name, numbers)
    if built.path is not None:
        try:
            return ctypes.CDLL(str(built.path))
        except OSError as error:
            built = Built(None, problem=f"{built.path} cannot be loaded ({error}); delete it and try again")
    _warn_once(built.problem)
    return None


@functools.cache
def _warn_once(problem: str) -> None:
    warnings.warn(f"C++ kernels are off and slower torch forms run: {problem}", RuntimeWarning, stacklevel=2)


def build(name: str, numbers: str = "f32") -> Built:
    """Compile a kernel for f32, f64, c64 or c128, unless its library is there already."""
    compiler = find_compiler()
    if compiler is None:
        return Built(None, problem="no C++ compiler found; install g++ or clang++, or name one in CXX")
    try:
        folder = cache_folder()
    except OSError as error:
        return Built(None, problem=f"no folder for compiled kernels ({error}); name one in SLIPSTREAM_CACHE")
    said = ""
    for extra in TRIES:
        flags = (*ALWAYS, *extra, f"-DFOR_{numbers}(...)=__VA_ARGS__")
        path = folder / f"{name}-{numbers}-{fingerprint(name, compiler, flags)}.so"
        if path.exists():
            return Built(path, flags)
        wrong = _compile(HERE / f"{name}.cpp", compiler, flags, path)
        if path.exists():
            return Built(path, flags, fresh=True)
        said = said or wrong
    return Built(None, problem=f"{compiler} cannot compile {name}.cpp: {said}")


def kernels() -> list[str]:
    """Names of all that can be built."""
    return sorted(p.stem for p in HERE.glob("*.cpp"))


def single_precision(name: str) -> list[str]:
    """What a kernel is compiled for where models are in float32: real numbers, and complex ones if it knows them."""
    return ["f32", "c64"] if "\nFOR_c64(" in (HERE / f"{name}.cpp").read_text() else ["f32"]


def find_compiler() -> str | None:
    """Path of the C++ compiler: CXX where it is set, else the first that is there."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    return next((path for name in names if (path := shutil.which(name))), None)


def cache_folder() -> Path:
    """A folder that only this user can write to. Raises OSError when there is none to be had."""
    refused: OSError | None = None
    for folder in _folders():
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _own(folder)
            return folder
        except OSError as error:
            refused = error
    raise refused or OSError("none")


def _folders() -> list[Path]:
    """SLIPSTREAM_CACHE alone, or the user's cache, or what is left on a machine whose home cannot be written to."""
    if named := os.environ.get("SLIPSTREAM_CACHE"):
        return [Path(named).expanduser() / "kernels"]
    home = Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    base = Path(os.environ.get("XDG_CACHE_HOME") or home)
    user = os.getuid() if hasattr(os, "getuid") else os.environ.get("USERNAME", "user")
    return [base / "slipstream" / "kernels", Path(tempfile.gettempdir()) / f"slipstream-kernels-{user}"]


def _own(folder: Path) -> None:
    """Code is loaded from here: nobody else may have put it there."""
    about = folder.stat()
    if hasattr(os, "getuid") and (about.st_uid != os.getuid() or about.st_mode & (stat.S_IWGRP | stat.S_IWOTH)):
        raise PermissionError(f"{folder} belongs to, or can be written by, somebody else")
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{folder} cannot be written to")


def fingerprint(name: str, compiler: str, flags: tuple[str, ...]) -> str:
    """Of all that a library depends on."""
    about = os.stat(compiler)
    facts = [compiler, str(about.st_size), str(about.st_mtime_ns), *flags, cpu_features(), torch.__version__]
    sources = [p.read_bytes() for p in (HERE / f"{name}.cpp", *sorted(HERE.glob("*.h")))]
    return hashlib.sha256(b"\0".join([*(f.encode() for f in facts), *sources])).hexdigest()[:24]


@functools.cache
def cpu_features() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join(
        sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    )


def _compile(source: Path, compiler: str, flags: tuple[str, ...], path: Path) -> str:
    """Make the library; what went wrong, or ""."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    command = [compiler, *flags, str(source), "-o", str(partial)]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
        if run.returncode == 0:
            os.replace(partial, path)
            return ""
        return next(
            (line for line in run.stderr.splitlines() if "error" in line), run.stderr.strip()[:200] or "no reason"
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    finally:
        partial.unlink(missing_ok=True)
