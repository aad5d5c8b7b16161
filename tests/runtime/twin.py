"""A device that is not there: values on the CPU, CUDA's rules kept, and what breaks them refused.

A tensor of the device (`Far`) says it lies on "meta" and holds a CPU tensor that nobody else sees. A dispatch mode runs
every operation and raises where CUDA would fail, or would do what a step must not:

- an operation that mixes the device's tensors with the host's (a copy, or a number of no dimensions, is let through);
- while recording: a look at a result, a shape that depends on one, a copy from or to the host;
- a replay in which a shape differs or a static tensor has moved.

A recorded graph is the list of operations with the Python numbers they had: a replay repeats those, over the same
addresses, and asks no Python. So what a step forgets to write into a static buffer is the last step's, as on a GPU.
Waits are counted: `Device.fetch`, and every look at a result besides (`surprises`).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import is_dataclass
from functools import cache, partial, wraps
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from dspark_kernels import Filters, ReferenceKernels
from dspark_kernels.reference import read_rows
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

T = TypeVar("T")
AWAY = torch.device("meta")
HOME = torch.device("cpu")

# Operations whose result, or its shape, is read on the host.
LOOKS = {"aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::equal", "aten::nonzero",
         "aten::masked_select", "aten::unique_dim", "aten::_unique2", "aten::repeat_interleave"}  # fmt: skip
COPIES = {"aten::copy_", "aten::_to_copy", "aten::to"}
PLAIN = {int, float, bool, type(None), str, torch.dtype}


class TwinError(AssertionError):
    """What CUDA would not do."""


class Far(Tensor):
    """A tensor of the device that is not there."""

    near: Tensor

    @staticmethod
    def __new__(cls, near: Tensor) -> "Far":
        made = Tensor._make_wrapper_subclass(
            cls, near.shape, strides=near.stride(), storage_offset=near.storage_offset(), dtype=near.dtype, device=AWAY
        )
        made.near = near
        return made

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Far({self.near})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise TwinError(f"{func} outside of the twin's mode")


class Result(NamedTuple):
    """A tensor that a recorded operation gave; every replay puts its own there."""

    tensor: Tensor
    shape: torch.Size
    stride: tuple[int, ...]
    place: int

    @classmethod
    def of(cls, tensor: Tensor) -> "Result":
        return cls(tensor, tensor.shape, tensor.stride(), tensor.data_ptr())


Operation = tuple[Any, Any, Any, list[Result]]


class Recorded(Generic[T]):
    """A graph: operations on CPU tensors that are kept, and what the recorded function returned."""

    def __init__(self, operations: list[Operation], result: T) -> None:
        self._operations = operations
        self.result = result

    def replay(self) -> None:
        with torch._C._DisableTorchDispatch():  # nothing here is far
            for func, args, kwargs, expected in self._operations:
                out = func(*args, **kwargs)
                if type(out) is Tensor:
                    ((first, shape, stride, place),) = expected
                    if out is not first:
                        if out.shape != shape or out.stride() != stride:
                            raise _changed(func, out, shape)
                        if out.data_ptr() != place:
                            first.copy_(out)
                    continue
                for mine, (first, shape, stride, place) in zip(_leaves((_done(out),), []), expected, strict=True):
                    if mine.shape != shape or mine.stride() != stride:
                        raise _changed(func, mine, shape)
                    if mine.data_ptr() != place:
                        first.copy_(mine)


def _changed(func: Any, mine: Tensor, shape: torch.Size) -> TwinError:
    return TwinError(f"{func} gave {[*mine.shape]} in a replay, {[*shape]} when recorded")


class Rule(NamedTuple):
    """What is known of an operation without its arguments."""

    name: str
    device: int | None  # the place of its argument `device`, where it has one
    looks: bool
    copies: bool
    indexes: bool  # and a mask's shape depends on its values
    gathers: bool  # the device may be indexed with a tensor of the host, which is copied
    writes: bool  # it changes an argument: a collective does, though its schema does not say so
    collective: bool


@cache
def _rule(func: Any) -> Rule:
    name, arguments = str(func.name().split(".")[0]), [each.name for each in func._schema.arguments]
    collective = func.namespace != "aten"
    return Rule(
        name,
        arguments.index("device") if "device" in arguments else None,
        name in LOOKS,
        name in COPIES,
        name in ("aten::index", "aten::index_put_", "aten::index_put"),
        name == "aten::index",
        collective or bool(func._schema.is_mutable),
        collective,
    )


class TwinDevice(TorchDispatchMode):
    """See the module. A mode: `with device:` around everything that touches its tensors."""

    name = "twin"
    label = "a device that is not there"
    where = AWAY

    def __init__(self, free: int = 1 << 30, total: int = 2 << 30, working: int = 0) -> None:
        super().__init__()
        self.syncs = 0
        self.surprises: list[str] = []  # looks at results that no `fetch` made
        self.launches = 0
        self.launch_seconds = 1e-5  # between two marks, for each launch
        self._memory, self._working = (free, total), working
        self._recording: list[Operation] | None = None
        self._in_flight: set[int] = set()
        self.waits = 0  # for uploads that no fetch had already waited for

    # -- Device ------------------------------------------------------------------------------------------------------

    def pinned(self, size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.uint8)

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return Far(torch.zeros(tuple(shape), dtype=dtype))

    def upload(self, host: Tensor, there: Tensor) -> int:
        place = host.data_ptr()
        assert place not in self._in_flight, "pinned memory was filled again before its copy was known to be done"
        there.copy_(host)
        self._in_flight.add(place)
        return place

    def uploaded(self, upload: int) -> None:
        self.waits += upload in self._in_flight
        self._in_flight.discard(upload)

    def fetch(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        assert self._recording is None, "a result was fetched inside a graph"
        self.syncs += 1
        self._in_flight.clear()
        for tensor in tensors:
            assert isinstance(tensor, Far), "fetched what was not on the device"
        return [tensor.near.clone() for tensor in tensors]  # type: ignore[attr-defined]

    def capture(self, work: Callable[[], T]) -> Recorded[T]:
        assert self._recording is None
        self._recording = []
        try:
            result = work()  # which runs it too: another run before it, as for CUDA, would change nothing
            return Recorded(self._recording, result)
        finally:
            self._recording = None

    def mark(self) -> int:
        return self.launches

    def seconds(self, first: int, last: int) -> float:
        return (last - first) * self.launch_seconds

    def memory(self) -> tuple[int, int]:
        return self._memory

    def peak(self, work: Callable[[], object]) -> int:
        work()
        self._in_flight.clear()  # a peak is known once all of it is done
        return self._working

    def check(self, dtype: torch.dtype) -> None:
        return None

    # -- the rules ---------------------------------------------------------------------------------------------------

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here: without its guard around each operation

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        rule, far, near = _rule(func), Far in types, list[Tensor]()
        kwargs = kwargs or {}
        device = None
        if rule.device is not None:
            device = kwargs["device"] if "device" in kwargs else next(iter(args[rule.device : rule.device + 1]), None)
        mine = [_near(each, near) for each in args]
        named = {name: _near(each, near) for name, each in kwargs.items()} if kwargs else kwargs
        for each in near:
            if each.is_meta:
                raise TwinError(f"{func}: a tensor was made on the device behind its back (torch.tensor(device=...))")
        away = device == AWAY
        if not far and not away:
            return func(*args, **kwargs)
        moves = rule.copies and ((away and bool(near)) or (far and (bool(near) or device == HOME)))
        if self._recording is not None and moves:
            raise TwinError(f"{func}: a copy between host and device inside a graph")
        if not moves:
            for each in near:
                if each.dim() and not (rule.gathers and self._recording is None):
                    raise TwinError(f"{func} mixes the device's tensors with one of the host, {list(each.shape)}")
        back = far and device == HOME
        looks = rule.looks or (back and rule.copies)
        if rule.indexes:
            looks = any(isinstance(i, Tensor) and i.dtype == torch.bool for i in args[1])
        if looks:
            if self._recording is not None:
                raise TwinError(f"{func}: a look at a result inside a graph")
            self.surprises.append(rule.name)
        with torch._C._InferenceMode(False):  # wrappers know nothing of inference tensors
            out = func(*mine, **named)
            if rule.collective:
                _done(out)
            self.launches += 1
            if self._recording is not None and not _is_view(rule, mine, out):  # a view of what stays where it is
                self._recording.append((func, mine, named, [Result.of(each) for each in _leaves((out,), [])]))
            if back:
                return out
            if far and out is mine[0] and type(args[0]) is Far:  # written in place, or already what it should become
                return args[0]
            return _far(out)

    def launch(self, work: Callable[..., T], args: Any, kwargs: Any) -> T:
        """Run a kernel as one operation: all of its tensors are the device's, and it looks at none of them."""
        host: list[Tensor] = []
        mine, named = [_near(each, host) for each in args], {name: _near(each, host) for name, each in kwargs.items()}
        for each in host:
            raise TwinError(f"{work} was given a tensor of the host, {list(each.shape)}")
        with torch._C._DisableTorchDispatch(), torch._C._InferenceMode(False):
            out = work(*mine, **named)
        self.launches += 1
        if self._recording is not None:
            self._recording.append((work, mine, named, [Result.of(each) for each in _leaves((out,), [])]))
        with torch._C._InferenceMode(False):
            return _far(out)  # type: ignore[no-any-return]


