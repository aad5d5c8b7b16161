"""Divides the tokens that a step has for prefill among the prompts in progress."""

from collections.abc import Iterable, Sequence

from dspark_server.engine.queue import is_last, rank
from dspark_server.engine.request import Request


def prefill_chunks(prompts: Sequence[Request], room: int) -> dict[Request, int]:
    """Number of tokens, at least 1, that each of `prompts` runs in this step; at most `room` together.

    Tenants get equal shares; a tenant that needs less leaves the rest to the others. Half of a share goes to the
    tenant's prompts in order of rank, so that a long one always advances; the other half to those with the fewest
    tokens left, so that a short one never waits for a long one. Requests of the last priority share what is left over.
    """
    chunks: dict[Request, int] = {}
    for last in (False, True):
        lines: dict[str, list[Request]] = {}
        for request in sorted((each for each in prompts if is_last(each) == last), key=rank):
            lines.setdefault(request.tenant, []).append(request)
        served = list(lines.values())[:room]  # no share is less than one token
        wanted = [sum(request.pending for request in line) for line in served]
        shares = equal_shares(wanted, room)
        for line, share in zip(served, shares, strict=True):
            _divide(line, share, chunks)
        room -= sum(shares)
    return chunks


def equal_shares(wanted: Sequence[int], room: int) -> list[int]:
    """The largest equal shares of `room` of which none exceeds what is wanted (max-min fairness)."""
    shares = [0] * len(wanted)
    for place, index in enumerate(sorted(range(len(wanted)), key=wanted.__getitem__)):
        shares[index] = min(wanted[index], room // (len(wanted) - place))
        room -= shares[index]
    return shares


def _divide(line: Sequence[Request], share: int, chunks: dict[Request, int]) -> None:
    """Divide a tenant's share: half by rank, the other half by the number of prompt tokens left."""
    by_rank = -(-share // 2)
    left = _fill(line, by_rank, chunks) + share - by_rank
    _fill(sorted(line, key=lambda request: request.pending - chunks.get(request, 0)), left, chunks)


def _fill(line: Iterable[Request], room: int, chunks: dict[Request, int]) -> int:
    """Give each request in turn its pending tokens; returns the unused part of `room`."""
    for request in line:
        chunk = min(request.pending - chunks.get(request, 0), room)
        if chunk:
            chunks[request] = chunks.get(request, 0) + chunk
            room -= chunk
    return room
