"""What the report finds in text, against the same by hand; and tokens as text."""

import json

import pytest
import torch
from helpers import CONTEXT, HOOK_Z, D, E, F, largest_allocation, switch_sae
from helpers.report_pages import WORDS, dense
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from sae_lens_switch.report import language_model as language_model_module
from sae_lens_switch.report import load_run, open_model, read_texts, token_texts

pytestmark = [
    pytest.mark.filterwarnings("ignore:The training dataset contains fewer samples:UserWarning"),
    pytest.mark.filterwarnings("ignore:To copy construct from a tensor:UserWarning"),
]


def test_the_text_goes_through_the_model_as_in_training(output):
    run = load_run(output)
    texts = read_texts(run, *open_model(run), contexts=100, n_latents=F, n_examples=3)
    sae, tokens, x, counts, acts = dense(output)
    activity = texts.activity
    assert activity.n_tokens == counts.sum() < counts.numel()
    assert torch.equal(activity.fired_F, (acts > 0).sum((0, 1)))
    mse = (x - sae.decode(sae.encode(x))).square().sum(-1)[counts].mean()
    assert activity.mse == pytest.approx(mse.item(), rel=1e-4)
    assert sorted(texts.windows) == (activity.fired_F > 0).nonzero().flatten().tolist()
    names = ["<bos>", "<eos>", "<pad>", *WORDS]
    for latent, windows in texts.windows.items():
        best = acts[:, :, latent].amax(1).sort(descending=True, stable=True)
        assert len(windows) == min(3, (best.values > 0).sum())
        for (pieces, values), context, top in zip(windows, best.indices, best.values, strict=False):
            assert max(values) == pytest.approx(top.item(), rel=1e-4)
            at = int(acts[context, :, latent].argmax())
            window = slice(max(0, at - 16), at + 9)
            expected = acts[context, window, latent]
            assert values == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-5)
            assert "".join(pieces).strip(" ").split(" ") == [names[i] for i in tokens[context, window]]
    for e, listed in enumerate(texts.typical):
        for text, here, everywhere in listed:
            token = names.index(text.strip(" "))
            assert everywhere == (tokens[counts] == token).sum()
            probs = (x[counts] - sae.b_router) @ sae.W_router
            assert here == ((tokens[counts] == token) & (probs.argmax(-1) == e)).sum()


def test_loss_recovered_is_of_the_tokens_that_the_sae_saw(output):
    run = load_run(output)
    lm, store, _ = open_model(run)
    sae, tokens, x, counts, _ = dense(output)
    found = language_model_module.ce_losses(run.sae, lm, store, tokens, [3])
    replaced = {
        "ce_loss_without_sae": x,
        "ce_loss_with_sae": torch.where(counts[..., None], sae.decode(sae.encode(x)), x),
        "ce_loss_with_ablation": torch.where(counts[..., None], torch.zeros_like(x), x),
    }
    model, expected = GPT2LMHeadModel.from_pretrained(sae.cfg.metadata.model_name), {}
    for name, new in replaced.items():
        with torch.no_grad():
            hidden = model.transformer.h[1](new)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
            log_probs = model.lm_head(model.transformer.ln_f(hidden)).log_softmax(-1)[:, :-1]
        losses = -log_probs.gather(-1, tokens[:, 1:, None])[..., 0]
        expected[name] = losses[counts[:, :-1]].mean().item()
        assert found[name] == pytest.approx(expected[name], rel=1e-4)
    gap = expected["ce_loss_with_ablation"] - expected["ce_loss_without_sae"]
    with_sae = expected["ce_loss_with_ablation"] - expected["ce_loss_with_sae"]
    assert found["ce_loss_recovered"] == pytest.approx(with_sae / gap, rel=1e-3)
    assert len(set(expected.values())) == 3


