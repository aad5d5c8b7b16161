"""`make mutants`: plants each known way to lose losslessness, a safety, or a true cost model, in a copy of the package;
a named test must fail on it.

A mutant is a few exact replacements in the sources. One that no longer applies, that its test lets through, or that
is no program any more, fails the run. Prints a table and exits 1 if any survived.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

ROOT = Path(__file__).parents[1]
# What a test says of code that has changed under a mutant: it fails, but would whatever it looked at.
NO_PROGRAM = re.compile(r"^E +((?:Name|UnboundLocal|Type|Attribute|Syntax|Import)Error.*)$", re.MULTILINE)


@dataclass(frozen=True)
class Mutant:
    """`edits`: (file, text, replacement), the text standing there exactly once. `killer`: the test that must fail."""

    name: str
    edits: tuple[tuple[str, str, str], ...]
    killer: str


def _one(name: str, file: str, text: str, replacement: str, killer: str) -> Mutant:
    return Mutant(name, ((file, text, replacement),), killer)


STEP, DSPARK = "dspark_server/engine/step.py", "dspark_server/speculation/dspark.py"
MODEL_DRAFTER, FEATURES = "dspark_server/speculation/model_drafter.py", "dspark_server/speculation/features.py"
SEQUENTIAL, BLOCK = "dspark_server/speculation/sequential.py", "dspark_server/speculation/draft_block.py"
ACCEPTANCE, SELECTION = "dspark_server/speculation/acceptance.py", "dspark_server/speculation/selection.py"
ADMISSION = "dspark_server/speculation/prefix_scheduler.py"
TRITON, TRITON_TESTS = "kernels/triton/", "tests/kernels/test_triton_"
DEVICE = "tests/engine/test_device_executor.py"
BLOCK_RULE = "tests/speculation/test_losslessness.py::test_block_rule_has_the_targets_joint_law"
LATENT_C = "kernels/cpu/latent.c"
LATENT, V4 = "dspark_server/models/layers/latent.py", "tests/models/test_deepseek_v4.py::test_matches_transformers"
CONFORMANCE = "tests/engine/test_conformance.py::test_fixture_is_reproduced"
MONTE_CARLO = "tests/engine/test_monte_carlo.py::test_the_law_is_the_targets"

LOSSLESS = (
    _one("draft and acceptance share noise", "dspark_server/speculation/noise.py", "COIN = 2", "COIN = 1",
         "tests/speculation/test_streams.py::test_everything_in_the_key_gives_another_number"),
    _one("a rank computes experts of another", "dspark_server/models/layers/moe.py",
         "torch.where((number < 0) | (number > len(own)), len(own), number)", "number.remainder(len(own) + 1)",
         "tests/kernels/test_native.py::test_experts_of_other_ranks_add_nothing"),
    _one("edits of a row do not see the draft tokens before it", "kernels/cpu/rules.c",
         "width, slot, all->position", "width, 0, all->position",
         "tests/kernels/test_draft_tokens.py::test_rows_of_a_pass_under_rules_are_those_of_the_plain_loop"),
    _one("drafts are edited for tokens that their block does not have", ACCEPTANCE,
         "whole.start, lengths, whole.tokens, ruled)", "whole.start, lengths, whole.tokens.roll(1, 1), ruled)",
         "tests/speculation/test_controls.py::test_the_joint_law_is_the_ruled_targets"),
    _one("q is not the law drafts were drawn from", SEQUENTIAL, "laws.append(law)", "laws.append(torch.sqrt(law))",
         MONTE_CARLO),
    _one("residual softmaxed instead of normalised", ACCEPTANCE,
         "return torch.where(left.sum(-1, keepdim=True) > 0, left, p)", "return torch.softmax(left, -1)",
         "tests/speculation/test_exact.py::test_the_joint_law_is_the_targets"),
    _one("the block rule's residual is the ratio rule's", ACCEPTANCE,
         "scaled = p * accepted[drawing[short]].to(p.dtype).unsqueeze(1)", "scaled = p", BLOCK_RULE),
    _one("the block rule ends at the first node that fails", ACCEPTANCE,
         "stood = rows[coins[rows, slot - 1] < chance]",
         "stood = rows[(coins[rows, slot - 1] < chance) & (count[rows] == slot - 1)]", BLOCK_RULE),
    _one("every node of the block rule is judged like the last", ACCEPTANCE,
         "chance[further] = torch.where(rest > 0, left / rest, 1.0)", "pass", BLOCK_RULE),
    _one("what the block rule carries on is not capped", ACCEPTANCE,
         "(joint[more] * gained).clamp(max=1).nan_to_num(nan=0.0)", "(joint[more] * gained).nan_to_num(nan=0.0)",
         BLOCK_RULE),
    _one("a broken row does not end its block", ACCEPTANCE,
         "ends[rows[broken[rows]]] = slot", "pass",
         "tests/speculation/test_nan.py::test_requests_fail_where_plain_decoding_does"),
    _one("the native block rule's residual is the ratio rule's", "kernels/cpu/accept.c",
         "kept_total, (float)kept_joint, request, kept)", "kept_total, 1, request, kept)",
         "tests/kernels/test_accept.py::test_the_residual_is_that_of_the_accepted_nodes_share"),
    _one("Triton's block rule's residual is the ratio rule's", "kernels/triton/accept.py",
         "        rest *= share\n", "",
         "tests/kernels/test_triton_drafting.py::test_the_residual_is_that_of_the_accepted_nodes_share"),
    _one("target filters left out of p", ACCEPTANCE, "p = distribution(mine.logits[mine.start[active] + slot], here)",
         "p = torch.softmax(mine.logits[mine.start[active] + slot], -1)",
         "tests/speculation/test_losslessness.py::test_ratio_rule_has_the_targets_joint_law"),
    _one("retrospective search over this step's survivals", SELECTION,
         "lengths = admit(survival.tolist(), limits, load.sampling, room, seconds, usual).lengths",
         "every = (ranked := Ranked.of(survival, limits)).values\n"
         "        bumpy = seconds.upto(len(every)) * [1 + count % 2 for count in range(len(every) + 1)]\n"
         "        lengths = ranked.first(best_count(every, bumpy, load))",
         "tests/speculation/test_selection.py::test_whether_a_token_is_kept_does_not_depend_on_it_or_on_later_ones"),
    _one("prefix cut at a forbidden token", STEP, "        lengths = self._selection.lengths(survival, block.limits,",
         "        usable = [next((k for k, x in enumerate(row[:limit]) if x in r.stop_ids), limit)\n"
         "                  for r, row, limit in zip(requests, block.tokens.tolist(), block.limits, strict=True)]\n"
         "        lengths = self._selection.lengths(survival, usable,",
         "tests/engine/test_lossless.py::test_what_a_block_says_does_not_move_how_much_of_it_is_verified"),
    _one("native residual drawn from p", "kernels/cpu/accept.c",
         "          take_away(all, weights, left, total, 1, request, slot);\n", "",
         "tests/speculation/test_exact.py::test_the_joint_law_is_the_targets"),
    _one("rules forget the draft tokens before a position", ACCEPTANCE,
         "mine.sampling.select(active, slot, mine.tokens[active, :slot].tolist)", "mine.sampling.select(active, slot)",
         "tests/speculation/test_controls.py::test_the_joint_law_is_the_ruled_targets"),
    _one("the mask after another prefix", "dspark_server/engine/grammar.py",
         "            if prefix[: len(said)] == said and not mask.cancelled()\n",
         "            if not mask.cancelled()\n",
         "tests/engine/test_grammar.py::test_drafted_and_committed_are_the_same"),
    _one("rules on the draft only", "dspark_server/speculation/law.py",
         "    logits = permitted(logits, sampling, columns)",
         "    logits = logits.float()", f"{MONTE_CARLO}[causal-None-float32-True-block]"),
    _one("rules are not told what was committed", "dspark_server/engine/request.py",
         "                controls.commit([token])\n", "                pass\n",
         f"{MONTE_CARLO}[causal-None-float32-True-block]"),
    _one("prefix dropped whole on a late NaN", BLOCK,
         "return [min(request.limit, most) for request, most",
         "return [request.limit if request.limit <= most else 0 for request, most",
         "tests/speculation/test_nan.py::test_a_nan_at_a_slot_keeps_exactly_the_slots_before_it"),
    _one("costs are looked up by limits that a NaN has cut", BLOCK,
         "return sum(request.limit for request in self.requests)", "return sum(self.limits)",
         "tests/speculation/test_nan.py::test_what_a_draft_may_reach_is_counted_before_it"),
    _one("native head draws from the law of another temperature", "kernels/cpu/head.c",
         "choice = draw_column(weights, columns, head->uniforms[at], cells);",
         "for (long j = 0; j < columns; j++) weights[j] *= weights[j];\n"
         "        choice = draw_column(weights, columns, head->uniforms[at], cells);",
         f"{MONTE_CARLO}[causal-None-bfloat16-False-block]"),
    _one("block cut where it leaves the copy it was favoured with", SEQUENTIAL,
         "                copies.follow(k, previous)\n",
         "                copies.follow(k, previous)\n"
         "                left = copies.on[:, k] & (previous != copies.tokens[:, k])\n"
         "                usable = torch.where(left, usable.clamp(max=k), usable)\n",
         f"{MONTE_CARLO}[causal-None-float32-False-ratio]"),
    _one("a draft whose mask is late loses the token before it", SEQUENTIAL,
         "usable = torch.where(dead, usable.clamp(max=k), usable)",
         "usable = torch.where(dead, usable.clamp(max=max(k - 1, 0)), usable)",
         "tests/speculation/test_sequential.py::test_a_draft_ends_where_its_controls_are_late"),
    _one("shared seeds under the ratio rule", STEP, "coupled=[p.seed is not None for p in params]",
         "coupled=[False for p in params]", "tests/engine/test_lossless.py::test_a_drafter_changes_no_token"),
    _one("lagged count with redrawn noise", STEP,
         "                request.draft_number += 1\n", "                pass\n",
         "tests/engine/test_lossless.py::test_no_draft_reuses_the_noise_of_another"),
    _one("lagged count from one step ago", SELECTION, "    LAG = 2\n", "    LAG = 1\n",
         "tests/speculation/test_selection.py::test_lagged_counts_by_the_survivals_of_two_steps_ago"),
    _one("draft context one row short", MODEL_DRAFTER, "Run([r.anchor, *mask], r.position, r.tables, self.width)",
         "Run([r.anchor, *mask], r.position - 1, r.tables, self.width)", CONFORMANCE),
    _one("a pair has the features of its own token", FEATURES, "return before[:-1]", "return before[1:]",
         "tests/engine/test_conformance.py::test_eagle3_is_reproduced"),
    _one("a run's first pair has the features of the run before it in the batch", FEATURES,
         "before[batch.query_start[:-1].long()] = last(batch, cache)", "last(batch, cache)",
         "tests/engine/test_drafters.py::test_drafts_do_not_depend_on_hits_chunks_or_neighbours"),
    _one("place 0 of a sequence is seen, though it has no pair", "dspark_server/speculation/eagle3_formats.py",
         "first_key=1", "first_key=0", "tests/engine/test_conformance.py::test_eagle3_is_reproduced"),
    _one("all slots of an autoregressive draft have the first slot's noise", SEQUENTIAL,
         "at = self._sampling.ahead(first, self._tokens)", "at = self._sampling",
         "tests/speculation/test_sequential.py::test_slots_drawn_one_by_one_are_those_drawn_together"),
    _one("rules of later slots do not see the tokens drawn before", SEQUENTIAL,
         "at = self._sampling.ahead(first, self._tokens)", "at = self._sampling.ahead(first)",
         "tests/speculation/test_sequential.py::test_slots_drawn_one_by_one_are_those_drawn_together"),
    _one("copies go on after the block has left them", SEQUENTIAL, "copies.drawn(first, block.tokens, here)", "pass",
         "tests/speculation/test_sequential.py::test_slots_drawn_one_by_one_are_those_drawn_together"),
    _one("an assistant reads rows that the window has lost", "dspark_server/speculation/assistant.py",
         "return {source: window + 1 for", "return {source: 1 for",
         "tests/engine/test_drafters.py::test_an_assistant_reads_what_the_targets_window_would_free"),
    _one("a compressed entry is seen before its window is closed", LATENT_C,
         "  long visible = (position + 1) / attend->ratio;\n",
         "  long visible = (position + 2) / attend->ratio;\n", V4),
    _one("what tokens bring to an open window is kept too short", LATENT,
         "reach = _reach(self.spans * self.ratio, length)", "reach = _reach(self.ratio, length)", V4),
    _one("an entry keeps what a rejected draft has written", LATENT_C,
         "      write_floats(row_at(&compress->entries, compress->dtype, run, start / ratio), made",
         "      if (*(float *)row_at(&compress->entries, FLOAT32, run, start / ratio) > 500)\n"
         "        write_floats(row_at(&compress->entries, compress->dtype, run, start / ratio), made",
         "tests/models/test_deepseek_v4.py::test_a_rejected_run_leaves_nothing"),
    _one("the window before a block of DeepSeek-V4's stages ends at the block's first token", LATENT_C,
         "attend->own ? attend->runs.positions[begin] - 1 : position;", "attend->own ? position : position;",
         "tests/engine/test_deepseek_v4.py::test_the_fixtures_are_reproduced"),
    _one("an MTP layer of streams sees place 0, which has no pair", "dspark_server/speculation/stages.py",
         "first_key=1", "first_key=0", "tests/engine/test_deepseek_v4.py::test_the_fixtures_are_reproduced"),
    _one("an MTP layer sees place 0, which has no pair", "dspark_server/speculation/mtp.py",
         "first_key=1", "first_key=0",
         "tests/engine/test_mtp.py::test_blocks_are_those_of_the_formulas"),
    _one("steps without drafts write no draft rows, and a prefix hit finds none", "dspark_server/engine/executor.py",
         "        drafter.observe(taps, batch, pool)",
         "        if any(len(run.tokens) > 1 for run in self._runs):\n"
         "            drafter.observe(taps, batch, pool)",
         "tests/engine/test_lossless.py::test_a_prefix_hit_carries_the_draft_rows"),
    _one("long chunks write no draft rows", "dspark_server/engine/executor.py",
         "        drafter.observe(taps, batch, pool)",
         "        if all(len(run.tokens) <= 8 for run in self._runs):\n"
         "            drafter.observe(taps, batch, pool)",
         CONFORMANCE),
    _one("a window's blocks are freed a row early", "dspark_server/runtime/paging.py",
         "max(0, computed - self.reach + 1)", "max(0, computed - self.reach + 2)",
         "tests/runtime/test_paging.py::test_a_window_moves_on_by_whole_blocks_and_keeps_what_is_read"),
    _one("a prefix hit without the window's rows", "dspark_server/engine/blocks.py",
         "                return block // per  # longer ones need this block, too\n", "                break\n",
         "tests/engine/test_blocks.py::test_a_hit_needs_the_windows_tail"),
    _one("attention counts from the sequence's start over a table that begins later", "dspark_server/runtime/batch.py",
         "kept = context if group.reach is None else context - np.array([t.first for t in own], dtype=np.int32)",
         "kept = context", "tests/engine/test_windows.py::test_tokens_after_a_prefix_hit"),
    _one("an expert gets another token's row", "kernels/cpu/gemm.c",
         "sources[place] = (int32_t)(slot / chosen);", "sources[place] = (int32_t)(slot % tokens);",
         "tests/kernels/test_native.py::test_experts_and_their_batch_invariance"),
    _one("the soft cap is forgotten", "dspark_server/models/layers/embedding.py",
         "return logits if self._softcap is None else", "return logits if True else",
         "tests/engine/test_conformance.py::test_gemma4_is_reproduced"),
    _one("Triton's queries see one key too many", TRITON + "attention.py", "(column[None, :] <= position[:, None])",
         "(column[None, :] <= position[:, None] + 1)", f"{TRITON_TESTS}attention.py::test_attention"),
    _one("Triton's window is one key too wide", TRITON + "attention.py",
         "(column[None, :] > position[:, None] - WINDOW)", "(column[None, :] >= position[:, None] - WINDOW)",
         f"{TRITON_TESTS}attention.py::test_attention"),
    _one("Triton's residual is not cut at zero", TRITON + "draw.py",
         "tl.maximum(tl.load(weights + column, mask=column < end, other=0.0), 0.0)",
         "tl.load(weights + column, mask=column < end, other=0.0)",
         f"{TRITON_TESTS}drafting.py::test_outcomes_are_those_of_the_plain_loop"),
    Mutant("Triton's argmax takes the highest of equals", (
        (TRITON + "elementwise.py", "(0x7FFFFFFF - column).to(tl.int64)", "column.to(tl.int64)"),
        (TRITON + "elementwise.py", "return 0x7FFFFFFF - (rank & 0x7FFFFFFF)", "return rank & 0x7FFFFFFF"),
     ), f"{TRITON_TESTS}small.py::test_argmax_takes_the_lowest_of_equals_and_a_nan_wins"),
    _one("padding writes to a slot that is somebody's", "dspark_server/runtime/layout.py",
         "block * size + place % size, scratch[index])", "block * size + place % size, 0)",
         f"{DEVICE}::test_padding_never_reaches_a_row_that_is_read"),
    _one("the device keeps the unlikeliest", ADMISSION, "argsort(descending=True, stable=True)",
         "argsort(descending=False, stable=True)", f"{DEVICE}::test_the_same_tokens_and_so_many_waits[lagged]"),
    _one("a static input is a step old", "dspark_server/runtime/staging.py",
         "            field.zero_()\n",
         "            if name == \"context\" and field.any():\n                continue\n",
         f"{DEVICE}::test_the_same_tokens_and_so_many_waits[fixed]"),
    _one("a pass that was run ahead taken for another", STEP,
         "lengths=block.lengths or lengths", "lengths=lengths",
         f"{DEVICE}::test_the_lengths_of_a_pass_that_was_run_ahead_are_the_devices"),
)  # fmt: skip

SERVER, SECURITY = "dspark_server/api/server.py", "tests/api/test_security.py"
SUPERVISION, ASYNC_ENGINE = "tests/engine/test_supervision.py", "tests/engine/test_async_engine.py"

SAFETY = (
    _one("an aborted request keeps its blocks", "dspark_server/engine/thread.py",
         "                    self._core.batcher.remove(message.request)\n", "                    pass\n",
         f"{ASYNC_ENGINE}::test_abort_frees_blocks_and_ends_once"),
    _one("a cancelled request goes on", "dspark_server/api/responses.py",
         "            watcher.cancel()\n            self.generation.close()\n", "            watcher.cancel()\n",
         "tests/reliability/test_cancel.py::test_a_handler_may_be_cancelled_at_any_await[stream]"),
    _one("the watchdog sees no hang", "dspark_server/engine/watchdog.py", "if silent >= timeout:",
         "if silent >= 1000 * timeout:", f"{SUPERVISION}::test_a_step_that_hangs_is_noticed"),
    _one("a process with a dead engine goes on", SERVER,
         "        elif monotonic() > self._died + LAST_LOOK:\n            self.should_exit = True\n", "",
         "tests/reliability/test_exit_code.py::test_a_dead_engine_ends_the_process[engine.thread=die@3]"),
    _one("the queue has no bound", "dspark_server/engine/admission.py",
         "if self.in_flight + choices > self._places:", "if self.in_flight + choices > 1000 * self._places:",
         f"{ASYNC_ENGINE}::test_a_full_queue_refuses_and_a_place_comes_back"),
    _one("a drain takes new requests", "dspark_server/engine/admission.py", "        if self.draining:\n",
         "        if self.closed:\n", f"{SUPERVISION}::test_a_prompt_that_was_being_tokenized_meanwhile_is_refused"),
    _one("the beginning of a key is enough", "dspark_server/api/auth.py", "hmac.compare_digest(key, token)",
         "(token != b'' and key.startswith(token))", "tests/api/test_auth.py::test_what_does_not_open"),
    _one("keys share their prefixes", "dspark_server/engine/core.py",
         "chain_root(self.cache_identity, tenant, salt)", 'chain_root(self.cache_identity, "", salt)',
         "tests/api/test_limits.py::test_one_key_does_not_find_what_another_wrote"),
    _one("a reader may stall for ever", SERVER, '        self._expect("reader", self.stall_timeout)\n', "",
         "tests/api/test_lifecycle.py::test_a_reader_that_stalls_is_dropped"),
    _one("headers may go on for ever", SERVER, "        self._framing += len(data)\n", "",
         f"{SECURITY}::test_what_never_ends_is_cut_before_anyone_needs_a_key"),
    _one("a body goes on for ever behind its answer", SERVER, "            self._lingering += len(body)\n", "",
         "tests/api/test_bad_bytes.py::test_a_gigabyte_in_chunks_is_cut"),
    _one("a request gives way behind its draft", STEP,
         "        block = self._draft(cycle, plan, load, asked) if asked else None\n",
         "        block = self._draft(cycle, plan, load, asked) if asked else None\n"
         "        if not self.batcher.pool.available and len(self.batcher.running) > 1:\n"
         "            self.batcher.preempt(self.batcher.running[-1])\n",
         "tests/engine/test_preemption.py::test_it_takes_effect_between_commit_and_the_next_draft[step.draft]"),
    _one("what follows a prefix passes for what follows another", "dspark_server/engine/blocks.py",
         "named = named and self._key_of[owner] == key", "named = True",
         "tests/engine/test_blocks.py::test_prefixes_with_equal_digests_change_no_token"),
    _one("bodies have no bound together", "dspark_server/api/edge.py",
         "self._reading > MOST_BODIES * self._settings.max_body_bytes", "self._reading < 0",
         f"{SECURITY}::test_bodies_that_are_read_have_a_bound_together"),
    _one("log lines without their requests", "dspark_server/engine/thread.py",
         "        concerned.set(lambda: [request.id for request in self._core.batcher.running])\n", "",
         f"{SECURITY}::test_lines_of_the_step_thread_name_their_requests"),
)  # fmt: skip

EXPLORATION, EXPLORING = "dspark_server/speculation/exploration.py", "tests/speculation/test_exploration.py"
CAPACITY, CORRECTION = "dspark_server/speculation/cost_model.py", "dspark_server/speculation/correction.py"
COST_TESTS = "tests/speculation/test_cost_model.py"
HOPELESS = f"{EXPLORING}::test_where_drafts_do_not_pay_they_are_tried_now_and_then"
SHIFT = f"{COST_TESTS}::test_a_lasting_shift_is_learnt_in_either_direction"
HELD_UP = f"{COST_TESTS}::test_one_step_that_was_held_up_says_nothing"
TOO_HIGH = f"{COST_TESTS}::test_one_time_too_high_does_not_lift_all_larger_sizes"

COSTS = (
    _one("an exploring step's count depends on the survivals of its blocks", SELECTION,
         "            return Ranked.of(survival, limits).first(self._exploration.count)\n",
         "            ranked = Ranked.of(survival, limits)\n"
         "            return ranked.first(min(self._exploration.count, int((ranked.values > 0.005).sum())))\n",
         f"{HOPELESS}[causal]"),
    _one("lagged forgets the count of an exploring step", SELECTION,
         "        if self._exploration.count is not None:\n            return self._exploration.count\n", "",
         f"{HOPELESS}[lagged]"),
    _one("requests that explore are not probing", EXPLORATION, "choice.probing | frozenset(more)", "choice.probing",
         f"{HOPELESS}[causal]"),
    _one("exploring costs nothing", EXPLORATION, "        self._budget.spend(price)\n", "", f"{HOPELESS}[causal]"),
    _one("steps without drafts cost nothing", EXPLORATION, "            self._plain.spend(price)\n",
         "            pass\n",
         f"{EXPLORING}::test_where_whole_blocks_are_verified_only_steps_without_drafts_are_left_to_explore"),
    _one("known costs are explored too", EXPLORATION, "promising = doubt > KNOWN and ", "promising = True or ",
         f"{EXPLORING}::test_a_step_without_drafts_is_not_tried_where_its_cost_is_known"),
    _one("exploring pays what a wrong table says", EXPLORATION,
         "verify = min(float(raw[min(tokens, most)]) - there, there * -(-(tokens - usual) // usual))",
         "verify = float(raw[min(tokens, most)]) - there",
         f"{EXPLORING}::test_a_size_that_is_believed_far_too_dear_is_tried_as_often"),
    _one("corrections do not fade", CORRECTION, "fading = -math.expm1(-seconds / MEMORY)", "fading = 0.0",
         f"{COST_TESTS}::test_a_change_after_long_service_is_learnt_as_soon"),
    _one("corrections have the wrong sign", CORRECTION, "self._logs += gain", "self._logs -= gain", SHIFT),
    _one("sizes never tried are never corrected", CORRECTION,
         "self._prior = SPEED**2 + same * (TABLE**2 + SHAPE**2 * near)",
         "self._prior = SPEED**2 * np.eye(len(place)) + 0 * same * near", SHIFT),
    _one("corrected tables are not built again", CAPACITY, ".max() > STALE:", ".max() > 1000 * STALE:", SHIFT),
    _one("a step that was held up is learnt from", CORRECTION, "return min(before, (log_ratio, parts)",
         "return max(before, (log_ratio, parts)", HELD_UP),
    _one("steps of all sizes are compared with each other", CORRECTION, "self._seen.pop(nearest, None)",
         "self._seen.pop(0, None)", SHIFT),
    _one("a step without drafts runs however much drafts gain", EXPLORATION,
         " and choice.gain < math.exp(DEVIATIONS * doubt)", "",
         f"{EXPLORING}::test_where_whole_blocks_are_verified_only_steps_without_drafts_are_left_to_explore"),
    _one("costs may fall", CAPACITY, "isotonic(verify * profile.verify, sure[0])",
         "verify * np.asarray(profile.verify)", TOO_HIGH),
    _one("one high cost raises all larger sizes", CAPACITY, "isotonic(verify * profile.verify, sure[0])",
         "np.maximum.accumulate(verify * profile.verify)", TOO_HIGH),
    _one("a cost measured lately gives way to others", CAPACITY, "isotonic(verify * profile.verify, sure[0])",
         "isotonic(verify * profile.verify)",
         f"{COST_TESTS}::test_a_cost_measured_lately_outweighs_those_that_were_not"),
    _one("the walk of Algorithm 1 sees a curve with bumps", CAPACITY,
         "convex_minorant(corners, self._raw[corners].tolist())", "self._raw[start : last + 1]",
         f"{COST_TESTS}::test_the_minorant_is_convex_below_and_the_greatest"),
)  # fmt: skip
MUTANTS = LOSSLESS + SAFETY + COSTS


def planted(mutant: Mutant, copy: Path) -> str | None:
    """Apply the edits to a copy of the package; what is wrong, if they do not apply."""
    for file, text, replacement in mutant.edits:
        path = copy / file
        source = path.read_text()
        if source.count(text) != 1:
            return f"{file} holds {text!r} {source.count(text)} times, not once"
        path.write_text(source.replace(text, replacement))
    return None


def copied(copy: Path) -> None:
    """The package and its tests, as far as a test run needs them."""
    for part in ("dspark_server", "tests", "kernels"):
        shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "dspark_kernels").symlink_to("kernels")  # its name as a package
    shutil.copy(ROOT / "pyproject.toml", copy)


def tested(copy: Path, *tests: str) -> subprocess.CompletedProcess[str]:
    """Run tests against the copy; status 1 means that some failed, 0 that none did."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    environment = os.environ | {"PYTHONPATH": str(copy)}
    return subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=900)


