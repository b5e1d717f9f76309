"""Commands start at once, and the package registers its architectures however else it is imported."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers import switch_sae

import sae_lens_switch
from sae_lens_switch.cli.help import known_help

ROOT = Path(__file__).parents[2]
HEAVY = {"sae_lens", "transformer_lens", "transformers", "datasets", "torch", "plotly", "matplotlib"}
SCRIPTS = sorted(
    str(file.relative_to(ROOT))
    for folder in ("examples", "examples/experiments", "benchmarks", "benchmarks/gpu")
    for file in (ROOT / folder).glob("*.py")
    if "ArgumentParser(" in file.read_text() and '__name__ == "__main__"' in file.read_text()
)
# What a process is to have registered, printed by it.
REPORT = """
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY
print(sorted({"switch", "sparse_topk"} & SAE_CLASS_REGISTRY.keys() & SAE_TRAINING_CLASS_REGISTRY.keys()))
"""
REGISTERED = "['sparse_topk', 'switch']"


def environment(folder: Path, at_exit: str = "") -> dict[str, str]:
    """Of processes that see this checkout and ``folder``, and run some code when they exit."""
    body = "".join(f"    {line}\n" for line in at_exit.strip().splitlines())
    (folder / "sitecustomize.py").write_text(f"import atexit, sys\n@atexit.register\ndef look():\n    pass\n{body}")
    return environment_of(folder)


def environment_of(folder: Path) -> dict[str, str]:
    paths = [str(folder), str(ROOT), str(ROOT / "kernels")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def python(*command: str, env: dict[str, str], cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], cwd=cwd, env=env, capture_output=True, text=True, timeout=600)


def heavy_modules(folder: Path, *command: str) -> tuple[str, set[str]]:
    """What a command prints, and the heavy modules it has loaded when it exits."""
    env = environment(folder, 'sys.stderr.write("loaded: " + " ".join(sys.modules))')
    done = python(*command, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout, {*done.stderr.rpartition("loaded: ")[2].split()} & HEAVY


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--help"],
        ["train", "--architecture", "switch", "--help"],
        ["train", "--architecture=topk", "-h"],
        ["cost", "--help"],
        ["cost", "--d-in", "768", "--d-sae", "24576", "--n-experts", "32"],
        ["report", "--help"],
    ],
    ids=" ".join,
)
def test_a_command_imports_nothing_heavy_to_say_what_it_does(arguments, tmp_path):
    if arguments[0] == "train" and known_help() is None:
        pytest.skip("help.json was made from other sources of SAELens than are installed")
    out, loaded = heavy_modules(tmp_path, "-m", f"sae_lens_switch.{arguments[0]}", *arguments[1:])
    assert len(out.splitlines()) > 20
    assert loaded == set()


def test_the_help_of_saedashboard_is_its_own_and_imports_nothing_heavy(tmp_path):
    pytest.importorskip("sae_dashboard")
    out, loaded = heavy_modules(tmp_path, "-m", "sae_lens_switch.dashboard", "--help")
    assert "--np-set-name" in out
    assert loaded == set()
    whole = python(*("-c", "from sae_lens_switch.dashboard import main; main()", "--help"), env=environment(tmp_path))
    assert whole.stdout.split("options:")[1] == out.split("options:")[1]


def test_the_kernels_import_no_saelens(tmp_path):
    _, loaded = heavy_modules(tmp_path, "-c", "import sae_lens_switch_kernels, sae_lens_switch_kernels.speed")
    assert loaded == {"torch"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_imports_nothing_heavy_to_print_its_help(script, tmp_path):
    out, loaded = heavy_modules(tmp_path, script, "--help")
    assert out.startswith("usage: ")
    assert loaded <= ({"torch"} if script == "examples/packed_model.py" else set())


NONE_OF_THE_COMMANDS = [
    ["-c", f"import sae_lens_switch\n{REPORT}"],
    ["-m", "user_package.train"],
    ["-m", "user_package.train", "-m", "sae_lens_switch.train"],
    ["-m", "user_module"],
    ["user_module.py"],
    ["-c", f"import sys; sys.argv = ['-m', 'x', 'y', 'sae_lens_switch.train']; import sae_lens_switch\n{REPORT}"],
    ["-c", "import runpy; runpy.run_module('user_package.train', run_name='__main__', alter_sys=True)"],
    ["-c", f"import runpy; runpy.run_module('sae_lens_switch.cost', run_name='not main')\n{REPORT}"],
    ["-m", "runpy", "user_package.train"],
    ["-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", "user_module.py"],
]


# A process ends where the package begins to import what registers its architectures: that takes seconds.
END_THERE = f"""
import os, sys
class EndThere:
    def find_spec(self, name, *_):
        if name == "sae_lens_switch._public":
            print("{REGISTERED}", flush=True)
            os._exit(0)
