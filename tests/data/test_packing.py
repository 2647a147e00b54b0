from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moedist.config import ConfigError
from moedist.data.contract import Documents
from moedist.data.corpus import concatenate
from moedist.data.packing import PackedStream
from moedist.model.batch import IGNORE, TokenBatch
from tests.data.corpora import documents_of

END = 99


def all_rows(documents: Documents, sequence_length: int, cross_documents: bool = False) -> TokenBatch:
    stream = PackedStream(documents, sequence_length, 1000, cross_documents)
    sample_B = np.arange(stream.num_samples)
    return stream.batch(sample_B, sample_B)


@pytest.fixture(params=["offsets", "end_id", "two parts"])
def three_documents(request: pytest.FixtureRequest) -> Documents:
    """100 101 99 | 200 99 | 300 301 302 303 99, known by offsets or by the id that ends them."""
    documents = concatenate(documents_of(3, 2, 5))
    (token_N,) = documents.parts
    if request.param == "end_id":
        return Documents((token_N,), end_id=END)
    if request.param == "two parts":
        return Documents((token_N[:4].astype(np.int32), token_N[4:]), start_G=documents.start_G)
    return documents


def test_rows_drawn_by_hand(three_documents: Documents) -> None:
    batch = all_rows(three_documents, 6)
    I = IGNORE  # noqa: E741
    # The second row's last three positions are past the last input, which is token 9 of 10.
    assert batch.token_BS[0].tolist() == [100, 101, 99, 200, 99, 300]
    assert batch.target_BS.tolist() == [[101, 99, I, 99, I, 301], [302, 303, 99, I, I, I]]
    assert batch.position_BS.tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]]
    assert batch.document_BS is not None
    assert batch.document_BS.tolist() == [[0, 0, 0, 1, 1, 2], [0, 0, 0, 0, 0, 0]]
    assert batch.valid_BS.tolist() == [[True] * 6, [True] * 3 + [False] * 3]
    assert batch.token_BS[1, :3].tolist() == [301, 302, 303]
    assert batch.num_targets() == 7 and batch.num_tokens() == 9


def test_crossing_documents_is_one_text(three_documents: Documents) -> None:
    batch = all_rows(three_documents, 6, cross_documents=True)
    assert batch.target_BS[0].tolist() == [101, 99, 200, 99, 300, 301]
    assert batch.position_BS[0].tolist() == [0, 1, 2, 3, 4, 5]
    assert batch.document_BS is None


def test_no_document_numbers_where_no_row_has_two() -> None:
    batch = all_rows(concatenate(documents_of(4, 4)), 4)
    assert batch.document_BS is None
    # The boundary lies between the rows: the last position of the first has no target all the same.
    assert batch.target_BS.tolist() == [[101, 102, END, IGNORE], [201, 202, END, IGNORE]]
    assert batch.valid_BS.tolist() == [[True] * 4, [True] * 3 + [False]]


def test_without_boundaries_the_stream_is_one_document() -> None:
    batch = all_rows(Documents((np.arange(9, dtype=np.uint16),)), 4)
    assert batch.document_BS is None and batch.target_BS.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]


def test_padding_does_not_begin_documents_where_zero_ends_them() -> None:
    batch = all_rows(Documents((np.array([5, 6, 7], np.uint16),), end_id=0), 8)
    assert batch.document_BS is None and batch.position_BS.tolist() == [list(range(8))]


def test_types() -> None:
    batch = all_rows(concatenate(documents_of(3, 2, 5)), 6)
    assert batch.document_BS is not None
    for tensor in (batch.token_BS, batch.target_BS, batch.position_BS, batch.document_BS, batch.sample_B):
        assert tensor.dtype == torch.int64 and tensor.is_contiguous()
    assert batch.valid_BS.dtype == torch.bool


def test_large_uint16_ids_stay_positive() -> None:
    stream = PackedStream(Documents((np.array([65535, 65534, 40000], np.uint16),)), 2, 1 << 16, False)
    batch = stream.batch(np.array([0]), np.array([0]))
    assert batch.token_BS.tolist() == [[65535, 65534]] and batch.target_BS.tolist() == [[65534, 40000]]


def test_samples_past_the_end_are_padding() -> None:
    stream = PackedStream(concatenate(documents_of(3, 2)), 4, 1000, False)
    batch = stream.batch(np.array([1, 7, 10**9]), np.array([1, 7, 10**9]))
    assert stream.num_samples == 1
    assert not batch.valid_BS.any() and (batch.target_BS == IGNORE).all() and batch.document_BS is None
    assert batch.sample_B.tolist() == [1, 7, 10**9]


@pytest.mark.parametrize("wrong", [1000, -1])
def test_id_outside_the_vocabulary(wrong: int) -> None:
    token_N = np.arange(20, dtype=np.int32)
    token_N[13] = wrong
    with pytest.raises(ConfigError, match=f"data.vocab_size = 1000 does not hold token id {wrong}, at position 13"):
        all_rows(Documents((token_N,)), 4)


@given(
    lengths=st.lists(st.integers(1, 12), max_size=8),
    sequence_length=st.integers(1, 9),
    cross_documents=st.booleans(),
    cuts=st.lists(st.integers(0, 60), max_size=3),
    by_end=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_every_target_once(
    lengths: list[int], sequence_length: int, cross_documents: bool, cuts: list[int], by_end: bool
) -> None:
    """Against the obvious loop: for any documents, row length and cut into files."""
    texts = documents_of(*lengths)
    joined = concatenate(texts)
    parts = tuple(np.split(joined.parts[0], sorted(min(cut, joined.num_tokens) for cut in cuts)))
    documents = Documents(parts, end_id=END) if by_end else Documents(parts, start_G=joined.start_G)
    batch = all_rows(documents, sequence_length, cross_documents)
    pairs = []
    for text in [joined.parts[0]] if cross_documents else texts:
        pairs += list(zip(text[:-1].tolist(), text[1:].tolist(), strict=True))
    counted_BS = batch.target_BS != IGNORE
    assert list(zip(batch.token_BS[counted_BS].tolist(), batch.target_BS[counted_BS].tolist(), strict=True)) == pairs
    assert batch.num_tokens() == max(0, joined.num_tokens - 1)
    assert not (counted_BS & ~batch.valid_BS).any()
    if not cross_documents:
        document_BS = torch.zeros_like(batch.token_BS) if batch.document_BS is None else batch.document_BS
        for row in range(len(document_BS)):
            for token, position, document, valid in zip(
                batch.token_BS[row], batch.position_BS[row], document_BS[row], batch.valid_BS[row], strict=True
            ):
                same = (document_BS[row] == document).nonzero()
                assert not valid or token == END or token // 100 >= 1 + document
                assert position < len(same)
