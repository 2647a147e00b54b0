from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from moedist.config import ConfigError
from moedist.data import corpus
from moedist.data.contract import Documents
from moedist.data.loader import Loader
from moedist.data.tokens import SAMPLED_TOKENS, TokensConfig
from tests.data.corpora import documents_of

IDS = np.arange(1000, dtype=np.int64) * 7 % 900


def save_llmc(path: Path, ids: np.ndarray, magic: int = 20240520, version: int = 1, dtype: str = "<u2") -> None:
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(ids)
    path.write_bytes(header.tobytes() + ids.astype(dtype).tobytes())


def save_megatron(
    prefix: Path, documents: list[np.ndarray], code: int = 8, dtype: str = "<u2", bounds: list[int] | None = None
) -> None:
    """As Megatron-LM's IndexedDatasetBuilder: one sequence per document, bounds 0, 1, ..., n."""
    length_S = np.array([len(document) for document in documents])
    bounds = list(range(len(documents) + 1)) if bounds is None else bounds
    head = b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + struct.pack("<B", code)
    head += struct.pack("<Q", len(length_S)) + struct.pack("<Q", len(bounds))
    offset_S = (np.cumsum(length_S) - length_S) * np.dtype(dtype).itemsize
    index = head + length_S.astype("<i4").tobytes() + offset_S.astype("<i8").tobytes()
    Path(f"{prefix}.idx").write_bytes(index + np.array(bounds, "<i8").tobytes())
    Path(f"{prefix}.bin").write_bytes(b"".join(document.astype(dtype).tobytes() for document in documents))


def opened(files: object, **settings: object) -> Documents:
    options = {"vocab_size": 1000, "holdout_every": None, **settings}
    return TokensConfig(files=str(files), **options).open().documents("train")  # type: ignore[arg-type]


def ids_of(documents: Documents) -> list[int]:
    return np.concatenate([part.astype(np.int64) for part in documents.parts]).tolist()


@pytest.mark.parametrize("file_format", ["auto", "nanogpt", "raw"])
def test_nanogpt(tmp_path: Path, file_format: str) -> None:
    IDS.astype("<u2").tofile(tmp_path / "train.bin")
    assert ids_of(opened(tmp_path / "train.bin", format=file_format)) == IDS.tolist()


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "int16", "int32", "int64"])
def test_headerless_npy(tmp_path: Path, dtype: str) -> None:
    IDS.astype(dtype).tofile(tmp_path / "part-0-00000.npy")
    assert ids_of(opened(tmp_path / "part-0-00000.npy", dtype=dtype)) == IDS.tolist()


@pytest.mark.parametrize(("magic", "version", "dtype"), [(20240520, 1, "<u2"), (20240801, 7, "<u4")])
@pytest.mark.parametrize("file_format", ["auto", "llmc"])
def test_llmc(tmp_path: Path, magic: int, version: int, dtype: str, file_format: str) -> None:
    save_llmc(tmp_path / "train.bin", IDS, magic, version, dtype)
    assert ids_of(opened(tmp_path / "train.bin", format=file_format)) == IDS.tolist()


@pytest.mark.parametrize("dtype", ["<u2", ">u2", "<i4", "<i8", "u1"])
@pytest.mark.parametrize("file_format", ["auto", "npy"])
def test_true_npy(tmp_path: Path, dtype: str, file_format: str) -> None:
    np.save(tmp_path / "train.npy", (IDS % 256).astype(dtype))
    assert ids_of(opened(tmp_path / "train.npy", format=file_format)) == (IDS % 256).tolist()


@pytest.mark.parametrize(("code", "dtype"), [(8, "<u2"), (4, "<i4"), (5, "<i8"), (3, "<i2")])
@pytest.mark.parametrize("name", ["corpus_text_document", "corpus_text_document.bin", "corpus_text_document.idx", ""])
def test_megatron(tmp_path: Path, code: int, dtype: str, name: str) -> None:
    """By prefix, by either file, and as the folder that holds both."""
    texts = documents_of(3, 1, 5)
    save_megatron(tmp_path / "corpus_text_document", texts, code, dtype)
    documents = opened(tmp_path / name)
    assert ids_of(documents) == np.concatenate(texts).tolist()
    assert documents.start_G is not None and documents.start_G.tolist() == [0, 3, 4]


