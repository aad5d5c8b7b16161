"""Every kernel in plain PyTorch: the reference in tests of the native kernels, and the fallback without a compiler.

Written to be obviously right, not fast. Shapes and contracts: `interface.Kernels`.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from dspark_kernels.interface import (
    UNNAMED,
    DraftedTokens,
    Favour,
    Filters,
    LayerParts,
    PackedExperts,
    PackedLinear,
    Ruled,
)
from dspark_kernels.reference_latent import LatentReference
from dspark_kernels.reference_rules import edit_rows
from torch import Tensor


@dataclass(frozen=True)
class PlainLinear:
    """A "packed" linear that is merely the weight [Nout, K] and bias [Nout]."""

    weight: Tensor
    bias: Tensor | None

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]


@dataclass(frozen=True)
class PlainExperts:
    """gate_up [E, 2F, D] and down [E, D, F] as they are."""

    gate_up: Tensor
    down: Tensor

    @property
    def count(self) -> int:
        return self.gate_up.shape[0]


def stacked(count: int, experts: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """gate_up [count, 2F, D] and down [count, D, F] of experts, copied one after the other."""
    room: tuple[Tensor, Tensor] | None = None
    for number, each in enumerate(experts):
        room = room or (each[0].new_empty(count, *each[0].shape), each[1].new_empty(count, *each[1].shape))
        room[0][number], room[1][number] = each
    assert room is not None, "a mixture has experts"
    return room


class ReferenceKernels(LatentReference):
    """`interface.Kernels` in plain PyTorch."""

    name = "reference"
    build = "reference"
    reads_fp8 = True
    ruled = True
    threads: int | None = None

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return _rms_norm(x.float(), weight, eps).to(x.dtype)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        residual.copy_(residual.float() + x.float())
        return self.rms_norm(residual, weight, eps)

    def rotary_kv_write(
        self,
        qkv: Tensor,
        positions: Tensor,
        cos_sin: Tensor,
        slots: Tensor,
        keys: Tensor,
        values: Tensor,
        num_q_heads: int,
        q_norm: Tensor | None = None,
        k_norm: Tensor | None = None,
        eps: float = 1e-6,
        value_norm: bool = False,
    ) -> None:
        _, _, kv_heads, head_dim = keys.shape
        heads = qkv.unflatten(1, (-1, head_dim))
        q, k, v = heads[:, :num_q_heads], heads[:, num_q_heads : num_q_heads + kv_heads], heads[:, -kv_heads:]
        table = cos_sin[positions.long()].unsqueeze(1)  # [N, 1, d]
        q.copy_(_rotate(q.float(), table, q_norm, eps))
        if kv_heads == 0:
            return
        write_rows(keys, slots, _rotate(k.float(), table, k_norm, eps))
        write_rows(values, slots, _rms_norm(v.float(), None, eps) if value_norm else v)

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
        _, block_size, kv_heads, head_dim = keys.shape
        out = torch.empty(qkv.shape[0], num_q_heads * head_dim, dtype=qkv.dtype)
        starts = query_start.tolist()
        for run, context in enumerate(context_len.tolist()):
            first, last = starts[run], starts[run + 1]
            position = context + torch.arange(last - first).unsqueeze(1)  # [q_len, 1]
            key_position = torch.arange(context + last - first)
            slots = block_tables[run].long()[key_position // block_size] * block_size + key_position % block_size
            query = qkv[first:last, : num_q_heads * head_dim].float().unflatten(1, (kv_heads, -1, head_dim))
            scores = torch.einsum("qhgd,khd->hgqk", query, read_rows(keys, slots)) * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            hidden = torch.zeros(last - first, len(slots), dtype=torch.bool)
            if causal:
                hidden |= key_position > position
            if window is not None:
                hidden |= key_position <= position - window
            hidden |= key_position < first_key
            weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
            out[first:last] = _weighted(weights, read_rows(values, slots), hidden).flatten(1).to(out.dtype)
        return out

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.float().chunk(2, dim=1)
        return (F.silu(gate) * up).to(gate_up.dtype)

    def gelu_tanh_mul(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.float().chunk(2, dim=1)
        return (F.gelu(gate, approximate="tanh") * up).to(gate_up.dtype)

    def norm_add(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, scale: float = 1.0) -> None:
        residual.copy_(residual.float() + self.rms_norm(x, weight, eps).float())
        if scale != 1.0:
            residual.mul_(scale)

    def score_experts(
        self, logits: Tensor, bias: Tensor | None, chosen: Tensor | None, count: int, scale: float
    ) -> tuple[Tensor, Tensor]:
        scores = F.softplus(logits).sqrt()
        if chosen is None:
            assert bias is not None
            chosen = torch.sort(scores + bias, dim=-1, descending=True, stable=True).indices[:, :count]
        shares = scores.gather(1, chosen.long())
        return chosen.int(), shares / shares.sum(-1, keepdim=True) * scale

    def read_streams(
        self,
        streams: Tensor,
        fn: Tensor,
        base: Tensor,
        scale: Tensor,
        norm: Tensor,
        iterations: int,
        floor: float,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        count = streams.shape[1] // len(norm)
        wide = streams.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        sizes = [count, count, count * count]
        products, offsets = (normed @ fn.T).split(sizes, dim=-1), base.split(sizes)
        before, after, among = (
            part * factor + offset for part, factor, offset in zip(products, scale, offsets, strict=True)
        )
        mixing = torch.unflatten(among, -1, (count, count)).softmax(-1) + floor
        mixing = mixing / (mixing.sum(-2, keepdim=True) + floor)
        for _ in range(iterations - 1):
            mixing = mixing / (mixing.sum(-1, keepdim=True) + floor)
            mixing = mixing / (mixing.sum(-2, keepdim=True) + floor)
        pre = torch.sigmoid(before) + floor
        x = (pre.unsqueeze(-1) * torch.unflatten(wide, -1, (count, -1))).sum(1).to(streams.dtype)
        return self.rms_norm(x, norm, eps), 2 * torch.sigmoid(after), mixing

    def write_streams(self, streams: Tensor, output: Tensor, post: Tensor, mixing: Tensor) -> None:
        wide = torch.unflatten(streams.float(), -1, (post.shape[1], -1))
        mixed = (mixing.unsqueeze(-1) * wide.unsqueeze(2)).sum(1)
        streams.copy_((mixed + post.unsqueeze(-1) * output.float().unsqueeze(1)).flatten(1))

    def argmax(self, logits: Tensor) -> Tensor:
        return logits.argmax(-1)

    def pack_linear(self, weight: Tensor, bias: Tensor | None = None) -> PlainLinear:
        return PlainLinear(weight.clone(), None if bias is None else bias.clone())

    def linear(self, x: Tensor, packed: PackedLinear, out_dtype: torch.dtype = torch.bfloat16) -> Tensor:
        assert isinstance(packed, PlainLinear)
        bias = None if packed.bias is None else packed.bias.float()
        return F.linear(x.float(), packed.weight.float(), bias).to(out_dtype)

    def pack_experts(self, count: int, experts: Iterable[tuple[Tensor, Tensor]]) -> PlainExperts:
        return PlainExperts(*stacked(count, experts))

    def experts(
        self, x: Tensor, packed: PackedExperts, chosen: Tensor, shares: Tensor, limit: float | None = None
    ) -> Tensor:
        assert isinstance(packed, PlainExperts)
        out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for token, (row, own, share) in enumerate(zip(x, chosen.tolist(), shares, strict=True)):
            for place, expert in enumerate(own):
                if expert >= len(packed.down):  # another rank's
                    continue
                gate_up = F.linear(row.float(), packed.gate_up[expert].float()).to(x.dtype)
                if limit is not None:
                    gate, up = gate_up.chunk(2)
                    gate_up = torch.cat([gate.clamp(max=limit), up.clamp(-limit, limit)])
                inner = self.silu_mul(gate_up.unsqueeze(0))[0]
                out[token] += share[place] * F.linear(inner.float(), packed.down[expert].float())
        return out.to(x.dtype)

    def fuse_layer(self, parts: LayerParts) -> None:
        return None

    def draft_tokens(
        self,
        base: Tensor,
        anchors: Tensor,
        names: Tensor | None,
        head: tuple[Tensor, PackedLinear] | None,
        inverse_temperature: Tensor,
        uniforms: Tensor | None,
        favour: Favour | None,
        filters: Filters | None = None,
        ruled: Ruled | None = None,
    ) -> DraftedTokens:
        rows, slots, columns = base.shape
        greedy, scale = inverse_temperature == 0, inverse_temperature.unsqueeze(1)
        where = base.device
        tokens, laws = torch.empty(rows, slots, dtype=torch.int64, device=where), torch.zeros_like(base)
        on = torch.zeros(rows, slots, dtype=torch.bool, device=where)
        odds = torch.zeros(rows, slots, device=where)
        usable, previous = torch.full_like(anchors, slots), anchors
        following = torch.zeros(rows, dtype=torch.bool, device=where) if favour is None else favour.following
        for k in range(slots):
            logits, names_here = base[:, k], torch.arange(columns, device=where) if names is None else names
            if head is not None:
                logits = logits + self.linear(head[0][previous], head[1], torch.float32)
            finite = torch.isfinite(logits.amax(-1))
            usable = torch.where(finite, usable, usable.clamp(max=k))
            following = following & finite
            here = names_here.expand(rows, -1)
            if favour is not None:
                place = favour.place[:, k : k + 1]
                total, own = logits.logsumexp(-1), logits.gather(1, place).squeeze(1)
                score = torch.where(favour.named[:, k], own, total + UNNAMED)
                share = torch.exp(score - total).clamp(max=1 - 1e-6)
                on[:, k] = following
                odds[:, k] = (score - total - torch.log1p(-share)).clamp(min=-20).where(following, odds[:, k])
                logits = logits.scatter(1, place, torch.where(following, score + favour.bias[:, k], own).unsqueeze(1))
                replaced = torch.where(favour.named[:, k : k + 1], here.gather(1, place), favour.tokens[:, k : k + 1])
                here = here.scatter(1, place, replaced)
            if ruled is not None:
                logits = logits.clone()
                edit_rows(logits, ruled, tokens[:, :k], k, here)
                finite = finite & (logits.amax(-1) > -torch.inf)
                usable = torch.where(finite, usable, usable.clamp(max=k))
                following = following & finite
            choice, logits = logits.argmax(-1), logits.where(finite.unsqueeze(1), 0.0)
            if filters is not None:
                index, positive = torch.arange(rows, device=where), inverse_temperature.masked_fill(greedy, 1.0)
                logits = logits.where(greedy.unsqueeze(1), self.filter_logits(logits, index, positive, filters))
            law = torch.softmax(logits * scale, dim=-1)
            if uniforms is not None:
                edges = law.double().cumsum(-1)
                below = torch.nextafter(edges[:, -1], torch.zeros_like(edges[:, -1]))
                point = torch.minimum(uniforms[:, k] * edges[:, -1], below).unsqueeze(1)
                choice = torch.where(greedy, choice, torch.searchsorted(edges, point, right=True).squeeze(1))
            previous = torch.where(finite, here.gather(1, choice.unsqueeze(1)).squeeze(1), names_here[0])
            tokens[:, k] = previous
            laws[:, k] = law.where((finite & ~greedy).unsqueeze(1), 0)
            if favour is not None:
                following = following & (previous == favour.tokens[:, k])
        return DraftedTokens(tokens, None if uniforms is None else laws, on, odds, usable)

    def apply_rules(self, logits: Tensor, start: Tensor, lengths: Tensor, tokens: Tensor, ruled: Ruled) -> None:
        names = torch.arange(logits.shape[1], device=logits.device).expand(len(logits), -1)
        for k in range(int(lengths.max()) + 1):
            for i in (lengths >= k).nonzero().flatten().tolist():
                one = Ruled(ruled.rules[i : i + 1], ruled.position[i : i + 1], ruled.drafted[i : i + 1])
                row = int(start[i]) + k
                edit_rows(logits[row : row + 1], one, tokens[i : i + 1, :k], k, names)

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
        outcomes = []
        for i, length in enumerate(lengths.tolist()):
            rows = logits[int(start[i]) : int(start[i]) + length + 1]
            p = torch.softmax(rows * inverse_temperature[i], -1).double()
            fine = rows.amax(-1).isfinite().tolist()
            drafted = tokens[i, :length]
            law = torch.zeros_like(p[:length])
            if q is None:
                law.scatter_(1, drafted.unsqueeze(1), 1.0)
            else:
                mine = q[row[i], :length].double()
                law = mine if names is None else law.scatter_add_(1, names[row[i], :length], mine)
            outcomes.append(decide(p, law, fine, drafted.tolist(), None if coins is None else coins[i], last[i]))
        count, token, failed = zip(*outcomes, strict=True)
        return torch.tensor(count), torch.tensor(token), torch.tensor(failed)

    def filter_logits(self, logits: Tensor, rows: Tensor, inverse_temperature: Tensor, filters: Filters) -> Tensor:
        top_k, top_p, min_p = filters.top_k, filters.top_p, filters.min_p
        out = logits[rows].clone()
        for i, row in enumerate(out):
            if not bool((row < torch.inf).all()) or not bool(row.max() > -torch.inf):
                continue
            scaled = row * inverse_temperature[i]
            kept = torch.ones_like(scaled, dtype=torch.bool)
            if min_p[i] > 0:
                kept &= scaled >= scaled.max() + min_p[i].log()
            if 0 < top_k[i] < len(scaled):
                kept &= scaled >= scaled.sort(descending=True).values[top_k[i] - 1]
            if top_p[i] < 1:
                p, order = torch.softmax(scaled.masked_fill(~kept, -torch.inf).double(), -1).sort(descending=True)
                inside = p.cumsum(0) - p < top_p[i].double()
                kept &= scaled >= scaled[order[inside]].min()
            row[~kept] = -torch.inf
        return out

    def log_probabilities(self, logits: Tensor, tokens: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        laws = logits.log_softmax(-1)
        own = logits.gather(1, tokens.unsqueeze(1))
        order = logits.argsort(stable=True, dim=-1, descending=True)[:, :count]
        return (
            laws.gather(1, tokens.unsqueeze(1)).squeeze(1), (logits > own).sum(1) + 1, order, laws.gather(1, order),
        )  # fmt: skip

    def draft_loss(
        self,
        draft: Tensor,
        target: Tensor,
        target_rows: Tensor,
        labels: Tensor,
        mass: Tensor,
        ce_weight: Tensor,
        tv_weight: Tensor,
    ) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            logits = draft.float().detach().requires_grad_()
            cross_entropy = F.cross_entropy(logits, labels, reduction="none")
            law = target.float().softmax(-1) * mass.unsqueeze(1)
            distance = (logits.softmax(-1) - law[target_rows]).abs().sum(-1) + 1 - mass[target_rows]
            (ce_weight * cross_entropy + tv_weight * distance).sum().backward()
        assert logits.grad is not None
        draft.copy_(logits.grad)
        return cross_entropy.detach(), distance.detach()


def write_rows(cache: Tensor, slots: Tensor, rows: Tensor) -> None:
    """Store rows [N, Hkv, d] at slots [N] int32 of cache [blocks, C, Hkv, d], in its dtype.

    An e4m3 cache stores values clamped to +-448: a cast alone would turn larger ones into NaN.
    """
    if cache.dtype == torch.float8_e4m3fn:
        largest = torch.finfo(cache.dtype).max
        stored = rows.float().clamp(-largest, largest).to(cache.dtype)
        cache, rows = cache.view(torch.uint8), stored.view(torch.uint8)  # torch copies no e4m3 by index
    cache[_places(cache, slots)] = rows.to(cache.dtype)


def read_rows(cache: Tensor, slots: Tensor) -> Tensor:
    """Rows at slots [...] of cache [blocks, C, Hkv, d], float32 [..., Hkv, d]."""
    if cache.dtype == torch.float8_e4m3fn:
        return cache.view(torch.uint8)[_places(cache, slots)].view(cache.dtype).float()
    return cache[_places(cache, slots)].float()


def _places(cache: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    return slots.long() // cache.shape[1], slots.long() % cache.shape[1]


def _given(coins: Tensor | None) -> Tensor:
    assert coins is not None, "drafts need coins"
    return coins


def _decided(
    p: Tensor, law: Tensor, fine: list[bool], drafted: list[int], coins: Tensor | None, last: Tensor
) -> tuple[int, int, bool]:
    """Count, token and whether it failed, of one request by the ratio rule; p [n + 1, V], law [n, V] float64."""
    for slot, drafted_token in enumerate([*drafted, -1]):
        if not fine[slot]:  # the draft token of this row is accepted, and ends the cycle
            return (slot - 1, drafted[slot - 1], False) if slot else (0, -1, True)
        weights = p[slot]
        if slot < len(drafted):
            if _given(coins)[slot] * law[slot, drafted_token] < p[slot, drafted_token]:
                continue
            left = (p[slot] - law[slot]).clamp(min=0)
            weights = left if left.sum() > 0 else weights
        break
    return slot, _drawn(weights, last[slot]), False


def _decided_jointly(
    p: Tensor, law: Tensor, fine: list[bool], drafted: list[int], coins: Tensor | None, last: Tensor
) -> tuple[int, int, bool]:
    """The same by the block rule."""
    joint, kept, weights = 1.0, 0, p[0]
    end = min([*(slot for slot, each in enumerate(fine) if not each), len(drafted)])
    for slot in range(end + 1):
        left, rest = p[slot], 1.0
        if slot < end:
            left = (joint * p[slot] - law[slot]).clamp(min=0)
            rest = float(left.sum())
            chance = rest / (rest + 1 - joint) if rest + 1 - joint > 0 else 1.0
        else:
            chance = joint
        if slot == 0 or float(_given(coins)[slot - 1]) < chance:
            kept, weights = slot, left if rest > 0 else p[slot]
        if slot < end:
            p_x, q_x = float(p[slot, drafted[slot]]), float(law[slot, drafted[slot]])
            joint = min(1.0, joint * p_x / q_x) if q_x > 0 else 1.0
    if not fine[kept]:  # a draft token with a broken row of its own ends the cycle; so does the anchor's
        return (kept - 1, drafted[kept - 1], False) if kept else (0, -1, True)
    return kept, _drawn(weights, last[kept]), False


def _drawn(weights: Tensor, at: Tensor) -> int:
    """The column of weights [V] float64 whose cell holds `at` in [0, 1), by inverse CDF."""
    edges = weights.cumsum(0)
    below = torch.nextafter(edges[-1], torch.zeros(()).double())
    return int(torch.searchsorted(edges, torch.minimum(at * edges[-1], below), right=True))


def _weighted(weights: Tensor, values: Tensor, hidden: Tensor) -> Tensor:
    """Sums over k of weights [Hkv, G, q, k], 0 where hidden [q, k], times values [k, Hkv, d] -> [q, Hkv, G, d].

    0 times NaN is NaN: values that are not finite are taken out, and the sums of queries that see them are set to NaN.
    """
    finite = values.isfinite()
    sums = torch.einsum("hgqk,khd->qhgd", weights, values.where(finite, 0.0))
    if finite.all():
        return sums
    broken = torch.einsum("qk,khd->qhd", (~hidden).float(), (~finite).float()) > 0
    return sums.masked_fill(broken.unsqueeze(2), torch.nan)


def _rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return normed if weight is None else normed * weight.float()


def _rotate(x: Tensor, cos_sin: Tensor, norm: Tensor | None, eps: float) -> Tensor:
    """x [N, H, d] float32 and cos_sin [N, 1, d] -> [N, H, d], normalised first if there is a norm weight."""
    if norm is not None:
        x = _rms_norm(x, norm, eps)
    cos, sin = cos_sin.chunk(2, dim=-1)
    low, high = x.chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)