sys.meta_path.insert(0, EndThere())
"""


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> list[subprocess.CompletedProcess]:
    """Of all these, run two at a time; the first and the last register for good."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "user_package").mkdir()
    (folder / "user_package" / "__init__.py").write_text("import sae_lens_switch")
    (folder / "user_package" / "train.py").write_text(REPORT)
    (folder / "user_module.py").write_text(f"import sae_lens_switch\n{REPORT}")
    env, whole = environment(folder), tmp_path_factory.mktemp("whole")
    (folder / "sitecustomize.py").write_text(END_THERE)
    short = [env] * (len(NONE_OF_THE_COMMANDS) - 2)
    envs = [environment(whole), *short, environment(whole)]
    with ThreadPoolExecutor(max_workers=2) as pool:
        ran = pool.map(lambda command, env: python(*command, env=env, cwd=folder), NONE_OF_THE_COMMANDS, envs)
        return list(ran)


@pytest.mark.parametrize(
    "i", range(len(NONE_OF_THE_COMMANDS)), ids=[" ".join(c).partition("\n")[0] for c in NONE_OF_THE_COMMANDS]
)
def test_importing_registers_in_every_process_that_is_none_of_the_commands(i, outputs):
    assert REGISTERED in outputs[i].stdout, outputs[i].stderr


COST = ("-m", "sae_lens_switch.cost", "--d-in", "768", "--d-sae", "24576")


def test_a_spawned_child_of_a_command_registers(tmp_path):
    """Its main module is the command's, under another name."""
    (tmp_path / "child.py").write_text(f"def report():\n{REPORT.replace(chr(10), chr(10) + '    ')}")
    (tmp_path / "sitecustomize.py").write_text(
        """
import argparse
import multiprocessing
parse = argparse.ArgumentParser.parse_args
def parse_in_a_child_first(self, argv):
    import child
    process = multiprocessing.get_context("spawn").Process(target=child.report)
    process.start()
    process.join()
    return parse(self, argv)
argparse.ArgumentParser.parse_args = parse_in_a_child_first
"""
    )
    done = python(*COST, env=environment_of(tmp_path))
    assert done.stdout.startswith(REGISTERED), done.stderr
    assert "parameters" in done.stdout


def test_a_command_registers_before_it_loads_anything(tmp_path):
    switch_sae().save_model(tmp_path / "sae")
    done = python(
        *("-m", "sae_lens_switch.report", str(tmp_path / "sae"), "--contexts", "0"), env=environment(tmp_path)
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "sae" / "report.html").exists()


def test_in_the_process_of_a_command_the_public_names_are_there_when_asked_for(tmp_path):
    look = f"""
import pickle
import sae_lens_switch
assert "torch" not in sys.modules
assert sae_lens_switch.__version__ and not hasattr(sae_lens_switch, "__wrapped__")
assert "torch" not in sys.modules
names = {{}}
exec("from sae_lens_switch import *", names)
import sae_lens_switch.saes.switch_sae as home
assert names["SwitchSAE"] is sae_lens_switch.SwitchSAE is home.SwitchSAE
assert {{*sae_lens_switch.__all__}} <= names.keys()
assert {{*sae_lens_switch.__all__}} <= {{*dir(sae_lens_switch)}}
config = sae_lens_switch.SwitchSAEConfig(d_in=4, d_sae=8, n_experts=2, k=2)
assert pickle.loads(pickle.dumps(config)) == config
{REPORT}"""
    done = python(*COST, env=environment(tmp_path, look))
    assert done.stdout.rstrip().endswith(REGISTERED), done.stderr


def test_the_public_names_are_those_of_their_modules():
    names = {}
    exec("from sae_lens_switch import *", names)
    assert {*sae_lens_switch.__all__} == names.keys() - {"__builtins__"}
    assert {*sae_lens_switch.__all__} <= {*dir(sae_lens_switch)}
    for name in sae_lens_switch.__all__:
        value = vars(sae_lens_switch)[name]
        assert value is names[name]
        assert value is vars(sys.modules[value.__module__])[name]
