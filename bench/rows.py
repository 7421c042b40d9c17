"""Rows of the table of measured figures: what was measured, the figure, and what is beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from bench.lab import fastest_first, spread

Row = tuple[str, str, str]

#: Names of the models that benches measure by a short one.
MODELS = {"smollm2": "SmolLM2-135M", "gemma": "Gemma-3-270M"}


def transport_rows(result: dict[str, Any]) -> Iterator[Row]:
    """The built-in transport on each link, beside what limits it."""
    size = f"{result['bytes'] / 1e9:.2f} GB"
    for link, rows in result["links"].items():
        at = {row["transport"]: row for row in rows}
        checked = at["tcp+checksum"]
        yield (
            f"{size} of KV cache over {link} into finished MLX arrays",
            f"**{at['tcp']['gb_per_s']:.2f} GB/s**, {at['tcp']['cpu_s_per_gb_both']:.2f} CPU-s/GB "
            f"for both sides; with a checksum of every block {checked['gb_per_s']:.2f} and "
            f"{checked['cpu_s_per_gb_both']:.2f}",
            f"plain sockets {at['sockets']['gb_per_s']:.2f} GB/s; "
            + (
                f"one thread's memcpy {result['floors']['memcpy_gb_per_s']:.1f}"
                if link == "loopback"
                else f"the link {result['floors']['link_10gbit_gb_per_s']:.2f}"
            ),
        )


def replay_rows(result: dict[str, Any]) -> Iterator[Row]:
    """Totals of the paced replay at the published length."""
    names = {
        "streamed": "streamed layer by layer",
        "chunked": f"streamed, {result['chunk']:,}-token prefill steps",
        "afterwards": "sent after prefill",
    }
    published = result["published"]
    for row in result["rows"]:
        if row["tokens"] != published["tokens"]:
            continue
        if row["variant"] == "link-bound":
            yield (
                f"paced replay, {row['tokens']:,} tokens in, prefill in half of the "
                f"{result['link']} link's time: from the first layer to finished MLX arrays",
                f"**{row['transfer_s']:.3f} s**",
                f"bytes / link rate {row['link_floor_s']:.3f} s",
            )
        else:
            yield (
                f"paced replay, {row['tokens']:,} tokens in, {published['output_tokens']} out, "
                f"{result['link']} link, KV {names[row['variant']]}",
                f"**{row['total_s']:.2f} s**, {1e3 * row['exposed_s']:.0f} ms of it transfer "
                "that was not hidden",
                f"computation alone {row['compute_floor_s']:.2f} s; published "
                f"{published['together']:.2f} s",
            )


def handoff_rows(result: dict[str, Any]) -> Iterator[Row]:
    """What the connector costs, and how long the hand-off takes, on a machine's CPU."""
    first = result["first_token_ms"]
    what = f"{result['model']}, fp32, {result['prompt_tokens']:,} tokens, both engines on one CPU"
    yield (
        f"{what}: first token, handed off",
        f"**{first['handed_off']:.0f} ms**",
        f"kept local {first['local']:.0f} ms; a vLLM without the connector {first['plain']:.0f} ms",
    )
    yield (
        f"{what}: cache complete after the last layer",
        f"**{result['cache_complete_after_last_layer_ms']:.0f} ms**",
        f"{result['kv_bytes'] / 1e6:.0f} MB",
    )
    yield (
        f"{what}: vLLM's first token to the receiver's",
        f"**{result['handoff_gap_ms']:.0f} ms**",
        f"a decode step: {result['decode_step_ms']['handed_off']:.0f} ms",
    )


def serving_rows(result: dict[str, Any]) -> Iterator[Row]:
    """What the relay adds to each token."""
    latency, own = result["relay_latency"], result["relay_time"]
    yield (
        "the relay's own time for a decode step, in vLLM's engine process",
        f"**{own['p50_ms']:.2f} ms** p50, {own['p99_ms']:.2f} ms p99",
        f"{own['steps']:,.0f} steps, 1 to 8 requests each",
    )
    for at_once in (1, 8):
        tpot = {
            row["server"]: row["median_tpot_ms"]
            for row in result["rows"]
            if row["concurrency"] == at_once
        }
        yield (
            f"{result['model']}: time per output token (p50), {at_once} at once, handed off",
            f"**{tpot['vLLM and receiver']:.1f} ms**",
            f"the receiver alone {tpot['receiver alone']:.1f}, vLLM alone "
            f"{tpot['vLLM alone']:.1f}; every process on the same cores",
        )
    yield (
        "a token's way from the receiver through vLLM to the HTTP client",
        f"**{latency['p50_ms']:.2f} ms** p50, {latency['p99_ms']:.2f} ms p99",
        f"{latency['samples']} tokens",
    )


