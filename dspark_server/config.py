"""The engine's settings. The command line, a file and the environment set them; everything below reads them."""

from dataclasses import dataclass

from dspark_server.errors import ConfigError
from dspark_server.settings import build, check, read_object, setting

METHODS = ("auto", "dspark", "dflash", "dflash2", "eagle3", "mtp", "ngram", "none")
ACCEPTANCE = ("block", "ratio")
TAP_CONVENTIONS = ("auto", "inputs", "outputs")
SELECTIONS = ("causal", "lagged", "fixed", "threshold", "none")
DTYPES = ("auto", "bfloat16", "float16", "float32")
DEVICES = ("auto", "cpu", "cuda")
ATTENTION = ("auto", "flash-attn", "triton")
CACHE_DTYPES = ("auto", "bfloat16", "float16", "fp8")
DEFAULT_CACHE_BYTES = 2 << 30  # of the KV pool on a CPU
UTILIZATION = 0.9  # of a GPU's memory, as in vLLM


@dataclass(frozen=True)
class SpeculativeConfig:
    """`--speculative-config`: the drafter, and the selection policy."""

    method: str = setting(
        "auto",
        "Where drafts come from: a DSpark, DFlash, Eagle3 or MTP drafter, a greedy request's own text where it "
        "repeats itself (ngram), the drafter that is named, or ships for the model, or else ngram (auto), or nowhere "
        "(none).",
        group="Speculation",
        choices=METHODS,
    )
    model: str | None = setting(None, "Directory or Hugging Face id of the drafter.", group="Speculation")
    num_speculative_tokens: int | None = setting(
        None, "Most draft tokens of a block; default: what the drafter was trained for.", group="Speculation", minimum=1
    )
    tap_convention: str = setting(
        "auto",
        "What an Eagle3 drafter's layer numbers mean: the outputs of these layers or their inputs (vLLM); auto: what "
        "those who wrote the checkpoint mean.",
        group="Speculation",
        choices=TAP_CONVENTIONS,
    )
    selection: str = setting(
        "causal",
        "What the target verifies: what pays at the present load (causal, or lagged by two steps), the whole block "
        "(fixed), likely prefixes (threshold), nothing (none).",
        group="Speculation",
        choices=SELECTIONS,
    )
    acceptance: str = setting(
        "block",
        "The rule for sampled requests without a seed: joint over a draft block, which accepts more (block), or token "
        "by token (ratio). Both are lossless.",
        group="Speculation",
        choices=ACCEPTANCE,
    )
    threshold: float = setting(
        0.5, "Survival that selection threshold asks for.", group="Speculation", minimum=0, maximum=1
    )
    min_user_tokens_per_second: float | None = setting(
        None,
        "Fewer drafts, of causal and lagged, where a step would take longer than leaves every user that much.",
        group="Speculation",
        above=0,
    )
    shortlist: int | None = setting(
        None,
        "Candidates a draft position is chosen from; default: the whole vocabulary.",
        group="Speculation",
        minimum=1,
    )
    copying: bool = setting(
        True,
        "Drafts may also come from where the same tokens stood before in prompt and answer.",
        group="Speculation",
    )

    def __post_init__(self) -> None:
        check(self, prefix="")
        if self.method == "ngram" and not self.copying:
            raise ConfigError("method ngram drafts by copying: leave out copying, or say method none.")
        if self.method in ("ngram", "none") and self.model:
            raise ConfigError(f'method {self.method!r} takes no drafter: say {{"model": "DIR"}}.')

    @classmethod
    def parse(cls, text: str) -> "SpeculativeConfig":
        """Read a JSON object. Raises ConfigError for anything but an object of known keys and fitting values."""
        where = "--speculative-config"
        return build(cls, read_object(text, where), where)


