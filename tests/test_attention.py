"""Attention: heads that differ, masks, and one path for training and for full sort."""

from dataclasses import replace

import pytest
import torch
from torch.func import functional_call, vmap

from recbole_fedkd.model.attention import Past, TargetAttention


@pytest.fixture
def attention() -> TargetAttention:
    torch.manual_seed(0)
    return TargetAttention(width=6, heads=4, positions=5)


def test_heads_differ_so_their_mean_is_not_one_head_scaled(attention):
    weights = attention.head_weights(torch.randn(3, 1, 6), torch.randn(3, 5, 6))
    assert weights.shape == (3, 1, 5, 4)
    torch.testing.assert_close(weights.sum(2), torch.ones(3, 1, 4))
    first, second = weights[0, 0, :, 0], weights[0, 0, :, 1]
    ratio = first / second
    assert (ratio - ratio.mean()).abs().max() > 0.01
    assert first.argsort().tolist() != second.argsort().tolist() or not torch.allclose(first, second)


def test_single_and_many_targets_agree(attention):
    query, keys = torch.randn(3, 7, 6), torch.randn(3, 5, 6)
    mask = torch.rand(3, 7, 5) > 0.3
    together, weights = attention(query, keys, mask)
    for target in range(7):
        alone, own = attention(query[:, target : target + 1], keys, mask[:, target : target + 1])
        torch.testing.assert_close(alone, together[:, target : target + 1])
        torch.testing.assert_close(own, weights[:, target : target + 1])


def test_output_is_the_weighted_sum_of_values_by_a_slow_loop(attention):
    query, keys = torch.randn(2, 1, 6), torch.randn(2, 5, 6)
    context, _ = attention(query, keys)
    for row in range(2):
        projected = attention.query.weight @ query[row, 0]
        averaged = torch.zeros(5)
        for head in range(4):
            scores = torch.stack([(attention.head[head] * projected * key).sum() / 6**0.5 for key in keys[row]])
            averaged += (scores + attention.position_bias[:, head]).softmax(0) / 4
        expected = sum(averaged[i] * (attention.value.weight @ keys[row, i]) for i in range(5))
        torch.testing.assert_close(context[row, 0], expected)


def test_samples_of_a_batch_do_not_mix(attention):
    query, keys = torch.randn(3, 1, 6), torch.randn(3, 5, 6)
    before, _ = attention(query, keys)
    keys[1] = torch.randn(5, 6)
    after, _ = attention(query, keys)
    assert torch.equal(before[[0, 2]], after[[0, 2]])
    assert not torch.equal(before[1], after[1])


def test_hidden_keys_get_nothing_and_an_empty_history_gives_zero(attention):
    query, keys = torch.randn(2, 1, 6), torch.randn(2, 5, 6)
    mask = torch.tensor([[[True, False, True, False, False]], [[False] * 5]])
    context, weights = attention(query, keys, mask)
    assert torch.equal(weights[0, 0, [1, 3, 4]], torch.zeros(3))
    assert float(weights[0].sum()) == pytest.approx(1.0)
    assert torch.equal(context[1], torch.zeros(1, 6))
    context.sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in attention.parameters())


def test_hidden_keys_change_nothing():
    torch.manual_seed(0)
    attention = TargetAttention(width=6, heads=4)
    query, keys = torch.randn(3, 1, 6), torch.randn(3, 25, 6)
    few = 19
    mask = (torch.arange(keys.shape[1]) < few).expand(3, 1, -1)
    context, weights = attention(query, keys, mask)
    expected_context, expected_weights = attention(query, keys[:, :few])
    torch.testing.assert_close(context, expected_context)
    torch.testing.assert_close(weights[..., :few], expected_weights)
    assert not weights[..., few:].any()


