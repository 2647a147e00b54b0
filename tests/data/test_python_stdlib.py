from __future__ import annotations

import sysconfig
from pathlib import Path

import numpy as np
import pytest

from moedist.config import ConfigError
from moedist.data.corpus import MemorySource
from moedist.data.python_stdlib import PythonStdlibConfig, stdlib_files
from moedist.data.yardstick import bigram_cross_entropy


@pytest.fixture(scope="module")
def corpus() -> MemorySource:
    source = PythonStdlibConfig().open()
    assert isinstance(source, MemorySource)
    return source


def fake_stdlib(root: Path, monkeypatch: pytest.MonkeyPatch, num_files: int = 60) -> Path:
    for i in range(num_files):
        (root / f"module_{i:02d}.py").write_bytes(b"x = %d\n" % i)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(root)})
    return root


def test_bytes_and_ends(corpus: MemorySource) -> None:
    assert corpus.vocab_size == 257 and corpus.byte_level
    for documents in (corpus.train, corpus.valid):
        (token_N,) = documents.parts
        start_G = documents.start_G
        assert start_G is not None and token_N.dtype == np.uint16
        ends = np.flatnonzero(token_N == 256)
        assert (ends[:-1] + 1 == start_G[1:]).all() and ends[-1] == len(token_N) - 1


def test_about_a_twentieth_is_held_out(corpus: MemorySource) -> None:
    assert corpus.train.num_tokens > 5e6
    assert 0.02 < corpus.valid.num_tokens / corpus.train.num_tokens < 0.1


def test_yardstick_is_what_bigrams_reach_on_python(corpus: MemorySource) -> None:
    found = bigram_cross_entropy(corpus)
    assert found is not None and 2.3 < found < 2.6


def test_says_what_it_is(corpus: MemorySource) -> None:
    assert "python_stdlib" in corpus.describe() and corpus.fingerprint[:16] in corpus.describe()


def test_which_files(tmp_path: Path) -> None:
    wanted = ["abc.py", "email/header.py", "unittest/case.py", "zipfile.py"]
    others = [
        "site-packages/a.py", "lib/dist-packages/b.py", "test/c.py", "email/tests/d.py", "idlelib/e.py",
        "idlelib/idle_test/f.py", "lib2to3/tests/data/g.py", "unittest/test/h.py", "readme.txt", "x.pyc",
        "__pycache__/i.py",
    ]  # fmt: skip
    for name in [*others, *reversed(wanted)]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("pass")
    assert [path.relative_to(tmp_path).as_posix() for path in stdlib_files(tmp_path)] == wanted


def test_every_twentieth_file_is_held_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_stdlib(tmp_path, monkeypatch)
    source = PythonStdlibConfig().open()
    held = bytes(source.documents("valid").parts[0][source.documents("valid").parts[0] < 256].astype(np.uint8))
    assert held == b"x = 19\nx = 39\nx = 59\n"


def test_hash_follows_names_and_contents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = fake_stdlib(tmp_path, monkeypatch)
    first = PythonStdlibConfig().open().fingerprint
    assert PythonStdlibConfig().open().fingerprint == first
    (root / "module_00.py").rename(root / "module_.py")
    renamed = PythonStdlibConfig().open().fingerprint
    (root / "module_01.py").write_bytes(b"x = 2\n")
    assert len({first, renamed, PythonStdlibConfig().open().fingerprint}) == 3


def test_no_sources_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_stdlib(tmp_path, monkeypatch, num_files=3)
    with pytest.raises(ConfigError, match="finds only 3 Python files .* data=text"):
        PythonStdlibConfig().open()


def test_holdout_every() -> None:
    with pytest.raises(ConfigError, match="holdout_every = 1 leaves nothing to train on. Set 2 or more."):
        PythonStdlibConfig(holdout_every=1)
