"""What the version before modules moved into folders (commit 93011c6) saved, and how: tests/data/before_rooms.

Made once, by that version's code, from a checkout of it::

    PYTHONPATH=.:kernels:/path/to/this/checkout/tests OMP_NUM_THREADS=1 python -m helpers.before_rooms

Data are integers over 64, drawn by a seeded generator, so that every machine has the same bits. Everything is built
through public names, so that the test builds the same trainers with the code of today.
"""

import contextlib
import copy
import hashlib
import json
import platform
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import sae_lens
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from torch import Tensor, nn

from helpers import CONTEXT, HOOK, D, E, F, K, run_fields, tiny_dataset, tiny_model
from helpers.hub_server import HubServer
from sae_lens_switch import (
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    SparseSAETrainer,
    SparseSAETrainerConfig,
    SparseTopKTrainingSAE,
    SparseTopKTrainingSAEConfig,
    SwitchSAE,
    SwitchSAEConfig,
    SwitchTrainingSAE,
    SwitchTrainingSAEConfig,
    upload_saes_to_huggingface,
)

DATA = Path(__file__).parents[1] / "data" / "before_rooms"
BATCH, STEPS = 64, 20
REPO = "user/saes"

# By name: the SAE's fields, the trainer's fields, and where the activations come from.
RUNS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "switch": ({}, {}, "iterator"),
    "switch_row_sparse": ({}, {"optimizer": "row_sparse_adam"}, "tensor"),
    "switch_auxk": ({"aux_loss_coefficient": 0.25}, {"dead_feature_window": 2}, "iterator"),
    "switch_scaled": ({"normalize_activations": "expected_average_only_in"}, {}, "iterator"),
    "switch_whitened": ({"normalize_activations": "covariance_whitening"}, {"optimizer": "row_sparse_adam"}, "tensor"),
    "switch_accumulated": ({}, {"gradient_accumulation_steps": 4}, "folder"),
    "switch_bfloat16": ({"dtype": "bfloat16"}, {}, "iterator"),
    "sparse_topk": ({}, {"dead_feature_window": 2}, "tensor"),
    "sparse_topk_bfloat16": ({"dtype": "bfloat16"}, {}, "iterator"),
}
RUNNER = "switch_runner"
HUB_IDS = ("layer_1/switch", "layer_1/topk")


def integers(seed: int, *shape: int, bound: int = 64) -> Tensor:
    return torch.randint(-bound, bound + 1, shape, generator=torch.Generator().manual_seed(seed))


def activations(n: int, seed: int = 1) -> Tensor:
    """[n, D], float32 without rounding: sparse mixtures of a few directions, off centre."""
    directions, centre = integers(0, 2 * D, D, bound=16), integers(2, D, bound=128)
    active = integers(seed, n, 2 * D, bound=50) > 44
    strength = integers(seed + 1000, n, 2 * D, bound=4) + 8
    return (((active * strength) @ directions) + 8 * centre).float() / 64


INPUT = activations(16, seed=7)


def cached_folder(folder: Path) -> Path:
    """Activations as SAELens's CacheActivationsRunner writes them."""
    contexts = activations(96 * CONTEXT, seed=3).view(96, CONTEXT, D)
    features = datasets.Features(
        {
            HOOK: datasets.Array2D(shape=(CONTEXT, D), dtype="float32"),
            "token_ids": datasets.Sequence(datasets.Value("int32"), length=CONTEXT),
        }
    )
    rows = {HOOK: contexts.tolist(), "token_ids": [list(range(3, 3 + CONTEXT))] * len(contexts)}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(folder)
    return folder


def make_sae(run: str) -> SwitchTrainingSAE | SparseTopKTrainingSAE:
    torch.manual_seed(0)
    fields = {"d_in": D, "d_sae": F, "k": K, **RUNS[run][0]}
    if run.startswith("sparse_topk"):
        return SparseTopKTrainingSAE(SparseTopKTrainingSAEConfig(**fields))
    return SwitchTrainingSAE(SwitchTrainingSAEConfig(n_experts=E, **fields))


