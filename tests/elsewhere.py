"""A device that is not the processor, emulated where there is none: what is computed there may not meet what is here.

Its tensors say that they are on ``meta``; their numbers lie in tensors of the processor, on which everything is computed. So a
run there gives what a run here gives to the bit, unless it mixes tensors of both, which raises as it does on a GPU.
"""

from contextlib import contextmanager, nullcontext

import torch
from torch.optim import optimizer
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

ELSEWHERE = torch.device("meta")

_aten = torch.ops.aten
_MOVES = {_aten._to_copy.default, _aten.copy_.default}
_INDEXING = {
    _aten.index.Tensor,
    _aten.index_put.default,
    _aten.index_put_.default,
    _aten._index_put_impl_.default,
    _aten._unsafe_index.Tensor,
}
"""They take indices of the processor for a tensor of the device, never the other way round."""


class There(torch.Tensor):
    """A tensor of the device."""

    __slots__ = ("numbers",)

    @staticmethod
    def __new__(cls, numbers):
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            numbers.size(),
            strides=numbers.stride(),
            storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype,
            device=ELSEWHERE,
            requires_grad=numbers.requires_grad,
        )
        made.numbers = numbers
        return made

    def __repr__(self):
        return f"There({self.numbers})"

    def __reduce_ex__(self, protocol):
        return self.numbers.__reduce_ex__(protocol)  # files are read onto the processor

    def tolist(self):
        return self.numbers.tolist()

    def __getitem__(self, key):
        return super().__getitem__(_as_tensors(key))

    def __setitem__(self, key, value):
        super().__setitem__(_as_tensors(key), value)

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _computed(function, args, kwargs or {})


def _as_tensors(key):
    """Lists in an index as tensors: torch itself would make one of ``meta``, which holds nothing."""
    if isinstance(key, tuple):
        return tuple(map(_as_tensors, key))
    return torch.tensor(key, dtype=torch.long) if isinstance(key, list) else key


def _computed(function, args, kwargs):
    tensors = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, torch.Tensor)]
    there = [each for each in tensors if isinstance(each, There)]
    here = [each for each in tensors if not isinstance(each, There)]
    if there and here and function not in _MOVES:
        if function in _INDEXING:
            own = isinstance(args[0], There)
            mixed = not own and any(isinstance(each, There) for each in args[1])
            mixed = mixed or (len(args) > 2 and args[2].dim() > 0 and isinstance(args[2], There) != own)
        else:
            mixed = any(each.dim() for each in here)
        if mixed:
            raise RuntimeError(f"{function}: tensors of two devices")
    device = kwargs.get("device")
    if device is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    plain_args, plain_kwargs = tree_map(lambda each: each.numbers if isinstance(each, There) else each, (args, kwargs))
    result = function(*plain_args, **plain_kwargs)
    if function is _aten._local_scalar_dense.default:
        return result
    if "out" in kwargs:
        return kwargs["out"]
    # By what it changes and not by its name: a shift is called ``__rshift__`` and changes nothing.
    if function._schema.is_mutable and isinstance(result, torch.Tensor):
        return args[0]
    stays = torch.device(device).type == ELSEWHERE.type if device is not None else bool(there)
    return tree_map(lambda each: There(each) if isinstance(each, torch.Tensor) else each, result) if stays else result


class _Computing(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return _computed(function, args, kwargs or {})


class _Making(TorchFunctionMode):
    """What makes a tensor of Python's numbers does it here and moves it."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function in (torch.tensor, torch.as_tensor):
            device = kwargs.pop("device", None)
            made = function(*args, **kwargs)
            return made if device is None else made.to(device)
        if function is torch.Tensor.new_tensor:
            like, *given = args
            device = kwargs.pop("device", like.device)
            return torch.tensor(*given, **{"dtype": like.dtype, **kwargs}).to(device)
        return function(*args, **kwargs)


@contextmanager
def elsewhere(monkeypatch):
    """As long as it lasts, ``ELSEWHERE`` is a device, and every config's."""
    from recbole_fedkd.config import FedKDConfig

    fused, init_device = optimizer._get_fused_kernels_supported_devices, FedKDConfig._init_device
    autocast = torch.autocast

    def its_device(config):
        init_device(config)
        config.final_config_dict["device"] = ELSEWHERE

    def there_too(device_type, *args, **kwargs):
        return nullcontext() if device_type == ELSEWHERE.type else autocast(device_type, *args, **kwargs)

    with monkeypatch.context() as patched, _Making(), _Computing():
        patched.setattr(optimizer, "_get_fused_kernels_supported_devices", lambda: [*fused(), ELSEWHERE.type])
        patched.setattr(torch, "autocast", there_too)
        patched.setattr(FedKDConfig, "_init_device", its_device)
        yield
