"""The dashboards: service, engine, autoscaling, clients."""

from __future__ import annotations

from monitoring.board import Board, Panel, Row, graph, stacked, stat

_R = "[$__rate_interval]"
_LATENCY = 'ray_t5_http_latency_ms_bucket{S,http_route=~"/v1/summarize.*|/hf/.*"}'
_HTTP = "ray_serve_num_http_requests_total"


def _quantiles(title: str, series: str, text: str = "") -> Panel:
    return graph(
        title,
        "ms",
        *(
            (f"histogram_quantile({q}, sum by (le) (rate({series}{_R})))", f"p{q * 100:g}")
            for q in (0.5, 0.95, 0.99)
        ),
        text=text,
    )


def _mean(amount: str, count: str, legend: str, scale: str = "") -> tuple[str, str]:
    """Of counters: Ray rebuilds a histogram's sum from its buckets."""
    return f"{scale}sum(rate({amount}{{S}}{_R})) / sum(rate({count}{{S}}{_R}))", legend


SERVICE = Board(
    "service",
    "t5-serve: service",
    "Is it up, how fast, and who is refused? Requests as Serve's proxy sees them.",
    (
        Row(
            "Now",
            (
                stat("Requests", "reqps", f"sum(rate({_HTTP}{{S}}{_R}))"),
                stat(
                    "Answered without failure",
                    "percentunit",
                    f'sum(rate({_HTTP}{{S,status_code!~"5.."}}{_R})) / sum(rate({_HTTP}{{S}}{_R}))',
                    "Status below 500.",
                ),
                stat(
                    "p95",
                    "ms",
                    f"histogram_quantile(0.95, sum by (le) (rate({_LATENCY}{_R})))",
                ),
                stat("Documents waiting", "short", "sum(ray_t5_waiting_requests{S})"),
                stat(
                    "Work waiting",
                    "s",
                    "sum(ray_t5_waiting_tokens{S}) / sum(ray_t5_drain_tokens_per_s{S})",
                    "How long what waits now takes to work off.",
                ),
                stat(
                    "Engines",
                    "short",
                    'count(ray_serve_deployment_replica_healthy{S,deployment="Summarizer"} == 1)',
                ),
            ),
        ),
        Row(
            "Requests",
            (
                stacked(
                    "By status",
                    "reqps",
                    (f"sum by (status_code) (rate({_HTTP}{{S}}{_R}))", "{{status_code}}"),
                ),
                stacked(
                    "By route",
                    "reqps",
                    (
                        f"sum by (http_route) (rate(ray_t5_http_requests_total{{S}}{_R}))",
                        "{{http_route}}",
                    ),
                    text="As the application counts them.",
                ),
                graph(
                    "Being worked on",
                    "short",
                    ("sum(ray_serve_num_ongoing_http_requests{P})", "in Serve's proxies"),
                    ("sum(ray_t5_client_requests_in_flight{S})", "in the Api replicas"),
                    ("sum(ray_t5_running_requests{S})", "documents in the model"),
                ),
                _quantiles(
                    "Latency of summaries", _LATENCY, "Good to a bucket. Longest: the deadline."
                ),
                graph(
                    "p95 by route",
                    "ms",
                    (
                        "histogram_quantile(0.95, sum by (http_route, le) "
                        f"(rate(ray_t5_http_latency_ms_bucket{{S}}{_R})))",
                        "{{http_route}}",
                    ),
                ),
                _quantiles("of it: wait in the queue", "ray_t5_queue_ms_bucket{S}"),
            ),
        ),
        Row(
            "What went wrong",
            (
                graph(
                    "Texts refused for want of room",
                    "cps",
                    (f"sum by (reason) (rate(ray_t5_shed_texts_total{{S}}{_R}))", "{{reason}}"),
                ),
                graph(
                    "Texts cut, texts split",
                    "cps",
                    (f"sum(rate(ray_t5_truncated_texts_total{{S}}{_R}))", "texts cut"),
                    (f"sum(rate(ray_t5_chunks_total{{S}}{_R}))", "parts"),
                ),
                graph(
                    "Usage events lost",
                    "short",
                    ("sum(ray_t5_usage_events_dropped_total{S})", "since the replicas began"),
                ),
            ),
        ),
    ),
)

