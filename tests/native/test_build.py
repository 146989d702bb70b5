"""Compiling the kernels: once, aside, for this CPU; and doing without."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from llm_engine.native import build

SMALL = ("-O0", "-march=native", "-fopenmp", "-shared", "-fPIC", "-std=c++17", "-Wno-psabi")


@pytest.fixture
def compiler():
    found = build.find_compiler()
    if found is None:
        pytest.skip("no C++ compiler here")
    return found


@pytest.fixture
def fresh(monkeypatch):
    """As in a process that has not asked for the kernels yet."""
    monkeypatch.setattr(build, "_loaded", [])


@pytest.fixture
def small_sources(monkeypatch, tmp_path):
    folder = tmp_path / "csrc"
    folder.mkdir()
    (folder / "answer.cpp").write_text('extern "C" int answer() { return 42; }')
    monkeypatch.setattr(build, "SOURCES", folder)
    return folder


def test_a_second_call_finds_the_first_ones_work(compiler, small_sources, tmp_path):
    first = build.compiled(compiler, tmp_path, SMALL)
    stamp = first.stat().st_mtime_ns
    assert build.compiled(compiler, tmp_path, SMALL) == first
    assert first.stat().st_mtime_ns == stamp


def test_what_changes_the_object_changes_its_name(compiler, small_sources, tmp_path):
    names = {build.compiled(compiler, tmp_path, SMALL), build.compiled(compiler, tmp_path, (*SMALL, "-O1"))}
    (small_sources / "answer.cpp").write_text('extern "C" int answer() { return 43; }')
    names.add(build.compiled(compiler, tmp_path, SMALL))
    (small_sources / "other.h").write_text("#pragma once")
    names.add(build.compiled(compiler, tmp_path, SMALL))
    assert len(names) == 4


def test_many_at_once_all_get_a_whole_object(compiler, small_sources, tmp_path):
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(lambda _: build.compiled(compiler, tmp_path, SMALL), range(4)))
    assert len(set(paths)) == 1
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".so"] == [paths[0].name]


def test_a_failed_compile_leaves_nothing_and_is_told_once(
    compiler, small_sources, tmp_path, fresh, monkeypatch, caplog
):
    (small_sources / "answer.cpp").write_text("this is not C++")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("LLM_ENGINE_NATIVE", raising=False)
    with caplog.at_level(logging.WARNING):
        assert build.library() is None
        assert build.library() is None
    assert len(caplog.records) == 1
    assert "g++" in caplog.text
    assert list(build.cache_folder().iterdir()) == []


def test_no_compiler_is_told(fresh, monkeypatch, caplog):
    monkeypatch.setattr(build, "find_compiler", lambda: None)
    monkeypatch.delenv("LLM_ENGINE_NATIVE", raising=False)
    assert build.library() is None
    assert "no C++ compiler" in caplog.text


def test_it_can_be_switched_off_silently(fresh, monkeypatch, caplog):
    monkeypatch.setenv("LLM_ENGINE_NATIVE", "0")
    assert build.library() is None
    assert not caplog.records


def test_a_cache_that_cannot_be_written_is_replaced(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    folder = build.cache_folder()
    assert os.access(folder, os.W_OK)
    folder.rmdir()


def test_the_openmp_runtime_is_torchs(compiler):
    """Two runtimes would be two teams of threads on the same cores; and denormals must survive our loading."""
    script = (
        "import torch, numpy, warnings; from llm_engine.native import build; library = build.library();"
        "maps = open('/proc/self/maps').read().split();"
        "print(library is not None, len({path for path in maps if 'libgomp' in path}), numpy.float32(1e-40) * 1 > 0)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("LLM_ENGINE_NATIVE", None)
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "1", "True"], done.stdout + done.stderr
    assert torch.get_num_threads() >= 1
