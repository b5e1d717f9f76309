"""What is shipped: the wheel holds both packages and imports from anywhere, and `kernels` shadows nothing."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from helpers import ROOT


def run_python(code: str, cwd: Path, *paths: Path) -> str:
    """Runs code in a fresh interpreter that sees the given paths first; returns what it printed."""
    setup = f"import sys; sys.path[:0] = {[str(p) for p in paths]!r}\n"
    result = subprocess.run([sys.executable, "-c", setup + code], cwd=cwd, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


_SHIPPED = {".py", ".typed", ".html", ".css", ".js", ".json", ".c", ".h"}


@pytest.fixture(scope="module")
def unpacked_wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a copy: a build leaves files beside the sources, which the next would ship
    for package in ("sae_lens_switch", "kernels"):
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", folder, source], check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "unpacked")
    return folder / "unpacked"


def test_the_wheel_holds_every_module_and_the_type_markers(unpacked_wheel):
    for package, source in (("sae_lens_switch", ROOT), ("sae_lens_switch_kernels", ROOT / "kernels")):
        expected = {p.relative_to(source) for p in (source / package).rglob("*") if p.suffix in _SHIPPED}
        assert Path(package, "py.typed") in expected
        assert {p.relative_to(unpacked_wheel) for p in (unpacked_wheel / package).rglob("*") if p.is_file()} == expected
    assert not (unpacked_wheel / "kernels").exists()


def test_the_wheel_works_from_another_folder(unpacked_wheel, tmp_path):
    code = (
        "import sae_lens_switch, sae_lens_switch_kernels\n"
        "sae = sae_lens_switch.SwitchSAE(sae_lens_switch.SwitchSAEConfig(d_in=4, d_sae=8, n_experts=2, k=2))\n"
        "import torch; print(sae(torch.ones(3, 4)).shape, sae_lens_switch.__file__, sae_lens_switch_kernels.__file__)"
    )
    out = run_python(code, tmp_path, unpacked_wheel)
    assert "torch.Size([3, 4])" in out
    assert out.count(str(unpacked_wheel)) == 2


def test_the_editable_install_works_from_another_folder(tmp_path):
    out = run_python("import sae_lens_switch, sae_lens_switch_kernels as k; print(k.__file__)", tmp_path)
    assert Path(out).parent == ROOT / "kernels" / "sae_lens_switch_kernels"


def test_kernels_shadows_no_other_package_of_that_name(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("whose = 'theirs'")
    code = "import kernels; print(kernels.whose); import sae_lens_switch"
    assert run_python(code, ROOT, ROOT, tmp_path) == "theirs"


def test_importing_needs_no_triton_and_changes_nothing_but_its_registrations(tmp_path):
    code = """
import sys
sys.modules["triton"] = None
import torch, sae_lens
from sae_lens import registry
before = {name: dict(getattr(registry, name)) for name in ("SAE_CLASS_REGISTRY", "SAE_TRAINING_CLASS_REGISTRY")}
threads, rng = torch.get_num_threads(), torch.get_rng_state()
attributes = {name: id(value) for name, value in vars(sae_lens).items()}
import sae_lens_switch
for name, entries in before.items():
    now = getattr(registry, name)
    assert {k: now[k] for k in entries} == entries, name
    print(sorted(now.keys() - entries.keys()))
assert torch.get_num_threads() == threads and torch.equal(torch.get_rng_state(), rng)
assert {n: id(v) for n, v in vars(sae_lens).items()} == attributes
"""
    assert run_python(code, tmp_path).splitlines() == [
        "['sparse_abstopk', 'sparse_topk', 'sparse_topk_transcoder', 'switch', 'switch_transcoder']",
        "['sparse_abstopk', 'sparse_batchtopk', 'sparse_batchtopk_transcoder', 'sparse_matryoshka_batchtopk', "
        "'sparse_topk', 'sparse_topk_transcoder', 'switch', 'switch_transcoder']",
    ]


def test_layers_import_downwards_only():
    for file in (ROOT / "kernels").rglob("*.py"):
        assert "sae_lens_switch." not in file.read_text().replace("sae_lens_switch_kernels.", ""), file
        assert "import sae_lens\n" not in file.read_text(), file
    for file in (ROOT / "sae_lens_switch").rglob("*.py"):
        assert "import triton" not in file.read_text(), file