@pytest.mark.parametrize("head", [None, 1])
def test_heads_are_replaced_alone_or_all_together(head, model, dataset, tmp_path, monkeypatch):
    """hook_z of a TransformerLens model; an SAE that gives back what it gets changes nothing."""
    width = D if head is None else D // 2
    sae = switch_sae(d_in=width, dtype="float32", n_experts=1, d_sae=2 * width, k=2 * width, gate="one")
    with torch.no_grad():
        eye = torch.eye(width)
        sae.W_enc.copy_(torch.cat([eye, -eye], dim=1))
        sae.W_dec.copy_(torch.cat([eye, -eye]))
        sae.b_dec.zero_()
    metadata = {"model_name": "tiny", "hook_name": HOOK_Z, "hook_head_index": head, "context_size": CONTEXT}
    for name, value in {**metadata, "prepend_bos": False}.items():
        sae.cfg.metadata[name] = value
    sae.save_model(str(tmp_path / "sae"))
    dataset.save_to_disk(tmp_path / "text")
    monkeypatch.setattr(
        language_model_module, "load_model", lambda *_, **__: model
    )  # it has no name that could be loaded
    run = load_run(tmp_path / "sae")
    texts = read_texts(run, *open_model(run, dataset=str(tmp_path / "text")), contexts=10)
    assert texts.activity.mse < 1e-8
    assert texts.loss["ce_loss_with_sae"] == pytest.approx(texts.loss["ce_loss_without_sae"], abs=1e-5)
    assert texts.loss["ce_loss_with_ablation"] != pytest.approx(texts.loss["ce_loss_without_sae"], abs=1e-4)
    assert texts.loss["ce_loss_recovered"] == pytest.approx(1, abs=1e-2)


def test_texts_may_be_a_file(tmp_path, output):
    lines = [" ".join(WORDS[(i + j) % 20] for j in range(30)) for i in range(9)]
    (tmp_path / "text.txt").write_text("\n".join(lines))
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    run, activities = load_run(output), []
    for name in ("text.txt", "text.jsonl"):
        texts = read_texts(run, *open_model(run, dataset=str(tmp_path / name)), contexts=5)
        assert texts.source == f"5 contexts of {CONTEXT} tokens from {tmp_path / name}"
        activities.append(texts.activity)
    assert torch.equal(activities[0].fired_F, activities[1].fired_F)
    (tmp_path / "text.pkl").write_bytes(b"")
    with pytest.raises(ValueError, match=r"--dataset must be a folder, a name on the hub or a file \.txt"):
        open_model(run, dataset=str(tmp_path / "text.pkl"))


def test_characters_of_several_tokens_are_the_last_ones():
    bytes_alphabet = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=bytes_alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    ids = fast("a é😀\n")["input_ids"]
    assert token_texts(fast, ids) == ["a", " ", "", "é", "", "", "", "😀", "\n"]
    assert "".join(token_texts(fast, ids[:-3])) == "a é\N{REPLACEMENT CHARACTER}"
    assert token_texts(None, [5, 7]) == ["[5]", "[7]"]


@pytest.mark.parametrize("n", [0, 1, 5, 6, 11, F])
def test_as_many_latents_are_shown_as_asked_for_in_turn_from_each_expert(n, output):
    run = load_run(output)
    texts = read_texts(run, *open_model(run), contexts=20, n_latents=n)
    fired = (texts.activity.fired_F > 0).view(E, -1).sum(1)
    shown = torch.tensor([sum(latent // (F // E) == e for latent in texts.windows) for e in range(E)])
    assert shown.sum() == min(n, int(fired.sum()))
    room = shown < fired  # an expert with less than another has no more to show
    assert int(shown.max()) <= (int(shown[room].min()) + 1 if room.any() else F)


def test_the_loss_of_an_sae_with_dense_latents_is_computed_in_pieces(output, monkeypatch):
    run = load_run(output)
    lm, store, _ = open_model(run)
    tokens = language_model_module.read_contexts(store, 8)
    whole = language_model_module.ce_losses(run.sae, lm, store, tokens, [3])
    plain = TopKSAE(TopKSAEConfig(d_in=D, d_sae=5000, k=3, dtype="float32"))
    expected = language_model_module.ce_losses(plain, lm, store, tokens, [3])
    monkeypatch.setattr("sae_lens_switch.analysis.activity._DENSE_AT_ONCE", 7 * 5000)
    found = []
    memory = largest_allocation(lambda: found.append(language_model_module.ce_losses(plain, lm, store, tokens, [3])))
    assert memory < 8 * 5000 * 4 < tokens.numel() * 5000 * 4
    assert found == [pytest.approx(expected, rel=1e-5)]
    assert language_model_module.ce_losses(run.sae, lm, store, tokens, [3]) == whole