@pytest.mark.parametrize(
    ("bounds", "starts"), [([0, 2, 3], [0, 4]), ([0, 1, 1, 3], [0, 3]), ([0], [0]), ([0, 3], [0]), ([], [0])]
)
def test_megatron_documents_of_several_sequences(tmp_path: Path, bounds: list[int], starts: list[int]) -> None:
    save_megatron(tmp_path / "c", documents_of(3, 1, 5), bounds=bounds)
    documents = opened(tmp_path / "c")
    assert documents.start_G is not None and documents.start_G.tolist() == starts


def test_megatron_pairs_end_to_end(tmp_path: Path) -> None:
    save_megatron(tmp_path / "a", documents_of(3, 2))
    save_megatron(tmp_path / "b", documents_of(4, 1))
    documents = opened(tmp_path / "*.bin")
    assert documents.start_G is not None and documents.start_G.tolist() == [0, 3, 5, 9]


def test_shards_are_one_stream_cut_by_the_end_of_documents(tmp_path: Path) -> None:
    for shard, ids in enumerate(np.split(IDS, [300, 650])):
        save_llmc(tmp_path / f"train_{shard:06d}.bin", ids)
    source = TokensConfig(
        files=str(tmp_path / "train_*.bin"), vocab_size=900, eod_id=int(IDS[5]), holdout_every=None
    ).open()
    loader = Loader(source, "train", sequence_length=999, micro_batch=1)
    ((batch,),) = [next(loader)]
    assert batch.token_BS[0].tolist() == IDS[:-1].tolist()
    assert batch.document_BS is not None and batch.document_BS[0, :8].tolist() == [0, 0, 0, 0, 0, 0, 1, 1]


def test_the_end_is_held_out_from_a_document_on(tmp_path: Path) -> None:
    texts = documents_of(*[10] * 30)
    np.concatenate(texts).tofile(tmp_path / "t.bin")
    save_megatron(tmp_path / "m", texts)
    for files, settings in (("t.bin", {"eod_id": 99}), ("m", {})):
        source = TokensConfig(files=str(tmp_path / files), vocab_size=4000, holdout_every=7, **settings).open()  # type: ignore[arg-type]
        # 300 // 7 = 42 from the end is token 258; the next document begins at 260.
        assert source.documents("train").num_tokens == 260
        assert ids_of(source.documents("valid")) == np.concatenate(texts[26:]).tolist()
    starts = source.documents("valid").start_G
    assert starts is not None and starts.tolist() == [0, 10, 20, 30]


def test_the_cut_stays_where_no_document_begins_near(tmp_path: Path) -> None:
    save_megatron(tmp_path / "m", documents_of(295, 5))
    source = TokensConfig(files=str(tmp_path / "m"), vocab_size=1000, holdout_every=10).open()
    assert source.documents("valid").num_tokens == 30
    starts = source.documents("valid").start_G
    assert starts is not None and starts.tolist() == [0, 25]


def test_valid_files(tmp_path: Path) -> None:
    IDS.astype("<u2").tofile(tmp_path / "train.bin")
    IDS[:50].astype("<u2").tofile(tmp_path / "val.bin")
    config = TokensConfig(files=str(tmp_path / "train.bin"), valid_files=str(tmp_path / "val.bin"), vocab_size=1000)
    source = config.open()
    assert source.documents("train").num_tokens == 1000 and source.documents("valid").num_tokens == 50


def test_files_are_mapped(tmp_path: Path) -> None:
    """A sparse terabyte opens and is read at its end."""
    path = tmp_path / "huge.bin"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    source = TokensConfig(files=str(path), vocab_size=1000).open()
    documents = source.documents("train")
    assert documents.num_tokens + source.documents("valid").num_tokens == 1 << 39
    assert all(isinstance(part, np.memmap) for part in documents.parts)
    num_samples = (documents.num_tokens - 1) // 64
    loader = Loader(source, "valid", sequence_length=64, micro_batch=2)
    assert next(loader)[0].valid_BS.all() and num_samples > 1 << 32


