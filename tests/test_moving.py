"""Rows between stores and packs: machine code moves what torch's operators move."""

import pytest
import torch
from conftest import needs_numba

from recbole_fedkd.engine.fleet import store as stores
from recbole_fedkd.engine.fleet.compiled import changes_of_many
from recbole_fedkd.engine.fleet.store import Pack, RowStore

pytestmark = pytest.mark.without_loops

ITEMS, CLIENTS, WIDTHS = 12, 5, (3, 2)


def packed(seed):
    """All clients, the second with the padding item alone, in an order of their own; and two tables of what they hold."""
    generator = torch.Generator().manual_seed(seed)
    count = torch.tensor([4, 1, 6, 3, 5])
    items = torch.zeros(CLIENTS, int(count.max()), dtype=torch.long)
    for client, own in enumerate(count.tolist()):
        items[client, 1:own] = 1 + torch.randperm(ITEMS - 1, generator=generator)[: own - 1]
    members = torch.zeros(CLIENTS, 2, dtype=torch.long)
    pack = Pack(torch.randperm(CLIENTS, generator=generator), members, items, count, ITEMS)
    return pack, [torch.rand(*items.shape, width, generator=generator) for width in WIDTHS]


def moved(monkeypatch, by_machine_code):
    """What a store holds when two packs have been put into it, and what a third takes out of it."""
    with monkeypatch.context() as patched:
        if not by_machine_code:
            patched.setattr(stores, "moves_rows", lambda device: False)
        store = RowStore(CLIENTS, sum(WIDTHS) - 1, ITEMS)
        pack, tables = packed(0)
        store.put_pack(pack, tables)
        # Two clients have other rows since, so that those of all are in two pieces.
        pack, tables = packed(1)
        store.put_pack(pack.select(slice(2)), [table[:2] for table in tables])
        assert len(store.pieces) == 2
        pack, (first, _) = packed(2)
        wide = torch.full((*first.shape[:2], 5), -1.0)
        narrow = torch.full((*first.shape[:2], 1), -1.0)
        store.fill_pack(pack, [wide[..., :3], narrow])
    return [*store.state_dict().values(), wide, narrow]


@needs_numba
def test_machine_code_moves_the_rows_that_torch_moves(monkeypatch):
    ours, torchs = (moved(monkeypatch, by_machine_code) for by_machine_code in (True, False))
    assert all(torch.equal(own, other) for own, other in zip(ours, torchs, strict=True))
    wide = ours[-2]
    assert bool((wide[..., 3:] == -1).all()) and bool((wide[..., :3] >= 0).any()) and bool((wide[..., :3] == -1).any())


@needs_numba
@pytest.mark.parametrize("clients", [1, 7])
def test_changes_of_clients_add_up_in_double_precision(clients):
    generator = torch.Generator().manual_seed(0)
    own, base = torch.randn(clients, 1003, generator=generator), torch.randn(1003, generator=generator)
    shares = torch.rand(clients, generator=generator, dtype=torch.float64)
    expected = shares @ (own - base).double()
    torch.testing.assert_close(changes_of_many(own, base, shares), expected, rtol=1e-12, atol=1e-12)


def test_items_of_clients_stand_side_by_side():
    store, (pack, tables) = RowStore(CLIENTS, 4, ITEMS), packed(0)
    store.put_pack(pack, tables)
    found = store.items_of(pack.clients)
    for own, items in zip(found, pack.items, strict=True):
        assert set(own.tolist()) == set(items.tolist())
