"""DeepSeek-V4 as the roofline sees it, from the dimensions of its releases and the way this server shares it out.

Weights are read as they are stored: 8 bits with a scale for each 128 x 128, 4 bits with one for each 32 columns, and
2 or 4 bytes elsewhere. Heads with their output groups, shared experts, routed experts and the head are divided between
ranks; key and value row, compressors, indexer, gates and stream mixing are whole on each; the drafter is on rank 0
alone. Context rows are whole on every rank, which reads all of them.

Shapes: D width, V vocabulary, F features of an expert, T tokens of context. Bytes, FLOPs.
"""

from dataclasses import dataclass
from typing import Any

from dspark_server.evaluation.roofline import Network, Pair

VOCABULARY = 129_280
HEAD, WINDOW, STREAMS = 512, 128, 4  # channels of a head, tokens of a window, residual streams
INDEX_HEADS, INDEX_HEAD, OUTPUT_RANK = 64, 128, 1024
INDEXED, HEAVY = 4, 128  # tokens of an entry, with an indexer and without
CHOSEN, STAGES, BLOCK = 6, 3, 5  # experts of a token, stages of the drafter, tokens of its block
ROW = 2 * HEAD  # bytes of a row or an entry


@dataclass(frozen=True)
class Matrices:
    """Weights: their number and their bytes."""

    count: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: "Matrices") -> "Matrices":
        return Matrices(self.count + other.count, self.bytes + other.bytes)

    def __mul__(self, times: float) -> "Matrices":
        return Matrices(self.count * times, self.bytes * times)