def fault_rows(result: dict[str, Any]) -> Iterator[Row]:
    """Responses under faults."""
    kinds = ", ".join(f"{count} x {kind}" for kind, count in sorted(result["actions"].items()))
    yield (
        f"{result['trials']} random faults under load ({kinds})",
        f"**{result['responses_wrong']} wrong or failed** of "
        f"{result['responses_right'] + result['responses_wrong']:,} responses",
        f"{result['fell_back']['all']:.0f} fell back to local decode",
    )


def shadow_rows(result: dict[str, Any]) -> Iterator[Row]:
    """A conversation's next turn, and who comes while it is prepared. Ratios of each process."""
    sizes, processes = result["sizes"], result["processes"]

    def each(ratio: Callable[[Any], float]) -> str:
        return " and ".join(f"{ratio(one):.2f}" for one in processes)

    def second(one: Any, name: str) -> float:
        return float(one["second_turn"][name]["median_ttft_ms"])

    cached = {name: row["cached_tokens"] for name, row in processes[-1]["second_turn"].items()}
    yield (
        f"second turn of a conversation ({sizes['prompt']} tokens, an answer of {sizes['answer']}, "
        f"a question of {sizes['question']}): first token with shadow prefill beside without",
        f"**{each(lambda one: second(one, 'with shadow prefill') / second(one, 'without'))}** "
        f"times as long, in {len(processes)} processes",
        f"cached tokens {cached['with shadow prefill']} and {cached['without']}; "
        "both engines on the same cores",
    )
    if not all("waits" in one for one in processes):
        return  # what was recorded before vLLM's engine told of it
    waits = [one["waits"] for one in processes]
    shares = "; ".join(
        " and ".join(f"{one['waited_share_of_chunk'][name]:.2f}" for one in waits)
        for name in ("p50", "p90", "most")
    )
    yield (
        f"a short request that comes while a shadow's chunk of {sizes['chunk']} tokens is "
        "computed: until its own step begins, as a share of the chunk's time; p50, p90, most",
        f"**{shares}**",
        f"{' and '.join(str(one['requests']) for one in waits)} requests, by vLLM's engine: none "
        f"waited for more than {max(one['most_shadow_tokens'] for one in waits)} tokens of shadows",
    )


def overlap_rows(result: dict[str, Any]) -> Iterator[Row]:
    """What exporting costs the first token, and what of the transfer comes after it."""
    for row in result["rows"]:
        local, handed = row["first_token_local_ms"], row["first_token_handed_off_ms"]
        gap, lag = row["handoff_gap_ms"], row["cache_complete_after_last_layer_ms"]
        steps = f" in steps of {row['step_tokens']:,}" if row["step_tokens"] else ""
        steps += "" if row["streams"] == "auto" else f", {row['streams']} connection"
        yield (
            f"{_gpu(result)}, {row['prompt_tokens']:,} tokens{steps}: first token with KV streamed "
            "out; hand-off gap beyond a decode step, p50 and p90",
            f"**{handed['median']:.1f} ms** ({row['slowdown_percent']:+.1f} %); "
            f"**{gap['median']:.1f} and {gap['p90']:.1f} ms**",
            f"kept local {local['median']:.1f} ms; cache complete after the last layer "
            f"{lag['median']:.1f} and {lag['p90']:.1f} ms; {row['samples']} hand-offs in "
            f"{len(row['processes'])} processes, whose median gaps were "
            f"{', '.join(f'{ms:.1f}' for ms in row['process_gaps_ms'])}",
        )


def two_gpus_rows(result: dict[str, Any]) -> Iterator[Row]:
    """The gap with the receiver's own decode step in it."""
    for row in result["rows"]:
        if row["prompt_tokens"] == 8192:
            yield (
                f"two {_gpu(result)}, 8,192 tokens, MLX on the second: vLLM's first token to "
                "the receiver's",
                f"**{row['handoff_gap_ms']['median']:.1f} ms**",
                f"a decode step {row['receiver_ms_per_token']['median']:.1f} ms, "
                f"vLLM's own {row['local_ms_per_token']['median']:.1f}",
            )


