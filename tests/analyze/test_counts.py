"""Counts by hand, at any number of ranks, and the page that shows them."""

from __future__ import annotations

import base64
import dataclasses
import gzip
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from moedist.analyze.counts import CorpusCounts, position_bins
from moedist.analyze.measure import Routers, layer_sizes
from moedist.analyze.page import render
from moedist.analyze.quantities import chosen_by, coactivation, mutual_information
from moedist.analyze.result import corpus_result, domains, favourite_tokens, saturation
from moedist.analyze.vocabulary import CLASSES, Vocabulary, read_vocabulary
from moedist.data.corpus import MemorySource, concatenate, encode_bytes
from moedist.data.synthetic import SyntheticConfig
from moedist.data.text import TextConfig
from moedist.mesh import Mesh
from moedist.moe.trace import LayerTrace, StepTrace
from moedist.train.build import build_model
from moedist.train.config import RunConfig
from tests.ranks import Here
from tests.train.tiny import CONFIG, changed

# Rows 0 and 1 of three positions, top-2 of 4; the last position is padding, whose choices must not count.
TRACE = StepTrace(
    step=7,
    sample_T=torch.tensor([0, 0, 0, 1, 1, 1]),
    position_T=torch.tensor([0, 1, 2, 0, 1, 2]),
    id_T=torch.tensor([2, 0, 2, 1, 2, 0]),
    valid_T=torch.tensor([True] * 5 + [False]),
    layers={
        1: LayerTrace(
            4, torch.tensor([[0, 1], [2, 3], [0, 2], [1, 0], [0, 1], [3, 3]]), torch.empty(6, 2), torch.empty(6, 2)
        )
    },
)


def counted() -> CorpusCounts:
    counts = CorpusCounts.empty({1: (4, 2)}, vocab_size=3, length=3, num_rows=1)
    counts.add(TRACE)
    return counts


def test_counts_by_hand():
    counts = counted()
    layer = counts.layers[1]
    assert counts.num_tokens == 5
    assert layer.pair_VE.tolist() == [[0, 0, 1, 1], [1, 1, 0, 0], [3, 2, 1, 0]]
    assert layer.first_E.tolist() == [3, 1, 1, 0]
    assert layer.together_EE.tolist() == [[4, 3, 1, 0], [3, 3, 0, 0], [1, 0, 2, 1], [0, 0, 1, 1]]
    assert layer.position_PE.tolist() == [[2, 2, 0, 0], [1, 1, 1, 1], [1, 0, 1, 0]]
    assert counts.excerpt.id_BS.tolist() == [[2, 0, 2]]
    assert counts.excerpt.expert_BSK[1].tolist() == [[[0, 1], [2, 3], [0, 2]]]


def test_quantities_by_hand():
    layer = counted().layers[1]
    assert chosen_by(layer.pair_VE.numpy(), 2)[2].tolist() == [1.0, 2 / 3, 1 / 3, 0.0]
    share_EE = coactivation(layer.together_EE.numpy())
    assert share_EE[0].tolist() == [0.0, 0.75, 0.25, 0.0] and share_EE[1].tolist() == [1.0, 0.0, 0.0, 0.0]
    # two classes of 4 and 6 pairs: 4 ln(.4/(.4 .7)) + 3 ln(.3/(.6 .7)) + 3 ln(.3/(.6 .3)), over 10
    by_hand = (4 * np.log(1 / 0.7) + 3 * np.log(0.3 / 0.42) + 3 * np.log(0.3 / 0.18)) / 10
    assert mutual_information(np.array([[4, 0], [3, 3]])) == pytest.approx(by_hand, abs=1e-15)
    assert saturation({3: {1: 4}}, num_tokens=5, top_k={1: 2}) == {"3": {"1": 0.4}}
    other = CorpusCounts.empty({1: (4, 2)}, 3, 3, 1)
    found = domains({"this": counted(), "nothing": other})["layers"]["1"]
    assert found["all"] == [[0.8, 0.6, 0.4, 0.2], [0.0] * 4] and found["first"][0] == [0.6, 0.2, 0.2, 0.0]


def test_a_rare_token_is_no_favourite():
    vocabulary = Vocabulary(["a", "b"], np.array([0, 0]))
    (first, second) = favourite_tokens(np.array([[30, 10], [0, 2]]), 1, vocabulary)
    assert [token["text"] for token in first] == [token["text"] for token in second] == ["a"]
    assert first[0] == {"id": 0, "text": "a", "share": 0.75, "seen": 40}


