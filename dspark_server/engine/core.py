"""Builds an engine from its configuration: model, drafter, KV pool, batcher, step loop."""

import importlib.util
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dspark_kernels import Kernels
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from dspark_server import failpoints
from dspark_server.config import EngineConfig, SpeculativeConfig
from dspark_server.engine.batcher import Batcher
from dspark_server.engine.blocks import BlockPool, chain_root
from dspark_server.engine.build import Place, build_executor
from dspark_server.engine.device_executor import DeviceExecutor
from dspark_server.engine.executor import Executor, TorchExecutor
from dspark_server.engine.profile import profile
from dspark_server.engine.ranks import LeadingExecutor, announce
from dspark_server.engine.request import FinishReason, Request, SamplingParams
from dspark_server.engine.stats import EngineStats
from dspark_server.engine.step import StepLoop
from dspark_server.engine.threads import ThreadCount
from dspark_server.engine.trace import StepOutput
from dspark_server.errors import CheckpointError, ConfigError
from dspark_server.models.decoder import Decoder
from dspark_server.models.ends import end_tokens
from dspark_server.models.fields import read_json
from dspark_server.models.generation import Defaults, sampling_defaults
from dspark_server.models.hub import cache_dir, resolve_model, shipped_drafter
from dspark_server.models.registry import family_of
from dspark_server.runtime.backend import threads_in_use, use_threads
from dspark_server.runtime.device import Device
from dspark_server.runtime.group import ONE_RANK, Group, TorchGroup
from dspark_server.runtime.kv import KVPool
from dspark_server.speculation.copy_drafter import Copying
from dspark_server.speculation.copying import ContextIndex, CopyTables
from dspark_server.speculation.cost_model import CostModel, Profile
from dspark_server.speculation.drafter import Drafter, NoDrafter
from dspark_server.speculation.families import load_drafter, load_own, own_stages
from dspark_server.speculation.selection import POLICIES, Selection, build_selection

logger = logging.getLogger(__name__)

# A tokenizer has at least one of these.
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


