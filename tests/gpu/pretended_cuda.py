"""A pretended CUDA device for a build of torch without CUDA.

Tensors "on cuda:0" wrap CPU tensors with real numbers, so that whole trainings run, with the
control flow of a GPU. Inside `with PretendedCuda() as gpu:` it is counted, with the function,
what the host of a real GPU would wait for:

- numbers that are read (`.item()`, `bool`, `.tolist()`, `.cpu()`),
- copies to the device that are not asynchronous,
- shapes that depend on values (`nonzero`, a boolean index, `unique`),
- an index by tensors of the CPU.

An operation on tensors of two devices raises, as on a GPU, and so does one in a process that was
forked from the one that entered the block. cuDNN's recurrent layers and torch's
memory-efficient attention are one operation forward and one backward each; the former refuse a
backward pass in evaluation mode. Streams are those of `pretended_streams`, CUDA graphs those of
`pretended_graphs`. Not pretended: the
numerical errors of CUDA's kernels, and time.

This module must be imported before torch.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

COMPILER = "g++"
SOURCE = Path(__file__).resolve().with_name("cuda_guard.cpp")


def load_guard() -> None:
    """Load the library of `cuda_guard.cpp`; compile it if this machine has not done so yet."""
    if "torch" in sys.modules:
        raise ImportError("import pretended_cuda before torch")
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    torch_folder = Path(spec.origin).parent
    version = importlib.metadata.version("torch")
    name = f"qtorch-pretended-cuda-{os.getuid()}-{version}-{SOURCE.stat().st_size}.so"
    library = Path(tempfile.gettempdir()) / name
    if not library.exists():
        with tempfile.TemporaryDirectory() as folder:
            compiled = Path(folder) / "guard.so"
            subprocess.run(
                [COMPILER, "-std=c++20", "-O1", "-shared", "-fPIC", f"-I{torch_folder}/include",
                 str(SOURCE), f"-L{torch_folder}/lib", "-lc10", "-ltorch_cpu",
                 f"-Wl,-rpath,{torch_folder}/lib", "-o", str(compiled)],
                check=True,
            )  # fmt: skip
            partial = library.with_suffix(f".{os.getpid()}")
            shutil.copy(compiled, partial)
            partial.replace(library)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


load_guard()

import torch  # noqa: E402
from pretended_graphs import NOT_CAPTURED, PretendedGraph, graph_functions  # noqa: E402
from pretended_streams import (  # noqa: E402
    PretendedStream,
    StreamOrder,
    poison,
    stream_functions,
)
from torch import Tensor, nn  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten  # noqa: E402

CUDA = torch.device("cuda:0")
PACKAGES = ("qtorch", "pytorch_lightning", "lightning_fabric")
GB = 1 << 30

# Operations without a kernel on a GPU: they change the description of a tensor, or take memory.
WITHOUT_KERNEL = {
    "detach", "alias", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided",
    "lift_fresh", "_unsafe_view", "_reshape_alias", "set_", "resize_", "is_pinned", "lift",
    "_conj", "record_stream", "_has_same_storage_numel", "is_same_size", "_version", "sym_size",
    "sym_numel", "sym_stride", "is_nonzero", "_pin_memory",
}  # fmt: skip
# Operations whose shape depends on values, so that the host waits for the number of results.
VALUE_SHAPED = {
    "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "_unique",
    "unique_dim_consecutive", "bincount", "equal", "nonzero_numpy", "histc", "argwhere",
}  # fmt: skip
INDEXING = {"index", "index_put_", "index_put", "_index_put_impl_", "_unsafe_index"}
# Operations on a tensor of each device: copies, and what CUDA copies over by itself.
MIXED_DEVICES = {*INDEXING, "copy_", "_to_copy", "_foreach_copy_", "_copy_from", "set_"}
# What CUDA refuses under torch.use_deterministic_algorithms(True), with the name in its message.
NOT_DETERMINISTIC = {
    "cumsum": "cumsum_cuda_kernel", "cumsum_": "cumsum_cuda_kernel", "put_": "put_",
    "histc": "_histc_cuda", "kthvalue": "kthvalue CUDA",
    "median": "median CUDA with indices output",
}  # fmt: skip


class CudaTensor(Tensor):
    """A tensor that says it is on "cuda:0"; the CPU tensor `content` has its numbers."""

    content: Tensor

    @staticmethod
    def __new__(cls, content: Tensor) -> CudaTensor:
        assert type(content) is Tensor, type(content)
        assert content.device.type == "cpu"
        content = content.detach() if content.requires_grad else content
        result: CudaTensor = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, content.shape, strides=content.stride(), storage_offset=content.storage_offset(),
            dtype=content.dtype, layout=content.layout, device=CUDA, requires_grad=False,
        )  # fmt: skip
        result.content = content
        return result

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return current_device().dispatch(func, args, kwargs or {})

    def __repr__(self, **_: Any) -> str:
        return f"CudaTensor({self.content!r})"

    def tolist(self) -> Any:
        current_device().count_wait("numbers read by .tolist()")
        return self.content.tolist()

    def record_stream(self, stream: Any) -> None:
        """Do nothing: memory is only reused when nobody holds the tensor."""

    def __reduce_ex__(self, protocol: Any) -> Any:  # a file holds the numbers
        if isinstance(self, nn.Parameter):
            return nn.Parameter(self.content, self.requires_grad).__reduce_ex__(protocol)
        return self.content.__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            with torch.no_grad():
                copy: Tensor = CudaTensor(self.content.clone())
            if isinstance(self, nn.Parameter):
                copy = nn.Parameter(copy, self.requires_grad)
            memo[id(self)] = copy
        return memo[id(self)]


def get_content(value: Any) -> Any:
    """Return the CPU tensor of a CudaTensor, and any other value as it is."""
    return value.content if isinstance(value, CudaTensor) else value


def num_device_bytes() -> int:
    """Return the size of all tensors on the device, without a run of the garbage collector."""
    tensors = (value for value in gc.get_objects() if type(value) is CudaTensor)
    return sum(
        {
            t.content.untyped_storage().data_ptr(): t.content.untyped_storage().nbytes()
            for t in tensors
        }.values()
    )


class StageCounts:
    """What happened in one stage of a program, for example in all training steps."""

    def __init__(self) -> None:
        self.calls = 0
        self.waits: Counter[str] = Counter()  # "reason @ file function"
        self.kernels: Counter[str] = Counter()  # by operation
        self.copies: Counter[str] = Counter()  # asynchronous copies

    @property
    def num_kernels(self) -> int:
        return self.kernels.total()

    @property
    def num_waits(self) -> int:
        return self.waits.total()


class PretendedCuda(TorchDispatchMode):
    """Inside the block there is one CUDA device.

    `shuffle_sums`: sums by atomic operations are added in a random order, as on a GPU.
    """

    def __init__(self, *, shuffle_sums: bool = False) -> None:
        super().__init__()
        self.shuffle_sums = shuffle_sums
        self.process_id = os.getpid()
        self.stages: defaultdict[str, StageCounts] = defaultdict(StageCounts)
        self.stage = "around the epochs"
        self.waits_raise = False
        self.pinned: set[int] = set()
        self.default_stream = self.current_stream = PretendedStream(self, is_default=True)
        self.stream_order: StreamOrder | None = None  # from the first further stream on
        self.num_operations = 0
        self.graph: PretendedGraph | None = None  # the one that records
        self.is_replaying = self.is_generator_recording = False
        # cuDNN's layers are computed in a thread of their own, in which autograd is enabled.
        self.autograd_thread = ThreadPoolExecutor(1)
        self._generator = torch.Generator().manual_seed(torch.seed() % 2**63)
        self._undo: list[Callable[[], None]] = []

    # -- the device ----------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self._undo = replace_torch_functions(self)
        _devices.append(self)
        # torch.tensor(numbers, device="cuda") becomes a CPU tensor that is moved.
        lifts = torch._C._only_lift_cpu_tensors()  # type: ignore[attr-defined]
        torch._C._set_only_lift_cpu_tensors(True)  # type: ignore[attr-defined]
        self._undo.append(lambda: torch._C._set_only_lift_cpu_tensors(lifts))  # type: ignore[attr-defined]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        _devices.pop()
        for undo in reversed(self._undo):
            undo()

    @contextmanager
    def counting(self, stage: str) -> Iterator[StageCounts]:
        """Context manager: count what happens inside the block for this stage."""
        previous, self.stage = self.stage, stage
        self.stages[stage].calls += 1
        try:
            yield self.stages[stage]
        finally:
            self.stage = previous

    # -- operations ----------------------------------------------------------------------------

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.dispatch(func, args, kwargs or {})

    def dispatch(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operation, and count it if it concerns the device."""
        flat, spec = tree_flatten((args, kwargs))
        has_cuda_tensor = any(isinstance(a, CudaTensor) for a in flat)
        device = kwargs.get("device")
        is_for_cuda = device is not None and torch.device(device).type == "cuda"
        if not has_cuda_tensor and not is_for_cuda:
            return func(*args, **kwargs)
        if os.getpid() != self.process_id:
            raise RuntimeError("Cannot re-initialize CUDA in forked subprocess.")
        if torch.is_inference_mode_enabled() and func._can_decompose():
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        name = func.overloadpacket.__name__
        self._begin_operation(func, name, args, kwargs, flat)
        if self.shuffle_sums and not torch.are_deterministic_algorithms_enabled():
            args = self._shuffle_sum(name, args)
            flat, spec = tree_flatten((args, kwargs))
        if self.stream_order is not None:
            tensors = [a.content for a in flat if isinstance(a, CudaTensor)]
            self.stream_order.check(tensors, self.current_stream)
        if name in OWN_OPERATIONS:
            result = OWN_OPERATIONS[name](self, func, args, kwargs)
        else:
            leaves_cuda = device is not None and torch.device(device).type == "cpu"
            result = _run(func, flat, spec, is_result_on_cuda=not leaves_cuda)
        if self.graph is not None:
            self.graph.record(func, args, kwargs, result)
        self.num_operations += 1
        if self.stream_order is not None and not func.is_view:
            values = tree_flatten(result)[0]
            tensors = [value.content for value in values if isinstance(value, CudaTensor)]
            self.stream_order.write(tensors, self.current_stream, self.num_operations)
        return result

    def _begin_operation(
        self, func: Any, name: str, args: Any, kwargs: Any, flat: list[Any]
    ) -> None:
        self._check_deterministic(name, args)
        self._check_devices(func, name, flat)
        PretendedGraph.check_generator(self, name)
        if not self.is_replaying:
            self._count(func, name, args, kwargs)
        if self.graph is not None:
            self.graph.save_memory(func, args, kwargs)

    def _check_deterministic(self, name: str, args: Any) -> None:
        if not torch.are_deterministic_algorithms_enabled() or name not in NOT_DETERMINISTIC:
            return
        if not name.startswith("cumsum") or args[0].is_floating_point():
            raise RuntimeError(
                f"{NOT_DETERMINISTIC[name]} does not have a deterministic implementation, but you "
                f"set 'torch.use_deterministic_algorithms(True)' @ {code_place()}"
            )

    def _check_devices(self, func: Any, name: str, flat: list[Any]) -> None:
        cpu_tensors = [a for a in flat if type(a) in (Tensor, nn.Parameter) and a.dim() > 0]
        if not cpu_tensors or not any(isinstance(a, CudaTensor) for a in flat):
            return
        # The lists of a foreach operation are divided by device by its caller.
        if name in MIXED_DEVICES or name.startswith(("_foreach", "_fused")):
            return
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"cuda:0 and cpu! ({func} @ {code_place()})"
        )

    def _shuffle_sum(self, name: str, args: Any) -> Any:
        """Return the arguments of the same sum in another order."""
        if name not in ("index_add_", "index_add", "scatter_add_", "scatter_add"):
            return args
        target, dim, index, source, *rest = args
        if not target.is_floating_point() or not index.dim():
            return args
        along = 0 if name.startswith("index") else dim
        order = torch.randperm(index.shape[along], generator=self._generator)
        index, source = (
            CudaTensor(t.content.index_select(d, order)) for t, d in ((index, along), (source, dim))
        )
        return (target, dim, index, source, *rest)

    # -- counting ------------------------------------------------------------------------------

    def count_wait(self, reason: str) -> None:
        """Count that the host waits for the device."""
        if self.graph is not None:
            raise RuntimeError(f"{NOT_CAPTURED}: {reason} @ {code_place()}")
        if self.waits_raise:
            raise RuntimeError(f"called a synchronizing CUDA operation: {reason} @ {code_place()}")
        self.stages[self.stage].waits[f"{reason} @ {code_place()}"] += 1

    def _count(self, func: Any, name: str, args: Any, kwargs: Any) -> None:
        if name == "_local_scalar_dense":
            self.count_wait("a number read by .item(), bool or float")
            return
        if name in ("_to_copy", "copy_"):
            self._count_copy(name, args, kwargs)
            return
        if name in INDEXING:
            self._count_index(name, args[1])
        elif name in VALUE_SHAPED:
            self.count_wait(f"{name}: its shape depends on values")
        elif name == "repeat_interleave" and kwargs.get("output_size") is None:
            self.count_wait("repeat_interleave without output_size")
        if not (func.is_view or name in WITHOUT_KERNEL or name.startswith(("sym_", "prim."))):
            self.stages[self.stage].kernels[name] += 1

    def _count_index(self, name: str, indices: Any) -> None:
        indices = [i for i in indices if i is not None]
        if any(i.dtype in (torch.bool, torch.uint8) for i in indices):
            self.count_wait(f"{name} by a boolean mask")
        if any(not isinstance(i, CudaTensor) and i.dim() > 0 for i in indices):
            self.count_wait(f"{name} by an index on the CPU")

    def _count_copy(self, name: str, args: Any, kwargs: Any) -> None:
        if name == "copy_":
            target, source = args[:2]
            is_target_on_cuda = isinstance(target, CudaTensor)
            non_blocking = bool(args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        else:
            source, device = args[0], kwargs.get("device")
            is_target_on_cuda = device is None or torch.device(device).type == "cuda"
            non_blocking = bool(kwargs.get("non_blocking"))
        if not is_target_on_cuda:
            self.count_wait("copied to the host")
        elif isinstance(source, CudaTensor):
            self.stages[self.stage].kernels[name] += 1
        elif not non_blocking:
            self.count_wait("blocking copy to the device")
        elif self.graph is not None:
            raise RuntimeError(f"{NOT_CAPTURED}: a copy to the device @ {code_place()}")
        else:
            kind = "pinned" if source.data_ptr() in self.pinned else "pageable"
            self.stages[self.stage].copies[kind] += 1


_devices: list[PretendedCuda] = []


def current_device() -> PretendedCuda:
    """Return the device of the innermost `with` block."""
    assert _devices, "outside of PretendedCuda"
    return _devices[-1]


@functools.cache
def package_folders() -> dict[str, str]:
    """Return the folder of each package whose functions are named, by the package's name."""
    specs = {name: importlib.util.find_spec(name) for name in PACKAGES}
    return {
        name: f"{spec.submodule_search_locations[0]}{os.sep}"
        for name, spec in specs.items()
        if spec is not None and spec.submodule_search_locations
    }


def code_place() -> str:
    """Return "package/file.py function" of the innermost frame in qtorch or Lightning, else "?"."""
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        for name, folder in package_folders().items():
            if code.co_filename.startswith(folder):
                function = code.co_qualname.split(".<locals>")[0]
                return f"{name}/{code.co_filename.removeprefix(folder)} {function}"
        frame = frame.f_back  # type: ignore[assignment]
    return "?"


def _run(func: Any, flat: list[Any], spec: Any, *, is_result_on_cuda: bool) -> Any:
    """Run an operation on the CPU and wrap its results; arguments keep their identity."""
    wrapped = {id(a.content): a for a in flat if isinstance(a, CudaTensor)}
    cpu_ids = {id(a) for a in flat if type(a) is Tensor}
    args, kwargs = tree_unflatten([get_content(a) for a in flat], spec)
    if kwargs.get("device") is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if kwargs.get("pin_memory"):
        kwargs = {**kwargs, "pin_memory": False}

    def wrap(value: Any) -> Any:
        if not isinstance(value, Tensor) or id(value) in cpu_ids:
            return value
        if id(value) in wrapped:
            return wrapped[id(value)]
        return CudaTensor(value) if is_result_on_cuda else value

    return tree_map(wrap, func(*args, **kwargs))


# -- operations that are not run as they are -------------------------------------------------------


def _to_copy(gpu: PretendedCuda, func: Any, args: Any, kwargs: Any) -> Tensor:
    device = kwargs.get("device")
    ignored = ("device", "non_blocking", "pin_memory")
    non_blocking = bool(kwargs.get("non_blocking"))
    kwargs = {k: v for k, v in kwargs.items() if k not in ignored}
    is_on_cuda = device is None or torch.device(device).type == "cuda"
    stream, source = gpu.current_stream, args[0]
    if is_on_cuda and non_blocking and not stream.is_default:
        late = poison(func(source, **kwargs))
        stream.copies.append(functools.partial(late.copy_, source))
        return CudaTensor(late)
    result = func(get_content(source), **kwargs)
    return CudaTensor(result) if is_on_cuda else result


def _copy(gpu: PretendedCuda, func: Any, args: Any, kwargs: Any) -> Tensor:
    get_content(args[0]).copy_(get_content(args[1]))
    return args[0]


def _read_number(gpu: PretendedCuda, func: Any, args: Any, kwargs: Any) -> Any:
    return func(args[0].content)


def _index(gpu: PretendedCuda, func: Any, args: Any, kwargs: Any) -> Tensor:
    return CudaTensor(func(get_content(args[0]), [get_content(i) for i in args[1]]))


def _index_put(gpu: PretendedCuda, func: Any, args: Any, kwargs: Any) -> Tensor:
    indices = [get_content(i) for i in args[1]]
    func(get_content(args[0]), indices, *map(get_content, args[2:]), **kwargs)
    return args[0]


class KeptGraphs:
    """The autograd graphs of the last forward passes, by a tensor that the backward pass gets."""

    MAX_KEPT = 64

    def __init__(self) -> None:
        self._graphs: dict[int, tuple[Tensor, Any]] = {}  # by the tensor's id

    def keep(self, key: Tensor, graph: Any) -> None:
        self._graphs[id(key)] = (key, graph)
        while len(self._graphs) > self.MAX_KEPT:
            self._graphs.pop(next(iter(self._graphs)))

    def find(self, key: CudaTensor) -> Any:
        return self._graphs[id(key.content)][1]

    def move(self, old: Tensor, new: Tensor) -> None:
        """Keep what is kept for one tensor for another one instead."""
        if id(old) in self._graphs:
            self.keep(new, self._graphs.pop(id(old))[1])


class Attention:
    """Memory-efficient attention: one operation forward, one backward.

    Its results have the memory of `[B, L, A, H]`, in which the heads of a step are joined without a
    copy.
    """

    _graphs = KeptGraphs()

    @classmethod
    def forward(cls, gpu: PretendedCuda, func: Any, args: Any, kwargs: Any) -> Any:
        query, key, value, bias, needs_backward, *options = args
        dropout, is_causal = (*options, *(0.0, False)[len(options) :])
        leaves = [get_content(t) for t in (query, key, value)]

        def compute() -> Any:
            with torch.enable_grad():
                inputs = [t.detach().clone().requires_grad_(True) for t in leaves]
                return inputs, cpu_attention(
                    *inputs, get_content(bias), dropout, is_causal, scale=kwargs.get("scale")
                )

        inputs, output = gpu.autograd_thread.submit(compute).result()
        seed = torch.zeros(1)
        if needs_backward:
            cls._graphs.keep(seed, (inputs, output))
        numbers = [CudaTensor(t) for t in (torch.zeros(0), seed, torch.zeros(0))]
        return (CudaTensor(_join_heads(output.detach())), *numbers)

    @classmethod
    def backward(cls, gpu: PretendedCuda, func: Any, args: Any, kwargs: Any) -> Any:
        inputs, output = cls._graphs.find(args[7])
        gradient = get_content(args[0])

        def compute() -> Any:
            return torch.autograd.grad(output, inputs, gradient, retain_graph=True)

        gradients = gpu.autograd_thread.submit(compute).result()
        return (*(CudaTensor(_join_heads(g)) for g in gradients), None)


def _join_heads(values: Tensor) -> Tensor:
    """Return a copy of `[B, A, L, H]` with the memory of `[B, L, A, H]`."""
    return values.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)