def test_classes_of_bytes():
    source = MemorySource(257, "", True, "", *(concatenate([encode_bytes(b"x")]),) * 2)
    vocabulary = read_vocabulary(SyntheticConfig(), source)
    named = {text: CLASSES[place] for text, place in zip(vocabulary.texts, vocabulary.class_V.tolist(), strict=True)}
    expected = {"a": "lower case", "Z": "upper case", "7": "digits", " ": "space", "\n": "line break", "{": "brackets"}
    expected |= {"+": "other punctuation", "c3": "beyond ASCII", "\x00": "control", "": "end of document"}
    assert {text: named[text] for text in expected} == expected
    pair_VE = np.zeros((257, 2), np.int64)
    pair_VE[[ord("a"), ord("b")], [0, 1]] = 3
    assert vocabulary.by_class(pair_VE)[CLASSES.index("lower case")].tolist() == [3, 3]


def test_words_of_a_tokenizer_keep_their_space(tmp_path: Path):
    """Its decoder takes it off the first word of a text, and here every word is looked up alone."""
    tokenizers = pytest.importorskip("tokenizers")
    words = {"\u2581the": 0, "\u2581cat": 1, "s": 2, "\u2581": 3, "<unk>": 4, "<end>": 5}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    made.decoder = tokenizers.decoders.Metaspace()
    made.save(str(tmp_path / "tokenizer.json"))
    config = TextConfig(files=("none",), tokenizer=str(tmp_path / "tokenizer.json"), eod_id=5)
    source = MemorySource(6, "", False, "", *(concatenate([np.zeros(1, np.int64)]),) * 2)
    vocabulary = read_vocabulary(config, source)
    assert vocabulary.texts == [" the", " cat", "s", " ", "<unk>", "<end>"]
    assert [CLASSES[place] for place in vocabulary.class_V] == [*3 * ["lower case"], "space", "brackets", CLASSES[9]]


def analyzed(here: Here | None, config: RunConfig, ep: int) -> tuple[dict, list[int]]:
    """The result of a fresh model, and what it shares with one whose routers are of another seed."""
    mesh = Mesh.alone() if here is None else here.mesh_of(ep)
    source = config.data.open()
    model = build_model(config, source.vocab_size, mesh).model
    routers = Routers(model, {"text": source}, config, mesh)
    counts, choices = routers.count(step=0)
    same = routers.count_shared(0, choices)
    if here is None:
        assert routers.count(step=0, keep=False)[1] == {"text": []}
    sizes = layer_sizes(model)
    assert sizes == {1: (8, 2), 2: (8, 2)}
    assert same == dict.fromkeys(sizes, 2 * counts["text"].num_tokens), "a model agrees with itself"
    other = build_model(dataclasses.replace(config, seed=6), source.vocab_size, mesh).model
    shared = Routers(other, {"text": source}, config, mesh).count_shared(0, choices)
    return corpus_result(counts["text"], read_vocabulary(config.data, source)), list(shared.values())


def test_ranks_count_what_one_device_counts(ranks):
    config = changed(CONFIG, capacity={"factor": None})
    alone = analyzed(None, config, 1)
    held_out = config.data.open().documents("valid").num_tokens
    assert alone[0]["tokens"] == held_out - 1
    for layer in alone[0]["layers"].values():
        assert sum(layer["load"]) == 2 * alone[0]["tokens"] and sum(layer["first"]) == alone[0]["tokens"]
    assert all(0 < shared < 2 * alone[0]["tokens"] for shared in alone[1])
    for ep in (1, 2):
        for result in ranks(2).run(analyzed, config, ep):
            assert result == alone


def test_the_page_holds_the_result_and_nothing_that_it_could_run():
    evil = "</script><img src=x onerror=alert(1)>"
    vocabulary = Vocabulary([evil, "b", "c"], np.array([0, 0, 0]))
    text = corpus_result(counted(), vocabulary)
    result = {"run": "<b>&amp;", "step": 7, "layers": {}, "corpora": {evil: text}}
    page = render(result)
    assert evil not in page and "<b>" not in page and position_bins(3) == 3
    packed = re.search(r'<script id="data" type="text/plain">([^<]*)</script>', page)
    assert packed is not None
    assert json.loads(gzip.decompress(base64.b64decode(packed[1]))) == json.loads(json.dumps(result))
    assert not re.search(r'(?:src|href)="https?:', page), "the page fetches nothing"
