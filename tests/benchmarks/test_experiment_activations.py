"""Text of several kinds, and the cache of the activations that a language model has on it."""

import gzip
import json
import shutil

import activations
import debian
import numpy as np
import pytest
import texts
import torch
from helpers import experiments, kills

from sae_lens_switch import activation_batches


@pytest.fixture(scope="module", autouse=True)
def small_batches():
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(activations, "_BATCH", 4)
        yield


@pytest.fixture(scope="module")
def contexts(folder):
    return experiments.contexts(folder, "plays")


@pytest.fixture(scope="module")
def whole(folder, contexts, tmp_path_factory):
    cache = experiments.cache_of(folder, contexts, tmp_path_factory.mktemp("whole"))
    assert list(cache.fill()) == list(range(cache.n_parts))
    return cache


# Text


def test_held_out_documents_and_the_kind_kept_out_are_not_trained_on(folder):
    parts = texts.split(texts.folder_kinds(folder / "text"), 10**9)
    paragraphs = {}
    for kind, of_kind in parts.items():
        for name in ("train", "held_out"):
            documents = getattr(of_kind, name)
            assert documents, (kind, name)
            for source, texts_of_it in documents:
                for paragraph in texts_of_it:
                    assert paragraph not in paragraphs, source  # nowhere twice, in no split
                    paragraphs[paragraph] = kind, name, source
    by_source = {}
    for kind, name, source in paragraphs.values():
        assert by_source.setdefault((kind, source), name) == name  # a document is of one split
    assert len(paragraphs) == 68 * 6  # and the repeated document is there once


def test_contexts_come_from_their_split_and_kinds_in_equal_shares(folder, contexts):
    assert {name: len(t) for name, t in contexts.tokens.items()} == {"train": 64, "held_out": 8, "other": 4}
    assert contexts.kept_out == "plays"
    assert [contexts.facts[kind]["contexts train"] for kind in ("letters", "lists", "plays")] == [32, 32, 0]
    assert [contexts.facts[kind]["contexts other"] for kind in ("letters", "lists", "plays")] == [0, 0, 4]
    tokenizer_of = {f"w{i}": i + 3 for i in range(29)}
    plays = " ".join((folder / "text" / "plays" / f"{i}.txt").read_text() for i in range(8)).split()
    stream = " ".join(str(tokenizer_of[w]) for w in plays)
    inside = [" ".join(map(str, row[:10])) in stream for row in contexts.tokens["other"]]
    assert any(inside)  # but for those where two documents meet
    assert not any(" ".join(map(str, row[:10])) in stream for row in contexts.tokens["train"])
    everything = [row.tobytes() for name in texts.SPLITS for row in contexts.tokens[name]]
    assert len(set(everything)) == len(everything)


def test_contexts_are_kept_as_they_were(contexts, tmp_path):
    texts.save(contexts, tmp_path / "tokens.npz")
    again = texts.load(tmp_path / "tokens.npz")
    assert again.digest == contexts.digest
    assert (again.facts, again.kept_out) == (contexts.facts, contexts.kept_out)


def test_too_little_text_and_unknown_kinds_are_refused(folder, tmp_path):
    kinds = texts.folder_kinds(folder / "text")
    few = {"train": 10**6, "held_out": 8, "other": 4}
    with pytest.raises(ValueError, match="1000000 are wanted"):
        texts.contexts(kinds, folder / "model", 32, few)
    with pytest.raises(
        ValueError, match="kept_out must be one of the kinds of text, letters, lists, plays; got 'odes'"
    ):
        texts.contexts(kinds, folder / "model", 32, few, "odes")
    with pytest.raises(ValueError, match="text must be a folder with text files"):
        texts.folder_kinds(tmp_path)


@pytest.mark.parametrize(
    ("available", "wanted", "expected"),
    [
        ({"a": 1, "b": 9, "c": 9}, 9, {"a": 1, "b": 4, "c": 4}),
        ({"b": 9, "a": 2}, 99, {"b": 9, "a": 2}),
        ({"a": 5, "b": 5}, 4, {"a": 2, "b": 2}),
        ({}, 4, {}),
    ],
)
def test_kinds_share_equally_what_is_wanted(available, wanted, expected):
    assert texts.shares(available, wanted) == expected


