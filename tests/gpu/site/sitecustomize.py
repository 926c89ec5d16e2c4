"""Every Python process of these tests has the imitated GPU."""

import ctypes
import importlib.util
import os
from pathlib import Path

_found = importlib.util.find_spec("torch")
_torch = Path(_found.origin).parent / "lib"  # its libraries, before torch asks what devices there are
for _name in ("libc10.so", "libtorch_cpu.so", "libtorch.so", "libtorch_python.so"):
    ctypes.CDLL(str(_torch / _name), mode=ctypes.RTLD_GLOBAL)
ctypes.CDLL(os.environ["PFTOOLS_IMITATED_GPU"], mode=ctypes.RTLD_GLOBAL)

import torch  # noqa: E402


class _Anything:
    """A context and a stream of a device that nothing has to wait for."""

    cuda_stream = device_index = 0

    def __init__(self, *_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return False

    def wait_stream(self, *_):
        pass


class _Properties:
    name, major, minor, multi_processor_count = "an imitation", 7, 5, 1
    total_memory = 8 * 2**30


def _copied(storage, device):
    if storage.device.type == device:
        return storage
    whole = torch.empty(0, dtype=torch.uint8, device=storage.device.type)
    return whole.set_(storage, 0, (storage.nbytes(),), (1,)).to(device).untyped_storage()


def _nothing(*_, **__):
    return None


def _answer(value):
    return lambda *_, **__: value


_cuda = torch.cuda
import bitsandbytes  # noqa: E402, F401  its kernels for CUDA are not here: those for any device are used

_cuda.is_available = _cuda.is_initialized = _answer(True)
_cuda.device_count = _answer(1)
_cuda.current_device = torch._C._cuda_getDevice = _answer(0)
torch._C._cuda_exchangeDevice = torch._C._cuda_maybeExchangeDevice = _answer(0)
_cuda._lazy_init = _cuda.set_device = torch._C._cuda_setDevice = _nothing
_cuda.synchronize = _cuda.empty_cache = _cuda.reset_peak_memory_stats = _nothing
_cuda._is_in_bad_fork = _answer(False)
_cuda.manual_seed = _cuda.manual_seed_all = _nothing
_cuda.default_generators = (torch.default_generator,)
for _module in (_cuda, _cuda.random):
    _module.get_rng_state = lambda *_: torch.get_rng_state()
    _module.get_rng_state_all = lambda: [torch.get_rng_state()]
    _module.set_rng_state = _module.set_rng_state_all = _nothing
_cuda.mem_get_info = _answer((8 * 2**30, 8 * 2**30))
for _name in ("memory_reserved", "memory_allocated", "max_memory_allocated", "max_memory_reserved"):
    setattr(_cuda, _name, _answer(0))
_cuda.get_device_name = _answer("an imitation")
_cuda.get_device_capability = _answer((7, 5))
_cuda.get_device_properties = _answer(_Properties())
_cuda.is_bf16_supported = _answer(False)
_cuda.device = _cuda.device_of = _Anything
_cuda.current_stream = _answer(_Anything())
torch.Tensor.pin_memory = lambda self, *_, **__: self
torch.UntypedStorage.cpu = lambda self: _copied(self, "cpu")
torch.UntypedStorage.cuda = lambda self, *_, **__: _copied(self, "cuda")
torch.UntypedStorage.to = lambda self, *, device, **_: _copied(self, torch.device(device).type)