class Cudnn:
    """cuDNN's recurrent layers: one operation forward, one backward.

    All its tensors have one dtype. It computes in float32, because CPUs lack layers of bfloat16.
    """

    LSTM, GRU = 2, 3
    _graphs = KeptGraphs()

    @classmethod
    def forward(cls, gpu: PretendedCuda, func: Any, args: Any, kwargs: Any) -> Any:
        (x, weight, _, _, hx, cx, kind, _, _, layers, batch_first, dropout, train, bidirectional,
         _, _) = args  # fmt: skip
        states = [hx, cx] if kind == cls.LSTM else [hx]
        leaves = [get_content(t) for t in (x, *states, *weight)]
        if {t.dtype for t in leaves} != {x.dtype}:
            raise RuntimeError(f"cuDNN takes tensors of one dtype: {[t.dtype for t in leaves]}")

        def compute() -> Any:
            with torch.enable_grad():
                inputs = [t.detach().float().clone().requires_grad_(True) for t in leaves]
                weights = inputs[1 + len(states) :]
                first = tuple(inputs[1:3]) if kind == cls.LSTM else inputs[1]
                layer = cpu_layer(kind)
                return inputs, layer(inputs[0], first, weights, True, layers, dropout, train,
                                     bidirectional, batch_first)  # fmt: skip

        inputs, outputs = gpu.autograd_thread.submit(compute).result()
        outputs = outputs if kind == cls.LSTM else (*outputs, torch.zeros(0))
        reserve = torch.zeros(1)
        if train:
            cls._graphs.keep(reserve, (inputs, outputs, kind))
        results = [CudaTensor(o.detach().to(x.dtype, copy=True)) for o in outputs]
        return (*results, CudaTensor(reserve), CudaTensor(torch.zeros(0)))

    @classmethod
    def backward(cls, gpu: PretendedCuda, func: Any, args: Any, kwargs: Any) -> Any:
        output_gradients, train, reserve, mask = args[7:10], args[16], args[20], args[21]
        if not train:
            raise RuntimeError("cudnn RNN backward can only be called in training mode")
        inputs, outputs, kind = cls._graphs.find(reserve)
        dtype = args[0].dtype
        pairs = [
            (output, get_content(gradient).to(output.dtype))
            for output, gradient in zip(outputs, output_gradients, strict=True)
            if gradient is not None
        ]

        def compute() -> Any:
            return torch.autograd.grad(
                [p[0] for p in pairs], inputs, [p[1] for p in pairs],
                retain_graph=True, allow_unused=True,
            )  # fmt: skip

        gradients = gpu.autograd_thread.submit(compute).result()
        results = [
            None if g is None else CudaTensor(g.detach().to(dtype, copy=True)) for g in gradients
        ]
        first_weight = 3 if kind == cls.LSTM else 2
        weights = [
            CudaTensor(torch.zeros_like(i.detach(), dtype=dtype)) if r is None else r
            for r, i in zip(results, inputs, strict=True)
        ]
        x, hx, cx = results[0], results[1], results[2] if kind == cls.LSTM else None
        states = [
            g if is_needed else None for g, is_needed in zip((x, hx, cx), mask[:3], strict=True)
        ]
        return (*states, weights[first_weight:])