def relay_rows(result: dict[str, Any]) -> Iterator[Row]:
    """Both engines on one GPU, where they take turns."""
    for row in result["rows"]:
        if row["prompt_tokens"] == 8192:
            yield (
                f"vLLM and MLX on the same {_gpu(result)}, 8,192 tokens: first token; vLLM's first "
                "token to the receiver's; tokens/s",
                f"**{row['first_token_handed_off_ms']['median']:.0f} ms**; "
                f"**{row['handoff_gap_ms']['median']:.0f} ms**; "
                f"**{1e3 / row['receiver_ms_per_token']['median']:.0f}**",
                f"vLLM alone {row['first_token_local_ms']['median']:.0f} ms and "
                f"{1e3 / row['local_ms_per_token']['median']:.0f} tokens/s",
            )


def agent_paced_rows(result: dict[str, Any]) -> Iterator[Row]:
    """What an agent's calls send, and when their second tokens come, in both processes."""
    by = {(run["link"], run["keeps"]): run for run in result["runs"]}
    for number, link in enumerate(fastest_first(run["link"] for run in result["runs"])):
        run, rows = by[link, True], by[link, True]["rows"]
        kept, sent = run["summary"], by[link, False]["summary"]
        alone = {
            who: spread(row[f"{who}_alone_second_s"] for row in rows[1:] if row["in_place"])
            for who in ("mac", "vllm")
        }
        what = (
            f"a coding agent's {len(rows)} calls, {rows[0]['prompt_tokens']:,} to "
            f"{max(row['prompt_tokens'] for row in rows):,} tokens, paced"
        )
        if number == 0:
            yield (
                f"{what}: KV sent, as a multiple of the new tokens' (p50, worst)",
                f"**{kept['sent_over_new']['p50']:.2f}, {kept['sent_over_new']['worst']:.2f}**",
                f"whole histories {sent['sent_over_new']['p50']:.0f}, "
                f"{sent['sent_over_new']['worst']:.0f}",
            )
        again = "".join(
            f"; in another process {_seconds(earlier['second_s_in_place'])}"
            for earlier in run.get("earlier", [])
        )
        yield (
            f"{what}, {link} link: second token of the {kept['in_place']} calls that are "
            "continued in place (p50, p90)",
            f"**{_seconds(kept['second_s_in_place'])}**{again}",
            f"those that this CPU copied first {_seconds(kept['second_s_copied'])}; whole "
            f"histories {_seconds(sent['second_s'])}; computed, for the same calls: the Mac alone "
            f"{_seconds(alone['mac'])}, vLLM alone {_seconds(alone['vllm'])}",
        )


def agent_servers_rows(result: dict[str, Any]) -> Iterator[Row]:
    """The same trace in small, with real engines. Their times depend on who else uses the cores."""
    kept, sent = (result["summary"][name] for name in ("kept", "not_kept"))
    yield (
        f"{result['model']}: a coding agent's {result['calls']} calls in small, both engines: KV "
        "sent, as a multiple of the new tokens' (p50, worst)",
        f"**{kept['sent_over_new']['p50']:.2f}, {kept['sent_over_new']['worst']:.2f}**",
        f"whole histories {sent['sent_over_new']['p50']:.0f}, "
        f"{sent['sent_over_new']['worst']:.0f}; {result['texts_differ']} texts differ from those "
        "of vLLM alone",
    )


def agent_crowd_rows(result: dict[str, Any]) -> Iterator[Row]:
    """Memory after very many conversations."""
    half, control = result["second_half"], ""
    if "local" in result:
        local = sum(result["local"]["second_half"]["vllm_mb"].values())
        control = f", without hand-offs {local:+.0f}"
    again = "".join(
        f"; in another process {earlier['second_half']['receiver_mb']:+.0f}"
        for earlier in result.get("earlier", [])
    )
    yield (
        f"{result['conversations']:,} short conversations, {result['kv_memory']} of KV: resident "
        "memory, second half",
        f"**{half['receiver_mb']:+.0f} MB** in the receiver{again}",
        f"vLLM's processes {sum(half['vllm_mb'].values()):+.0f}{control}; "
        f"{result['held_tokens']:,.0f} tokens were held",
    )


