"""The report of real runs on a small language model, read as HTML and opened in a real browser."""

import base64
import json
import math
import os
import select
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from datasets import Dataset
from helpers import CONTEXT, HOOK_Z, D, E, F, K, M, randomize, run_fields, switch_sae, tiny_dataset
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from sae_lens_switch import LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner, SwitchSAE, report
from sae_lens_switch.report import find_sae, load_run, main, open_model, read_texts, token_texts, write_report
from sae_lens_switch.report import page as page_module
from sae_lens_switch.training.history import FILENAME, History, read_history

pytestmark = [
    pytest.mark.filterwarnings("ignore:The training dataset contains fewer samples:UserWarning"),
    pytest.mark.filterwarnings("ignore:To copy construct from a tensor:UserWarning"),
]

# What text may hold: each would run, or end the script or attribute it stands in, if it were not escaped.
HOSTILE = [
    "</script><script>window.hacked=1</script>",
    "<img/src=x/onerror=window.hacked=1>",
    "\"'><b>&lt;",
    "<!--",
    "\u2028]]>",
]
WORDS = [*(f"w{i}" for i in range(24)), *HOSTILE]
HOOK = "transformer.h.0"
SKIPPED = 1


def save_language_model(folder: Path) -> Path:
    """A random GPT-2 with a tokenizer of whole words."""
    vocabulary = {token: i for i, token in enumerate(["<bos>", "<eos>", "<pad>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=32, n_positions=CONTEXT, n_embd=D, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=1
    )
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        model.transformer.wte.weight.mul_(40)
    model.save_pretrained(folder)
    return folder


def train(folder: Path, language_model: Path, text: Dataset, **fields: Any) -> Path:
    """A run of six steps; returns its output folder."""
    own = {"model_name": str(language_model), "model_class_name": "AutoModelForCausalLM", "hook_name": HOOK}
    own |= {"d_in": D, "d_sae": F, "lr": 1e-2}
    own |= {"architecture": "switch", "n_experts": E, "k": K} if "architecture" not in fields else {}
    own |= {"seqpos_slice": (SKIPPED, None), "prepend_bos": False, "exclude_special_tokens": [3]}
    cfg = LanguageModelSAERunnerConfig(**run_fields(folder, **{**own, **fields}))
    LanguageModelSAETrainingRunner(cfg, override_dataset=text).run()
    return folder / "output"


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    return save_language_model(tmp_path_factory.mktemp("report") / "language model")


@pytest.fixture(scope="module")
def output(tmp_path_factory, language_model):
    """A run's output folder, with the text that it is reported on beside the SAE."""
    folder = tmp_path_factory.mktemp("run")
    output = train(folder, language_model, tiny_dataset())
    tiny_dataset(12).save_to_disk(output / "held_out")
    return output


@pytest.fixture(scope="module")
def page(output):
    return write_report(output, n_latents=8).read_text()


class Tags(HTMLParser):
    """Every tag of a page with its attributes, and the text outside of tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self.open.pop() != tag:  # what has no end tag of its own
            pass

    def handle_data(self, data: str) -> None:
        if self.open[-1:] not in (["script"], ["style"]):
            self.words.append(data)

    @property
    def text(self) -> str:
        return "".join(self.words)

    @property
    def sections(self) -> list[str | None]:
        return [attributes.get("id") for tag, attributes in self.found if tag == "section"]


SECTIONS = ["summary", "curves", "load", "density", "router", "duplicates", "experts", "latents"]


# Which SAE


def test_the_sae_is_found_from_what_a_user_has(tmp_path, output):
    assert find_sae(output) == output
    shutil.copytree(output, tmp_path / "quickstart" / "sae")
    assert find_sae(tmp_path / "quickstart") == tmp_path / "quickstart" / "sae"
    for name in ("900", "final_1000", "diverged_80"):
        shutil.copytree(output, tmp_path / "checkpoints" / "abc" / name)
    assert find_sae(tmp_path / "checkpoints") == tmp_path / "checkpoints" / "abc" / "final_1000"
    shutil.copytree(output, tmp_path / "checkpoints" / "another" / "900")
    with pytest.raises(ValueError, match=r"RUN must hold one SAE; .* has 4: abc/900"):
        find_sae(tmp_path / "checkpoints")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"there is no cfg\.json in"):
        find_sae(tmp_path / "empty")
    with pytest.raises(ValueError, match="is no folder"):
        find_sae(tmp_path / "nowhere")


@pytest.mark.parametrize("normalize", ["expected_average_only_in", "covariance_whitening"])
def test_a_checkpoint_is_the_sae_of_the_raw_activations(normalize, tmp_path, language_model):
    fields = {"save_final_checkpoint": True, "n_batches_for_norm_estimate": 3, "normalize_activations": normalize}
    output = train(tmp_path, language_model, tiny_dataset(), **fields)
    x = torch.randn(50, D)
    final, checkpoint = (load_run(folder).sae for folder in (output, tmp_path / "checkpoints"))
    torch.testing.assert_close(checkpoint(x), final(x))
    assert write_report(tmp_path / "checkpoints", contexts=0).exists()


@pytest.mark.parametrize("architecture", ["topk", "standard"])
def test_architectures_without_experts_have_a_page_too(architecture, tmp_path, language_model):
    fields = {
        "architecture": architecture,
        "save_final_checkpoint": True,
        **({"k": K} if architecture == "topk" else {}),
    }
    train(tmp_path, language_model, tiny_dataset(), **fields)
    tiny_dataset(8).save_to_disk(tmp_path / "text")
    for run in (tmp_path / "output", tmp_path / "checkpoints"):
        page = write_report(run, dataset=str(tmp_path / "text"), n_latents=4).read_text()
        sections = [name for name in Tags(page).sections if name != "density"]  # of windows that were not empty
        assert sections == ["summary", "curves", "duplicates", "latents"]
        assert len(plots_of(page)["density"]["data"][0]["y"]) == 40


# What it says


def plots_of(page: str) -> dict[str, Any]:
    return json.loads(page.partition('<script type="application/json" id="plots">')[2].partition("</script>")[0])


def dense(output: Path) -> tuple[Any, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """SAE, tokens, activations, which of them count, latents, of the whole held-out text; by hand."""
    sae = SwitchSAE.load_from_disk(output)
    tokens = tiny_dataset(12).with_format("torch")["tokens"][:]
    lm = GPT2LMHeadModel.from_pretrained(sae.cfg.metadata.model_name)
    with torch.no_grad():
        x = lm(tokens, output_hidden_states=True).hidden_states[1]
        acts = sae.encode(x)
    counts = tokens != 3
    counts[:, :SKIPPED] = False
    return sae, tokens, x, counts, acts * counts[..., None]


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
    found = report._losses(run.sae, lm, store, tokens, [3])
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
    monkeypatch.setattr(report, "load_model", lambda *_, **__: model)  # it has no name that could be loaded
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


def test_the_page_has_every_section_and_the_numbers(page, output):
    tags, plots = Tags(page), plots_of(page)
    assert tags.sections == SECTIONS
    sae, tokens, x, counts, acts = dense(output)
    load = torch.bincount(((x[counts] - sae.b_router) @ sae.W_router).argmax(-1), minlength=E) / counts.sum()
    assert plots["load"]["data"][0]["y"] == pytest.approx((100 * load).tolist(), rel=1e-3)
    dead = (acts == 0).all(0).all(0).view(E, M).sum(1).tolist()
    assert [series["y"] for series in plots["dead"]["data"] if "text" in series["name"]] == [dead]
    rows = read_history(output / FILENAME)
    assert plots["loss"]["data"][0]["y"] == [row["losses/mse_loss"] for row in rows]
    assert plots["loss"]["data"][0]["x"] == [64 * (i + 1) for i in range(6)]
    assert plots["balance"]["data"][0]["y"] == [row["routing/load_balance"] for row in rows]
    assert plots["load-history"]["data"][0]["z"][2] == pytest.approx(
        [E * row["routing/load"][2] for row in rows], rel=1e-4
    )
    assert sum(plots["density"]["data"][0]["y"]) + (load_run(output).density_F == 0).sum() == F
    assert sum(plots["gates"]["data"][0]["y"]) == pytest.approx(100, abs=0.1)
    cards = [a["id"] for tag, a in tags.found if tag == "article" and "id" in a]
    assert len(cards) == 8
    assert {int(card.removeprefix("latent-")) // M for card in cards} == set(range(E))
    anchors = {a["href"] for tag, a in tags.found if tag == "a"}
    assert anchors == {f"#{name}" for name in (*SECTIONS, *cards)}  # every link leads somewhere on the page


def test_text_and_names_from_anywhere_are_escaped(page, tmp_path, output):
    names = {"model_name": HOSTILE[0], "hook_name": HOSTILE[1], "dataset_path": HOSTILE[2]}
    sae = SwitchSAE.load_from_disk(output)
    for name, value in names.items():
        sae.cfg.metadata[name] = value
    sae.save_model(str(tmp_path / "sae"))
    (tmp_path / "metrics.json").write_text(json.dumps({HOSTILE[0]: 1.5}))
    for text in (page, write_report(tmp_path).read_text()):
        tags = Tags(text)
        assert [tag for tag, _ in tags.found].count("script") == 3
        assert not [tag for tag, _ in tags.found if tag in ("img", "iframe", "object", "link")]
        assert not [
            name for _, attributes in tags.found for name in attributes if name.startswith("on") or name == "src"
        ]
        assert HOSTILE[0] in tags.text
    for word in HOSTILE[:4]:
        assert word in Tags(page).text.replace("\u2423", "")


@pytest.mark.parametrize("word", HOSTILE)
def test_json_in_the_page_ends_no_script(word):
    text = page_module._json_in_html({word: [word]})
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == {word: [word]}


def test_the_page_is_small_beside_plotly(page):
    from plotly.offline import get_plotlyjs

    assert len(page.encode()) - len(get_plotlyjs().encode()) < 200_000
    assert "http" not in page.replace(get_plotlyjs().replace("\r\n", "\n"), "").lower().replace("http-equiv", "")


def test_latents_that_were_asked_for_are_shown(output, tmp_path):
    texts = write_report(output, tmp_path / "page.html", latents=[7, 39], n_latents=0, contexts=2)
    assert [a["id"] for tag, a in Tags(texts.read_text()).found if tag == "article" and "id" in a] == [
        "latent-7",
        "latent-39",
    ]


def test_a_token_with_much_of_the_variance_is_pointed_out(output, tmp_path, monkeypatch):
    for share, said in ((1.0, False), (0.0, True)):
        monkeypatch.setattr(report, "_OUTLIER", share)
        text = write_report(output, tmp_path / "page.html", contexts=3).read_text()
        assert ("of the variance of the activations" in Tags(text).text) == said


# What cannot be had


def test_without_a_model_the_page_has_what_weights_and_logs_give(output, tmp_path):
    sae = SwitchSAE.load_from_disk(output)
    sae.cfg.metadata.model_name = str(tmp_path / "gone")
    sae.save_model(str(tmp_path / "run"))
    for name in (FILENAME, "sparsity.safetensors"):
        shutil.copy(output / name, tmp_path / "run" / name)
    (tmp_path / "run" / "metrics.json").write_text('{"explained_variance": 0.625, "expert_load": [0.1, 0.2, 0.3, 0.4]}')
    page = write_report(tmp_path / "run").read_text()
    tags = Tags(page)
    assert tags.sections == ["summary", "curves", "load", "density", "router", "duplicates"]
    assert "No text was read" in tags.text
    assert "62.5 %" in tags.text
    assert plots_of(page)["load"]["data"][0]["y"] == [10, 20, 30, 40]


def test_weights_alone_make_a_page(tmp_path):
    switch_sae().save_model(str(tmp_path / "switch"))
    randomize(TopKSAE(TopKSAEConfig(d_in=D, d_sae=F, k=K))).save_model(str(tmp_path / "topk"))
    tags = Tags(write_report(tmp_path / "switch").read_text())
    assert tags.sections == ["summary", "curves", "router", "duplicates"]
    assert "No curve was recorded" in tags.text
    assert "metadata name no" in tags.text
    assert Tags(write_report(tmp_path / "topk", contexts=0).read_text()).sections == ["summary", "curves", "duplicates"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "nowhere/at-all"], "nowhere/at-all"),
        (["--dataset", "text.pkl"], "text.pkl"),
        (["--latents", "40"], "latents must be between 0 and 39; got 40"),
        (["--n-examples", "0"], "n_examples must be at least 1; got 0"),
        (["--contexts", "-3"], "contexts must be at least 1; got -3"),
        (["--threshold", "2"], "threshold must be between 0 and 1; got 2.0"),
        (["--history", "nothing.jsonl"], "there is no nothing.jsonl"),
    ],
)
def test_what_was_named_must_be_there_and_no_page_is_left_otherwise(options, message, output, tmp_path, capsys):
    page = tmp_path / "page.html"
    with pytest.raises(SystemExit) as ended:
        main([str(output), "--output", str(page), *options])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_command_says_where_the_page_is(output, tmp_path, capsys):
    main([str(output), "--output", str(tmp_path / "sub" / "page.html"), "--contexts", "3"])
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'sub' / 'page.html'} (")
    assert [p.name for p in (tmp_path / "sub").iterdir()] == ["page.html"]


# The history


def test_history_keeps_numbers_of_at_most_200_steps(tmp_path):
    history = History(1234)
    for step in range(1, 1235):
        if history.is_due(step):
            loads = {f"routing/load_expert_{e}": e / 10 for e in (10, 2, 0, 1, 3, 4, 5, 6, 7, 8, 9, 11)}
            history.add(step, {"loss": step / 3, "bad": math.nan, "n": step, "text": "no", "flag": True, **loads})
    assert len(history.rows) == 1234 // 7 == 176
    file = history.save(tmp_path)
    rows = read_history(file)
    assert rows == history.rows
    assert rows[0] == {"step": 7, "loss": 2.33333, "bad": None, "n": 7, "routing/load": [e / 10 for e in range(12)]}
    assert "NaN" not in file.read_text()
    again = History(1234)
    again.load(tmp_path)
    assert again.rows == rows
    again.load(tmp_path / "none")
    assert again.rows == []
    assert [p.name for p in tmp_path.iterdir()] == [FILENAME]


@pytest.mark.parametrize(
    ("line", "message"), [("{", "line 2: expected one JSON"), ("[1]", r"line 2: expected a JSON object")]
)
def test_a_damaged_history_is_named(line, message, tmp_path):
    (tmp_path / FILENAME).write_text(f'{{"step": 1}}\n{line}\n')
    with pytest.raises(ValueError, match=message):
        read_history(tmp_path / FILENAME)


@contextmanager
def wandb_offline(folder: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("DIR", "DATA_DIR", "CACHE_DIR", "CONFIG_DIR", "ARTIFACT_DIR"):
            patch.setenv(f"WANDB_{name}", str(folder))
        for name, value in {"MODE": "offline", "SILENT": "true", "CONSOLE": "off", "ERROR_REPORTING": "false"}.items():
            patch.setenv(f"WANDB_{name}", value)
        wandb.teardown()
        try:
            yield
        finally:
            wandb.teardown()


def test_the_history_of_an_offline_wandb_run(tmp_path):
    with wandb_offline(tmp_path):
        run = wandb.init(project="tested")
        for step in range(200):  # more than one block of 32 KiB
            run.log(
                {"losses/mse_loss": 1 / (step + 1), **{f"routing/load_expert_{e}": e / 100 for e in range(12)}},
                step=step,
            )
        run.log({"model_performance_preservation": {"ce_loss_score": 0.5}, "plots/x": wandb.Histogram([1.0])}, step=200)
        run.finish()
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    rows = read_history(file)
    assert len(rows) == 201
    assert [row["losses/mse_loss"] for row in rows[:-1]] == pytest.approx([1 / (i + 1) for i in range(200)], rel=1e-5)
    assert all(row["routing/load"] == [e / 100 for e in range(12)] for row in rows[:-1])
    assert rows[-1]["model_performance_preservation/ce_loss_score"] == 0.5
    cut = tmp_path / "cut.wandb"
    cut.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert 50 < len(read_history(cut)) < 150  # of a run that was killed
    cut.write_bytes(b"something else")
    with pytest.raises(ValueError, match="is not a file of W&B"):
        read_history(cut)


# Tokens as text


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


# In a browser


class Chromium:
    """Debian's chromium, told what to do through two pipes (DevTools protocol, messages that end with NUL)."""

    def __init__(self, home: Path) -> None:
        program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
        if program is None:
            pytest.skip("no chromium in PATH; on Debian: apt-get install --no-install-recommends chromium")
        commands_out, self.commands = os.pipe()
        self.answers, answers_in = os.pipe()
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        arguments = [program, *options, "--remote-debugging-pipe", f"--user-data-dir={home}", "about:blank"]
        shell = f'exec "$@" 3<&{commands_out} 4>&{answers_in}'  # the numbers that chromium expects
        self.process = subprocess.Popen(
            ["bash", "-c", shell, "bash", *arguments],
            pass_fds=[commands_out, answers_in],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(commands_out)
        os.close(answers_in)
        self.pending, self.n, self.session = b"", 0, None
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def message(self) -> dict[str, Any]:
        while b"\0" not in self.pending:
            ready, _, _ = select.select([self.answers], [], [], 120)
            assert ready, f"chromium has said nothing for two minutes, after {self.n} commands"
            data = os.read(self.answers, 1 << 16)
            assert data, "chromium has ended"
            self.pending += data
        first, _, self.pending = self.pending.partition(b"\0")
        return json.loads(first)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self.n += 1
        command = {"id": self.n, "method": method, "params": parameters}
        command |= {"sessionId": self.session} if self.session else {}
        os.write(self.commands, json.dumps(command).encode() + b"\0")
        while (answer := self.message()).get("id") != self.n:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, file: Path, width: int) -> None:
        self.events.clear()
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=844, deviceScaleFactor=1, mobile=width < 600
        )
        self.call("Page.navigate", url=file.as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self.message())
        # Plots are drawn in frames to come.
        self.run("new Promise(done => requestAnimationFrame(() => setTimeout(done, 200)))")

    def run(self, expression: str) -> Any:
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def complaints(self) -> list[Any]:
        """Exceptions, whatever was written to the console, and what the browser itself reports, such as policies."""
        names = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        return [event["params"] for event in self.events if event["method"] in names]

    def requests(self) -> list[str]:
        sent = [event for event in self.events if event["method"] == "Network.requestWillBeSent"]
        return [event["params"]["request"]["url"] for event in sent]

    def close(self) -> None:
        self.session = None
        with suppress(AssertionError, OSError):
            self.call("Browser.close")
        os.close(self.commands)
        os.close(self.answers)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    browser = Chromium(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def page_file(page, tmp_path_factory):
    file = tmp_path_factory.mktemp("page") / "report.html"
    file.write_text(page)
    return file


VISIBLE = "[...document.querySelectorAll('.item')].filter(item => item.checkVisibility())"


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_opens_without_a_complaint_or_a_request(width, chromium, page_file):
    chromium.open(page_file, width)
    assert chromium.complaints() == []
    assert [url for url in chromium.requests() if not url.startswith(("data:", "blob:"))] == [page_file.as_uri()]
    assert chromium.run("window.hacked") is None
    assert chromium.run("document.documentElement.scrollWidth") <= width
    assert chromium.run("[...document.querySelectorAll('.table')].every(t => getComputedStyle(t).overflowX == 'auto')")


@pytest.mark.parametrize("width", [1280, 390])
def test_every_plot_is_drawn_within_its_place(width, chromium, page_file, page):
    chromium.open(page_file, width)
    drawn = chromium.run(
        """Object.fromEntries([...document.querySelectorAll('.plot')].map(place => {
            const marks = place.querySelectorAll('.point path, .js-line, .hm image, path.box');
            const svg = place.querySelector('svg.main-svg');
            return [place.id.replace('plot-', ''),
                    [marks.length, svg ? svg.getBoundingClientRect().right <= innerWidth : false]];
        }))"""
    )
    plots = plots_of(page)
    assert drawn.keys() == plots.keys()
    assert {
        "loss",
        "balance",
        "load",
        "load-history",
        "dead",
        "density",
        "density-by-expert",
        "router",
        "gates",
    } <= plots.keys()
    for name, (marks, fits) in drawn.items():
        data = plots[name]["data"]
        expected = {"bar": len(data[0].get("y", ())), "scatter": len(data), "heatmap": 1, "box": E}[data[0]["type"]]
        assert marks >= expected, name
        assert fits, name


def test_a_search_leaves_what_holds_the_words(chromium, page_file):
    chromium.open(page_file, 390)

    def search(words: str) -> list[str]:
        chromium.run(f"search.value = {json.dumps(words)}; search.dispatchEvent(new Event('input', {{bubbles: true}}))")
        return chromium.run(f"{VISIBLE}.map(item => item.textContent)")

    everything = search("")
    latents = [text for text in everything if text.startswith("Latent")]
    assert len(latents) == 8
    assert len([text for text in everything if text.startswith("Expert")]) == E
    name = latents[3].split(",")[0]
    assert search(name.upper() + ",") == [latents[3]]
    assert chromium.run("document.getElementById('found').textContent") == f"1 of {len(everything)}"
    for words in ("w5", "w7", "<img/src"):
        found = search(words)
        assert found == [text for text in everything if words in text]
        assert 0 < len(found) < len(everything)
    assert search("no such words") == []
    assert search("") == everything
    assert chromium.complaints() == []


def test_a_link_to_a_latent_leads_to_it(chromium, page_file):
    chromium.open(page_file, 1280)
    chromium.run("document.querySelector('#experts a').click()")
    chromium.run("new Promise(done => setTimeout(done, 100))")
    top = chromium.run("document.querySelector('article:target').getBoundingClientRect().top")
    assert 0 <= top < 844
    png = base64.b64decode(chromium.call("Page.captureScreenshot", format="png")["data"])
    assert png.startswith(b"\x89PNG")
