"""Checkpoints and saved SAEs with damaged files: refused by name, passed over, or what was written to the bit."""

import json
import logging
import random
import shutil
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from helpers.kills import BATCH, same, small_sae, small_trainer, weights
from sae_lens import SAE
from torch import Tensor

from sae_lens_switch.report import load_run
from sae_lens_switch.training import manifest as manifest_module
from sae_lens_switch.training.checkpoints import MANIFEST, CheckpointError

SETUPS = [
    {"architecture": architecture, "optimizer": optimizer}
    for architecture in ("switch", "sparse_topk")
    for optimizer in ("adam", "row_sparse_adam")
]
STEPS_AT = (2, 4, 6)


# Each changes a folder and says which files it has touched.


def flip(file: Path, rng: random.Random, _: Path) -> None:
    content = bytearray(file.read_bytes())
    for _i in range(rng.choice([1, 1, 10])):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def truncate(file: Path, rng: random.Random, _: Path) -> None:
    file.write_bytes(file.read_bytes()[: rng.randrange(file.stat().st_size)])


def extend(file: Path, rng: random.Random, _: Path) -> None:
    with open(file, "ab") as handle:
        handle.write(rng.choice([b"\0", b"}", rng.randbytes(100)]))


def empty(file: Path, _: random.Random, __: Path) -> None:
    file.write_bytes(b"")


def fill_with_noise(file: Path, rng: random.Random, _: Path) -> None:
    file.write_bytes(rng.randbytes(file.stat().st_size))


def remove(file: Path, _: random.Random, __: Path) -> None:
    file.unlink()


def replace_by_a_folder(file: Path, _: random.Random, __: Path) -> None:
    file.unlink()
    file.mkdir()


def swap_with_another(file: Path, rng: random.Random, other: Path) -> None:
    mine = file.read_bytes()
    theirs = rng.choice([f for f in other.iterdir() if f.is_file() and f.read_bytes() != mine])
    file.write_bytes(theirs.read_bytes())
    theirs.write_bytes(mine)


def link_to_the_others(file: Path, _: random.Random, other: Path) -> None:
    file.unlink()
    file.symlink_to(other / file.name)


def link_to_nothing_or_itself(file: Path, rng: random.Random, _: Path) -> None:
    file.unlink()
    file.symlink_to(rng.choice([file, file.parent / "nothing"]))


def link_to_the_same(file: Path, _: random.Random, __: Path) -> None:
    file.rename(file.with_name("moved"))
    file.symlink_to("moved")


DAMAGES: list[Callable[[Path, random.Random, Path], None]] = [
    *(flip, truncate, extend, empty, fill_with_noise, remove, replace_by_a_folder),
    *(swap_with_another, link_to_the_others, link_to_nothing_or_itself, link_to_the_same),
]
ODD: list[Any] = [
    None,
    True,
    -1,
    0,
    1.5,
    1e400,
    10**400,
    float("nan"),
    "",
    "x",
    [],
    [1],
    {},
    {"bytes": 1},
    "../../cfg.json",
]