def make_trainer(run: str, folder: Path, **fields: Any) -> SparseSAETrainer:
    """``folder`` may hold the cached activations, or gets them."""
    n = BATCH * STEPS
    cfg = SparseSAETrainerConfig(
        **{"total_training_samples": n, "train_batch_size_samples": BATCH, "lr": 1e-2, "n_batches_for_norm_estimate": 3}
        | RUNS[run][1]
        | fields
    )
    source: Any = activations(n // 2)  # two epochs
    if RUNS[run][2] == "iterator":
        source = iter(activations(n + 3 * BATCH).split(BATCH))
    elif RUNS[run][2] == "folder":
        source = folder / "activations"
        if not source.exists():
            cached_folder(source)
    return SparseSAETrainer(cfg, make_sae(run), source)


def make_runner(folder: Path, **fields: Any) -> LanguageModelSAETrainingRunner:
    """A language-model run on cached activations; paths are relative to ``folder``, the working directory."""
    if not (folder / "activations").exists():
        cached_folder(folder / "activations")
    torch.manual_seed(0)
    cfg = LanguageModelSAERunnerConfig(
        architecture="switch",
        **{"d_in": D, "d_sae": F, "n_experts": E, "k": K, "lr": 1e-2},
        **run_fields(
            Path(),
            use_cached_activations=True,
            cached_activations_path="activations",
            training_tokens=STEPS * BATCH,
            train_batch_size_tokens=BATCH,
            n_checkpoints=1,
            **fields,
        ),
    )
    return LanguageModelSAETrainingRunner(cfg, override_dataset=tiny_dataset(), override_model=tiny_model())


def weights(sae: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone(memory_format=torch.contiguous_format) for name, p in sae.named_parameters()}


def digest(sae: nn.Module) -> str:
    """Of the weights, bit for bit."""
    sha256 = hashlib.sha256()
    for name, p in sorted(weights(sae).items()):
        sha256.update(f"{name} {p.dtype} {list(p.shape)}".encode())
        sha256.update(p.view(torch.uint8).numpy().tobytes())
    return sha256.hexdigest()


@torch.no_grad()
def outputs(sae: Any) -> dict[str, Tensor]:
    x = INPUT.to(sae.dtype)
    return {"latents": sae.encode(x), "output": sae(x)}


def load_all(data: Path) -> Iterator[tuple[str, Any]]:
    """Every SAE in the folder, for inference and, where it can be, for training."""
    for cfg in sorted(data.rglob("cfg.json")):
        name = cfg.parent.relative_to(data).as_posix()
        yield f"{name}, inference", sae_lens.SAE.load_from_disk(cfg.parent).eval()
        if name.startswith("saved") and not name.endswith(("inference", "by_hand")):
            yield f"{name}, training", sae_lens.TrainingSAE.load_from_disk(cfg.parent).eval()


def this_machine() -> dict[str, str]:
    """What decides the last bits of a sum: the same here and there means the same bits."""
    facts: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            facts[name.strip()] = value.strip()
    extensions = (flag for flag in facts.get("flags", "").split() if flag.startswith(("avx", "amx", "fma")))
    return {
        "cpu": facts.get("model name", platform.processor()),
        "extensions": " ".join(sorted(extensions)),
        "vector instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "sae_lens": sae_lens.__version__,
    }


def talk_to(server: HubServer, patch: pytest.MonkeyPatch, cache: Path) -> None:
    """Send huggingface_hub's client to a server on this machine."""
    patch.setattr(constants, "ENDPOINT", server.url)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    patch.setenv("HF_TOKEN", server.writer)


# --- Only for the version before


def _save(folder: Path, trained: dict[str, Any]) -> None:
    """SAEs as every way of saving writes them."""
    inference = SwitchSAE(SwitchSAEConfig(d_in=D, d_sae=F, n_experts=E, k=K))
    with torch.no_grad():
        for i, p in enumerate(inference.parameters()):
            p.copy_(integers(20 + i, *p.shape).float() / 96)
    inference.save_model(folder / "switch_by_hand")
    make_sae("switch").save_model(folder / "switch_fresh")
    for run in ("switch", "switch_bfloat16", "sparse_topk", "sparse_topk_bfloat16"):
        copy.deepcopy(trained[run]).save_model(folder / f"{run}_training")
        copy.deepcopy(trained[run]).save_inference_model(folder / f"{run}_inference")


def _checkpoint(run: str, folder: Path) -> Any:
    """A run with a checkpoint in its middle, resumed from it; both ways end at the same SAE, which is returned."""
    there = folder / run
    whole = make_trainer(run, folder, checkpoint_path=str(there), n_checkpoints=1)
    whole.fit()
    (checkpoint,) = there.iterdir()
    resumed = make_trainer(run, folder, resume=str(checkpoint))
    resumed.fit()
    ends = weights(whole.sae), weights(resumed.sae)
    assert all(torch.equal(ends[0][n], ends[1][n]) for n in ends[0]), run
    shutil.copytree(checkpoint, DATA / run)
    return resumed.sae


def main() -> None:
    torch.set_num_threads(1)
    shutil.rmtree(DATA, ignore_errors=True)
    DATA.mkdir(parents=True)
    expected: dict[str, Tensor] = {}
    digests: dict[str, str] = {}

    def expect(name: str, tensors: dict[str, Tensor]) -> None:
        expected.update({f"{name}/{n}": t.contiguous() for n, t in tensors.items()})

    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):
        folder = Path(scratch)
        trained = {run: _checkpoint(run, folder) for run in RUNS}
        make_runner(folder).run()
        (checkpoint,) = folder.glob("checkpoints/*/*")
        shutil.copytree(checkpoint, DATA / RUNNER)
        trained[RUNNER] = make_runner(folder, resume=str(checkpoint.relative_to(folder))).run()
        for run, sae in trained.items():
            expect(f"end of {run}", weights(sae))
        _save(DATA / "saved", trained)
        with HubServer() as server, pytest.MonkeyPatch.context() as patch:
            talk_to(server, patch, folder / "cache")
            saes = dict(zip(HUB_IDS, (trained["switch"], trained["sparse_topk"]), strict=True))
            upload_saes_to_huggingface(saes, REPO, show_progress=False, license="mit")
            for path, blob in server.repos[REPO].files().items():
                if not path.endswith(".png") and not path.startswith(".git"):
                    (DATA / "hub" / path).parent.mkdir(parents=True, exist_ok=True)
                    (DATA / "hub" / path).write_bytes(blob.data)
        for name, sae in load_all(DATA):
            expect(name, outputs(sae))
            digests[name] = digest(sae)
    (DATA / "weights_sha256.json").write_text(json.dumps(digests, indent=2) + "\n")
    save_file(expected, DATA / "expected.safetensors")
    (DATA / "made_on.json").write_text(json.dumps(this_machine(), indent=2) + "\n")


if __name__ == "__main__":
    main()
