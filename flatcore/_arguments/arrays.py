"""Arrays of other libraries in, the same kind out.

NumPy arrays are read by their own attributes; anything else with ``__dlpack__`` goes through it. What such an array says of
itself on the CPU is read from its capsule here: a negative stride, which array-api-strict hides, makes torch abort the
process. CuPy's arrays are worked on in CuPy's current stream, in step with torch's.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from .checks import kind_of

_Function = TypeVar("_Function", bound=Callable[..., Any])
_NUMPY_FLOATS = (np.float16, np.float32, np.float64)


class _Writable:
    """The memory of a read-only array under an interface that does not say so: nothing here writes to it.

    ``torch.from_numpy`` warns on a read-only array, and a copy of a memory-mapped feature matrix would be wasted.
    """

    def __init__(self, array: np.ndarray):
        self._array = array
        interface = dict(array.__array_interface__)
        interface["data"] = (interface["data"][0], False)
        self.__array_interface__ = interface


def _from_numpy(array: np.ndarray, name: str) -> Tensor:
    if isinstance(array, np.ma.MaskedArray):
        raise TypeError(
            f"{name} must be a plain array; got a numpy masked array, whose mask would be dropped (fill it first)"
        )
    if array.dtype.type not in _NUMPY_FLOATS and array.dtype.kind not in "iu":
        raise TypeError(
            f"{name} must have a floating dtype (float16, float32, float64) or, for labels, an integer one; "
            f"got numpy dtype {array.dtype}"
        )
    array = np.asarray(array)
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if array.dtype.kind == "u" and array.dtype.itemsize > 1:
        if array.size and array.max() > np.iinfo(np.int64).max:
            raise ValueError(f"{name} must hold labels that fit int64, got {array.max()}")
        array = array.astype(np.int64)
    itemsize = array.dtype.itemsize
    if not array.flags.aligned or any(s < 0 or s % itemsize for s in array.strides):
        array = np.array(array, order="C", copy=True)
    if not array.flags.writeable:
        array = np.asarray(_Writable(array))
    return torch.from_numpy(array)


class _DLTensor(ctypes.Structure):
    """An array as the DLPack exchange describes it: strides in elements, None for a compact one."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


# where it stands in a capsule: first, or after version (2 x 4 bytes), context, deleter (pointers) and flags (8 bytes)
_CAPSULES = {b"dltensor": 0, b"dltensor_versioned": 16 + 2 * ctypes.sizeof(ctypes.c_void_p)}
_CPU = 1
_DLPACK_DTYPES = {
    (0, 8): torch.int8, (0, 16): torch.int16, (0, 32): torch.int32, (0, 64): torch.int64,
    (1, 8): torch.uint8, (1, 16): torch.uint16, (1, 32): torch.uint32, (1, 64): torch.uint64,
    (2, 16): torch.float16, (2, 32): torch.float32, (2, 64): torch.float64, (4, 16): torch.bfloat16,
}  # fmt: skip
_capsule_name = ctypes.pythonapi.PyCapsule_GetName
_capsule_name.restype, _capsule_name.argtypes = ctypes.c_char_p, (ctypes.py_object,)
_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype, _capsule_pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)


class _Straightened:
    """A device's array as torch asks it for its memory, in torch's stream: with no negative stride.

    At one torch ends the process. The axis is read forwards, from its last entry, and noted as reversed.
    """

    def __init__(self, array: Any):
        self._array = array
        self.reversed: tuple[int, ...] = ()

    def __dlpack_device__(self) -> tuple[int, int]:
        found: tuple[int, int] = self._array.__dlpack_device__()
        return found

    def __dlpack__(self, **options: Any) -> Any:
        capsule = self._array.__dlpack__(**options)
        kind = _capsule_name(capsule)
        if kind in _CAPSULES:
            given = _DLTensor.from_address(_capsule_pointer(capsule, kind) + _CAPSULES[kind])
            if given.strides:
                self.reversed = tuple(axis for axis in range(given.ndim) if given.strides[axis] < 0)
            for axis in self.reversed:
                steps = max(given.shape[axis] - 1, 0)
                given.data = (given.data or 0) + steps * given.strides[axis] * given.bits // 8
                given.strides[axis] = -given.strides[axis]
        return capsule


def _from_dlpack(array: Any, name: str) -> Tensor:
    if _is_traced(array):
        raise TypeError(
            f"{name} is a JAX tracer ({kind_of(array)}): flatcore computes with numbers and cannot be traced by jax.jit, "
            "vmap or grad; call it outside of them, or through jax.pure_callback"
        )
    try:
        if int(array.__dlpack_device__()[0]) != _CPU:
            straight = _Straightened(array)
            tensor = torch.from_dlpack(straight)
            return aligned(tensor.flip(straight.reversed) if straight.reversed else tensor)
        try:
            capsule = array.__dlpack__(max_version=(1, 0))  # older versions refuse read-only arrays
        except TypeError:
            capsule = array.__dlpack__()
    except (AttributeError, BufferError, RuntimeError, TypeError, ValueError) as error:
        raise TypeError(f"{name} of type {kind_of(array)} could not be read through DLPack: {error}") from error
    return _from_capsule(capsule, name)