OWN_OPERATIONS: dict[str, Callable[[PretendedCuda, Any, Any, Any], Any]] = {
    "_to_copy": _to_copy,
    "copy_": _copy,
    "_local_scalar_dense": _read_number,
    "index": _index,
    "index_put_": _index_put,
    "_index_put_impl_": _index_put,
    "_cudnn_rnn": Cudnn.forward,
    "_cudnn_rnn_backward": Cudnn.backward,
    "_scaled_dot_product_efficient_attention": Attention.forward,
    "_scaled_dot_product_efficient_attention_backward": Attention.backward,
}


# -- what torch says of its devices ----------------------------------------------------------------


cpu_attention = torch._C._nn.scaled_dot_product_attention


def cpu_layer(kind: int) -> Any:
    functions = torch._C._VariableFunctions
    return functions.lstm if kind == Cudnn.LSTM else functions.gru


def replace_torch_functions(gpu: PretendedCuda) -> list[Callable[[], None]]:
    """Replace what asks for devices; return functions that undo it, in the order of the changes."""
    undo: list[Callable[[], None]] = []

    def replace(owner: Any, name: str, value: Any) -> None:
        missing = object()
        is_module = isinstance(owner, type(torch))
        previous = getattr(owner, name, missing) if is_module else vars(owner).get(name, missing)
        setattr(owner, name, value)
        if previous is missing:
            undo.append(lambda: delattr(owner, name))
        else:
            undo.append(lambda: setattr(owner, name, previous))

    random_state = torch.zeros(16, dtype=torch.uint8)
    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "_lazy_init": lambda: None,
        "is_initialized": lambda: True,
        "mem_get_info": lambda device=None: (130 * GB, 139 * GB),
        "max_memory_allocated": lambda device=None: num_device_bytes(),
        "reset_peak_memory_stats": lambda device=None: None,
        "memory_allocated": lambda device=None: num_device_bytes(),
        "memory_reserved": lambda device=None: num_device_bytes(),
        "empty_cache": lambda: None,
        "synchronize": lambda device=None: gpu.count_wait("torch.cuda.synchronize"),
        "set_sync_debug_mode": lambda mode: setattr(gpu, "waits_raise", mode in ("error", 2)),
        "get_rng_state": lambda device="cuda": random_state,
        "get_rng_state_all": lambda: [random_state],
        "set_rng_state": lambda state, device="cuda": None,
        "set_rng_state_all": lambda states: None,
        "manual_seed_all": lambda seed: None,
        "get_device_name": lambda device=None: "pretended device",
        "is_bf16_supported": lambda *args, **kwargs: True,
        "get_device_capability": lambda device=None: (9, 0),
        **stream_functions(gpu),
        **graph_functions(gpu, _move_kept_graphs),
    }
    for name, value in answers.items():
        replace(torch.cuda, name, value)
    import torch.utils._foreach_utils as foreach

    tensor_types = [Tensor, nn.Parameter, CudaTensor]
    replace(sys.modules["torch.optim.optimizer"], "_foreach_supported_types", tensor_types)
    for module in (foreach, sys.modules["torch.nn.utils.clip_grad"]):
        replace(module, "_has_foreach_support", lambda tensors, device: True)
    replace(torch.Tensor, "pin_memory", _pin_memory(gpu))
    replace(nn.Module, "_apply", _apply_in_place(nn.Module._apply))
    replace(torch, "Generator", _cpu_generator(torch.Generator))
    # A wrapped tensor has no inference mode; without gradients it is the same program.
    replace(torch, "inference_mode", lambda mode=True: torch.no_grad())
    replace(sys.modules["qtorch.data.threads"], "ThreadPoolExecutor", DeviceThreads)
    from qtorch.model.devices import step_graph
    from qtorch.model.fleet.jobs import Job

    replace(step_graph, "_streams", {})
    replace(Job, "_run", _run_on_device(Job._run))
    replace(nn.functional, "scaled_dot_product_attention", _attention)
    for owner in (torch, torch._VF):
        replace(owner, "lstm", _recurrent_layer(Cudnn.LSTM))
        replace(owner, "gru", _recurrent_layer(Cudnn.GRU))
    return undo


