"""DeepSeek-V4's attention in plain torch: see `interface.Kernels`."""

import torch
from torch import Tensor


class LatentReference:
    """The operations of latent attention, gathered row by row."""

    def latent_rows(
        self,
        x: Tensor,
        norm: Tensor,
        positions: Tensor,
        cos_sin: Tensor,
        eps: float,
        cache: Tensor | None = None,
        slots: Tensor | None = None,
    ) -> Tensor | None:
        rows = _rotate(_normed(x, eps) * norm.float(), cos_sin[positions.long()]).to(norm.dtype)
        if cache is None or slots is None:
            return rows
        _put(cache, slots.long(), rows)
        return None

    def compress(
        self,
        values: Tensor,
        gates: Tensor,
        places: Tensor,
        positions: Tensor,
        query_start: Tensor,
        slots: Tensor,
        raw: Tensor,
        raw_tables: Tensor,
        raw_context: Tensor,
        entries: Tensor,
        entry_tables: Tensor,
        norm: Tensor,
        cos_sin: Tensor,
        eps: float,
    ) -> None:
        at, (ratio, columns), width = positions.long(), places.shape, len(norm)
        spans = columns // width
        _put(raw, slots.long(), torch.cat([values, gates + places[at % ratio]], dim=1))
        closing = ((at + 1) % ratio == 0).nonzero().squeeze(1)
        if not len(closing):
            return
        run, offset = _runs(query_start, len(at))
        run, offset, at = run[closing], offset[closing], at[closing]
        back = torch.arange(1 - spans * ratio, 1, device=at.device)
        known = at.unsqueeze(1) + back >= 0
        place = (raw_context.long()[run] + offset).unsqueeze(1) + back
        values, gates = _get(raw, raw_tables, run.unsqueeze(1), place.clamp(min=0)).chunk(2, dim=-1)
        if spans == 2:  # of the window before the first columns, of its own the last
            values, gates = (
                torch.cat([each[:, :ratio, :width], each[:, ratio:, width:]], dim=1) for each in (values, gates)
            )
        weights = gates.masked_fill(~known.unsqueeze(2), -torch.inf).softmax(1)
        made = _normed((weights * values).sum(1), eps) * norm.float()
        start = at + 1 - ratio
        number, size = start // ratio, entries.shape[1]
        block = entry_tables[run, number // size].long()
        entries[block, number % size, 0] = _rotate(made, cos_sin[start]).to(entries.dtype)

    def choose_entries(
        self,
        queries: Tensor,
        weights: Tensor,
        positions: Tensor,
        query_start: Tensor,
        keys: Tensor,
        tables: Tensor,
        cos_sin: Tensor,
        ratio: int,
        most: int,
        scale: float,
    ) -> Tensor:
        visible, run = (positions.long() + 1) // ratio, _runs(query_start, len(positions))[0]
        number = torch.arange(max(most, int(visible.max())), device=visible.device).expand(len(visible), -1)
        seen = number < visible.unsqueeze(1)
        q = torch.unflatten(queries, 1, (weights.shape[1], -1))
        q = _rotate(q, cos_sin[positions.long()].unsqueeze(1))
        rows = _get(keys, tables, run.unsqueeze(1), torch.where(seen, number, 0)).float()
        products = torch.einsum("nhd,nmd->nhm", q, rows).relu()
        scores = ((weights.unsqueeze(-1) * products).sum(1) * scale).masked_fill(~seen, -torch.inf)
        chosen = torch.sort(scores, dim=1, descending=True, stable=True).indices[:, :most]
        chosen = torch.where(seen.gather(1, chosen), chosen, number.shape[1]).sort(dim=1).values
        return torch.where(chosen < number.shape[1], chosen, -1).int()

    def latent_attention(
        self,
        queries: Tensor,
        positions: Tensor,
        query_start: Tensor,
        cos_sin: Tensor,
        sinks: Tensor,
        window: Tensor,
        tables: Tensor,
        context_len: Tensor,
        seen: int,
        scale: float,
        eps: float,
        first_key: int = 0,
        own: Tensor | None = None,
        entries: Tensor | None = None,
        entry_tables: Tensor | None = None,
        ratio: int = 1,
        chosen: Tensor | None = None,
    ) -> Tensor:
        at, cos_sin = positions.long(), cos_sin[positions.long()].unsqueeze(1)
        run, offset = _runs(query_start, len(at))
        q = _rotate(_normed(torch.unflatten(queries, 1, (len(sinks), -1)), eps), cos_sin)
        if own is None:
            last, place = at, context_len.long()[run] + offset
        else:
            last, place = at - offset - 1, context_len.long()[run] - 1
        back = torch.arange(1 - seen, 1, device=at.device)
        known = [last.unsqueeze(1) + back >= first_key]
        rows = [_get(window, tables, run.unsqueeze(1), (place.unsqueeze(1) + back).clamp(min=0))]
        if own is not None:
            width = len(own) // len(context_len)
            blocks = torch.unflatten(own, 0, (-1, width)).repeat_interleave(width, 0)
            rows.append(blocks)
            known.append(torch.ones(blocks.shape[:2], dtype=torch.bool, device=at.device))
        if entries is not None and entry_tables is not None:
            visible = (at + 1) // ratio
            if chosen is None:
                number = torch.arange(max(1, int(visible.max())), device=at.device).expand(len(at), -1)
            else:
                number = chosen.long()
            known.append((number >= 0) & (number < visible.unsqueeze(1)))
            rows.append(_get(entries, entry_tables, run.unsqueeze(1), torch.where(known[-1], number, 0)))
        every = torch.cat(rows, 1).float()
        scores = (torch.einsum("nhd,nsd->nhs", q, every) * scale).masked_fill(
            ~torch.cat(known, 1).unsqueeze(1), -torch.inf
        )
        every = every.masked_fill(~torch.cat(known, 1).unsqueeze(2), 0)  # a NaN that is not seen stays where it is
        weights = torch.cat([scores, sinks.view(1, -1, 1).expand(len(q), -1, 1)], dim=-1).softmax(-1)[..., :-1]
        out = torch.einsum("nhs,nsd->nhd", weights, every)
        return _rotate(out, cos_sin, sign=-1.0).flatten(1).to(window.dtype)


def _normed(x: Tensor, eps: float) -> Tensor:
    return x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)


def _rotate(x: Tensor, cos_sin: Tensor, sign: float = 1.0) -> Tensor:
    """Rotate pairs (2i, 2i + 1) of the last r channels of x [..., d] by cos_sin [..., r]."""
    cos, sin = cos_sin.chunk(2, dim=-1)
    size = cos_sin.shape[-1]
    even, odd = torch.unflatten(x[..., -size:], -1, (-1, 2)).unbind(-1)
    turned = torch.stack([even * cos - odd * sign * sin, odd * cos + even * sign * sin], dim=-1).flatten(-2)
    return torch.cat([x[..., :-size], turned], dim=-1)


def _runs(query_start: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Each token's run, and its number in it [N]."""
    starts, index = query_start.long(), torch.arange(tokens, device=query_start.device)
    run = torch.searchsorted(starts[1:], index, right=True).clamp(max=len(starts) - 2)
    return run, index - starts[run]


def _put(cache: Tensor, slots: Tensor, rows: Tensor) -> None:
    size = cache.shape[1]
    cache[slots // size, slots % size, 0] = rows.to(cache.dtype)


def _get(cache: Tensor, tables: Tensor, run: Tensor, place: Tensor) -> Tensor:
    size = cache.shape[1]
    block = tables[run, (place // size).clamp(max=tables.shape[1] - 1)].long()
    return cache[block, place % size, 0]