@dataclass(frozen=True)
class EngineConfig:
    """The engine's settings. Sizes are in tokens unless they say otherwise."""

    model: str = setting(
        "SmolLM2-135M-Instruct",
        "A model directory, a Hugging Face id, or SmolLM2-135M-Instruct (embedded).",
        group="Model",
    )
    served_model_name: str | None = setting(None, "Name that clients use; default: MODEL.", group="Model")
    tokenizer: str | None = setting(
        None, "Directory or Hugging Face id of another tokenizer; default: the model's own.", group="Model"
    )
    revision: str | None = setting(None, "Branch, tag or commit of a model from the Hugging Face Hub.", group="Model")
    dtype: str = setting(
        "auto",
        "Type of weights and activations; auto: the checkpoint's. float16 needs a GPU.",
        group="Model",
        choices=DTYPES,
    )
    max_model_len: int | None = setting(
        None, "Longest sequence, in tokens; default: what the model can.", group="Model", minimum=1
    )
    generation_config: str = setting(
        "auto",
        "Sampling where a request leaves it out (temperature, top_p, top_k, min_p, repetition_penalty): that of the "
        "model's generation_config.json (auto), of one in another directory, or OpenAI's defaults (vllm).",
        group="Model",
    )
    device: str = setting(
        "auto",
        "Where the model runs; auto: on the GPU that torch sees, else on the CPU.",
        group="Engine",
        choices=DEVICES,
    )
    attention_backend: str = setting(
        "auto",
        "On a GPU: flash-attn (pages of a multiple of 256 tokens) or our triton kernel; auto: flash-attn if installed.",
        group="Engine",
        choices=ATTENTION,
    )
    block_size: int = setting(16, "Tokens per KV block; flash-attn takes multiples of 256.", group="Engine", minimum=1)
    kv_cache_memory_bytes: int | None = setting(
        None,
        "Size of the KV pool, in bytes; default: 2 GiB on a CPU, what --gpu-memory-utilization leaves on a GPU.",
        group="Engine",
        minimum=1,
    )
    kv_cache_dtype: str = setting(
        "auto",
        "Type of the KV cache; auto: the model's. fp8 (e4m3) halves it and rounds; a GPU's Triton kernels take it.",
        group="Engine",
        choices=CACHE_DTYPES,
    )
    gpu_memory_utilization: float | None = setting(
        None,
        "Share of a GPU's memory that the server takes, weights included; default 0.9. Refused on CPU, which has "
        "--kv-cache-memory-bytes.",
        group="Engine",
        above=0,
        maximum=1,
    )
    cuda_graph_sizes: tuple[int, ...] = setting(
        (),
        "Token counts that get a CUDA graph each, commas between; default: 1, 2, 4, then by 8, 16 and 32 up to 512.",
        group="Engine",
        metavar="LIST",
        minimum=1,
    )
    num_blocks: int | None = None
    max_num_seqs: int = setting(64, "Most requests running together.", group="Engine", minimum=1)
    max_num_batched_tokens: int = setting(256, "Most tokens of one step.", group="Engine", minimum=1)
    max_num_queued_reqs: int = setting(
        1024, "Requests that may wait; beyond, clients get 503.", group="Limits", minimum=0
    )
    max_num_queued_tokens: int = setting(
        1 << 20, "Prompt tokens that may wait; beyond, clients get 503.", group="Limits", minimum=1
    )
    queue_timeout: float | None = setting(
        None, "Seconds a request may wait for its start; then 503. Default: any.", group="Limits", above=0
    )
    request_timeout: float | None = setting(
        None, "Seconds a request may take in all; then 504. Default: any.", group="Limits", above=0
    )
    step_timeout: float = setting(
        60.0,
        "Seconds a single step may take; then the engine has hung and the process ends.",
        group="Limits",
        above=0,
    )
    enable_prefix_caching: bool = setting(True, "Reuse KV blocks of common prefixes.", group="Engine")
    enforce_eager: bool = setting(False, "No CUDA graphs; on CPU there are none anyway.", group="Engine")
    tensor_parallel_size: int = setting(
        1, "Processes that share the model, each with its part of every layer.", group="Engine", minimum=1
    )
    enable_expert_parallel: bool = setting(
        False,
        "Processes that share a mixture of experts have whole ones, not a part of each; no effect on other models.",
        group="Engine",
    )
    seed: int | None = setting(None, "Seed of private noise, for repeatable experiments.", group="Engine")
    speculative: SpeculativeConfig = setting(
        SpeculativeConfig(),
        'JSON. {"method": "none"} switches drafting off; {"model": "DRAFTER"} names a drafter of any family in '
        'docs/drafters.md; "selection" is causal (default), lagged, fixed, threshold or none. SmolLM2-135M-Instruct '
        "comes with a drafter.",
        group="Speculation",
        name="speculative-config",
        metavar="JSON",
    )
    measure_costs_again: bool = setting(False, "Time drafts and target passes anew at this start.", group="Speculation")
    check_invariants: bool = False

    def __post_init__(self) -> None:
        check(self)
        if self.max_num_batched_tokens <= self.max_num_seqs:
            raise ConfigError(
                f"--max-num-batched-tokens ({self.max_num_batched_tokens}) must exceed --max-num-seqs "
                f"({self.max_num_seqs}): every running request takes at least one token of each step."
            )
        if self.gpu_memory_utilization is not None and self.kv_cache_memory_bytes is not None:
            raise ConfigError(
                "--gpu-memory-utilization and --kv-cache-memory-bytes both size the KV pool: give one of them."
            )

    def check_device(self, device: str | None) -> None:
        """Raise ConfigError for settings that the device (None: the CPU) does not support."""
        if device is not None:
            return
        if self.gpu_memory_utilization is not None:
            raise ConfigError(
                "--gpu-memory-utilization sizes the KV pool by a GPU's memory, and this server runs on the CPU: "
                "use --kv-cache-memory-bytes."
            )
        if self.attention_backend != "auto":
            raise ConfigError(f"--attention-backend {self.attention_backend} needs a GPU; leave it at auto.")
        if self.cuda_graph_sizes:
            raise ConfigError("--cuda-graph-sizes needs a GPU: the CPU has no graphs. Leave it out.")