@dataclass(eq=False)
class EngineCore:
    """Everything the step thread owns, and the facts that `AsyncEngine` needs to check a request."""

    config: EngineConfig
    place: Place
    loop: StepLoop
    model_name: str
    max_model_len: int
    vocab_size: int
    tokenizer: PreTrainedTokenizerBase | None  # None: the checkpoint has none, prompts can only be token ids
    eos_token_ids: frozenset[int]  # of the checkpoint's configuration and of the tokenizer
    sampling_defaults: Defaults  # of requests that leave these fields out
    cache_identity: str
    cache_dtype: str
    backend: str
    speculation: str  # drafter and policy, as text for people
    drafter: str | None  # the method of the drafter in use; None without one
    threads: ThreadCount | None = None  # None: the number is set by OMP_NUM_THREADS, or a GPU computes

    @property
    def batcher(self) -> Batcher:
        """The batcher of the step loop."""
        return self.loop.batcher

    @property
    def cache_info(self) -> dict[str, str]:
        """Facts about the KV cache, under vLLM's names (`num_gpu_blocks` also on a CPU)."""
        pool = self.batcher.pool
        return {
            "block_size": str(pool.segment_size),
            "cache_dtype": self.cache_dtype,
            "enable_prefix_caching": str(self.config.enable_prefix_caching),
            "num_gpu_blocks": str(pool.num_blocks),
        }

    @classmethod
    def load(
        cls,
        config: EngineConfig,
        costs: Profile | None = None,
        group: Group = ONE_RANK,
        *,
        device: Device | None = None,
        kernels: Kernels | None = None,
        **loop_options: Any,
    ) -> "EngineCore":
        """Load weights and tokenizer, allocate the KV pool, measure step costs (or use `costs`).

        Runs on rank 0 of the group; the other ranks run `follow`. `device` and `kernels` replace those that the
        configuration names; `loop_options` go to StepLoop.

        Raises CheckpointError for a model that cannot be read, ConfigError for settings that do not fit it.
        """
        failpoints.hit("engine.load")
        place = Place.choose(config, group, device, kernels)
        threads = None if place.device or "OMP_NUM_THREADS" in os.environ else ThreadCount(threads_in_use())
        count = threads.count if threads else threads_in_use()
        if not place.device:
            use_threads(count, place.kernels, products=False)  # torch reads the weights
        if isinstance(group, TorchGroup):
            announce(place.directory, place.dtype, config, group)
        target = place.load_target(config.max_model_len)
        if config.enable_expert_parallel and not (target.config.has_experts and group.size > 1):
            logger.info("--enable-expert-parallel changes nothing: no routed experts, or no ranks to share them")
        tokenizer = _tokenizer(config, place.directory, target.config.vocab_size)
        defaults = _sampling_defaults(config, place.directory)
        drafter = _drafter(config.speculative, target, place)
        if not place.device:
            place.use_threads(count)
        own = build_executor(config, target, drafter, place)
        executor = LeadingExecutor(own, group) if isinstance(group, TorchGroup) else own
        backend = _backend(own, place)
        batcher = Batcher(
            BlockPool(own.pool.num_blocks, own.pool.groups, prefix_caching=config.enable_prefix_caching),
            EngineStats(),
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            gamma=executor.gamma,
        )
        _check_pool(batcher, config, target.max_model_len)
        policy = config.speculative.selection if executor.gamma else "none"
        cache_identity = f"{place.directory}|{place.dtype}|{place.stored}|{drafter.identity}"
        cost_model = None
        if policy in ("causal", "lagged"):
            drafts = f"{config.speculative.model}|{executor.block}|{config.speculative.shortlist}"
            experts = "whole" if config.enable_expert_parallel else "parts"
            identity = f"{cache_identity}|{drafts}|{backend}|{experts}|{place.kernels.build}|{threads_in_use()}"
            measured = costs or _profile(config, executor, own.pool, target, identity)
            cost_model = CostModel(measured, config.max_num_batched_tokens, config.max_num_seqs)
        loop = StepLoop(
            batcher,
            executor,
            _selection(policy, cost_model, config.speculative),
            cost_model=cost_model,
            max_draft_tokens=config.speculative.num_speculative_tokens,
            copying=drafter if isinstance(drafter, Copying) else None,
            kernels=place.kernels,
            check_invariants=config.check_invariants,
            **loop_options,
        )
        return cls(
            config=config,
            place=place,
            loop=loop,
            model_name=config.served_model_name or config.model,
            max_model_len=target.max_model_len,
            vocab_size=target.config.vocab_size,
            tokenizer=tokenizer,
            eos_token_ids=end_tokens(tokenizer, target.config.eos_token_ids),
            sampling_defaults=defaults,
            cache_identity=cache_identity,
            cache_dtype=str(place.stored).removeprefix("torch."),
            backend=backend,
            speculation=_described(config.speculative, drafter, policy),
            drafter=drafter.method if executor.gamma else None,
            threads=threads,
        )

    @property
    def policies(self) -> tuple[str, ...]:
        """Policies that `select` accepts: without a drafter only "none", without a cost model none that uses costs."""
        if not self.loop.executor.gamma:
            return ("none",)
        return POLICIES if self.loop.cost_model else ("fixed", "threshold", "none")

    def follow_processors(self) -> None:
        """Adapt the number of compute threads to the usable processors. Step thread only, after a step."""
        cost_model = self.loop.cost_model
        if self.threads and self.threads.stepped(cost_model.slowdown if cost_model else 1.0):
            self.place.use_threads(self.threads.count)

    def select(self, policy: str) -> None:
        """Use another policy from the next step on; it starts without any history. Step thread only."""
        assert policy in self.policies
        self.loop.select_by(_selection(policy, self.loop.cost_model, self.config.speculative))

    def new_request(
        self,
        prompt: list[int],
        params: SamplingParams,
        *,
        id: str = "",
        nonce: int,
        choice: int = 0,
        salt: str = "",
        leader: Request | None = None,
        tenant: str = "",
    ) -> Request:
        """A request ready to be queued; the caller has checked that it fits. `prompt` is kept and must not change.

        `leader` is an earlier request for the same prompt, with the same rules, tenant and salt: both share everything
        that depends on these alone.
        """
        goes_on = params.ignore_eos and params.grammar is None  # a grammar itself determines the end of an answer
        eos = frozenset[int]() if goes_on else self.eos_token_ids
        stop_ids = params.stop_token_ids | eos
        return Request(
            id=id,
            prompt_length=len(prompt),
            tokens=prompt,
            params=params,
            stop_ids=stop_ids,
            controls=params.controls(self.vocab_size, prompt, stop_ids, None if leader is None else leader.controls),
            context=ContextIndex(len(prompt), None if leader is None else leader.context.prompt),
            leader=leader,
            chain_root=chain_root(self.cache_identity, tenant, salt) if leader is None else leader.chain_root,
            tenant=tenant,
            nonce=nonce,
            choice=choice,
        )

    def generate(self, prompts: list[list[int]], params: SamplingParams | list[SamplingParams]) -> list[list[int]]:
        """Offline: run all prompts to their end and return their output tokens, in order."""
        each = params if isinstance(params, list) else [params] * len(prompts)
        requests = [
            self.new_request(prompt, own, nonce=index)
            for index, (prompt, own) in enumerate(zip(prompts, each, strict=True))
        ]
        for request in requests:
            self.batcher.check_fits(request.prompt_length, request.params.max_tokens)
            self.batcher.add(request)
        while self.loop.has_work:
            self.loop.step()
        return [request.output for request in requests]

    def fail_step(self, message: str) -> list[StepOutput]:
        """After a failed step: end each request it touched with an error. Waiting requests are not affected."""
        touched = self.batcher.recover()
        for request in touched:
            request.finish_reason = FinishReason.ERROR
            request.error = message
        self.batcher.update_gauges()
        return [StepOutput(request, []) for request in touched]


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer. Raises CheckpointError if there is none."""
    lone = (directory / "tokenizer.model").is_file() and not (directory / "tokenizer.json").is_file()
    if lone and importlib.util.find_spec("sentencepiece") is None:
        raise CheckpointError(
            f"{directory} has a tokenizer.model (SentencePiece) and no tokenizer.json: take the model's own, "
            "or pip install sentencepiece protobuf, with which transformers converts it"
        )
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(directory, config=_bare_config(directory))
    except Exception as error:  # transformers raises exceptions of any type
        why = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"{directory} has no usable tokenizer: {why}") from error
    # Prompts longer than the training length are refused by `AsyncEngine`, with its own message.
    tokenizer.model_max_length = 1 << 60
    return tokenizer


def _bare_config(directory: Path) -> PreTrainedConfig | None:
    """The model's fields, for a tokenizer whose own file names its class; None: AutoTokenizer reads the configuration.

    It would import the model's configuration class, and with it torch's compiler and much else: seconds of each start.
    """
    try:
        own = read_json(directory / "tokenizer_config.json")
        if "tokenizer_class" in own and "auto_map" not in own:
            fields = read_json(directory / "config.json")
            return PreTrainedConfig.from_dict(fields | {"_name_or_path": str(directory)})
    except (CheckpointError, ValueError, TypeError, AttributeError):  # AutoTokenizer says what is wrong
        pass
    return None


def _tokenizer(config: EngineConfig, directory: Path, vocab_size: int) -> PreTrainedTokenizerBase | None:
    """The configured tokenizer, or the checkpoint's own; None if it has none.

    Raises CheckpointError if it cannot be read, ConfigError if it has tokens that the model does not know.
    """
    if config.tokenizer is None:
        has_own = any((directory / name).is_file() for name in TOKENIZER_FILES)
        return _with_template(load_tokenizer(directory), directory) if has_own else None
    tokenizer = _with_template(load_tokenizer(resolve_model(config.tokenizer, weights=False)), directory)
    if len(tokenizer) > vocab_size:
        raise ConfigError(
            f"--tokenizer {config.tokenizer} has {len(tokenizer)} tokens, but the model knows {vocab_size}: it belongs "
            "to another model."
        )
    return tokenizer


def _with_template(tokenizer: PreTrainedTokenizerBase, directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer, with the chat template of the model's family where checkpoints have none."""
    own = family_of(directory).chat_template
    if own is not None and tokenizer.chat_template is None:
        tokenizer.chat_template = own.read_text(encoding="utf-8")
    return tokenizer


