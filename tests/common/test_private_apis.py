"""The private names of torch and SAELens that this package stands on: a new version says here what it broke."""

import importlib
import inspect
import pkgutil
from types import ModuleType

import pytest
import torch
from torch import nn

import sae_lens_switch
from sae_lens_switch.common import torch_private
from sae_lens_switch.common.saelens_private import OVERRIDDEN, SUBSTITUTED


def saelens_class(path: str) -> type:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def own_modules() -> list[ModuleType]:
    found = pkgutil.walk_packages(sae_lens_switch.__path__, "sae_lens_switch.")
    return [importlib.import_module(m.name) for m in found if not m.name.endswith("__main__")]


@pytest.mark.parametrize(("path", "method"), [(path, m) for path, methods in OVERRIDDEN.items() for m in methods])
def test_saelens_still_has_the_private_methods_we_override_or_call(path, method):
    assert callable(vars(saelens_class(path)).get(method)), f"{path} has no {method}: {OVERRIDDEN[path][method]}"


@pytest.mark.parametrize(
    ("module", "name"), [(module, n) for module, names in SUBSTITUTED.items() for n in sorted(names)]
)
def test_saelens_still_has_the_names_we_substitute(module, name):
    assert callable(vars(importlib.import_module(module)).get(name))


def test_every_private_method_of_saelens_that_is_overridden_is_in_the_table():
    known = {(saelens_class(path), method) for path, methods in OVERRIDDEN.items() for method in methods}
    found = set()
    for module in own_modules():
        for cls in vars(module).values():
            if not inspect.isclass(cls) or cls.__module__ != module.__name__:
                continue
            for name in [n for n in vars(cls) if n.startswith("_") and not n.startswith(("__", "_abc"))]:
                bases = [b for b in cls.__mro__[1:] if name in vars(b) and b.__module__.startswith("sae_lens.")]
                found |= {(bases[-1], name)} if bases else set()
    assert found
    assert found <= known


@pytest.mark.parametrize("tensor_lr", [False, True])
def test_the_fused_adam_step_is_torchs(tensor_lr):
    p, plain = torch.arange(6.0), nn.Parameter(torch.arange(6.0))
    grad, zeros = torch.ones(6), lambda: torch.zeros(6)
    plain.grad = grad.clone()
    torch.optim.Adam([plain], lr=0.25, fused=True).step()
    options = {"beta1": 0.9, "beta2": 0.999, "weight_decay": 0.0, "eps": 1e-8, "amsgrad": False, "maximize": False}
    lr = torch.tensor(0.25) if tensor_lr else 0.25
    fused = torch_private.fused_adam(tensor_lr)
    fused([p], [grad], [zeros()], [zeros()], [], [torch.ones(())], lr=lr, **options)
    assert torch.equal(p, plain)


@pytest.mark.parametrize("number", [2, torch.tensor(2.0)], ids=["number", "tensor"])
def test_one_number_is_added_to_all_tensors(number):
    tensors = [torch.zeros(()), torch.ones(3)]
    torch_private.add_to_all(tensors, number)
    assert [t.tolist() for t in tensors] == [2.0, [3.0, 3.0, 3.0]]


def test_a_group_of_adam_is_collected_by_torch_itself():
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer = torch_private.OpenAdam([p])
    lists: list[list] = [[] for _ in range(6)]
    optimizer.collect(optimizer.param_groups[0], *lists)
    parameters, grads, first, second, _, steps = lists
    assert (parameters, grads) == ([p], [p.grad])
    assert [len(first), len(second), len(steps)] == [1, 1, 1]


@pytest.mark.parametrize(
    "register", ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"]
)
def test_hooks_of_every_kind_are_seen(register):
    module = nn.Identity()
    assert not torch_private.has_hooks(module)
    handle = getattr(module, f"register_{register}")(lambda *_: None)
    assert torch_private.has_hooks(module)
    handle.remove()
    assert not torch_private.has_hooks(module)
