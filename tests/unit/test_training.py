"""What the demo model's data and figures are made of."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from training.corpus import Corpus, Texts, read, save
from training.data import Example, examples, long_description, part_of, split, stanzas
from training.evaluate import faithfulness
from training.model import config, new_model
from training.muon import Muon, orthogonal
from training.net import Net, from_transformers, to_transformers
from training.objectives import EOS, SENTINELS, STAGES, Objectives, batches, held_out, stage_of
from training.passages import blocks, is_english, passages, plain
from training.prepare import gists
from training.train import tensors

_TRANSLATION = """\
Package: lampreader
Description-md5: 0
Description-en: viewer for log files
 Lampreader follows files as they grow and marks the
 lines that match a pattern.
 .
 It can:
  * fold repeated lines
  * run in a terminal
 .
 No setup is needed at all.

Package: lampreader-dbg
Description-en: debug symbols for lampreader
 Lampreader follows files as they grow. These are the debug symbols of it, and long enough.
"""


def test_a_translation_becomes_examples() -> None:
    [example] = examples([_TRANSLATION], {"lampreader": "lamp"})
    assert example == Example(
        id="lampreader",
        source="lamp",
        text=(
            "Lampreader follows files as they grow and marks the lines that match a pattern.\n"
            "It can:\n* fold repeated lines\n* run in a terminal\nNo setup is needed at all."
        ),
        synopsis="viewer for log files",
    )


def test_control_files_are_read_by_paragraph() -> None:
    assert list(stanzas("A: 1\nB: 2\n more\n\nA: 3\n")) == [
        {"A": "1", "B": "2\nmore"},
        {"A": "3"},
    ]


def test_indented_lines_stand_alone() -> None:
    assert long_description([" - one", "   goes on", " - two"]) == "- one\ngoes on\n- two"


def test_no_source_package_stands_on_both_sides() -> None:
    words = [f"w{i}" for i in range(400)]
    made = [
        Example(f"p{i}", f"s{i // 3}", " ".join(words[i : i + 30]), "a synopsis")
        for i in range(300)
    ]
    parts = split(made)
    sources = {part: {example.source for example in rows} for part, rows in parts.items()}
    assert sources["test"]
    assert sources["dev"]
    assert not sources["train"] & (sources["test"] | sources["dev"])
    assert part_of("s1") == part_of("s1")


def test_near_repeats_of_held_out_texts_are_not_trained_on() -> None:
    held = next(f"s{i}" for i in range(1_000) if part_of(f"s{i}") == "test")
    seen = next(f"s{i}" for i in range(1_000) if part_of(f"s{i}") == "train")
    text = " ".join(f"word{i}" for i in range(40))
    parts = split(
        [
            Example("held", held, text, "x y"),
            Example("near", seen, text + " and a few more words", "x y"),
            Example("far", seen, " ".join(f"other{i}" for i in range(40)), "x y"),
        ]
    )
    assert [example.id for example in parts["train"]] == ["far"]


@pytest.mark.parametrize(
    ("summary", "share"),
    [("viewer of logs", 1.0), ("viewers for log files", 1.0), ("editor for log files", 2 / 3)],
)
def test_faithfulness_counts_content_words_by_stem(summary: str, share: float) -> None:
    assert faithfulness(summary, "A viewer that shows log files.") == pytest.approx(share)


def test_prose_is_told_from_code_and_from_other_languages() -> None:
    page = (
        "<html><p>The harbour lies at the mouth of a river. Ships of all sizes come to it. "
        "It was dug by hand a century ago, and the digging took nine years.</p>"
        "<p>x = call(y); // see --help</p><p>Contents</p></html>"
    )
    [found] = passages(blocks("page.html", page))
    assert found.startswith("The harbour lies")
    assert found.endswith("nine years.")
    assert "call" not in found
    assert is_english(found)
    assert not is_english("Der Hafen liegt an der Mündung eines Flusses, und alle Schiffe kommen.")


def test_an_encyclopaedia_page_loses_its_markup() -> None:
    page = (
        "<title>Harbour</title><text xml:space='preserve'>{{Infobox|a={{b}}}}\n== Name ==\n"
        "A '''harbour''' is a [[shelter|sheltered place]] on the [[coast]].&lt;ref&gt;x&lt;/ref&gt;"
    )
    assert plain(page).split("\n")[-1] == "A harbour is a sheltered place on the coast."


def test_the_gist_is_a_sentence_about_what_the_others_are_about() -> None:
    scores = gists(
        [
            "It rained all day and nobody went anywhere.",
            "The ferry carries cars between the island and the town.",
            "A ferry leaves the island every hour until the town sleeps.",
            "Cars wait in a lane.",
        ]
    )
    assert max(range(4), key=scores.__getitem__) == 1


def ragged(documents: list[list[list[int]]]) -> Texts:
    flat = [sentence for document in documents for sentence in document]
    return Texts(
        np.array([token for sentence in flat for token in sentence], np.uint16),
        np.cumsum([0, *map(len, flat)]),
        np.cumsum([0, *map(len, documents)]),
    )


@pytest.fixture
def corpus() -> Corpus:
    """Sentences whose tokens tell document and place: 1000 * document + 100 * sentence + place."""
    documents = [
        [[1000 * d + 100 * s + place for place in range(12)] for s in range(6)] for d in (1, 2, 3)
    ]
    texts = ragged(documents)
    synopses = ragged([[[1001, 1002]], [[2001]], [[3001, 3002, 3003]]])
    return Corpus(
        descriptions=texts,
        synopses=synopses,
        faithful=np.array([0.9, 0.2, 1.0], np.float32),
        passages=texts,
        gist=np.tile(np.array([0.1, 0.2, 0.9, 0.3, 0.2, 0.1], np.float32), 3),
        weight=np.array([1.0, 0.0, 1.0], np.float32),
        dev_descriptions=texts,
        dev_synopses=synopses,
        prefix=np.array([500, 501], np.uint16),
        copy_prefix=np.array([502], np.uint16),
        vocabulary=5000,
    )


def test_a_corpus_is_read_as_it_was_written(corpus: Corpus, tmp_path: Path) -> None:
    save(corpus, tmp_path / "corpus.npz")
    again = read(tmp_path / "corpus.npz")
    assert again.vocabulary == 5000
    assert np.array_equal(again.passages.span(2, 4), corpus.passages.span(2, 4))
    assert np.array_equal(again.weight, corpus.weight)


def test_filling_in_puts_a_text_together_again(corpus: Corpus) -> None:
    make = Objectives(corpus, 1)
    for _ in range(200):
        pair = make._fill(corpus.passages, 60)
        assert pair.source[-1] == pair.target[-1] == EOS
        spans: dict[int, list[int]] = {}
        for token in pair.target[:-1].tolist():
            if token in SENTINELS:
                spans[token] = current = []
            else:
                current.append(token)
        whole = [t for s in pair.source[:-1].tolist() for t in spans.get(s, [s])]
        begin = int(np.searchsorted(corpus.passages.tokens, whole[0]))
        assert whole == corpus.passages.tokens[begin : begin + len(whole)].tolist()
        assert len(spans) >= 1


def test_a_gist_is_a_whole_sentence_of_its_source(corpus: Corpus) -> None:
    make = Objectives(corpus, 2)
    seen = set()
    for _ in range(200):
        pair = make._gist(60)
        source, target = pair.source.tolist(), pair.target.tolist()
        assert source[:2] == [500, 501]
        assert len(source) <= 60
        assert len(target) == 13
        assert all(token in source for token in target)
        assert target[0] % 100 == 0
        seen.add(target[0] // 1000)
    assert seen == {1, 3}  # a weight of nothing is never drawn


def test_the_last_stage_asks_only_for_what_the_text_bears_out(corpus: Corpus) -> None:
    make = Objectives(corpus, 3)
    stage = stage_of(0.99)
    assert stage == STAGES[-1]
    targets = {int(make._synopsis(stage).target[0]) // 1000 for _ in range(100)}
    assert targets == {1, 3}
    assert {int(make._synopsis(STAGES[0]).target[0]) // 1000 for _ in range(100)} == {1, 2, 3}


def test_batches_hold_every_pair_once_within_their_bound(corpus: Corpus) -> None:
    make = Objectives(corpus, 4)
    pairs = [make.draw(STAGES[1]) for _ in range(300)]
    groups = batches(pairs, 1_000)
    assert sorted(id(p) for group in groups for p in group) == sorted(map(id, pairs))
    for group in groups:
        source, target = tensors(group)
        assert len(source) == len(target) == len(group)
        assert source.numel() + target.numel() <= 1_000
        for row, said, pair in zip(source.tolist(), target.tolist(), group, strict=True):
            assert row == [*pair.source.tolist(), *[0] * (len(row) - len(pair.source))]
            assert said == [*pair.target.tolist(), *[0] * (len(said) - len(pair.target))]
    assert len(held_out(corpus)) == 3


def test_the_network_trained_is_the_one_transformers_runs() -> None:
    model = new_model(600, 5).eval()
    net = from_transformers(Net(config(600)), model.state_dict()).eval()
    source = torch.randint(40, 600, (3, 32))
    source[1, 20:] = 0
    target = torch.randint(40, 600, (3, 8))
    with torch.no_grad():
        expected = model(
            input_ids=source, attention_mask=(source != 0).long(), labels=target
        ).logits
        torch.testing.assert_close(net(source, target), expected, atol=2e-4, rtol=2e-4)
    state = model.state_dict()
    for name, value in to_transformers(net.state_dict(), net.config).items():
        torch.testing.assert_close(value, state[name], atol=1e-6, rtol=1e-5)


def test_muon_moves_all_directions_alike() -> None:
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonal(torch.randn(2, 24, 40) * 7.0))
    assert values.min() > 0.6
    assert values.max() < 1.3
    stacked = torch.nn.Parameter(torch.zeros(2, 40, 24))
    optimizer = Muon([stacked], lr=0.1, momentum=0.0, weight_decay=0.0)
    stacked.grad = torch.randn(2, 40, 24)
    optimizer.step()
    steps = torch.linalg.svdvals(stacked.detach()) / (0.1 * (40 / 24) ** 0.5)
    assert steps.min() > 0.6
    assert steps.max() < 1.3
    assert (stacked.detach() * stacked.grad).sum() < 0
