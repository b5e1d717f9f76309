"""What the version before modules moved into folders saved still loads, and its runs resume, to the same bits.

Loaded weights are compared bit for bit everywhere; outputs, and weights after further training, on a machine like the
one that made the files (``made_on.json``): the same processor, vector instructions and torch, and with the operator
that version took for products at indices. Otherwise sums may be added in another order. With other code paths of torch
and MKL (``ATEN_CPU_CAPABILITY``, ``MKL_CBWR``) the weights at the end of a run then differ by less than 1e-7 of their
norm; 1e-5 is tolerated, 1e-2 in bfloat16.
"""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import before_rooms
from helpers.before_rooms import DATA, HUB_IDS, REPO, RUNNER, RUNS, digest, make_runner, make_trainer, outputs, weights
from helpers.hub_repositories import Blob, Repo
from helpers.hub_server import HubServer
from sae_lens import SAE
from sae_lens_switch_kernels import torch_backend
from safetensors.torch import load_file
from torch import Tensor

from sae_lens_switch import upload_saes_to_huggingface, verified_loader

MADE_ON = json.loads((DATA / "made_on.json").read_text())
DIGESTS = json.loads((DATA / "weights_sha256.json").read_text())
HERE = before_rooms.this_machine()
ALIKE = {name: HERE[name] == MADE_ON[name] for name in MADE_ON}
SAME_BITS = all(ALIKE[name] for name in ("cpu", "extensions", "vector instructions", "torch"))


@pytest.fixture(scope="module")
def expected() -> dict[str, dict[str, Tensor]]:
    """By SAE, then by the name of its tensors."""
    result: dict[str, dict[str, Tensor]] = {}
    for name, tensor in load_file(DATA / "expected.safetensors").items():
        sae, _, what = name.rpartition("/")
        result.setdefault(sae, {})[what] = tensor
    return result


@pytest.fixture
def data(tmp_path, monkeypatch) -> Path:
    """A copy to write beside; the working folder, as a run's paths are relative."""
    shutil.copytree(DATA, tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path / "data"
    torch.set_num_threads(before)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], same_bits: bool = SAME_BITS) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype
        if same_bits:
            assert torch.equal(tensor, expected[name]), name
        else:
            tolerance = 1e-2 if tensor.dtype == torch.bfloat16 else 1e-5
            error = (tensor.double() - expected[name].double()).norm()
            assert error <= tolerance * expected[name].double().norm(), name


def test_its_saes_load_and_give_the_same_bits(data, expected):
    found = dict(before_rooms.load_all(data))
    assert set(found) == {name for name in expected if not name.startswith("end of ")}
    for name, sae in found.items():
        assert digest(sae) == DIGESTS[name], name
        assert_same(outputs(sae), expected[name])


def test_a_fresh_one_is_still_fresh(data):
    fresh = {
        name: getattr(sae, "is_fresh", False) for name, sae in before_rooms.load_all(data) if name.endswith("training")
    }
    assert [name for name, is_fresh in fresh.items() if is_fresh] == ["saved/switch_fresh, training"]


@pytest.fixture(params=["its products", "today's"])
def has_its_products(request, monkeypatch) -> bool:
    """``matmul_at_indices`` by the operator of that version, where its bits can be compared; and by today's."""
    has_them = request.param == "its products"
    if has_them:
        if not torch.backends.mkl.is_available():
            pytest.skip("this build of torch lacks the operator")
        monkeypatch.setattr(torch_backend, "matmul_at_indices", sampled_products)
    return has_them


def sampled_products(g_BD: Tensor, W_FD: Tensor, indices_BK: Tensor, *_) -> Tensor:
    if g_BD.dtype == torch.bfloat16:
        return torch.bmm(W_FD[indices_BK], g_BD.unsqueeze(2)).squeeze(2)
    starts = torch.arange(len(g_BD) + 1) * indices_BK.shape[1]
    zeros = g_BD.new_zeros(indices_BK.numel())
    pattern = torch.sparse_csr_tensor(starts, indices_BK.flatten(), zeros, (len(g_BD), len(W_FD)))
    return torch.sparse.sampled_addmm(pattern, g_BD, W_FD.T, beta=0).values().view(indices_BK.shape)


@pytest.mark.parametrize("run", RUNS)
def test_its_checkpoints_resume_and_end_at_the_same_bits(run, has_its_products, data, expected, tmp_path):
    trainer = make_trainer(run, tmp_path, resume=str(data / run))
    trainer.fit()
    assert trainer.n_training_steps == before_rooms.STEPS
    # Since that version, gradients of bfloat16 are summed in float32.
    assert_same(
        weights(trainer.sae), expected[f"end of {run}"], SAME_BITS and has_its_products and "bfloat16" not in run
    )


def test_a_runners_checkpoint_resumes_and_ends_at_the_same_bits(has_its_products, data, expected, tmp_path):
    runner = make_runner(tmp_path, resume=str((data / RUNNER).relative_to(tmp_path)))
    found = weights(runner.run())
    if ALIKE["sae_lens"]:  # whose store of activations decides their order
        assert_same(found, expected[f"end of {RUNNER}"], SAME_BITS and has_its_products)
    assert all(torch.isfinite(tensor).all() for tensor in found.values())


def test_its_repository_is_read_verified_and_extended(data, expected, tmp_path, monkeypatch):
    with HubServer() as server:
        before_rooms.talk_to(server, monkeypatch, tmp_path / "cache")
        files = {
            p.relative_to(data / "hub").as_posix(): p.read_bytes() for p in (data / "hub").rglob("*") if p.is_file()
        }
        server.repos[REPO] = repo = Repo()
        repo.commit("main", {n: Blob(b, n.endswith(".safetensors")) for n, b in files.items()}, "the version before")
        for sae_id in HUB_IDS:
            sae = SAE.from_pretrained(REPO, sae_id, converter=partial(verified_loader, token=server.writer))
            assert digest(sae) == DIGESTS[f"hub/{sae_id}, inference"]
            assert_same(outputs(sae), expected[f"hub/{sae_id}, inference"])
        upload_saes_to_huggingface({"layer_2/switch": data / "saved" / "switch_training"}, REPO, show_progress=False)
        card = repo.files()["README.md"].data.decode()
        assert all(sae_id in card for sae_id in (*HUB_IDS, "layer_2/switch"))
        kept = {n: b for n, b in files.items() if n != "README.md"}
        assert {n: blob.data for n, blob in repo.files().items() if n in kept} == kept