def adapt_rows(result: dict[str, Any]) -> Iterator[Row]:
    """Auto beside the fixed choices, stage by stage."""
    for row in result["rows"]:
        mean = dict(row["mean_s"])
        auto = mean.pop("auto")
        others = ", ".join(f"{name} {seconds:.2f}" for name, seconds in mean.items())
        yield (
            f"conditions change, paced: {row['stage']}, mean time to the last token with "
            "`offload=auto`",
            f"**{auto:.2f} s**, {row['auto_over_best']:.2f} times the best fixed choice "
            f"({row['auto_over_best_later']:.2f} from the fifth request on); ends with "
            f"{row['chosen']}, {row['changes']} changes",
            others,
        )


def codec_rows(result: dict[str, Any]) -> Iterator[Row]:
    """Rates, quality and links of the codecs, with both processes' figures."""
    for codec in ("q8", "q4"):
        rates = [
            row for row in result["rates"] if (row["dtype"], row["codec"]) == ("bfloat16", codec)
        ]
        found = {
            name: " and ".join(f"{row[name]['median']:.2f}" for row in rates)
            for name in ("encode", "decode", "mlx_quantize", "mlx_dequantize")
        }
        yield (
            f"KV in {codec}, {100 * rates[0]['bytes_of_raw']:.0f} % of the bytes of bf16: one core "
            "quantises and decodes (raw KV)",
            f"**{found['encode']} GB/s, {found['decode']} GB/s**",
            f"MLX on a CPU {found['mlx_quantize']} GB/s, {found['mlx_dequantize']} GB/s",
        )
    for row in (row for row in result["quality"] if row["run"] == 1):
        yield (
            f"KV in {row['codec']}, {MODELS[row['of']]}, {row['positions']} positions behind a "
            "quantised prompt: KL from the raw one's, in nats",
            f"**{row['mean_kl']:.2g}** ± {row['kl_error']:.1g}, worst {row['worst_kl']:.2g}",
            f"perplexity {row['perplexity']:.2f} instead of {row['perplexity_raw']:.2f}, the same "
            f"likeliest token {100 * row['same_top_token']:.0f} %",
        )
    raw, *others = result["links"]
    for row in others:
        totals = ", ".join(
            f"{seconds:.2f} s at {gbit} Gbit/s"
            for gbit, seconds in row["total_s"].items()
            if float(gbit) <= 2.5
        )
        yield (
            f"KV in {row['codec']}, by the cost model: the published request of 8,192 tokens in, "
            "32 out",
            f"faster than {row['than']} **below {row['wins_below_gbit']:.1f} Gbit/s**: {totals}",
            "raw "
            + ", ".join(
                f"{seconds:.2f}" for gbit, seconds in raw["total_s"].items() if float(gbit) <= 2.5
            ),
        )


def _seconds(found: dict[str, float]) -> str:
    return f"{found['p50']:.2f} and {found['p90']:.2f} s" if found else "-"


def meet_rows(result: dict[str, Any]) -> Iterator[Row]:
    """What two ways at once give, for each length."""
    for row in result["rows"]:
        above = 100 * (row["both_s"] / row["ideal_s"] - 1)
        yield (
            f"paced, {row['tokens']:,} tokens over {result['link']}: a complete cache, KV sent "
            "from the end and computed from the front",
            f"**{row['both_s']:.2f} s**, {row['computed_tokens']:,} tokens computed",
            f"all sent {row['stream_s']:.2f} s, all computed {row['compute_s']:.2f} s; "
            f"the ideal of these {row['ideal_s']:.2f} s ({above:+.0f} %), of the published and the "
            f"link's rate {row['floor_s']:.2f} s",
        )


def _gpu(result: dict[str, Any]) -> str:
    return " ".join(result["machine"]["gpu"].split()[:2])


#: By the file in ``bench/results``, in the table's order.
SOURCES = {
    "replay.json": replay_rows,
    "transport.json": transport_rows,
    "overlap_gpu.json": overlap_rows,
    "overlap_two_gpus.json": two_gpus_rows,
    "relay_gpu.json": relay_rows,
    "handoff.json": handoff_rows,
    "serving.json": serving_rows,
    "faults.json": fault_rows,
    "shadow.json": shadow_rows,
    "agent_paced.json": agent_paced_rows,
    "agent_servers.json": agent_servers_rows,
    "agent_crowd.json": agent_crowd_rows,
    "adapt.json": adapt_rows,
    "meet.json": meet_rows,
    "codecs.json": codec_rows,
}
