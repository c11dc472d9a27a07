"""Compiling and loading kernels: whatever a machine lacks, the program works, and one line says what is lost."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from slipstream.ops.backends.cpp import library

SCAN = """
import warnings, torch
from slipstream.ops.linear_scan import linear_scan
from slipstream.ops.dispatch import torch_forms
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    a, b = torch.rand(2, 9, 4), torch.rand(2, 9, 4)
    got = [linear_scan(a, b)[0] for _ in range(3)][0]
with torch_forms():
    torch.testing.assert_close(got, linear_scan(a, b)[0])
print(len(said), *(str(w.message) for w in said))
"""


def run(cache: Path, **environment: str) -> str:
    """What a fresh process says after a scan that came out right."""
    given = {**os.environ, "SLIPSTREAM_CACHE": str(cache), "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run([sys.executable, "-c", SCAN], env=given, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def made(cache: Path) -> list[str]:
    return sorted(p.name for p in (cache / "kernels").iterdir())


def test_compiled_once_and_found_again(tmp_path: Path):
    assert run(tmp_path) == "0"
    first = made(tmp_path)
    assert len(first) == 1 and first[0].startswith("linear_scan-") and first[0].endswith(".so")
    before = (tmp_path / "kernels" / first[0]).stat().st_mtime_ns
    assert run(tmp_path) == "0"
    assert made(tmp_path) == first and (tmp_path / "kernels" / first[0]).stat().st_mtime_ns == before
    assert (tmp_path / "kernels").stat().st_mode & 0o777 == 0o700


def test_without_a_compiler_torch_runs_and_one_line_says_so(tmp_path: Path):
    said = run(tmp_path, CXX="no-such-compiler")
    assert said.startswith("1 C++ kernels are off") and "install g++ or clang++" in said


def test_a_compiler_that_fails_is_quoted_once(tmp_path: Path):
    broken = script(tmp_path / "broken-c++", "echo 'fatal error: no such header' >&2; exit 1")
    said = run(tmp_path, CXX=broken)
    assert said.startswith("1 ") and "cannot compile linear_scan.cpp: fatal error: no such header" in said
    assert made(tmp_path) == []


def test_a_compiler_without_openmp_makes_a_kernel_for_one_thread(tmp_path: Path):
    real = library.find_compiler()
    lacking = f'case "$*" in *-fopenmp*) echo "error: unsupported option -fopenmp" >&2; exit 1;; esac; exec {real} "$@"'
    assert run(tmp_path, CXX=script(tmp_path / "plain-c++", lacking)) == "0"
    assert len(made(tmp_path)) == 1


def test_a_home_that_cannot_be_written_to(tmp_path: Path):
    (tmp_path / "file").write_text("not a folder")
    given = {"SLIPSTREAM_CACHE": "", "XDG_CACHE_HOME": str(tmp_path / "file"), "TMPDIR": str(tmp_path)}
    assert run(tmp_path, **given) == "0"
    (folder,) = tmp_path.glob("slipstream-kernels-*")
    assert [p.suffix for p in folder.iterdir()] == [".so"]


def test_nowhere_to_write_at_all(tmp_path: Path):
    (tmp_path / "file").write_text("not a folder")
    said = run(tmp_path / "file")
    assert said.startswith("1 ") and "SLIPSTREAM_CACHE" in said


def test_code_is_not_loaded_from_a_folder_that_others_can_write_to(tmp_path: Path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels").chmod(0o777)
    said = run(tmp_path)
    assert said.startswith("1 ") and "somebody else" in said


def test_two_processes_at_once(tmp_path: Path):
    given = {**os.environ, "SLIPSTREAM_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1"}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", SCAN], env=given, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    assert [p.communicate(timeout=300)[0].strip() for p in both] == ["0", "0"]
    assert len(made(tmp_path)) == 1


def test_an_interrupted_compilation_is_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SLIPSTREAM_CACHE", str(tmp_path))

    def interrupted(command: list[str], **_: object) -> None:
        Path(command[-1]).write_text("half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(subprocess, "run", interrupted)
        library.build("linear_scan")
    assert made(tmp_path) == []
    assert library.build("linear_scan").fresh and not library.build("linear_scan").fresh


def test_another_cpu_compiler_or_torch_is_another_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    compiler = library.find_compiler()
    assert compiler
    flags = ("-O3",)
    names = {
        library.fingerprint("linear_scan", compiler, flags),
        library.fingerprint("linear_scan", compiler, ("-O2",)),
    }
    copy = shutil.copy(compiler, tmp_path / "c++")
    names.add(library.fingerprint("linear_scan", str(copy), flags))
    monkeypatch.setattr(library, "cpu_features", lambda: "another")
    names.add(library.fingerprint("linear_scan", compiler, flags))
    assert len(names) == 4