def edit_manifest(folder: Path, rng: random.Random) -> None:
    """By somebody who may know how its digest is made."""
    manifest = json.loads((folder / MANIFEST).read_text())
    place = manifest if rng.random() < 0.5 else manifest["files"]
    key = rng.choice([*place, "new"])
    if rng.random() < 0.3:
        place.pop(key, None)
    elif rng.random() < 0.3 and isinstance(place.get(key), dict):
        place[key][rng.choice([*place[key], "new"])] = rng.choice(ODD)
    else:
        place[key] = rng.choice(ODD)
    if rng.random() < 0.6 and "sha256" in manifest:
        del manifest["sha256"]
        manifest["sha256"] = manifest_module._digest(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[tuple[Path, dict[str, dict[str, Tensor]]]]:
    """Of each setup a folder of three checkpoints, and by their names the weights and moments they hold."""
    made = []
    for number, setup in enumerate(SETUPS):
        path, held = tmp_path_factory.mktemp(f"run-{number}"), {}
        trainer = small_trainer(path, **setup)
        for n in range(1, max(STEPS_AT) + 1):
            trainer.step(next(trainer.data_provider))
            trainer.n_training_steps += 1
            if n in STEPS_AT:
                trainer.save_checkpoint(str(n * BATCH))
                held[str(n * BATCH)] = weights(trainer)
        made.append((path, held))
    return made


def test_a_damaged_checkpoint_is_refused_passed_over_or_whole(trials, runs, tmp_path, caplog):
    outcomes = {"refused": 0, "whole": 0, "cannot be checked": 0, "from zero": 0}
    for name, rng in trials(1600):
        number = rng.randrange(len(SETUPS))
        original, held = runs[number]
        path = tmp_path / "saved"
        shutil.copytree(original, path)
        victims = rng.sample(sorted(held), rng.choice([1, 1, 1, 2, 3]))
        for victim in victims:
            for _ in range(rng.choice([1, 1, 1, 2])):
                files = [f for f in sorted((path / victim).iterdir()) if f.is_file() and not f.is_symlink()]
                other = path / rng.choice([n for n in held if n != victim])
                if rng.random() < 0.15 and path / victim / MANIFEST in files:
                    with_manifest_edited(path / victim, rng)
                else:
                    files = [f for f in files if f.stat().st_size]
                    rng.choice(DAMAGES)(rng.choice(files), rng, other)
        trainer = small_trainer(path, **SETUPS[number])
        which = rng.choice(["latest", str(path / rng.choice(victims))])
        caplog.clear()
        found, refusal = None, ""
        try:
            with caplog.at_level(logging.INFO):
                found = trainer.resume(which)
        except CheckpointError as error:
            refusal = str(error)
        if refusal:
            assert str(path) in refusal, name
            outcomes["refused"] += 1
        elif found is None:
            assert "starting from the beginning" in caplog.text, name
            assert not any(folder.joinpath(MANIFEST).exists() for folder in path.iterdir()), name
            outcomes["from zero"] += 1
        elif not (found / MANIFEST).exists():
            assert f"{found} has no {MANIFEST}: its files cannot be checked" in caplog.text, name
            assert which != "latest", name
            outcomes["cannot be checked"] += 1
        else:
            assert same(weights(trainer), held[found.name]), name
            assert trainer.n_training_samples == int(found.name), name
            outcomes["whole"] += 1
        shutil.rmtree(path)
    assert outcomes["refused"] > 0
    assert outcomes["whole"] > 0
    print(outcomes)  # noqa: T201


def with_manifest_edited(folder: Path, rng: random.Random) -> None:
    try:
        edit_manifest(folder, rng)
    except (ValueError, KeyError, TypeError, AttributeError):  # damaged already
        (folder / MANIFEST).write_text("{")


STRUCTURAL = [
    truncate,
    empty,
    fill_with_noise,
    remove,
    replace_by_a_folder,
    link_to_nothing_or_itself,
    link_to_the_same,
]


def test_a_damaged_sae_is_refused_by_name(trials, tmp_path):
    """What only changes numbers cannot be seen here: SAELens's files of an SAE have no digest."""
    for name, rng in trials(500):
        path = tmp_path / "sae"
        sae = small_sae(rng.choice(["switch", "sparse_topk"]))
        sae.save_inference_model(path)
        expected: Any = deepcopy(SAE.load_from_disk(path))  # which reads the file only when it is used
        file = path / rng.choice(["cfg.json", "sae_weights.safetensors"])
        rng.choice(STRUCTURAL)(file, rng, path)
        loaded, refusal = None, ""
        try:
            loaded = load_run(path).sae
        except ValueError as error:
            refusal = str(error)
        if loaded is None:
            assert str(path) in refusal, name
        else:
            assert loaded.cfg.to_dict() == expected.cfg.to_dict(), name
            assert loaded.state_dict().keys() == expected.state_dict().keys(), name
        if not any(f.is_dir() for f in path.iterdir()):  # then a save mends it
            sae.save_inference_model(path)
            assert same(SAE.load_from_disk(path).state_dict(), expected.state_dict()), name
            assert not [f for f in path.iterdir() if f.is_symlink() or f.name.startswith(".")], name
        shutil.rmtree(path)