def test_the_formats_of_debians_packages_are_read(tmp_path):
    (tmp_path / "data.noun").write_text(
        '  1 a licence\n00001740 03 n 02 lawful_act 0 deed 1 001 ~ 00001930 n 0000 | done by law; "a | b"  \n'
    )
    assert list(debian.wordnet([tmp_path / "data.noun"])) == [("data.noun:0", 'lawful act, deed: done by law; "a | b"')]
    (tmp_path / "a.dz").write_bytes(gzip.compress(b"Abacus\n   A frame.\n   [1913 Webster]\n\nAbaft\n   Behind."))
    assert list(debian.dictionary([tmp_path / "a.dz"])) == [("a.dz:0", "Abacus\n   A frame.\n\nAbaft\n   Behind.")]
    manual = "preamble\x1f\nFile: m,  Node: Index,  Next: B\n\nnothing\x1f\nFile: m,  Node: Loops,  Next: B\n\nA loop."
    (tmp_path / "m.info.gz").write_bytes(gzip.compress(manual.encode()))
    assert [(n, t.strip()) for n, t in debian.info([tmp_path / "m.info.gz"])] == [("Loops", "A loop.")]


def test_the_bibles_file_is_read(tmp_path):
    text = b"Title.\nGe1:1 In the beginning.\nGe1:2 And the earth.\nGe2:1 Thus."
    # What `compress` writes while it has found no repetition worth a code: 9 bits a byte, least significant first.
    raw = sum(byte << 9 * i for i, byte in enumerate(text)).to_bytes(len(text) * 9 // 8 + 1, "little")
    table = (1).to_bytes(4, "big") + (0x60).to_bytes(4, "big")
    (tmp_path / "bible.data").write_bytes(b"EC02".ljust(0x58, b"\0") + table + raw)
    assert list(debian.bible([tmp_path / "bible.data"])) == [
        ("Ge1", "In the beginning.\n\nAnd the earth."),
        ("Ge2", "Thus."),
    ]


def test_a_machine_without_apt_has_the_other_kinds(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda _name: None)
    assert sorted(texts.default_kinds(tmp_path)) == ["packages", "python"]
    assert "no bible text: apt brings no bible-kjv-text here" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


# Activations


def test_the_cache_holds_what_the_model_computes_without_the_first_tokens(folder, contexts, whole):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    for split in texts.SPLITS:
        tokens = torch.from_numpy(contexts.tokens[split].astype(np.int64))
        with torch.no_grad():
            hidden = model(tokens, output_hidden_states=True).hidden_states
        for layer, n in {0: len(tokens), 1: min(len(tokens), 22)}.items():
            expected = hidden[layer + 1][:n, 2:].flatten(0, 1)
            found = whole.rows(layer, split)
            assert found.dtype == torch.float16
            torch.testing.assert_close(found.float(), expected, rtol=2e-3, atol=2e-3)
    with pytest.raises(ValueError, match="tokens must be at most 660, those of layer 1; got 661"):
        whole.rows(1, "train", 661)


def test_a_layer_is_centred_and_scaled_and_its_batches_keep_their_place(whole):
    layer = activations.Layer.of(whole, 0)
    x = layer.scaled(whole.rows(0, "train"))
    assert x.mean(0).abs().max() < 1e-4
    assert x.square().sum(1).mean() == pytest.approx(experiments.D_IN, rel=1e-4)

    def batches():
        return activations.Scaled(activation_batches(whole.rows(0, "train"), 32, seed=5), layer.centre, layer.scale)

    first, second = batches(), batches()
    drawn = [next(first) for _ in range(5)]
    rows = {tuple(row.tolist()) for row in x}
    assert all(tuple(row.tolist()) in rows for batch in drawn for row in batch)
    place = first.state_dict()
    expected = next(first)
    second.load_state_dict(place)
    assert torch.equal(next(second), expected)


def test_massive_activations_are_left_out(folder, contexts, whole, tmp_path):
    cache = experiments.cache_of(folder, contexts, tmp_path)
    list(cache.fill())
    plain = activations.Layer.of(cache, 0)
    assert all(torch.equal(plain.train, cache.rows(0, "train")) for cache in (cache, whole))
    raw = np.memmap(cache.file(0), np.float16, "r+").reshape(-1, experiments.D_IN)
    n_held_out = 8 * cache.per_context
    n_first = n_held_out + 4 * cache.per_context
    for row in (3, n_held_out + 5, n_first + 1, n_first + 40):
        raw[row] *= 100
    raw.flush()
    layer = activations.Layer.of(cache, 0)
    kept = torch.ones(len(plain.train), dtype=torch.bool)
    kept[[1, 40]] = False
    assert torch.equal(layer.train, whole.rows(0, "train")[kept])
    torch.testing.assert_close(layer.centre, whole.rows(0, "train")[kept].float().mean(0))
    assert layer.scaled(layer.train).square().sum(1).mean() == pytest.approx(experiments.D_IN, rel=1e-4)
    assert (len(layer.held_out), len(layer.other)) == (n_held_out - 1, 4 * cache.per_context - 1)
    torch.testing.assert_close(layer.held_out[3:], layer.scaled(whole.rows(0, "held_out")[4:]))
    assert layer.is_massive(torch.stack([plain.centre, 1000 + plain.centre])).tolist() == [False, True]


def test_killed_anywhere_it_is_filled_with_the_same_bits(folder, contexts, whole, tmp_path):
    cache = experiments.cache_of(folder, contexts, tmp_path)
    expected = {layer: whole.file(layer).read_bytes() for layer in (0, 1)}
    n_killed = 0
    for at in range(10, 120, 13):
        n_killed += kills.killed(lambda: list(cache.fill()), at=at)
        assert all(cache.is_whole(part) for part in range(cache.n_parts) if cache.part_file(part).exists())
    assert n_killed > 3
    list(cache.fill())
    assert cache.missing() == []
    assert {layer: cache.file(layer).read_bytes() for layer in (0, 1)} == expected


def test_a_damaged_part_is_computed_again_and_no_other(folder, contexts, whole, tmp_path):
    cache = experiments.cache_of(folder, contexts, tmp_path)
    list(cache.fill())
    first, _ = cache._span(2, 0)
    data = bytearray(cache.file(0).read_bytes())
    data[first + 5] ^= 1
    cache.file(0).write_bytes(data)
    assert cache.missing() == [2]
    assert list(cache.fill()) == [2]
    assert cache.file(0).read_bytes() == whole.file(0).read_bytes()


def test_other_text_or_another_layer_is_another_cache_or_missing(folder, contexts, whole, tmp_path):
    shutil.copytree(whole.folder.parents[1], tmp_path, dirs_exist_ok=True)  # the other tests' is not to grow
    other = experiments.contexts(folder, "lists")
    assert experiments.cache_of(folder, other, tmp_path).folder.name != whole.folder.name
    longer = experiments.cache_of(folder, contexts, tmp_path, second=64)
    assert longer.folder.name == whole.folder.name
    assert longer.missing() == list(range(3, longer.n_parts))  # parts that have all layers already stay


def test_a_disk_that_is_too_small_is_known_at_once(folder, contexts, tmp_path):
    cache = experiments.cache_of(folder, contexts, tmp_path)
    with pytest.raises(ValueError, match=r"output needs \d+\.\d\d GB of disk at .*; got \d+\.\d\d GB free"):
        cache.reserve(10**18)
    assert cache.bytes_wanted() == 0  # the files are there in their full size
    notes = (
        [json.loads(p.read_text()) for p in (cache.folder / "parts").glob("*")]
        if (cache.folder / "parts").exists()
        else []
    )
    assert notes == []


def test_activations_too_large_for_float16_are_refused():
    with pytest.raises(ValueError, match="activations must fit into float16, whose largest number is 65504; got 7e"):
        activations._half(torch.tensor([7e4]))