def test_ids_are_checked_at_the_start_and_when_they_are_read(tmp_path: Path) -> None:
    ids = np.zeros(SAMPLED_TOKENS * 200, "<u2")
    ids[-1] = 1000
    ids.tofile(tmp_path / "t.bin")
    with pytest.raises(ConfigError, match=f"vocab_size = 1000 does not hold token id 1000, at position {len(ids) - 1}"):
        opened(tmp_path / "t.bin")
    ids[-1], hidden = 0, SAMPLED_TOKENS * 2
    ids[hidden] = 1000
    ids.tofile(tmp_path / "t.bin")
    source = TokensConfig(files=str(tmp_path / "t.bin"), vocab_size=1000, holdout_every=None).open()
    reader = Loader(source, "train", sequence_length=1 << 16, micro_batch=50)
    with pytest.raises(ConfigError, match=f"data.vocab_size = 1000 does not hold token id 1000, at position {hidden}"):
        for _ in range(4):
            next(reader)


def test_fingerprint(tmp_path: Path) -> None:
    def fingerprint(ids: np.ndarray, **settings: object) -> str:
        ids.astype("<u2").tofile(tmp_path / "t.bin")
        options = {"vocab_size": 1000, **settings}
        return TokensConfig(files=str(tmp_path / "t.bin"), **options).open().fingerprint  # type: ignore[arg-type]

    other = IDS.copy()
    other[500] += 1
    prints = [fingerprint(IDS), fingerprint(other), fingerprint(IDS[:-1]), fingerprint(IDS, eod_id=3)]
    assert len({*prints, fingerprint(IDS, holdout_every=30)}) == 5 and fingerprint(IDS) == prints[0]


def test_search_for_the_end_of_a_document_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "END_SEARCH", 5)
    ids = np.zeros(1000, "<u2")
    ids[910] = 99
    ids.tofile(tmp_path / "t.bin")
    source = TokensConfig(files=str(tmp_path / "t.bin"), vocab_size=1000, eod_id=99, holdout_every=10).open()
    assert source.documents("valid").num_tokens == 100


