"""The server's own counters: `/metrics` before and after a level, under vLLM's names. Absent ones stay absent."""

from dataclasses import dataclass, field
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

GENERATED = "vllm:generation_tokens"
DRAFTS = "vllm:spec_decode_num_drafts"
DRAFT_TOKENS = "vllm:spec_decode_num_draft_tokens"
ACCEPTED = "vllm:spec_decode_num_accepted_tokens"
PER_POSITION = "vllm:spec_decode_num_accepted_tokens_per_pos"


@dataclass(frozen=True)
class Counters:
    """Sums over all labels of the series of a server, since its start; `per_position` by draft position."""

    totals: dict[str, float] = field(default_factory=dict)
    per_position: dict[int, float] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> "Counters":
        """Read a page in the Prometheus text format; a page in any other format gives no counters."""
        totals: dict[str, float] = {}
        per_position: dict[int, float] = {}
        try:
            for family in text_string_to_metric_families(text):
                for sample in family.samples:
                    name = sample.name.removesuffix("_total")
                    if name == PER_POSITION:
                        position = int(sample.labels["position"])
                        per_position[position] = per_position.get(position, 0.0) + sample.value
                    elif name in (GENERATED, DRAFTS, DRAFT_TOKENS, ACCEPTED):
                        totals[name] = totals.get(name, 0.0) + sample.value
        except (ValueError, LookupError):
            return cls()
        return cls(totals, per_position)

    def since(self, before: "Counters") -> "Counters":
        """The increase since `before`. Series that one side lacks, or that went backwards (a restart), are absent."""
        totals = {
            name: value - before.totals[name]
            for name, value in self.totals.items()
            if name in before.totals and value >= before.totals[name]
        }
        per_position = {
            position: value - before.per_position.get(position, 0.0) for position, value in self.per_position.items()
        }
        return Counters(totals, per_position)

    def figures(self) -> dict[str, Any]:
        """Figures of speculation from a difference; {} without the series. `spec_decode_…` are vLLM bench's names.

        `verification_budget` is tokens verified per request and step, the anchor included (the paper's figure 8): 1 +
        draft tokens / request-steps, where each request-step commits one token more than it accepted drafts.
        """
        if not {GENERATED, DRAFTS, DRAFT_TOKENS, ACCEPTED} <= self.totals.keys():
            return {}
        generated, accepted = self.totals[GENERATED], self.totals[ACCEPTED]
        drafts, draft_tokens = self.totals[DRAFTS], self.totals[DRAFT_TOKENS]
        steps = generated - accepted
        return {
            "spec_decode_num_drafts": int(drafts),
            "spec_decode_draft_tokens": int(draft_tokens),
            "spec_decode_accepted_tokens": int(accepted),
            "spec_decode_acceptance_rate": 100 * accepted / draft_tokens if draft_tokens else None,  # per cent
            "spec_decode_acceptance_length": 1 + accepted / drafts if drafts else None,
            "spec_decode_per_position_acceptance_rates": [
                self.per_position[position] / drafts for position in sorted(self.per_position) if drafts
            ],
            "server_generation_tokens": int(generated),
            "request_steps": int(steps),
            "tokens_per_request_step": generated / steps if steps > 0 else None,
            "verification_budget": 1 + draft_tokens / steps if steps > 0 else None,
        }


async def scrape(client: httpx.AsyncClient) -> Counters:
    """The counters now; none if the server has no such page."""
    try:
        response = await client.get("/metrics", timeout=10.0)
    except httpx.TransportError:
        return Counters()
    return Counters.parse(response.text) if response.status_code == 200 else Counters()
