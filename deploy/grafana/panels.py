"""What the Grafana board shows: rows of panels, each a title, a sentence, a unit and its queries.

It names the series (`docs/metrics.md`). What a panel is and how queries are written is in `queries.py`; the JSON is
made in `board.py`.
"""

from deploy.grafana.queries import (
    COUNT,
    MODEL,
    RANGE,
    SERVER,
    Panel,
    by_count,
    gauge,
    or_zero,
    quantile,
    ratio,
    stat,
    total,
)

SAVED = ratio(total("routed_pairs_saved_total"), total("routed_pairs_total"))
FAILED = or_zero(total("requests_failed_total"))
MIXED = f"{total('step_mixed_total', 'instance')} / {total('step_time_over_estimate_count', 'instance')}"
TOKEN_TIME = "request_time_per_output_token_seconds"
DEFAULT_COUNT = f'count_values("num_experts", moedial:default_num_experts{{{MODEL}}})'
TOKEN_TIME_AT_DEFAULT = f"scalar({quantile(0.5, TOKEN_TIME, labels=MODEL)} and on (num_experts) {DEFAULT_COUNT})"

NOW = (
    stat("Servers that take work", "Engines that are loaded and run.", "short", f"sum(moedial:engine_up{{{MODEL}}})"),
    stat("Running", "Sequences in the batches.", "short", f"sum(moedial:num_requests_running{{{MODEL}}})"),
    stat("Waiting", "Sequences that wait for a place.", "short", f"sum(moedial:num_requests_waiting{{{MODEL}}})"),
    stat("Answers", "Sequences finished per second.", "reqps", or_zero(total("request_success_total"))),
    stat("Tokens", "Tokens generated per second.", "short", or_zero(total("generation_tokens_total"))),
    stat("Work saved", "Share of expert computations that lower counts saved.", "percentunit", SAVED),
)
DIAL = (
    Panel(
        "Tokens by expert count",
        "Which counts requests use: the share of generated tokens.",
        "short",
        ((total("generation_tokens_total", "num_experts", COUNT), "K={{num_experts}}"),),
        stacking="percent",
    ),
    Panel(
        "Time to first token by expert count",
        "From arrival to the first token, with the time in the queue.",
        "s",
        by_count("time_to_first_token_seconds"),
    ),
    Panel(
        "Time between tokens by expert count",
        "Sequences of different counts share steps, so that those of low counts wait for the others.",
        "s",
        by_count("inter_token_latency_seconds"),
    ),
    Panel(
        "What a count buys",
        "Median time per token at each count over that at the default count; 1: it buys no speed. For one model.",
        "none",
        ((f"{quantile(0.5, TOKEN_TIME)} / {TOKEN_TIME_AT_DEFAULT}", "K={{num_experts}}"),),
    ),
    Panel(
        "Time per token",
        "How many finished sequences had which mean time per token.",
        "s",
        ((f"sum by (le) (increase(moedial:{TOKEN_TIME}_bucket{{{COUNT}}}{RANGE}))", "{{le}}"),),
        "heatmap",
    ),
    Panel(
        "Expert computations",
        "Pairs of a token and an expert per second: done, and saved against the trained count.",
        "ops",
        ((total("routed_pairs_total"), "done"), (total("routed_pairs_saved_total"), "saved")),
        stacking="normal",
    ),
    Panel(
        "Prompt tokens by expert count",
        "Read per second, with those that were found in the cache.",
        "short",
        ((total("prompt_tokens_total", "num_experts", COUNT), "K={{num_experts}}"),),
        stacking="normal",
    ),
    Panel(
        "How sequences ended",
        "Finished sequences by reason.",
        "reqps",
        ((total("request_success_total", "finished_reason", COUNT), "{{finished_reason}}"),),
        stacking="normal",
    ),
    Panel(
        "Cost by expert count",
        "At --prices, in --currency, per hour; nothing without prices.",
        "none",
        ((or_zero(f"3600 * {total('cost_total', 'num_experts', COUNT)}"), "K={{num_experts}}"),),
        stacking="normal",
    ),
)
STEPS = (
    Panel(
        "Steps with several counts",
        "Share of the engine's steps. Where most are mixed, low counts are no faster: give them servers of their own.",
        "percentunit",
        (
            (
                f"{total('step_mixed_total', 'instance')} / {total('step_time_over_estimate_count', 'instance')}",
                "{{instance}}",
            ),
        ),
        width=6,
    ),
    Panel(
        "Time of steps over the estimate",
        "1: the scheduler's model of costs holds, by which it keeps streams smooth.",
        "none",
        tuple((quantile(share, "step_time_over_estimate", "", MODEL), f"p{share * 100:.0f}") for share in (0.5, 0.99)),
        width=6,
    ),
    Panel(
        "Experts used by a step",
        "Distinct experts of the last step, summed over layers: what a step reads from memory.",
        "short",
        ((gauge("step_unique_experts"), "{{instance}}"),),
        width=6,
    ),
    Panel(
        "Imbalance of experts",
        "The busiest expert's pairs over the mean, in the last step.",
        "none",
        ((f"avg by (instance) (moedial:expert_load_imbalance{{{MODEL}}})", "{{instance}}"),),
        width=6,
    ),
)
OVERLOAD = (
    Panel(
        "Time in the queue by expert count",
        "At HTTP and in the engine; 95th percentile.",
        "s",
        ((quantile(0.95, "request_queue_time_seconds"), "K={{num_experts}}"),),
    ),
    Panel(
        "Longest wait",
        "How long the sequence that waits longest has waited.",
        "s",
        ((f"max by (instance) (moedial:oldest_waiting_seconds{{{MODEL}}})", "{{instance}}"),),
    ),
    Panel(
        "HTTP answers",
        "By status; with 429 and 503 clients are to come back later.",
        "reqps",
        ((total("http_requests_total", "status"), "{{status}}"),),
        stacking="normal",
    ),
    Panel(
        "Refused",
        "Requests that did not run, by the code that their callers got.",
        "reqps",
        ((or_zero(total("requests_rejected_total", "reason")), "{{reason}}"),),
    ),
    Panel(
        "Failed, given up, preempted",
        "Sequences that ended with an error, whose caller had gone, or that lost their place for lack of memory.",
        "reqps",
        (
            (FAILED, "failed"),
            (total("requests_aborted_total"), "given up"),
            (total("num_preemptions_total"), "preempted"),
        ),
    ),
    Panel(
        "Refused by a key's limits",
        "Requests of API keys beyond their limits.",
        "reqps",
        ((or_zero(total("key_requests_limited_total", "key, limit")), "{{key}} {{limit}}"),),
    ),
    Panel(
        "Brownout",
        "Options below the default that stand in for it; nothing without --brownout.",
        "short",
        ((or_zero(gauge("brownout_level")), "{{instance}}"),),
    ),
    Panel(
        "Quality under brownout",
        "Calibrated quality, relative to the trained count, of what a request without a count gets now.",
        "percentunit",
        ((f"min by (instance) (moedial:brownout_relative_quality{{{MODEL}}}) or vector(1)", "{{instance}}"),),
    ),
    Panel(
        "Counts that ran",
        "Mean expert count of the sequences, and the default for requests that name none.",
        "none",
        (
            (f"{total('request_num_experts_sum')} / {total('request_num_experts_count')}", "mean"),
            (f"max by (instance) (moedial:default_num_experts{{{MODEL}}})", "default {{instance}}"),
        ),
    ),
)
MEMORY = (
    Panel(
        "KV cache in use",
        "Share of its blocks. Near 1 sequences are preempted.",
        "percentunit",
        ((f"max by (instance) (moedial:kv_cache_usage_perc{{{MODEL}}})", "{{instance}}"),),
        width=6,
    ),
    Panel(
        "Prompt tokens found in the cache",
        "Only prompts with equal counts share blocks.",
        "percentunit",
        ((f"{total('prefix_cache_hits_total')} / {total('prefix_cache_queries_total')}", "found"),),
        width=6,
    ),
    Panel(
        "Snapshots of states",
        "Of models with recurrent layers: bytes that the prefix cache keeps of them.",
        "bytes",
        ((gauge("prefix_snapshot_bytes"), "{{instance}}"),),
        width=6,
    ),
    Panel(
        "Snapshots displaced",
        "Dropped per second to make room for others: with more --prefix-snapshots more prompts might be found.",
        "short",
        ((f"{total('prefix_snapshots_displaced_total', 'instance')}", "{{instance}}"),),
        width=6,
    ),
    Panel(
        "Drafts accepted",
        "Of the tokens that speculation proposed.",
        "percentunit",
        (
            (
                f"{total('spec_decode_num_accepted_tokens_total')} / {total('spec_decode_num_draft_tokens_total')}",
                "accepted",
            ),
        ),
        width=6,
    ),
    Panel(
        "Resident memory",
        "Of the HTTP process and of the engine process.",
        "bytes",
        (
            (f"process_resident_memory_bytes{{{SERVER}}}", "http {{instance}}"),
            (f"moedial:engine_process_resident_memory_bytes{{{SERVER}}}", "engine {{instance}}"),
        ),
        width=6,
    ),
    Panel(
        "Processors in use",
        "Seconds of processor time per second. A decoding engine is always busy: this says nothing of the load.",
        "short",
        (
            (f"rate(process_cpu_seconds_total{{{SERVER}}}{RANGE})", "http {{instance}}"),
            (f"rate(moedial:engine_process_cpu_seconds_total{{{SERVER}}}{RANGE})", "engine {{instance}}"),
        ),
        width=6,
    ),
    Panel(
        "Engine restarts",
        "Engine processes started after one had ended or hung.",
        "short",
        ((f"sum by (instance) (increase(moedial:engine_restarts_total{{{MODEL}}}{RANGE}))", "{{instance}}"),),
        width=6,
    ),
    Panel(
        "Silence of the engine",
        "Since the engine last said anything. Idle, it is asked every 2 s.",
        "s",
        ((gauge("engine_seconds_since_report"), "{{instance}}"),),
        width=6,
    ),
    Panel(
        "Request bodies",
        "Bytes held, beyond the first 64 KiB of each.",
        "bytes",
        ((gauge("http_body_bytes"), "{{instance}}"),),
        width=6,
    ),
)
ROWS = (
    ("Now", NOW),
    ("Expert counts", DIAL),
    ("Steps that counts share", STEPS),
    ("Overload", OVERLOAD),
    ("Memory and processes", MEMORY),
)