def _leaves(values: Iterable[Any], found: list[Tensor]) -> list[Tensor]:
    """Append all tensors among the values, and in lists, tuples and dataclasses among them."""
    for each in values:
        if isinstance(each, Tensor):
            found.append(each)
        elif isinstance(each, (list, tuple)):
            _leaves(each, found)
        elif is_dataclass(each):
            _leaves(vars(each).values(), found)
    return found


def _is_view(rule: Rule, args: Any, out: Any) -> bool:
    """Whether the operation only gave views of its arguments, and wrote to none of them."""
    if rule.writes:
        return False
    own = {each.untyped_storage().data_ptr() for each in _leaves(args, [])}
    return all(each.untyped_storage().data_ptr() in own for each in _leaves((out,), []))


def _done(out: Any) -> Any:
    """Return the result of an operation; wait for a collective of gloo, which works on a thread of its own."""
    for each in out if isinstance(out, tuple) else (out,):
        if isinstance(each, torch.ScriptObject):
            each.wait()
    return out


def _near(value: Any, host: list[Tensor]) -> Any:
    """An argument as it is on the CPU; the host's own tensors among them are appended to `host`."""
    kind = type(value)
    if kind is Far:
        return value.near
    if kind in PLAIN:
        return value
    if kind is list or kind is tuple:
        return kind([_near(each, host) for each in value])
    if isinstance(value, Tensor):
        host.append(value)
    elif is_dataclass(value):
        return kind(**{name: _near(each, host) for name, each in vars(value).items()})
    return HOME if kind is torch.device else value


