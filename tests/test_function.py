"""Functions with a way back of their own say under ``vmap`` what they say of each network by itself."""

import pytest
import torch
from torch.func import grad, vmap

from recbole_fedkd.model.function import DirectFunction, side_by_side


class Mixed(DirectFunction):
    """Of two vectors ``a * b`` and ``a + scale * b``."""

    @staticmethod
    def forward(scale, a, b):
        return a * b, a + scale * b

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.scale, a, b = inputs
        ctx.save_for_backward(a, b)

    @staticmethod
    def backward(ctx, of_product, of_sum):
        a, b = ctx.saved_tensors
        return None, of_product * b + of_sum, of_product * a + ctx.scale * of_sum

    @staticmethod
    def vmap(info, in_dims, scale, *tensors):
        return Mixed.apply(scale, *side_by_side(info.batch_size, in_dims[1:], tensors)), (0, 0)


def mixed(a, b):
    product, total = Mixed.apply(3.0, a, b)
    return product + total.square()


def plain(a, b):
    return a * b + (a + 3.0 * b).square()


@pytest.mark.parametrize("dims", [(0, 0), (1, 0), (0, None), (None, 1)])
def test_networks_lie_on_any_axis_or_share_a_tensor(dims):
    a, b = (torch.randn(4 if dim is None else (4, 4)) for dim in dims)
    assert torch.equal(vmap(mixed, dims)(a, b), vmap(plain, dims)(a, b))


def test_networks_of_networks_and_gradients_behind_them_are_those_of_the_formula():
    found, expected = (torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    for tensors, function in ((found.requires_grad_(), mixed), (expected.requires_grad_(), plain)):
        vmap(vmap(function))(*tensors).sum().backward()
    torch.testing.assert_close(found.grad, expected.grad)


def test_a_call_without_any_tensor_of_a_network_is_the_same_for_all():
    a, b = torch.randn(3), torch.randn(3)
    made = vmap(lambda x: x + mixed(a, b))(torch.zeros(2, 3))
    assert torch.equal(made, plain(a, b).expand(2, -1))


def test_a_gradient_that_torch_takes_of_a_function_is_that_of_the_formula():
    a, b = torch.randn(3), torch.randn(3)
    of_mixed, of_plain = (grad(lambda x, function=function: function(x, b).sum())(a) for function in (mixed, plain))
    torch.testing.assert_close(of_mixed, of_plain)
    packed = vmap(grad(lambda x: mixed(x, b).sum()))(a.expand(2, -1))
    torch.testing.assert_close(packed, of_plain.expand(2, -1))