def _from_capsule(capsule: Any, name: str) -> Tensor:
    """Tensor over the memory of a capsule on the CPU, which it keeps; a copy where torch cannot take its strides."""
    kind = _capsule_name(capsule)
    address = _capsule_pointer(capsule, kind)
    # the versioned one begins with its major version
    if kind not in _CAPSULES or (kind != b"dltensor" and ctypes.c_uint32.from_address(address).value != 1):
        raise TypeError(f"{name} could not be read through DLPack: its version is not known ({kind!r})")
    given = _DLTensor.from_address(address + _CAPSULES[kind])
    dtype = _DLPACK_DTYPES.get((given.code, given.bits)) if given.lanes == 1 else None
    if dtype is None:
        raise TypeError(
            f"{name} must have a floating dtype (float16, bfloat16, float32, float64) or, for labels, an integer one; got "
            f"DLPack type code {given.code} of {given.bits} bits"
        )
    shape = tuple(given.shape[: given.ndim])
    if 0 in shape:
        return torch.empty(shape, dtype=dtype)
    size = dtype.itemsize
    strides: list[int] = []
    step = size
    for axis in reversed(range(given.ndim)):
        strides.insert(0, given.strides[axis] * size if given.strides else step)
        step *= shape[axis]
    first = (given.data or 0) + given.byte_offset
    spans = [(n - 1) * stride for n, stride in zip(shape, strides, strict=True)]
    lowest = first + sum(span for span in spans if span < 0)
    memory = (ctypes.c_char * (sum(map(abs, spans)) + size)).from_address(lowest)
    memory.capsule = capsule  # keeps the array alive
    words = np.ndarray(shape, np.dtype(f"i{size}"), memory, first - lowest, strides)
    if not words.flags.aligned or any(stride < 0 for stride in strides):
        words = np.array(words, order="C", copy=True)
    return torch.from_numpy(words).view(dtype)


def aligned(x: Tensor) -> Tensor:
    """The tensor, or a copy of one whose elements lie across the boundaries of their size: a fault on a CUDA device.

    DLPack allows such memory. Copied byte by byte, as only that is allowed there.
    """
    size = x.itemsize
    if x.data_ptr() % size == 0:
        return x
    memory = torch.empty(0, dtype=torch.uint8, device=x.device).set_(x.untyped_storage())
    strides = tuple(stride * size for stride in x.stride())
    parts = memory.as_strided((*x.shape, size), (*strides, 1), x.storage_offset() * size)
    return parts.clone(memory_format=torch.contiguous_format).view(x.dtype).view(x.shape)


def _is_traced(array: Any) -> bool:
    return any(kind.__name__ == "Tracer" and kind.__module__.startswith("jax") for kind in type(array).__mro__)


def as_tensor(value: Any, name: str) -> Tensor:
    """Tensor view of an array, without a copy where the memory allows it.

    Raises:
        TypeError: not a tensor, NumPy array or object with ``__dlpack__``; a dtype that flatcore does not take; a JAX
            tracer.
        ValueError: a label that int64 does not hold.
    """
    if isinstance(value, Tensor):
        return value
    if isinstance(value, np.ndarray):
        return _from_numpy(value, name)
    if hasattr(type(value), "__dlpack__") and not isinstance(value, np.generic):
        return _from_dlpack(value, name)
    way = f"; a quantized layer's weight is a method: pass {name}().dequantize()" if callable(value) else ""
    raise TypeError(
        f"{name} must be a torch.Tensor, a numpy.ndarray or an array with __dlpack__, got {kind_of(value)}{way}"
    )


def returner(like: Any) -> Callable[[Tensor], Any]:
    """Return the function that turns a result tensor into the kind of ``like``."""
    if isinstance(like, Tensor):
        return lambda tensor: tensor
    if isinstance(like, np.ndarray):
        return lambda tensor: tensor.numpy()
    namespace = like.__array_namespace__() if hasattr(like, "__array_namespace__") else None
    if not hasattr(namespace, "from_dlpack"):
        namespace = importlib.import_module(type(like).__module__.partition(".")[0])
    from_dlpack = getattr(namespace, "from_dlpack", None)
    if from_dlpack is None:
        raise TypeError(
            f"features of type {kind_of(like)} can be read through DLPack but not given back: "
            "its library has no from_dlpack; pass torch tensors or NumPy arrays"
        )
    return from_dlpack


def on_the_arrays_stream(function: _Function) -> _Function:
    """Let a public function work in CuPy's current stream where one of its arguments is CuPy's.

    torch's arrays have torch's stream, and no other library's have any.
    """

    @functools.wraps(function)
    def run(*arguments, **options):
        if "cupy" not in sys.modules:  # then none is CuPy's
            return function(*arguments, **options)
        for value in (*arguments, *options.values()):
            if type(value).__module__.partition(".")[0] == "cupy" and hasattr(value, "__dlpack__"):
                with _in_step(value):
                    return function(*arguments, **options)
        return function(*arguments, **options)

    return run  # type: ignore[return-value]


@contextmanager
def _in_step(array: Any) -> Iterator[None]:
    """Work in the stream that CuPy is working in, behind all that torch's has been given, which then waits for it.

    Whatever of the arguments and of a metric's states is torch's has been written, or will be read, in torch's stream; also
    after an exception. Results lie in memory that torch hands out again to this stream alone, for CuPy may free them while
    its own work still reads them.
    """
    device = array.device.id
    with array.device:
        address = sys.modules["cupy"].cuda.get_current_stream().ptr
    ours = torch.cuda.current_stream(device)
    if ours.cuda_stream == address:
        yield
        return
    theirs = torch.cuda.ExternalStream(address, device=device) if address else torch.cuda.default_stream(device)
    with torch.cuda.stream(theirs):
        # a graph that CuPy captures can have nothing from outside in it
        alone = torch.cuda.is_current_stream_capturing()
        if not alone:
            theirs.wait_stream(ours)
        try:
            yield
        finally:
            if not alone:
                ours.wait_stream(theirs)
