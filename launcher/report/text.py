"""A report's sentences, shared by the terminal, Markdown and HTML: what to say, in which words."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from launcher.report.run_report import Comparison, FailureReport, RunReport, select_ranks
from launcher.units import format_bytes, format_count, format_seconds

NOTHING = "-"
MAX_TEXT_CHARACTERS = 4000
MAX_TRACEBACK_LINES = 25
# C0 and C1 controls but newline and tab, characters that turn the writing direction, and halves of
# surrogate pairs, which no file can hold.
_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)

_STATES = {
    "created": "The run was prepared and has not started.",
    "pending": "The run waits for its turn.",
    "killed": "The run was KILLED: it could not say so itself.",
    "running": "The run is still going, or was killed without a word; the numbers are so far.",
    "finished": "The run finished.",
    "failed": "The run FAILED.",
    "out_of_memory": "The run FAILED: out of memory.",
    "interrupted": "The run was INTERRUPTED.",
    "unknown": "Nothing in the run directory says how the run went.",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One result as a sentence, with the two words that name it."""

    label: str
    text: str


def state_sentence(report: RunReport) -> str:
    """Return how the run went."""
    done = report.time.num_steps
    steps = f" {done} optimizer step{'s' * (done != 1)} done." if done else ""
    if not done and report.ranks:
        steps = " No optimizer step was completed."
    # A rank's own failure, shown beside this, says more than the launcher's reason.
    reason = "" if report.failures or not report.state_reason else f" Reason: {report.state_reason}"
    state = _STATES[report.state]
    if report.state == "running" and report.observation and report.observation.state == "running":
        state = "The run is going on; the numbers are so far."
    return printable(shorten(state + steps + reason, 500))


def describe_run(report: RunReport) -> str:
    """Return what ran in one line: model, method, length, strategy, ranks, device."""
    prediction = report.prediction
    parts = []
    if prediction.model_name:
        size = prediction.num_params
        parts.append(prediction.model_name + (f" ({format_count(size)})" if size else ""))
    if prediction.method:
        trainable = prediction.num_trainable_params
        of_them = f", {format_count(trainable)} trainable" if trainable else ""
        parts.append(prediction.method + of_them)
    if prediction.max_seq_len:
        parts.append(f"{prediction.max_seq_len} tokens")
    if prediction.precision:
        parts.append(prediction.precision)
    if (stage := prediction.strategy.get("zero_stage")) is not None:
        parts.append(f"ZeRO-{stage}")
    for key, name in (("offload_optimizer", "optimizer"), ("offload_param", "parameters")):
        if (place := prediction.strategy.get(key, "none")) != "none":
            parts.append(f"{name} on {place}")
    if (optimizer := prediction.strategy.get("optimizer", "adamw")) != "adamw":
        parts.append(str(optimizer))
    if (micro := prediction.strategy.get("micro_batch_size_per_gpu")) is not None:
        parts.append(f"micro-batch {micro}")
    if report.world_size:
        device = prediction.gpu_name or (report.ranks[0].device_name if report.ranks else "")
        ranks = f"{report.world_size} rank{'s' * (report.world_size != 1)}"
        parts.append(ranks + (f" on {device}" if device else ""))
    return " · ".join(parts)


def warnings(report: RunReport) -> tuple[str, ...]:
    """Return what a reader must know before trusting the numbers."""
    found = list(report.problems)
    if not report.ranks:
        found.append("No rank has written its measurements: nothing can be compared.")
    elif report.missing_ranks:
        found.append(
            f"{len(report.missing_ranks)} of {report.world_size} ranks left no readable file: "
            f"{format_ranks(report.missing_ranks)}. The figures are those of the others."
        )
    if report.world_size and any(rank.rank >= report.world_size for rank in report.ranks):
        found.append(
            f"There are files of ranks beyond the {report.world_size} that were planned: "
            "some are left from another run."
        )
    if steps := report.loss.not_finite_steps:
        found.append(
            f"The loss was not a number at {len(steps)} logged step{'s' * (len(steps) != 1)}, "
            f"first at step {steps[0]}: lower the learning rate, or use bf16 in place of fp16."
        )
    for host, seconds in list(report.clock_skews_seconds.items())[:3]:
        side = "ahead of" if seconds > 0 else "behind"
        found.append(
            f"The clock of {host} is {format_seconds(abs(seconds))} {side} most others': times in "
            "logs of different hosts cannot be compared. What is measured here is not affected."
        )
    retries = sum(rank.allocator_retries for rank in report.ranks)
    if retries:
        found.append(
            f"The CUDA allocator had to retry {retries} times: memory was short or fragmented, "
            "and every retry stalls the GPU."
        )
    return tuple(found)