def broken(tmp_path: Path, what: str) -> tuple[Path, dict[str, object]]:
    """A file with one fault, and how it is opened."""
    path = tmp_path / "t.bin"
    if what == "empty":
        path.touch()
    elif what == "odd":
        path.write_bytes(b"x" * 1001)
    elif what == "odd for its type":
        path.write_bytes(b"x" * 1002)
        return path, {"dtype": "uint32"}
    elif what.startswith("llmc"):
        version, magic = (3 if "version" in what else 1), (20240522 if "magic" in what else 20240520)
        save_llmc(path, IDS, magic=magic, version=version)
        keep = {"llmc header": 500, "llmc short": 2000}.get(what)
        path.write_bytes(path.read_bytes()[:keep])
        return path, {"format": "llmc"}
    elif what.startswith("npy"):
        path = tmp_path / "t.npy"
        array = {"npy floats": IDS.astype("f4"), "npy square": IDS.reshape(10, 100), "npy objects": IDS.astype(object)}
        np.save(path, array.get(what, IDS), allow_pickle=True)
        if what == "npy short":
            path.write_bytes(path.read_bytes()[:-8])
        if what == "npy header":
            path.write_bytes(path.read_bytes()[:40])
        if what == "npy none":
            IDS.tofile(path)
            return path, {"format": "npy"}
    else:
        save_megatron(tmp_path / "t", documents_of(3, 1, 5), code=7 if what == "megatron floats" else 8)
        index = tmp_path / "t.idx"
        content = bytearray(index.read_bytes())
        if what == "megatron magic":
            content[3] ^= 1
        elif what == "megatron version":
            content[9] = 2
        elif what == "megatron short":
            del content[-1]
        elif what == "megatron header":
            del content[20:]
        elif what == "megatron counts":
            content[18:26] = struct.pack("<Q", 1 << 60)
        elif what == "megatron lengths":
            content[34:38] = struct.pack("<i", -3)
        elif what == "megatron bounds":
            content[-8:] = struct.pack("<q", 9)
        elif what == "megatron tokens":
            path.write_bytes(path.read_bytes()[:-2])
        index.write_bytes(content)
        if what == "megatron alone":
            path.unlink()
            return index, {}
    return path, {}


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("empty", "t.bin' holds no tokens. Make the file again"),
        ("odd", "has 1001 bytes of tokens, no multiple of the 2 of uint16. Set format and dtype"),
        ("odd for its type", "has 1002 bytes of tokens, no multiple of the 4 of uint32"),
        ("llmc header", "is shorter than the 1024 bytes of an llm.c header. Make it again"),
        ("llmc magic", "has magic number 20240522, version 1, which no llm.c token file has"),
        ("llmc version", "has magic number 20240520, version 3"),
        ("llmc short", "says that it holds 1000 tokens and holds 488. It was cut short"),
        ("npy floats", "holds float32 of shape .1000., not one line of whole numbers. Save the ids"),
        ("npy square", "holds int64 of shape .10, 100., not one line"),
        ("npy objects", "is a broken NumPy file .*Make it again"),
        ("npy short", "is a broken NumPy file"),
        ("npy header", "is a broken NumPy file"),
        ("npy none", "does not begin as a NumPy file. If it has bare ids"),
        ("megatron floats", "t.idx' is no index of whole numbers of Megatron .*type 7"),
        ("megatron magic", "t.idx' is no index of whole numbers of Megatron"),
        ("megatron version", "is no index of whole numbers of Megatron .*version 2"),
        ("megatron header", "is no index of whole numbers of Megatron"),
        ("megatron short", "t.idx' has 101 bytes, and 3 sequences and 4 document bounds take 102"),
        ("megatron counts", "and 1152921504606846976 sequences and 4 document bounds take"),
        ("megatron lengths", "t.idx' does not cut t.bin into sequences end to end"),
        ("megatron bounds", "t.idx' has document bounds that do not ascend"),
        ("megatron tokens", "t.bin' has 8 tokens of uint16, and its index counts 9"),
        ("megatron alone", "has an .idx without its .bin. Add it."),
    ],
)
def test_corrupt(tmp_path: Path, what: str, message: str) -> None:
    path, settings = broken(tmp_path, what)
    with pytest.raises(ConfigError, match=message) as caught:
        opened(path, **settings)
    assert caught.value.key == "files"


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (tmp_path / "ran",)  # type: ignore[return-value]

    np.save(tmp_path / "t.npy", np.array([Payload()], dtype=object), allow_pickle=True)
    with pytest.raises(ConfigError):
        opened(tmp_path / "t.npy")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vocab_size": 1}, "vocab_size = 1 is too small. Set it to the number of token ids."),
        ({"vocab_size": 10, "eod_id": 10}, "eod_id = 10 is not an id below vocab_size = 10. Set it to"),
        ({"eod_id": -1}, "eod_id = -1 is not an id"),
        ({"holdout_every": 1}, "holdout_every = 1 leaves nothing to train on. Set 2 or more, or null."),
    ],
)
def test_bad_values(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TokensConfig(**settings)


def test_vocabulary_must_be_set(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="vocab_size = None is not set, and token files do not say it. Set it to"):
        opened(tmp_path, vocab_size=None)


def test_no_files_named() -> None:
    with pytest.raises(ConfigError, match="names no files"):
        TokensConfig(vocab_size=10).open()


def test_no_read_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is planted: tests may run as a user whom no permission stops."""
    IDS.astype("<u2").tofile(tmp_path / "t.bin")

    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(np, "memmap", refuse)
    with pytest.raises(ConfigError, match="t.bin' may not be read by this user. Give this user read permission"):
        opened(tmp_path / "t.bin", format="nanogpt")
