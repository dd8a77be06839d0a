"""Attention: heads that differ, masks, and one path for training and for full sort."""

import pytest
import torch

from recbole_fedkd.model.attention import MANY_KEYS, TargetAttention


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


def test_hidden_keys_beyond_the_few_change_nothing_for_one_target():
    torch.manual_seed(0)
    attention = TargetAttention(width=6, heads=4)
    query, keys = torch.randn(3, 1, 6), torch.randn(3, MANY_KEYS + 5, 6)
    few = MANY_KEYS - 1
    mask = (torch.arange(keys.shape[1]) < few).expand(3, 1, -1)
    context, weights = attention(query, keys, mask)
    expected_context, expected_weights = attention(query, keys[:, :few])
    torch.testing.assert_close(context, expected_context)
    torch.testing.assert_close(weights[..., :few], expected_weights)
    assert not weights[..., few:].any()
