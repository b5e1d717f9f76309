"""The folder for a GPU machine without network: what goes into which copy, and the stand-in for wandb."""

import subprocess
import sys
import zipfile

import pytest
from gpu import wheelhouse


@pytest.mark.parametrize(
    ("sizes", "copies"),
    [
        ({}, []),
        ({"tokens": 2, "model": 59, "packages": 3}, [["model"], ["packages", "tokens"]]),
        ({"tokens": 1, "model": 59, "packages": 3}, [["model", "tokens"], ["packages"]]),
        ({"model": 50, "packages": 3, "tokens": 2}, [["model", "packages", "tokens"]]),
        ({"model": 70, "packages": 3}, [["model"], ["packages"]]),
    ],
    ids=str,
)
def test_every_part_goes_into_a_copy_with_room_for_it(sizes, copies):
    assert wheelhouse.in_copies(sizes, 60) == copies


@pytest.mark.parametrize(("limit", "n_copies", "is_too_large"), [(2000, 1, False), (1600, 2, False), (1000, 2, True)])
def test_it_says_what_goes_into_which_copy_and_what_fits_into_none(
    limit, n_copies, is_too_large, tmp_path, monkeypatch, capsys
):
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "some.whl").write_bytes(bytes(300))
    (tmp_path / "model.safetensors").write_bytes(bytes(1500))
    monkeypatch.setattr(wheelhouse, "ROOT", tmp_path)  # no repository: an empty checkout
    monkeypatch.setattr(wheelhouse, "LIMIT", limit)
    assert wheelhouse.told(tmp_path) == is_too_large
    said = capsys.readouterr().out
    assert said.count("\ncopy ") == n_copies
    assert ("model.safetensors is too large for a copy" in said) == is_too_large


def test_the_packed_language_model_fits_into_a_copy_beside_this_checkout():
    assert 0 < wheelhouse.checkout_size() < wheelhouse.LIMIT - 58_950_000


def test_the_stand_in_for_wandb_is_a_wheel_that_imports_and_refuses_to_be_used(tmp_path):
    with zipfile.ZipFile(wheelhouse.stub_wheel(tmp_path)) as archive:
        archive.extractall(tmp_path / "site")
    program = "import wandb; print(wandb.__version__); wandb.init()"
    command = [sys.executable, "-S", "-c", f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); {program}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == "0.0.0\n"
    assert "RuntimeError: wandb.init: this is a stand-in; set log_to_wandb=False" in done.stderr
