"""The contract of a kernel set. Everything above `kernels/` depends on this and on nothing else in the package.

Shapes: N tokens in the step, R runs, D hidden size, Hq/Hkv query and key/value heads, d head size, F feed-forward size,
C tokens of a block of the cache, W block-table width, P rows of the rotary table, V vocabulary size, M rows of a matrix
product, K/Nout its input and output features.

Activations and caches are bfloat16 or float32 (on a GPU also float16), all of one dtype in one call, except that a
cache may be float8_e4m3fn where the set `reads_fp8`: rows are clamped to its range when written, and widened when read.
Every computation is done in float32 and rounded once, when it is stored. Rows may be strided, elements within a row are
contiguous. Index tensors are int32.
Arguments are trusted: shapes are checked where the model is built, not on every call of a step.

A padded step (runtime/graphs.py) has runs that are empty (query_start repeats, context_len 0) and tokens that belong to
no run (rows from query_start[R] on, at position 0, which closes no window): attention's results for these are
undefined, and may not disturb any other row. Kernels for a device read nothing on the host and allocate by shapes
alone, whatever the CPU's do: a CUDA graph can hold them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class PackedLinear(Protocol):
    """A weight in a kernel set's own layout; only that kernel set can read it."""

    @property
    def in_features(self) -> int: ...

    @property
    def out_features(self) -> int: ...


class PackedExperts(Protocol):
    """The feed-forwards of E experts in a kernel set's own layout."""

    @property
    def count(self) -> int: ...


@dataclass(frozen=True)
class Favour:
    """A token of each slot of R draft blocks whose logit gets a bias, as long as the block has taken those before it.

    tokens [R, gamma] int64; place [R, gamma] int64: its column; named [R, gamma] bool: whether that column is its own,
    else the column holds the token from now on, at UNNAMED log odds before the bias; bias [R, gamma] float32; following
    [R] bool: the rows that have such tokens at all.
    """

    tokens: Tensor
    place: Tensor
    named: Tensor
    bias: Tensor
    following: Tensor


@dataclass(frozen=True)
class Filters:
    """Filters of rows, in this order: min_p [n] float32 (0: off), top_k [n] int64 (0: off), top_p [n] float32 (1: off).

    Each sees only the tokens that the ones before it left. Ties at an edge stay.
    """

    top_k: Tensor
    top_p: Tensor
    min_p: Tensor


@dataclass(frozen=True, eq=False)
class Rules:
    """Edits of one request's logits (speculation/controls.py), in the order of its fields; None: no such rule.

    allowed [V] bool: no other token may appear. words: bad words one after the other, each its length and its tokens;
    tail: the last tokens of the answer, with which one may have begun. early: tokens that may not appear before
    position `until`. bias [V] float32, added. seen [V] bool, of prompt and answer, and counts [V] float32, of the
    answer (None: all 0), for the penalties. touched: the tokens that are seen or have a bias, each once. Tensors of
    tokens are int64.
    """

    allowed: Tensor | None = None
    words: Tensor | None = None
    tail: Tensor | None = None
    early: Tensor | None = None
    until: int = 0
    bias: Tensor | None = None
    touched: Tensor | None = None
    seen: Tensor | None = None
    counts: Tensor | None = None
    repetition: float = 1.0
    frequency: float = 0.0
    presence: float = 0.0


@dataclass(frozen=True)
class Ruled:
    """The rules of R rows, None where a row has none, for the tokens at `position` [R] int64 and after it.

    drafted [R, E] int64: the draft tokens before `position`, as many for each row. column [V] int32: the column of each
    token, -1: none (None: the token itself).
    """

    rules: Sequence[Rules | None]
    position: Tensor
    drafted: Tensor
    column: Tensor | None = None


@dataclass(frozen=True)
class LayerParts:
    """A decoder layer's weights (models/decoder.py), bfloat16: norms [D] or [d], products packed; window None: none."""

    input_norm: Tensor
    post_attention_norm: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    qkv: PackedLinear
    output: PackedLinear
    gate_up: PackedLinear
    down: PackedLinear
    q_heads: int
    kv_heads: int
    head_dim: int
    window: int | None
    eps: float
    scale: float