def histories(batch: int, targets: int, slots: int, width: int, more: bool) -> tuple[torch.Tensor, Past, torch.Tensor]:
    """Queries, histories and targets: own rows, empty slots, an empty history, and targets that are in none."""
    items = torch.randint(1, 9, (batch, slots))
    items[0], items[-1, slots // 2 :] = 0, 0
    table, of_labels = torch.randn(9, width, requires_grad=True), torch.randn(4, width, requires_grad=True)
    added = torch.randn(batch, slots, width, requires_grad=True) if more else None
    past = Past(items, table, (torch.randint(0, 4, (batch, slots)), of_labels), added)
    return torch.randn(batch, targets, width, requires_grad=True), past, torch.randint(0, 9, (batch, targets))


def asked(attention: TargetAttention, query: torch.Tensor, past: Past, items: torch.Tensor) -> list[torch.Tensor]:
    """Context, weights, and the gradients of a function of both by all that is learned."""
    learned = [
        query,
        past.table,
        past.labels[1],
        *attention.parameters(),
        *([past.more] if past.more is not None else []),
    ]
    found = attention.over(query, past, items)
    loss = sum((each * torch.linspace(-1, 2, each.numel()).view_as(each)).sum() for each in found)
    return [*found, *torch.autograd.grad(loss, learned)]


@pytest.mark.parametrize(
    ("batch", "targets", "slots", "width", "heads", "more"),
    [
        (70, 1, 5, 6, 4, False),
        (3, 40, 31, 16, 8, False),
        (2, 70, 4, 5, 1, False),
        (5, 3, 7, 3, 2, True),
        (19, 1, 33, 12, 3, False),
        (1, 1, 1, 16, 8, False),
        (9, 2, 1, 32, 5, True),
        (1, 23, 16, 33, 9, False),
    ],
)
def test_attention_in_machine_code_is_that_of_torch_and_so_is_its_gradient(
    monkeypatch, batch, targets, slots, width, heads, more
):
    torch.manual_seed(0)
    attention = TargetAttention(width, heads, slots)
    attention.position_bias.data.normal_()
    arguments = histories(batch, targets, slots, width, more)
    with_numba = asked(attention, *arguments)
    monkeypatch.setattr("recbole_fedkd.model.attention.attends", lambda *_: False)
    for compiled, plain in zip(with_numba, asked(attention, *arguments), strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("batch", "targets", "slots"), [(150, 1, 5), (40, 6, 6), (2, 90, 4)])
def test_gradients_of_attention_over_keys_of_its_own_do_not_depend_on_the_samples_before(
    monkeypatch, batch, targets, slots
):
    torch.manual_seed(0)
    attention = TargetAttention(6, 4, slots)
    query, keys = (torch.randn(batch, count, 6, requires_grad=True) for count in (targets, slots))

    def gradients() -> tuple[torch.Tensor, ...]:
        loss = sum(
            (found * torch.linspace(-1, 2, found.numel()).view_as(found)).sum() for found in attention(query, keys)
        )
        return torch.autograd.grad(loss, [query, keys, attention.head, attention.position_bias])

    compiled = gradients()
    monkeypatch.setattr("recbole_fedkd.model.attention.attends", lambda *_: False)
    for found, expected in zip(compiled, gradients(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_attention_over_many_networks_at_once_is_that_of_one_after_the_other(monkeypatch):
    torch.manual_seed(0)
    attention = TargetAttention(6, 4, 5)
    query, past, items = histories(4, 3, 5, 6, False)
    heads, tables = torch.randn(7, 4, 6), torch.randn(7, 9, 6, requires_grad=True)

    def of_network(head: torch.Tensor, table: torch.Tensor, own: torch.Tensor) -> tuple[torch.Tensor, ...]:
        histories = replace(past, table=table, items=own)
        return functional_call(Over(attention), {"attention.head": head}, (query, histories, items))

    each = heads, tables, torch.stack([past.items.roll(turn, 0) for turn in range(7)])
    together = vmap(of_network)(*each)
    monkeypatch.setattr("recbole_fedkd.model.attention.attends", lambda *_: False)
    alone = [torch.stack(found) for found in zip(*map(of_network, *each), strict=True)]
    for found, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(found[0].square().sum(), tables)[0] for found in (together, alone)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_of_no_sample_there_is_no_attention(attention):
    query, past, items = histories(3, 1, 5, 6, False)
    context, weights = attention.over(
        query[:0], replace(past, items=past.items[:0], labels=(past.labels[0][:0], past.labels[1])), items[:0]
    )
    assert context.shape == (0, 1, 6) and weights.shape == (0, 1, 5)
    assert attention(query[:0], torch.randn(0, 5, 6))[0].shape == (0, 1, 6)


@pytest.mark.parametrize("broken", ["query.weight", "head", "position_bias"])
def test_what_is_not_a_number_is_told_and_not_hidden(attention, broken):
    attention.get_parameter(broken).data.fill_(float("nan"))
    query, past, items = histories(3, 1, 5, 6, False)
    assert attention.over(query, past, items)[0][1].isnan().all()
    assert broken == "position_bias" or attention(query, torch.randn(3, 5, 6))[0].isnan().all()


class Over(torch.nn.Module):
    """Attention over histories as a module's forward: ``torch.func`` swaps the parameters of those."""

    def __init__(self, attention: TargetAttention) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, *arguments: object) -> tuple[torch.Tensor, ...]:
        return self.attention.over(*arguments)