def _move_kept_graphs(old: Tensor, new: Tensor) -> None:
    for operation in (Attention, Cudnn):
        operation._graphs.move(old, new)


class ThreadDevice(TorchDispatchMode):
    """The current device in another thread: a mode belongs to the thread that has entered it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return current_device().dispatch(func, args, kwargs or {})


class DeviceThreads(ThreadPoolExecutor):
    """A pool of threads that see the pretended device."""

    def map(self, function: Any, *parts: Any, **options: Any) -> Any:
        def run(*arguments: Any) -> Any:
            with ThreadDevice():
                return function(*arguments)

        return super().map(run, *parts, **options)


def _run_on_device(run: Any) -> Any:
    def run_on_device(self: Any) -> None:  # the jobs of a fleet run in threads of their own
        torch._C._set_only_lift_cpu_tensors(True)  # type: ignore[attr-defined]  # of each thread
        with ThreadDevice():
            run(self)

    return run_on_device


def _cpu_generator(generator_class: Any) -> Any:
    class Generator(generator_class):  # a generator "on cuda" draws on the CPU
        def __new__(cls, device: Any = "cpu") -> Any:
            return generator_class("cpu")

    return Generator


def _pin_memory(gpu: PretendedCuda) -> Any:
    def pin_memory(self: Tensor, device: Any = None) -> Tensor:
        copy = self.clone()
        gpu.pinned.add(copy.data_ptr())
        gpu.stages[gpu.stage].copies["to pinned memory"] += 1
        return copy

    return pin_memory


def _apply_in_place(apply: Any) -> Any:
    def apply_in_place(self: nn.Module, function: Any, recurse: bool = True) -> Any:
        # A parameter stays the same object when its module is moved, as on a GPU.
        previous = torch.__future__.get_swap_module_params_on_conversion()
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            return apply(self, function, recurse)
        except RuntimeError as error:
            # After an error in a step, autograd still holds the parameters.
            if "Couldn't swap" not in str(error):
                raise
            torch.__future__.set_swap_module_params_on_conversion(False)
            return apply(self, function, recurse)
        finally:
            torch.__future__.set_swap_module_params_on_conversion(previous)

    return apply_in_place


def _recurrent_layer(kind: int) -> Any:
    on_cpu = cpu_layer(kind)

    def layer(x, hx, weights, bias, layers, dropout, train, bidirectional, batch_first):
        if not x.is_cuda:
            return on_cpu(x, hx, weights, bias, layers, dropout, train, bidirectional, batch_first)
        h, c = hx if kind == Cudnn.LSTM else (hx, None)
        if torch.is_autocast_enabled("cuda"):  # CUDA's autocast knows _cudnn_rnn
            dtype = torch.get_autocast_dtype("cuda")
            x, h, *weights = (t.to(dtype) for t in (x, h, *weights))
            c = None if c is None else c.to(dtype)
        outputs = torch.ops.aten._cudnn_rnn(
            x, list(weights), 4, None, h, c, kind, h.shape[-1], 0, layers, batch_first,
            float(dropout), train, bidirectional, [], None,
        )  # fmt: skip
        return outputs[:3] if kind == Cudnn.LSTM else outputs[:2]

    return layer


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, **options: Any,
) -> Tensor:  # fmt: skip
    """Attend by the kernel that CUDA chooses for float32."""
    if not query.is_cuda:
        return cpu_attention(query, key, value, attn_mask, dropout_p, is_causal, **options)
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.where(attn_mask, 0.0, -torch.inf).to(query.dtype)
        attn_mask = attn_mask.expand(*query.shape[:-1], key.shape[-2])
    needs_backward = torch.is_grad_enabled() and query.requires_grad
    outputs = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, needs_backward, dropout_p, is_causal, **options
    )
    return outputs[0]
