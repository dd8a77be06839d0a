"""Convolutions in machine code are those of torch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import needs_numba
from torch.func import functional_call, vmap

from recbole_fedkd.model.backbone import CnnBackbone
from recbole_fedkd.model.compiled import has_compiler

pytestmark = pytest.mark.without_loops

CLOSE = {"rtol": 1e-5, "atol": 1e-5}

SHAPES = {
    "the student": (70, 10, 16, [16, 64]),
    "one sample of one field": (1, 1, 3, [5, 7]),
    "two fields": (32, 2, 16, [8, 8]),
    "whole blocks": (64, 4, 8, [16, 16]),
    "one sample more": (65, 9, 20, [33, 70]),
    "more channels than numbers": (5, 10, 4, [48, 12]),
    "a teacher": (33, 12, 40, [100, 130]),
}
TOO_LARGE = {"channels": (4, 3, 16, [129, 8]), "hidden": (4, 8, 16, [128, 513])}


def backbone_of(count: int, width: int, sizes: list[int], seed: int = 0) -> CnnBackbone:
    torch.manual_seed(seed)
    return CnnBackbone(count, width, sizes, 5, 0.0)


def learned(backbone: CnnBackbone) -> dict[str, torch.Tensor]:
    """Parameters that the last hidden layer depends on."""
    return {name: each for name, each in backbone.named_parameters() if not name.startswith("layers.10.")}


def asked(backbone: CnnBackbone, fields: torch.Tensor) -> list[torch.Tensor]:
    """The hidden layer, and derivatives of a sum of it."""
    hidden = backbone.hidden(fields)
    loss = (hidden * torch.linspace(-1, 2, hidden.numel()).view_as(hidden)).sum()
    return [hidden, *torch.autograd.grad(loss, [fields, *learned(backbone).values()])]


def agree(compiled_ones, plain_ones) -> None:
    """Whether tensors agree, each relative to its largest number."""
    for one, plain in zip(compiled_ones, plain_ones, strict=True):
        largest = plain.abs().max().clamp(min=1e-30)
        torch.testing.assert_close(one / largest, plain / largest, **CLOSE)


@pytest.fixture
def by_torch(monkeypatch):
    """A switch: from its call on convolutions are torch's."""
    return lambda: monkeypatch.setattr("recbole_fedkd.model.backbone.convolves", lambda *_: False)


@pytest.fixture
def calls(monkeypatch):
    """How often convolutions are in machine code."""
    from recbole_fedkd.model import backbone

    counted, convolve = [], backbone.convolve
    monkeypatch.setattr(backbone, "convolve", lambda *given: counted.append(1) or convolve(*given))
    return counted


@pytest.mark.parametrize("shape", [*SHAPES, *TOO_LARGE])
def test_convolutions_are_those_of_torch_and_so_are_their_gradients(by_torch, calls, shape):
    batch, count, width, sizes = {**SHAPES, **TOO_LARGE}[shape]
    backbone = backbone_of(count, width, sizes)
    fields = torch.randn(batch, count, width, requires_grad=True)
    found = asked(backbone, fields)
    assert len(calls) == (has_compiler() and shape in SHAPES)
    by_torch()
    agree(found, asked(backbone, fields))


def test_samples_do_not_lie_in_the_order_in_which_memory_does(by_torch):
    backbone = backbone_of(6, 5, [7, 9])
    fields = torch.randn(6, 5, 40, requires_grad=True)
    found = asked(backbone, fields.permute(2, 0, 1))
    by_torch()
    agree(found, asked(backbone, fields.permute(2, 0, 1)))


@pytest.mark.parametrize("shared", [(), ("fields",), ("layers.0.weight",), ("layers.7.weight", "layers.7.bias")])
def test_many_networks_at_once_are_those_of_one_after_the_other(by_torch, shared):
    clients, count, width, sizes = 5, 7, 6, [9, 20]
    networks = [backbone_of(count, width, sizes, seed) for seed in range(clients)]
    tensors = {name: torch.stack([learned(each)[name].detach() for each in networks]) for name in learned(networks[0])}
    tensors["fields"] = torch.randn(clients, 40, count, width)
    tensors = {name: (each[0] if name in shared else each).requires_grad_() for name, each in tensors.items()}

    def hidden(given: dict[str, torch.Tensor]) -> torch.Tensor:
        state = {f"backbone.{name}": each for name, each in given.items() if name != "fields"}
        return functional_call(Hidden(networks[0]), state, (given["fields"],))

    axes = {name: None if name in shared else 0 for name in tensors}
    together = vmap(hidden, (axes,))(tensors)
    by_torch()
    alone = torch.stack(
        [hidden({name: each if name in shared else each[x] for name, each in tensors.items()}) for x in range(clients)]
    )
    weights = torch.linspace(-1, 2, alone.numel()).view_as(alone)
    gradients = [torch.autograd.grad((found * weights).sum(), [*tensors.values()]) for found in (together, alone)]
    agree([together, *gradients[0]], [alone, *gradients[1]])


