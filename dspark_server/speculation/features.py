"""Rows of features in the KV pool: what the target knew at each token, for drafters that pair it with the next token.

The row of token i goes to the place of token i, so the one before any run is found by its block table, after a prefix
hit, a chunk of a prompt, a preemption or a rejected draft alike: none of them keeps a state of its own.

Shapes: N tokens of a pass, R runs, D features.
"""

from torch import Tensor

from dspark_server.runtime.batch import Batch
from dspark_server.runtime.kv import LayerCache


def keep(features: Tensor, batch: Batch, cache: LayerCache) -> Tensor:
    """Write the features [N, D] of a pass's tokens; gives those of the token before each [N, D].

    The first token of a sequence has none before it: its row is arbitrary.
    """
    slots, size = batch.paging[cache.group].slots.long(), cache.keys.shape[1]
    cache.keys[slots // size, slots % size, 0] = features
    before = features.new_empty(len(features) + 1, features.shape[1])
    before[1:] = features
    # Empty runs, of a padded step, come last: theirs is the row of a token that belongs to no run, or the one too many.
    before[batch.query_start[:-1].long()] = last(batch, cache)
    return before[:-1]


def last(batch: Batch, cache: LayerCache) -> Tensor:
    """Features [R, D] of the token before each run."""
    paging, size = batch.paging[cache.group], cache.keys.shape[1]
    place = (paging.context_len - 1).clamp(min=0).long()
    block = paging.block_tables.gather(1, (place // size).unsqueeze(1)).squeeze(1).long()
    return cache.keys[block, place % size, 0]