ENGINE = Board(
    "engine",
    "t5-serve: engine",
    "What the engines do with their time: queue, batch, encode, decode, tokens.",
    (
        Row(
            "Queue and batch",
            (
                graph(
                    "Rows of the batch",
                    "short",
                    ("sum(ray_t5_slots{S})", "there are"),
                    ("sum(ray_t5_slots_used{S})", "taken"),
                    text="A document takes one for each beam. All taken and a queue: it is full.",
                ),
                graph(
                    "Documents",
                    "short",
                    ("sum(ray_t5_running_requests{S})", "in the model"),
                    ("sum(ray_t5_waiting_requests{S})", "waiting"),
                ),
                graph(
                    "Tokens waiting",
                    "short",
                    ("sum(ray_t5_waiting_tokens{S})", "waiting"),
                    ("sum(ray_t5_drain_tokens_per_s{S})", "worked off in a second"),
                    text="Their ratio is the wait of who comes now, and Retry-After.",
                ),
                graph(
                    "Documents in a batch",
                    "short",
                    _mean("ray_t5_batched_requests_total", "ray_t5_batches_total", "mean"),
                    (
                        "histogram_quantile(0.95, sum by (le) "
                        f"(rate(ray_t5_batch_size_bucket{{S}}{_R})))",
                        "p95",
                    ),
                ),
                graph(
                    "Wait in the queue",
                    "s",
                    (
                        f"sum(rate(ray_t5_queue_seconds_total{{S}}{_R})) / "
                        f'sum(rate(ray_t5_engine_requests_total{{S,outcome="finished"}}{_R}))',
                        "mean",
                    ),
                ),
                _quantiles("Time of a document in the model", "ray_t5_compute_ms_bucket{S}"),
            ),
        ),
        Row(
            "Steps",
            (
                graph(
                    "Mean step",
                    "s",
                    _mean("ray_t5_encode_seconds_total", "ray_t5_encodes_total", "encode"),
                    _mean("ray_t5_decode_seconds_total", "ray_t5_batches_total", "decode"),
                ),
                graph(
                    "p99 of a step",
                    "ms",
                    *(
                        (
                            "histogram_quantile(0.99, sum by (le) "
                            f"(rate(ray_t5_{name}_ms_bucket{{S}}{_R})))",
                            name,
                        )
                        for name in ("encode", "decode")
                    ),
                    text="Of every 16th.",
                ),
                stacked(
                    "Where the time goes",
                    "percentunit",
                    (f"avg(rate(ray_t5_encode_seconds_total{{S}}{_R}))", "encode"),
                    (f"avg(rate(ray_t5_decode_seconds_total{{S}}{_R}))", "decode"),
                    text="Share of wall time, mean of the replicas. What is missing to 1 is idle.",
                ),
            ),
        ),
        Row(
            "Tokens and outcomes",
            (
                graph(
                    "Tokens",
                    "cps",
                    (f"sum by (kind) (rate(ray_t5_tokens_total{{S}}{_R}))", "{{kind}}"),
                ),
                graph(
                    "Lookup",
                    "percentunit",
                    (
                        f'sum(rate(ray_t5_draft_tokens_total{{S,kind="accepted"}}{_R})) / '
                        f'sum(rate(ray_t5_draft_tokens_total{{S,kind="tried"}}{_R}))',
                        "accepted of tried",
                    ),
                    text="Share of the tokens tried ahead that were right.",
                ),
                graph(
                    "Documents by outcome",
                    "cps",
                    (
                        f"sum by (outcome) (rate(ray_t5_engine_requests_total{{S}}{_R}))",
                        "{{outcome}}",
                    ),
                ),
                graph(
                    "Time lost",
                    "percentunit",
                    (
                        f"sum by (outcome) (rate(ray_t5_lost_compute_seconds_total{{S}}{_R}))",
                        "{{outcome}}",
                    ),
                    text="Document seconds a second in the model that gave no result.",
                ),
                graph(
                    "Without a step",
                    "s",
                    ("max by (replica) (ray_t5_no_progress_seconds{S})", "{{replica}}, has work"),
                    ("max by (replica) (ray_t5_step_age_seconds{S})", "{{replica}}"),
                    text="While there is work this must stay far below engine.stall_s.",
                ),
                graph(
                    "GPU",
                    "percent",
                    ("avg(ray_node_gpus_utilization{P})", "utilization"),
                    text="Empty where the engines run on CPUs.",
                ),
            ),
        ),
    ),
)