def findings(report: RunReport) -> tuple[Finding, ...]:
    """Return the results, the most important first; what was not measured is left out."""
    memory, time = _memory_findings(report), _time_findings(report)
    loss = held_out_sentence(report)
    held_out = [] if loss is None else [Finding(label="Held-out loss", text=loss)]
    return (*memory[:1], *held_out, *memory[1:], *time)


def _memory_findings(report: RunReport) -> list[Finding]:
    balance = report.balance
    if balance is None:
        return []
    rank = report.rank(balance.fullest_rank)
    found = [
        Finding(
            label="Peak memory",
            text=f"fullest rank {rank.rank}: {compare_bytes(rank.allocated_bytes)}"
            f", in {rank.peak_phase}",
        )
    ]
    if rank.device != "cpu":
        found.append(Finding(label="Reserved", text=compare_bytes(rank.reserved_bytes)))
        if rank.device_used_bytes.measured is not None:
            text = compare_bytes(rank.device_used_bytes)
            found.append(Finding(label="Device used", text=text))
    if balance.headroom_bytes is not None:
        total = format_bytes(report.prediction.gpu_memory_bytes or 0)
        found.append(
            Finding(
                label="Headroom",
                text=f"{format_bytes(balance.headroom_bytes)} of {total} free on that rank",
            )
        )
    if len(report.ranks) > 1:
        found.append(
            Finding(
                label="Balance",
                text=f"fullest rank {100 * balance.imbalance_fraction:.1f} % above the mean; "
                f"emptiest is rank {balance.emptiest_rank} with "
                f"{format_bytes(report.rank(balance.emptiest_rank).measured_bytes)}",
            )
        )
    fullest_node = max(report.nodes, key=lambda node: node.host_bytes.measured or 0)
    if fullest_node.host_bytes.measured:
        found.append(
            Finding(
                label="Host memory",
                text=f"{compare_bytes(fullest_node.host_bytes)} on {fullest_node.host}",
            )
        )
    return found


def _time_findings(report: RunReport) -> list[Finding]:
    time = report.time
    if time.first_step_seconds is None:
        return []
    step = time.step_seconds
    found = [Finding(label="Step time", text=compare(step, format_seconds) + " (median)")]
    tokens = time.tokens_per_step_per_gpu
    if tokens.predicted and tokens.measured and tokens.measured < 0.95 * tokens.predicted:
        full = tokens.measured / tokens.predicted
        text = f"{full:.0%} of the planned tokens: sequences were shorter than max_seq_len"
        found.append(Finding(label="Batches", text=text))
    speed = time.tokens_per_second_per_gpu
    if speed.measured is not None:
        per = "rank" if report.is_on_cpu else "GPU"
        found.append(Finding(label="Throughput", text=f"{compare(speed, format_rate)} per {per}"))
    if time.phase_fractions:
        found.append(Finding(label="Step went to", text=_shares(report)))
    if report.prediction.bound_by:
        found.append(Finding(label="Bound by", text=f"{report.prediction.bound_by} (predicted)"))
    return found


def _shares(report: RunReport) -> str:
    """Return what took the steps' time, the longest first, as the hosts' clocks saw it."""
    shares = sorted(report.time.phase_fractions.items(), key=lambda item: -item[1])
    parts = [f"{name} {100 * share:.0f} %" for name, share in shares]
    between = 1 - sum(share for _, share in shares)
    if between >= 0.005:
        parts.append(f"data and the rest {100 * between:.0f} %")
    busy = [rank.gpu_utilisation_fraction for rank in select_ranks(report)]
    known = [share for share in busy if share is not None]
    if known:
        parts.append(f"GPUs busy {100 * sum(known) / len(known):.0f} % of it")
    return ", ".join(parts)