def _sampling_defaults(config: EngineConfig, directory: Path) -> Defaults:
    defaults = sampling_defaults(config.generation_config, directory)
    if defaults:
        logger.info(
            "generation_config.json: requests get %s where they say nothing else (not so: --generation-config vllm)",
            ", ".join(f"{name} {value:g}" for name, value in defaults.items()),
        )
    return defaults


def _drafter(config: SpeculativeConfig, target: Decoder, place: Place) -> Drafter:
    if config.method == "none":
        return NoDrafter()
    copies_only = Copying(NoDrafter(), CopyTables()) if config.copying else NoDrafter()
    if config.method == "ngram":
        return copies_only
    if config.model:
        where = resolve_model(config.model)
    elif stages := own_stages(place.directory, target.config):
        own = load_own(stages, target, place.directory, place.dtype, place.kernels, config)
        return Copying(own, own.copying) if own.copying else own
    else:
        shipped = shipped_drafter(place.directory)
        if shipped is None and config.method == "auto":
            return copies_only
        if shipped is None:
            raise ConfigError(
                f'no drafter ships for this model: name one, {{"method": "{config.method}", "model": "DIR"}}.'
            )
        where = shipped
    drafter = load_drafter(where, target, place.directory, place.dtype, place.kernels, config)
    return Copying(drafter, drafter.copying) if drafter.copying else drafter