def eight_bits(rows: int, columns: int) -> Matrices:
    """A matrix in e4m3 with its scales."""
    return Matrices(rows * columns, rows * columns + -(-rows // 128) * -(-columns // 128))


def plain(rows: int, columns: int, size: int = 2) -> Matrices:
    """A matrix in bfloat16, or in float32 (`size` 4)."""
    return Matrices(rows * columns, size * rows * columns)


@dataclass(frozen=True)
class Geometry:
    """Dimensions of a release. `windowed`, `indexed` and `heavy` count its layers by kind.

    `request_bytes` are those of the blocks of a request of 257 tokens, as `dspark-server memory` sums them up.
    """

    name: str
    width: int
    heads: int
    query_rank: int
    groups: int
    experts: int
    features: int
    chosen_entries: int
    markov_rank: int
    windowed: int
    indexed: int
    heavy: int
    request_bytes: float

    @property
    def layers(self) -> int:
        """All kinds together."""
        return self.windowed + self.indexed + self.heavy

    @property
    def expert(self) -> Matrices:
        """A routed expert: packed e2m1, a scale for each 32 columns."""
        count = 3 * self.width * self.features
        return Matrices(count, count / 2 + count / 32)

    def divided(self) -> Matrices:
        """Weights of a layer that ranks share out, routed experts excepted."""
        own = eight_bits(self.heads * HEAD, self.query_rank)
        own += eight_bits(self.groups * OUTPUT_RANK, self.heads * HEAD // self.groups)
        own += eight_bits(self.width, self.groups * OUTPUT_RANK)
        return own + eight_bits(self.features, self.width) * 2 + eight_bits(self.width, self.features)

    def whole(self, ratio: int) -> Matrices:
        """Weights of a layer that every rank has; `ratio` 0: it sees a window alone."""
        mixing = (2 + STREAMS) * STREAMS
        own = eight_bits(self.query_rank, self.width) + eight_bits(HEAD, self.width)
        own += plain(self.experts, self.width) + plain(mixing, STREAMS * self.width, 4) * 2
        if ratio == INDEXED:
            own += plain(2 * HEAD, self.width) * 2 + plain(2 * INDEX_HEAD, self.width) * 2
            own += eight_bits(INDEX_HEADS * INDEX_HEAD, self.query_rank) + plain(INDEX_HEADS, self.width)
        elif ratio == HEAVY:
            own += plain(HEAD, self.width) * 2
        return own

    @property
    def head(self) -> Matrices:
        """The vocabulary's; the embedding is as large, but only looked up."""
        return plain(VOCABULARY, self.width)

    def rows(self, context: int) -> float:
        """Bytes of context that a run of the target reads: windows, entries, keys of the indexer."""
        window = self.layers * min(context, WINDOW) * ROW
        entries = context // INDEXED
        indexed = self.indexed * (min(entries, self.chosen_entries) * ROW + entries * 2 * INDEX_HEAD)
        return window + indexed + self.heavy * (context // HEAVY) * ROW

    def attention_flops(self, context: int) -> float:
        """Of one token, scores and values, all heads and layers."""
        seen = self.layers * min(context, WINDOW) + self.heavy * (context // HEAVY)
        seen += self.indexed * min(context // INDEXED, self.chosen_entries)
        return 4.0 * self.heads * HEAD * seen

    def index_flops(self, context: int) -> float:
        """Of one token, all layers; every rank computes them all, so that all choose the same entries."""
        return 2.0 * INDEX_HEADS * INDEX_HEAD * (context // INDEXED) * self.indexed

    def target(self, context: int) -> Network:
        """The target, where requests have `context` tokens."""
        whole = self.whole(0) * self.windowed + self.whole(INDEXED) * self.indexed + self.whole(HEAVY) * self.heavy
        divided = self.divided() * self.layers + self.head
        return Network(
            layers=self.layers,
            dense=divided.count,
            bytes_per_dense=divided.bytes / divided.count,
            copied=whole.count,
            bytes_per_copied=whole.bytes / whole.count,
            kv_bytes=self.rows(context) / context,
            kv_copied=True,
            pair_flops=self.attention_flops(context) / context,
            copied_pair_flops=self.index_flops(context) / context,
            exchanged=2 * self.width * 2,  # the sum of all ranks' outputs in bfloat16, there and back
            gathered=4 * VOCABULARY,
            **self._experts(),
        )

    def drafter(self, context: int) -> Network:
        """DSpark's stages, the projection of the taps, the head."""
        own = (self.divided() + self.whole(0)) * STAGES + eight_bits(self.width, STAGES * self.width) + self.head
        return self._on_one_rank(own, STAGES, context)

    def single(self, context: int) -> Network:
        """An MTP layer with its two projections, and the head."""
        own = self.divided() + self.whole(0) + eight_bits(self.width, self.width) * 2 + self.head
        return self._on_one_rank(own, 1, context)

    def pair(self, context: int) -> Pair:
        """Target and drafters; the Markov head's second matrix is read for each position."""
        return Pair(
            f"DeepSeek-V4-{self.name}",
            self.target(context),
            self.drafter(context),
            self.single(context),
            gamma=BLOCK,
            sequential_bytes=2.0 * VOCABULARY * self.markov_rank,
            context=context,
            request_bytes=self.request_bytes,
            unread_bytes=2.0 * VOCABULARY * self.width,
            drafter_alone=True,
        )

    def _on_one_rank(self, own: Matrices, stages: int, context: int) -> Network:
        rows = stages * min(context, WINDOW) * ROW
        per_dense = own.bytes / own.count
        return Network(stages, own.count, per_dense, kv_bytes=rows / context, **self._experts())

    def _experts(self) -> dict[str, Any]:
        return {
            "experts": self.experts,
            "experts_per_token": CHOSEN,
            "expert_parameters": self.expert.count,
            "bytes_per_expert_parameter": self.expert.bytes / self.expert.count,
        }


FLASH = Geometry("Flash", 4096, 64, 1024, 8, 256, 2048, 512, 256, 2, 21, 20, request_bytes=66.06e6)
PRO = Geometry("Pro", 7168, 128, 1536, 16, 384, 3072, 1024, 512, 0, 30, 31, request_bytes=98.57e6)