def held_out_sentence(report: RunReport) -> str | None:
    """Return how the held-out loss changed, ``None`` when it was not measured twice."""
    loss = report.loss
    if (change := loss.held_out_change) is None:
        return None
    verb = "fell" if change < 0 else "rose" if change > 0 else "stayed"
    share = f" ({format_percent(change / loss.held_out_before)})" if loss.held_out_before else ""
    sentence = f"{verb} from {loss.held_out_before:.3f} to {loss.held_out_after:.3f}{share}"
    return sentence if loss.is_after_final else f"{sentence} so far"


def error_note(report: RunReport) -> str:
    """Return how to read the columns of the tables."""
    note = "Error = (predicted - measured) / measured: negative where more was used than predicted."
    if report.world_size != 1:
        note += " The prediction is for the fullest rank."
    if report.is_on_cpu:
        note += (
            " On CPU torch keeps no statistics: measured is the live tensor storage counted in"
            " the first steps, and nothing is reserved."
        )
    return note


def failure_lines(failure: FailureReport) -> tuple[str, str]:
    """Return a failure's headline and its traceback, the end of a long one."""
    others = ""
    if failure.same_on_ranks:
        plural = "s" * (len(failure.same_on_ranks) > 1)
        others = f"; the same on rank{plural} {format_ranks(failure.same_on_ranks)}"
    what = failure.failure
    head = (
        f"Rank {failure.rank} on {failure.host} stopped in {what.phase or 'an unknown phase'}: "
        f"{what.type}: {shorten(what.message, 300)}{others}"
    )
    lines = what.traceback.rstrip().splitlines()
    if len(lines) > MAX_TRACEBACK_LINES:
        cut = len(lines) - MAX_TRACEBACK_LINES
        lines = [f"… {cut} lines above, see the rank's file", *lines[-MAX_TRACEBACK_LINES:]]
    return printable(head), printable("\n".join(lines))


def compare_bytes(comparison: Comparison) -> str:
    """Return ``3.20 GiB predicted, 3.10 GiB measured (+3.2 %)``."""
    return compare(comparison, format_bytes)


def compare(comparison: Comparison, show: Callable[[float], str]) -> str:
    """Return both numbers and the error, or whichever of them there is."""
    predicted, measured = comparison.predicted, comparison.measured
    parts = [] if predicted is None else [f"{show(predicted)} predicted"]
    parts.append("not measured" if measured is None else f"{show(measured)} measured")
    error = comparison.error_fraction
    return ", ".join(parts) + ("" if error is None else f" ({format_percent(error)})")


def format_percent(fraction: float | None) -> str:
    """Return a signed percentage: ``+3.2 %``."""
    if fraction is None:
        return NOTHING
    rounded = round(100 * fraction, 1) + 0.0  # + 0.0 turns -0.0 into 0.0
    return f"{rounded:+.1f} %" if abs(rounded) < 1000 else f"{rounded:+.0f} %"


def format_rate(tokens_per_second: float) -> str:
    """Return tokens per second for people."""
    return f"{format_count(tokens_per_second)} tokens/s"


def format_ranks(ranks: Sequence[int]) -> str:
    """Return rank numbers with runs joined, shortened when there are many: ``0-3, 7``."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1][1:] = [rank]
        else:
            runs.append([rank])
    shown = ["-".join(map(str, run)) for run in runs[:8]]
    return ", ".join(shown) + (", …" if len(runs) > 8 else "")


def printable(text: str) -> str:
    """Replace control characters: a sample or a message must not drive the terminal."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text.replace("\r\n", "\n"))


def shorten(text: str, max_characters: int = MAX_TEXT_CHARACTERS) -> str:
    """Cut a text that would drown the report, and say so."""
    if len(text) <= max_characters:
        return text
    return f"{text[:max_characters]} … ({len(text) - max_characters} more characters)"