def _profile(config: EngineConfig, executor: Executor, pool: KVPool, target: Decoder, identity: str) -> Profile:
    """The cost profile of this machine, measured or kept."""
    return profile(
        executor,
        num_blocks=pool.num_blocks,
        groups=pool.groups,
        max_model_len=target.max_model_len,
        vocab_size=target.config.vocab_size,
        max_tokens=config.max_num_batched_tokens,
        max_requests=config.max_num_seqs,
        directory=cache_dir() / "profiles",
        identity=identity,
        again=config.measure_costs_again,
    )


def _backend(executor: TorchExecutor | DeviceExecutor, place: Place) -> str:
    """Description of the backend, for people and for the identity of profiles."""
    dtype = str(place.dtype).removeprefix("torch.")
    backend = f"{place.kernels.name}, {executor.target.head.linear.backend} linear, {dtype}"
    if isinstance(executor, DeviceExecutor):
        backend = f"{executor.device.label}, {backend}, {len(executor.passes.sizes)} graph sizes"
    return f"{backend}, {place.group.size} ranks" if place.group.size > 1 else backend


def _described(config: SpeculativeConfig, drafter: Drafter, policy: str) -> str:
    if drafter.block:
        return f"drafter {config.model or 'of its own'}, selection {policy}"
    return "no drafter" if not drafter.gamma else f"copies of the context, selection {policy}"


def _selection(policy: str, cost_model: CostModel | None, config: SpeculativeConfig) -> Selection:
    return build_selection(policy, cost_model, threshold=config.threshold, floor=config.min_user_tokens_per_second)


def _check_pool(batcher: Batcher, config: EngineConfig, max_model_len: int) -> None:
    pool = batcher.pool
    sizes = " and ".join(str(group.block_size) for group in pool.groups)
    if len(pool.groups) > 1 and pool.prefix_caching and pool.segment_size > max_model_len:
        raise ConfigError(
            f"--block-size {config.block_size}: blocks of this model's layers hold {sizes} tokens, so the shortest "
            f"prefix that all of them can serve has {pool.segment_size}, more than --max-model-len {max_model_len}. "
            "Lower it, or set --no-enable-prefix-caching."
        )
    if batcher.longest_request <= 1:
        raise ConfigError(
            f"The KV cache has room for {pool.num_blocks} blocks of {sizes} tokens, too few for one request; "
            "raise kv_cache_memory_bytes."
        )