def _far(value: Any) -> Any:
    if isinstance(value, Tensor):
        return Far(value)
    if isinstance(value, (list, tuple)):
        return tuple([_far(each) for each in value])
    if is_dataclass(value):
        return type(value)(**{name: _far(each) for name, each in vars(value).items()})
    return value


def kernel(work: Callable[..., T]) -> Callable[..., T]:
    """A method as one launch on the device that is not there, where its tensors are the device's."""

    @wraps(work)
    def launched(self: Any, *args: Any, **kwargs: Any) -> T:
        if not any(type(each) is Far for each in _leaves((*args, *kwargs.values()), [])):
            return work(self, *args, **kwargs)
        device = _get_current_dispatch_mode()
        assert isinstance(device, TwinDevice), f"{work.__name__} outside of the twin's mode"
        return device.launch(partial(work, self), args, kwargs)

    return launched


class TwinKernels(ReferenceKernels):
    """The reference kernels as a device's must be: nothing read on the host, shapes from shapes alone.

    Each is one launch. What attention gives tokens of no run is NaN, so that whoever uses it is found out.
    """

    ruled = False  # like those of a GPU
    rms_norm = kernel(ReferenceKernels.rms_norm)
    add_rms_norm = kernel(ReferenceKernels.add_rms_norm)
    rotary_kv_write = kernel(ReferenceKernels.rotary_kv_write)
    silu_mul = kernel(ReferenceKernels.silu_mul)
    gelu_tanh_mul = kernel(ReferenceKernels.gelu_tanh_mul)
    norm_add = kernel(ReferenceKernels.norm_add)
    argmax = kernel(ReferenceKernels.argmax)
    read_streams = kernel(ReferenceKernels.read_streams)
    write_streams = kernel(ReferenceKernels.write_streams)
    score_experts = kernel(ReferenceKernels.score_experts)
    latent_rows = kernel(ReferenceKernels.latent_rows)
    compress = kernel(ReferenceKernels.compress)
    choose_entries = kernel(ReferenceKernels.choose_entries)
    linear = kernel(ReferenceKernels.linear)
    draft_tokens = kernel(ReferenceKernels.draft_tokens)

    @kernel
    def paged_attention(
        self,
        qkv: Tensor,
        num_q_heads: int,
        keys: Tensor,
        values: Tensor,
        query_start: Tensor,
        context_len: Tensor,
        block_tables: Tensor,
        scale: float,
        causal: bool = True,
        window: int | None = None,
        softcap: float | None = None,
        first_key: int = 0,
    ) -> Tensor:
        rows, (_, block_size, kv_heads, head_dim) = qkv.shape[0], keys.shape
        index = torch.arange(rows, device=qkv.device)
        run = torch.searchsorted(query_start[1:], index.int(), right=True).clamp(max=len(context_len) - 1)
        key = torch.arange(block_tables.shape[1] * block_size, device=qkv.device)
        slots = block_tables.long()[run][:, key // block_size] * block_size + key % block_size  # [N, keys]
        position = (context_len[run] + index - query_start[run]).unsqueeze(1)
        length = (context_len[run] + query_start[run + 1] - query_start[run]).unsqueeze(1)
        hidden = key >= length
        if causal:
            hidden = hidden | (key > position)
        if window is not None:
            hidden = hidden | (key <= position - window)
        hidden = hidden | (key < first_key)
        slots = torch.where(hidden, 0, slots)
        query = qkv[:, : num_q_heads * head_dim].float().unflatten(1, (kv_heads, -1, head_dim))
        scores = torch.einsum("qhgd,qkhd->qhgk", query, read_rows(keys, slots)) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        weights = scores.masked_fill(hidden[:, None, None], float("-inf")).softmax(-1)
        seen = read_rows(values, slots).masked_fill(hidden[:, :, None, None], 0.0)
        out = torch.einsum("qhgk,qkhd->qhgd", weights, seen).flatten(1)
        return out.masked_fill((index >= query_start[-1]).unsqueeze(1), float("nan")).to(qkv.dtype)

    @kernel
    def latent_attention(
        self,
        queries: Tensor,
        positions: Tensor,
        query_start: Tensor,
        *where: Any,
        **more: Any,
    ) -> Tensor:
        out = ReferenceKernels.latent_attention(self, queries, positions, query_start, *where, **more)
        index = torch.arange(len(out), device=out.device)
        return out.masked_fill((index >= query_start[-1]).unsqueeze(1), float("nan"))

    @kernel
    def experts(self, x: Tensor, packed: Any, chosen: Tensor, shares: Tensor, limit: float | None = None) -> Tensor:
        shares = torch.where(chosen < len(packed.down), shares, 0.0)  # the others are another rank's
        chosen = chosen.long().clamp(max=len(packed.down) - 1)
        own = torch.einsum("nkfd,nd->nkf", packed.gate_up[chosen].float(), x.float()).to(x.dtype)
        gate, up = own.float().chunk(2, dim=-1)
        if limit is not None:
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        inner = (torch.nn.functional.silu(gate) * up).to(x.dtype).float()
        outputs = torch.einsum("nkdf,nkf->nkd", packed.down[chosen].float(), inner)
        return (outputs * shares.unsqueeze(2)).sum(1).to(x.dtype)

    @kernel
    def filter_logits(self, logits: Tensor, rows: Tensor, inverse_temperature: Tensor, filters: Filters) -> Tensor:
        out = logits[rows]
        scaled = out * inverse_temperature.unsqueeze(1)
        ordered = scaled.sort(-1, descending=True).values
        off = torch.full_like(inverse_temperature, -torch.inf)
        place = filters.top_k.clamp(1, out.shape[1]) - 1
        kth = ordered.gather(1, place.unsqueeze(1)).squeeze(1)
        floor = torch.maximum(ordered[:, 0] + filters.min_p.log(), torch.where(filters.top_k > 0, kth, off))
        law = torch.softmax(ordered.masked_fill(ordered < floor.unsqueeze(1), -torch.inf).double(), -1)
        inside = law.cumsum(-1) - law < filters.top_p.double().unsqueeze(1)
        last = (inside.sum(1, keepdim=True) - 1).clamp(min=0)
        nucleus = torch.maximum(floor, ordered.gather(1, last).squeeze(1))
        floor = torch.where(filters.top_p < 1, nucleus, floor)
        fine = (out < torch.inf).all(-1, keepdim=True)
        return out.masked_fill(fine & (scaled < floor.unsqueeze(1)), -torch.inf)

    @kernel
    def accept_drafts(
        self,
        logits: Tensor,
        start: Tensor,
        lengths: Tensor,
        tokens: Tensor,
        inverse_temperature: Tensor,
        q: Tensor | None,
        row: Tensor,
        names: Tensor | None,
        coins: Tensor | None,
        last: Tensor,
        *,
        jointly: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        decide = _decided_jointly if jointly else _decided
        laws = _laws(logits, start, lengths, tokens, inverse_temperature, q, row, names)
        return decide(*laws, lengths, tokens, coins, last)


def _decided(
    fine: Tensor, p: Tensor, law: Tensor, lengths: Tensor, tokens: Tensor, coins: Tensor | None, last: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Counts, tokens and which failed, by the ratio rule."""
    width, slot = tokens.shape[1], torch.arange(tokens.shape[1] + 1, device=p.device)
    stands = slot[:-1] < lengths.unsqueeze(1)
    if width and coins is not None:
        at = tokens.unsqueeze(2)
        stands = stands & (coins * law[:, :-1].gather(2, at).squeeze(2) < p[:, :-1].gather(2, at).squeeze(2))
    count = (stands & fine[:, :-1]).long().cumprod(1).sum(1)
    pick = count[:, None, None].expand(-1, 1, p.shape[2])
    own, left = p.gather(1, pick).squeeze(1), (p - law).clamp(min=0).gather(1, pick).squeeze(1)
    weights = torch.where(left.sum(-1, keepdim=True) > 0, left, own)
    edges = weights.cumsum(-1)
    below = torch.nextafter(edges[:, -1], torch.zeros_like(edges[:, -1]))
    point = torch.minimum(last.gather(1, count.unsqueeze(1)).squeeze(1) * edges[:, -1], below).unsqueeze(1)
    token = torch.searchsorted(edges, point, right=True).squeeze(1)
    failed = ~fine.gather(1, count.unsqueeze(1)).squeeze(1)
    return count.masked_fill(failed, 0), token.masked_fill(failed, -1), failed


def _decided_jointly(
    fine: Tensor, p: Tensor, law: Tensor, lengths: Tensor, tokens: Tensor, coins: Tensor | None, last: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The same by the block rule."""
    width, slot = tokens.shape[1], torch.arange(tokens.shape[1] + 1, device=p.device)
    joint, reached = [torch.ones_like(last[:, 0])], [torch.ones_like(fine[:, 0])]
    for k in range(width):
        at = tokens[:, k : k + 1]
        p_x, q_x = p[:, k].nan_to_num(0.0).gather(1, at).squeeze(1), law[:, k].gather(1, at).squeeze(1)
        joint.append(torch.where(q_x > 0, joint[-1] * p_x / q_x, 1.0).clamp(max=1))
        reached.append(reached[-1] & fine[:, k] & (k < lengths))
    share, there = torch.stack(joint, 1), torch.stack(reached, 1)
    left = (share.unsqueeze(2) * p.nan_to_num(0.0) - law).clamp(min=0)
    rest = left.sum(2)
    ends = ~fine | (slot >= lengths.unsqueeze(1))
    bound = torch.where(rest + 1 - share > 0, rest / (rest + 1 - share), 1.0)
    bound = torch.where(ends, share, bound)
    stands = there[:, :1]
    if width and coins is not None:
        stands = torch.cat([stands, there[:, 1:] & (coins < bound[:, 1:])], 1)
    count = torch.where(stands, slot[: stands.shape[1]], 0).amax(1)
    pick = count[:, None, None].expand(-1, 1, p.shape[2])
    own = p.nan_to_num(0.0).gather(1, pick).squeeze(1)
    short = ~ends.gather(1, count.unsqueeze(1))
    weights = torch.where(short & (rest.gather(1, count.unsqueeze(1)) > 0), left.gather(1, pick).squeeze(1), own)
    edges = weights.cumsum(-1)
    below = torch.nextafter(edges[:, -1], torch.zeros_like(edges[:, -1]))
    point = torch.minimum(last.gather(1, count.unsqueeze(1)).squeeze(1) * edges[:, -1], below).unsqueeze(1)
    token = torch.searchsorted(edges, point, right=True).squeeze(1)
    broken = ~fine.gather(1, count.unsqueeze(1)).squeeze(1)
    before = (count - 1).clamp(min=0)
    if width:
        token = torch.where(broken, tokens.gather(1, before.unsqueeze(1)).squeeze(1), token)
    failed = broken & (count == 0)
    return torch.where(broken, before, count), token.masked_fill(failed, -1), failed


def _laws(
    logits: Tensor,
    start: Tensor,
    lengths: Tensor,
    tokens: Tensor,
    inverse_temperature: Tensor,
    q: Tensor | None,
    row: Tensor,
    names: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of rows [n, L + 1]: which are fine, p [., V] and q [., V], 0 behind a block's end; float64."""
    width, where = tokens.shape[1], logits.device
    slot = torch.arange(width + 1, device=where)
    scores = logits[start.unsqueeze(1) + slot.minimum(lengths.unsqueeze(1))]
    fine = scores.amax(-1).isfinite()
    p = torch.softmax(scores * inverse_temperature[:, None, None], -1).double()
    law = torch.zeros_like(p)
    if width and q is None:
        law[:, :-1].scatter_(2, tokens.unsqueeze(2), 1.0)
    elif width and q is not None:
        slots = slot[:-1].clamp(max=q.shape[1] - 1)
        mine = q[row.unsqueeze(1), slots].double()
        if names is None:
            law[:, :-1] = mine
        else:
            law[:, :-1].scatter_add_(2, names[row.unsqueeze(1), slots], mine)
    return fine, p, torch.where((slot < lengths.unsqueeze(1)).unsqueeze(2), law, 0.0)