def killed(mutant: Mutant) -> str:
    """Run the killer on the mutant: "killed", or what happened instead."""
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch)
        copied(copy)
        if wrong := planted(mutant, copy):
            return wrong
        try:
            done = tested(copy, mutant.killer)
        except subprocess.TimeoutExpired as error:  # a verdict takes a test that ends
            return f"the test did not end in {error.timeout:.0f} s"
        if done.returncode == 1:
            broken = NO_PROGRAM.search(done.stdout)
            return f"no program: {broken[1]}" if broken else "killed"
        return "survived" if done.returncode == 0 else f"the test did not run: {done.stdout[-300:]}{done.stderr[-300:]}"


def healthy(mutants: Sequence[Mutant]) -> bool:
    """Whether every killer passes on a copy without a mutant, so that a failure means something."""
    with tempfile.TemporaryDirectory() as scratch:
        copied(Path(scratch))
        done = tested(Path(scratch), *dict.fromkeys(mutant.killer for mutant in mutants))
        print("" if done.returncode == 0 else done.stdout[-2000:], end="")
        return done.returncode == 0


def main() -> None:
    """Try every mutant, or those whose name contains the argument."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", nargs="?", default="", help="only mutants whose name contains this")
    chosen = [mutant for mutant in MUTANTS if parser.parse_args().name in mutant.name]
    if not chosen:
        parser.error("no mutant has a name like that")
    if not healthy(chosen):
        sys.exit("the tests fail without a mutant already")
    table = Table("mutant", "test", "outcome")
    outcomes = []
    for mutant in tqdm(chosen, unit="mutant"):
        outcomes.append(killed(mutant))
        table.add_row(mutant.name, mutant.killer.removeprefix("tests/"), outcomes[-1])
    Console().print(table)
    print(f"{outcomes.count('killed')} of {len(outcomes)} killed")
    sys.exit(0 if outcomes.count("killed") == len(outcomes) else 1)


if __name__ == "__main__":
    main()