AUTOSCALING = Board(
    "autoscaling",
    "t5-serve: autoscaling",
    "How many replicas there are, how many Serve wants, and why.",
    (
        Row(
            "Replicas of the engine",
            (
                graph(
                    "Replicas",
                    "short",
                    (
                        'max(ray_serve_autoscaling_target_replicas{S,deployment="Summarizer"})',
                        "aimed at",
                    ),
                    (
                        'max(ray_serve_autoscaling_desired_replicas{S,deployment="Summarizer"})',
                        "the policy's wish",
                    ),
                    (
                        "count(ray_serve_deployment_replica_healthy"
                        '{S,deployment="Summarizer"} == 1)',
                        "healthy",
                    ),
                ),
                graph(
                    "Load for each replica",
                    "short",
                    (
                        'max(ray_serve_autoscaling_total_requests{S,deployment="Summarizer"}) / '
                        'count(ray_serve_deployment_replica_healthy{S,deployment="Summarizer"}'
                        " == 1)",
                        "running and queued",
                    ),
                    (
                        "max(ray_serve_autoscaling_target_ongoing_requests"
                        '{S,deployment="Summarizer"})',
                        "target_ongoing_requests",
                    ),
                    text="Above the target for upscale_delay_s: more replicas.",
                ),
                graph(
                    "Where requests are",
                    "short",
                    (
                        "sum by (deployment) (ray_serve_deployment_queued_queries{S})",
                        "before {{deployment}}",
                    ),
                    (
                        "sum by (deployment) (ray_serve_replica_processing_queries{S})",
                        "in {{deployment}}",
                    ),
                ),
            ),
        ),
        Row(
            "How replicas fare",
            (
                graph(
                    "By replica",
                    "short",
                    (
                        "sum by (replica) (ray_serve_replica_processing_queries"
                        '{S,deployment="Summarizer"})',
                        "{{replica}}",
                    ),
                    text="Even, or Serve's routing has a favourite.",
                ),
                graph(
                    "Time to start, p95",
                    "ms",
                    (
                        "histogram_quantile(0.95, sum by (deployment, le) "
                        "(ray_serve_replica_startup_latency_ms_bucket{S}))",
                        "{{deployment}}",
                    ),
                    text="Over the controller's life: from the decision to ready, pod included.",
                ),
                graph(
                    "Health checks",
                    "ms",
                    (
                        "histogram_quantile(0.95, sum by (deployment, le) "
                        f"(rate(ray_serve_health_check_latency_ms_bucket{{S}}{_R})))",
                        "{{deployment}}, p95",
                    ),
                    text="Slow ones come before failed ones.",
                ),
            ),
        ),
        Row(
            "Nodes of Ray",
            (
                graph("Nodes", "short", ("sum(ray_cluster_active_nodes{P})", "active")),
                graph("CPU", "percent", ("max by (ip) (ray_node_cpu_utilization{P})", "{{ip}}")),
                graph(
                    "Memory",
                    "percentunit",
                    (
                        "max by (ip) (ray_node_mem_used{P}) / max by (ip) (ray_node_mem_total{P})",
                        "{{ip}}",
                    ),
                ),
            ),
        ),
    ),
)

CLIENTS = Board(
    "clients",
    "t5-serve: clients",
    "Who sends how much. For days and months: t5-serve usage.",
    (
        Row(
            "Clients",
            (
                stacked(
                    "Requests",
                    "reqps",
                    (
                        f"topk(10, sum by (client) (rate(ray_t5_client_requests_total{{S}}{_R})))",
                        "{{client}}",
                    ),
                    width=8,
                ),
                graph(
                    "Refused or failed",
                    "reqps",
                    (
                        "topk(10, sum by (client, status) (rate("
                        f'ray_t5_client_requests_total{{S,status!="2xx"}}{_R})))',
                        "{{client}} {{status}}",
                    ),
                    width=8,
                ),
                graph(
                    "Refused for a limit",
                    "reqps",
                    (f"sum by (limit) (rate(ray_t5_rate_limited_total{{S}}{_R}))", "{{limit}}"),
                    text="Of the service's own limits (`rate_limits`), not the ingress's.",
                    width=8,
                ),
                graph(
                    "In flight",
                    "short",
                    (
                        "topk(10, sum by (client) (ray_t5_client_requests_in_flight{S}))",
                        "{{client}}",
                    ),
                    text="`other`: all clients beyond the first 100 of a replica.",
                    width=12,
                ),
                stacked(
                    "Tokens",
                    "cps",
                    (
                        f"topk(10, sum by (client) (rate(ray_t5_client_tokens_total{{S}}{_R})))",
                        "{{client}}",
                    ),
                    text="Input and output: what the engine has to do for a client.",
                    width=12,
                ),
            ),
        ),
    ),
)

BOARDS = (SERVICE, ENGINE, AUTOSCALING, CLIENTS)