class FusedLayer(Protocol):
    """A decoder layer in one call."""

    def __call__(
        self,
        delta: Tensor | None,
        residual: Tensor,
        positions: Tensor,
        cos_sin: Tensor,
        slots: Tensor,
        keys: Tensor,
        values: Tensor,
        query_start: Tensor,
        context_len: Tensor,
        block_tables: Tensor,
        causal: bool,
    ) -> Tensor:
        """The layer's delta [N, D] (which may be `delta`, written over); `residual` [N, D] is updated in place.

        Everything else as in `Kernels`; all but the caches contiguous.
        """
        ...


UNNAMED = -4.0  # log odds of a token that no column stands for


@dataclass(frozen=True)
class DraftedTokens:
    """tokens [R, gamma] int64; law [R, gamma, C] float32: distributions of sampled rows, None without uniforms; on [R,
    gamma] bool: the slots whose token was biased; odds [R, gamma] float32: its log odds before the bias, else 0; usable
    [R] int64: the slots before the first whose logits were not finite.
    """

    tokens: Tensor
    law: Tensor | None
    on: Tensor
    odds: Tensor
    usable: Tensor


class Kernels(Protocol):
    """The operations of a decoder. Calls change nothing in an instance: one serves all threads."""

    @property
    def name(self) -> str:
        """Name for `/version`, metrics and benchmarks: "native-avx512", …, "reference"."""
        ...

    @property
    def build(self) -> str:
        """Identifies the kernels' code and how it was compiled: costs measured with another build do not hold."""
        ...

    threads: int | None  # of a call on the CPU; None: as many as torch is set to use

    @property
    def reads_fp8(self) -> bool:
        """Whether caches may be float8_e4m3fn."""
        ...

    @property
    def ruled(self) -> bool:
        """Whether `draft_tokens` takes rules, and there is `apply_rules`."""
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x / rms(x) * weight. x [N, D] (rows may be strided), weight [D] -> [N, D]."""
        ...

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        """`residual += x` in place, rounded to its dtype; returns rms_norm(residual). All [N, D], weight [D]."""
        ...

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
        """Rotate q in place; write rotated k, and v, to the cache.

        qkv [N, (Hq + 2 Hkv) * d], or [N, (Hq + Hkv) * d] where v is k before norm and rotation; positions [N] int32,
        cos_sin [P, d] float32 (d/2 cosines, then d/2 sines; element i is paired with i + d/2), slots [N] int32 (block *
        C + offset), keys and values as in `paged_attention`. `num_q_heads` may be 0: the rows then hold k and v
        alone; so may Hkv: they hold q alone, and nothing is written. With q_norm or k_norm [d], each head of q or k is
        RMS-normalised first; with `value_norm` each head of v, without a weight.
        """
        ...

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
        """Attention of every run's queries over its own paged keys and values -> [N, Hq * d].

        qkv [N, at least Hq * d] (queries come first in a row), keys and values [blocks, C, Hkv, d], contiguous but for
        the blocks, whose distance is the same in both; query_start [R+1] int32, context_len [R] int32, block_tables
        [R, W] int32. The run's own tokens are already in the cache:
        run r has context_len[r] + q_len keys. Causal: query i sees keys 0 .. context_len + i. Not causal (a DSpark
        draft block): each query sees all keys of its run. `window` further hides keys at or before position - window.
        With `softcap`, a scaled score becomes softcap * tanh(score / softcap). No query sees keys before `first_key`;
        the result of one that sees none is undefined.

        A key or value that is NaN or infinite does not change queries that do not see it, bit for bit; a query that
        sees a value which is not finite has a result that is not finite (`flash` alone guarantees less).
        """
        ...

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """silu(gate) * up. gate_up [N, 2F], the gate first -> [N, F]."""
        ...

    def gelu_tanh_mul(self, gate_up: Tensor) -> Tensor:
        """gelu(gate) * up, by the approximation with tanh. gate_up [N, 2F], the gate first -> [N, F]."""
        ...

    def norm_add(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, scale: float = 1.0) -> None:
        """`residual` = (residual + rms_norm(x)) * scale in place; each step is rounded. x and residual [N, D]."""
        ...

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
        """Read a layer's input from n residual streams (DeepSeek-V4, hyper-connections).

        streams [N, n D], fn [(2 + n) n, n D], base [(2 + n) n] and scale [3] float32, norm [D]. m = fn rms(streams);
        pre = sigmoid(m[:n] scale_0 + base) + floor, post = 2 sigmoid(m[n:2n] scale_1 + base), mixing the softmax of
        rows of m[2n:] scale_2 + base, plus floor, after `iterations` of Sinkhorn's, columns first. Returns
        rms_norm(sum_j pre_j X_j) [N, D], whose sum is rounded first, post [N, n] and mixing [N, n, n] float32.
        """
        ...

    def write_streams(self, streams: Tensor, output: Tensor, post: Tensor, mixing: Tensor) -> None:
        """Write a layer's output [N, D] into streams [N, n D], in place: X'_k = post_k output + sum_j mixing_jk X_j."""
        ...

    def score_experts(
        self, logits: Tensor, bias: Tensor | None, chosen: Tensor | None, count: int, scale: float
    ) -> tuple[Tensor, Tensor]:
        """A router's choice (DeepSeek-V4): experts [N, count] int32, best first, and their shares [N, count] float32.

        logits [N, E] float32 contiguous; an expert's score is sqrt(softplus(logit)). Those with the highest scores plus
        bias [E] are chosen, of equal ones the lower, or, without a bias, the `chosen` [N, count]. Shares are scores
        over their sum, times `scale`.
        """
        ...

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
        """Rows that are key and value in one (DeepSeek-V4): norm(x), whose last r channels are rotated.

        x [N, d] float32 (rows may be strided), norm [d], positions [N] int32, cos_sin [P, r] float32 (r/2 cosines, then
        r/2 sines; pairs are 2i, 2i + 1). Writes them to `cache` [blocks, C, 1, d] at slots [N] int32, or returns them
        [N, d].
        """
        ...

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
        """Keep what tokens bring to compressed entries, and write the entries of windows that they close.

        values and gates [N, s w] float32 (rows may be strided), s 1 or 2; places [ratio, s w] float32 are added to
        gates by position in the window. They go to raw [blocks, C, 1, 2 s w] float32 at slots [N], with raw_tables [R,
        W] and raw_context [R], as in `paged_attention`. An entry [w] is, by channel, the softmax of gates times values
        over the `ratio` tokens of its window, and with s = 2 over those of the window before, which then have the first
        w columns, normalised and rotated at the window's first position. Entry e of a run lies at e of entry_tables, in
        entries [blocks, C, 1, w].
        """
        ...

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
        """The `most` entries of greatest score of each token -> [N, most] int32, ascending, -1 behind the last.

        queries [N, H d] float32, which are rotated first; weights [N, H] float32 (rows of both may be strided); keys
        [blocks, C, 1, d] and tables [R, W]. The score of an entry is scale * sum_h weights_h relu(q_h . key); a token
        at p sees (p + 1) // ratio of them, and of equal scores the lower entries are chosen.
        """
        ...

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
        """Attention over the last `seen` rows, and entries -> [N, H d], rotated back at the queries' positions.

        queries [N, H d] float32 (rows may be strided), each head normalised and rotated first; sinks [H] float32, the
        logit of a row of zeros that every query sees; window [blocks, C, 1, d] with tables and context_len as in
        `paged_attention`; no row before `first_key` is seen. With `own` [N, d] the runs are draft blocks of one width:
        each query sees the window before its run, and all own rows of it. Of entries [blocks, C, 1, d], found by
        entry_tables, a token at p sees the first (p + 1) // ratio, or those of them that are `chosen` [N, K].
        """
        ...

    def argmax(self, logits: Tensor) -> Tensor:
        """The lowest index of each row's maximum; a NaN counts as the maximum. logits [M, V] -> [M] int64."""
        ...

    def pack_linear(self, weight: Tensor, bias: Tensor | None = None) -> PackedLinear:
        """Copy weight [Nout, K] bfloat16 and bias [Nout] once into this kernel set's own layout."""
        ...

    def linear(self, x: Tensor, packed: PackedLinear, out_dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """x weight^T + bias, accumulated in float32. x [M, K] bfloat16 -> [M, Nout] bfloat16 or float32.

        A row's result does not depend on M, nor on the other rows.
        """
        ...

    def pack_experts(self, count: int, experts: Iterable[tuple[Tensor, Tensor]]) -> PackedExperts:
        """Copy gate_up [2F, D], the gates first, and down [D, F] of `count` experts into this kernel set's own layout.

        They are taken one after the other, so that no more than one exists twice.
        """
        ...

    def experts(
        self, x: Tensor, packed: PackedExperts, chosen: Tensor, shares: Tensor, limit: float | None = None
    ) -> Tensor:
        """Sum of the outputs of each token's experts, times their shares -> [N, D].

        x [N, D]; chosen [N, K] int32: a token's experts, each another; shares [N, K] float32. An expert is
        down(silu(gate x) * up x); gate, up and what goes into down are rounded, the K outputs are not. With a `limit`
        gate x is at most that, and up x within +-limit. A number from E on is that of another rank's expert, and adds
        nothing. A token's result does not depend on N, nor on the other tokens.
        """
        ...

    def fuse_layer(self, parts: LayerParts) -> FusedLayer | None:
        """The layer in one call, with the results of the single operations; None if the kernel set has none."""
        ...

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
        """Draw whole blocks left to right under the vanilla Markov head (DSpark §3.2).

        base [R, gamma, C] float32; anchors [R] int64; names [C] int64: the token of each column (None: the column);
        head: W1 [V, r] and the packed W2 [C, r], or None; slot k's logits are base + W1[x_{k-1}] W2.
        inverse_temperature [R] float32, 0 for a greedy row; uniforms [R, gamma] float64 draw the others' tokens by
        inverse CDF (None: all are greedy), after their `filters`. A slot's logits are edited by what is `ruled` for it,
        the draft tokens before it included; one whose rules leave no token is not usable.
        """
        ...

    def apply_rules(self, logits: Tensor, start: Tensor, lengths: Tensor, tokens: Tensor, ruled: Ruled) -> None:
        """Edit rows of logits [M, V] float32 in place, `start`, `lengths` and `tokens` as in `accept_drafts`.

        Row start[i] + k is that of the token after draft token k of request i, and after all of its `drafted`.
        """
        ...

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
        """Accept or reject n requests' drafts, for plain softmaxes of the target: token by token by the ratio rule
        (DSpark §3.2.2), or `jointly` by the block rule (Sun et al., arXiv 2403.10444; speculation/acceptance.py).

        logits [M, V] float32 contiguous: request i owns rows start[i] .. start[i] + lengths[i]; tokens [n, L] int64, L
        the longest of lengths; inverse_temperature [n] float32, positive; q [Rd, gamma, C] float32 contiguous: the
        distributions from which the tokens were drawn, row [n] the index of each request's (None: one-hot at the
        token); names [Rd, gamma, C] int64 (may be expanded; C contiguous): the token of each column of q, None: the
        column; coins [n, L] and last [n, L + 1] float64, uniform (coins None where nothing was drafted). Returns count
        [n] int64 of accepted tokens, token [n] int64 that follows them (-1 of a failed request), failed [n] bool: the
        request's first row is broken, it holds NaN or +inf, or nothing but -inf. A later row that is broken and would
        decide belongs to an accepted draft token: `token` is that one, and it is not counted. Jointly, coins[i, k] is
        that of the node after draft token k + 1, and a broken row ends its block: the nodes before it are judged as if
        it had no more draft tokens.
        """
        ...

    def filter_logits(self, logits: Tensor, rows: Tensor, inverse_temperature: Tensor, filters: Filters) -> Tensor:
        """Rows of logits, with -inf where a filter removes a token.

        logits [M, V] float32 contiguous; rows [n] int64 into M; inverse_temperature [n] float32, positive: filters look
        at logits times it. Returns [n, V] float32, not scaled. Rows that hold NaN or +inf come back unchanged.
        """
        ...

    def log_probabilities(self, logits: Tensor, tokens: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Natural log-probabilities of rows of finite logits [n, V] float32 contiguous.

        tokens [n] int64, one of each row. Returns theirs [n] float32, their ranks [n] int64 (1: most likely), and the
        `count` <= V most likely tokens [n, count] int64 of each row in falling order, of equal ones the lower first,
        with theirs [n, count] float32.
        """
        ...

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
        """Loss of a drafter's logits, and its gradient (DSpark §3.3); training only.

        draft [M, V] and target [U, V] contiguous logits, each float32 or bfloat16; row i of draft is compared with row
        target_rows[i] of target; target_rows, labels [M] int64; weights [M] float32. mass [U] float32 is the share of
        the target's distribution in the V columns, 1 if they are the whole vocabulary. With p the softmax of draft and
        t that of target times its mass, returns the cross-entropy of p on the label and the L1 distance of the two
        distributions, |p - t| + 1 - mass, both [M] float32, and overwrites `draft` with the gradient of sum(ce_weight *
        cross_entropy + tv_weight * distance).
        """
        ...