def test_networks_of_networks_are_side_by_side_too(by_torch):
    backbone = backbone_of(3, 4, [5, 6])
    fields = torch.randn(2, 3, 7, 3, 4)
    together = vmap(vmap(backbone.hidden))(fields)
    by_torch()
    agree([together.flatten(0, 2)], [backbone.hidden(fields.flatten(0, 2))])


def test_double_precision_mixed_precision_and_no_sample_are_torchs(calls):
    backbone = backbone_of(4, 8, [8, 8])
    assert backbone.hidden(torch.randn(0, 4, 8)).shape == (0, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert backbone.hidden(torch.randn(3, 4, 8)).dtype == torch.bfloat16
    assert backbone.double().hidden(torch.randn(3, 4, 8).double()).dtype == torch.float64
    assert not calls


def test_dropout_stands_behind_the_dense_layer():
    backbone = CnnBackbone(4, 8, [8, 100], 5, 0.5)
    fields = torch.randn(50, 4, 8)
    whole = backbone.eval().hidden(fields)
    dropped = backbone.train().hidden(fields)
    stayed = dropped != 0
    assert 0.3 < stayed.sum() / (whole != 0).sum() < 0.7
    torch.testing.assert_close(dropped[stayed], 2 * whole[stayed])


@pytest.mark.parametrize("place", ["layers.0.weight", "layers.2.bias", "layers.7.weight"])
def test_what_is_not_a_number_is_not_hidden_by_a_rectifier(by_torch, place):
    backbone = backbone_of(4, 8, [8, 8])
    backbone.get_parameter(place).data.fill_(float("nan"))
    fields = torch.randn(40, 4, 8, requires_grad=True)
    found = asked(backbone, fields)
    assert found[0].isnan().all()
    by_torch()
    for one, plain in zip(found, asked(backbone, fields), strict=True):
        assert torch.equal(one.isnan(), plain.isnan())


def test_a_client_that_diverges_spoils_no_other(by_torch):
    """Blocks of samples lie where those of the network before lay."""
    networks = [backbone_of(5, 8, [8, 8], seed) for seed in range(2)]
    names = learned(networks[0])
    tensors = {name: torch.stack([learned(each)[name].detach() for each in networks]) for name in names}
    tensors = {name: each.requires_grad_() for name, each in tensors.items()}
    fields = torch.randn(2, 40, 5, 8)
    fields[0, ::3] = float("nan")

    def hidden(given: dict[str, torch.Tensor], own: torch.Tensor) -> torch.Tensor:
        return functional_call(Hidden(networks[0]), {f"backbone.{x}": each for x, each in given.items()}, (own,))

    together = vmap(hidden)(tensors, fields)
    gradients = torch.autograd.grad(together.sum(), [*tensors.values()])
    by_torch()
    alone = networks[1].hidden(fields[1])
    agree(
        [together[1], *(each[1] for each in gradients)],
        [alone, *torch.autograd.grad(alone.sum(), [*learned(networks[1]).values()])],
    )


class Hidden(torch.nn.Module):
    """A backbone's hidden layer as a module's forward: ``torch.func`` swaps the parameters of those."""

    def __init__(self, backbone: CnnBackbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, fields: torch.Tensor) -> torch.Tensor:
        return self.backbone.hidden(fields)


@needs_numba
def test_a_processor_with_half_the_registers_computes_the_same(tmp_path):
    code = (
        "import torch; from recbole_fedkd.model import backbone, products; products.LARGE = False;"
        "import test_convolving as tests;"
        "network = tests.backbone_of(9, 20, [33, 70]); fields = torch.randn(65, 9, 20, requires_grad=True);"
        "found = tests.asked(network, fields); backbone.convolves = lambda *_: False;"
        "tests.agree(found, tests.asked(network, fields))"
    )
    # What is compiled here is kept for the processor as it is.
    here = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    command, folder = [sys.executable, "-c", code], Path(__file__).parent
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=here, check=False)
    assert not run.returncode, run.stderr
