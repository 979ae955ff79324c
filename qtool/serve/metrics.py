"""The metrics of `GET /metrics`, under the names that dashboards for vLLM and for SGLang use."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Histogram,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from qtool import __version__
from qtool.engine.outputs import FinishInfo, SpecCounts
from qtool.serve.backend.messages import EngineStats

CONTENT_TYPE = CONTENT_TYPE_LATEST  # of what `Metrics.render` returns
FIRST_TOKEN_S = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
    160,
)
BETWEEN_TOKENS_S = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.4,
    0.5,
    0.75,
    1,
    2.5,
    5,
    10,
)
WHOLE_S = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
TOKENS = tuple(step * 10**power for power in range(6) for step in (1, 2, 5))
# Names, the first of which is registered, and a description. Sources: vLLM 0.33
# `v1/metrics/loggers.py`, SGLang 0.5.23 `srt/metrics/collector.py`, the Grafana dashboards of both
GAUGES = {
    "running": (
        ("vllm:num_requests_running", "sglang:num_running_reqs"),
        "Requests that are computed.",
    ),
    "waiting": (
        ("vllm:num_requests_waiting", "sglang:num_queue_reqs"),
        "Requests that wait for their turn.",
    ),
    "kv_usage": (
        ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc", "sglang:token_usage"),
        "Share of the KV cache in use; 1 is all of it.",
    ),
    "used_tokens": (
        ("sglang:num_used_tokens",),
        "Tokens whose room in the KV cache is taken.",
    ),
    "tokens_per_s": (
        ("vllm:avg_generation_throughput_toks_per_s", "sglang:gen_throughput"),
        "Tokens generated a second.",
    ),
}
COUNTERS = {
    "prompt": (
        ("vllm:prompt_tokens", "sglang:prompt_tokens"),
        "Prompt tokens of completed requests.",
    ),
    "cached": (
        ("vllm:prompt_tokens_cached", "sglang:cached_tokens"),
        "Of these, found in the prefix cache.",
    ),
    "generation": (
        ("vllm:generation_tokens", "sglang:generation_tokens"),
        "Tokens generated.",
    ),
    "requests": (("sglang:num_requests",), "Choices that have ended."),
}
HISTOGRAMS: dict[str, tuple[tuple[str, ...], str, tuple[float, ...]]] = {
    "first": (
        ("vllm:time_to_first_token_seconds", "sglang:time_to_first_token_seconds"),
        "Seconds from a request to its first token.",
        FIRST_TOKEN_S,
    ),
    "between": (
        (
            "vllm:inter_token_latency_seconds",
            "vllm:time_per_output_token_seconds",
            "sglang:inter_token_latency_seconds",
            "sglang:time_per_output_token_seconds",
        ),
        "Seconds from one token of a stream to the next.",
        BETWEEN_TOKENS_S,
    ),
    "mean_between": (
        ("vllm:request_time_per_output_token_seconds",),
        "Mean seconds of a request's tokens after the first.",
        BETWEEN_TOKENS_S,
    ),
    "whole": (
        ("vllm:e2e_request_latency_seconds", "sglang:e2e_request_latency_seconds"),
        "Seconds of a request from its arrival to its end.",
        WHOLE_S,
    ),
    "queue": (
        ("vllm:request_queue_time_seconds", "sglang:queue_time_seconds"),
        "Seconds that a request waited for its first step.",
        FIRST_TOKEN_S,
    ),
    "prefill": (
        ("vllm:request_prefill_time_seconds",),
        "Seconds from a request's first step to its first token.",
        FIRST_TOKEN_S,
    ),
    "decode": (
        ("vllm:request_decode_time_seconds",),
        "Seconds from a request's first token to its end.",
        WHOLE_S,
    ),
    "inference": (
        ("vllm:request_inference_time_seconds",),
        "Seconds from a request's first step to its end.",
        WHOLE_S,
    ),
    "prompt_size": (
        ("vllm:request_prompt_tokens", "sglang:prompt_tokens_histogram"),
        "Tokens of a prompt.",
        TOKENS,
    ),
    "generation_size": (
        (
            "vllm:request_generation_tokens",
            "vllm:request_max_num_generation_tokens",
            "sglang:generation_tokens_histogram",
        ),
        "Tokens generated for a choice.",
        TOKENS,
    ),
}

_ALL_NAMES = [*(names for names, _ in COUNTERS.values())]
_ALL_NAMES += [names for names, _, _ in HISTOGRAMS.values()]
OTHER_NAMES = {names[0]: names for names in _ALL_NAMES}


class Metrics:
    """Counts and times of one served model."""

    def __init__(self, model_name: str) -> None:
        self._labels = {"model_name": model_name}
        self._registry = CollectorRegistry()
        self._doubled = CollectorRegistry()
        self._counters = {
            name: self._counter(names[0], help, self._doubled)
            for name, (names, help) in COUNTERS.items()
        }
        self._histograms = {
            name: Histogram(
                names[0], help, ["model_name"], registry=self._doubled, buckets=buckets
            ).labels(**self._labels)
            for name, (names, help, buckets) in HISTOGRAMS.items()
        }
        self._ended = Counter(
            "vllm:request_success",
            "Choices by how they ended.",
            ["model_name", "finished_reason"],
            registry=self._registry,
        )
        self._refused = Counter(
            "qtool:requests_refused",
            "Requests that were answered with an error, by its status and code.",
            ["model_name", "status", "code"],
            registry=self._registry,
        )
        info = GaugeMetricFamily("qtool:info", "The version that serves.", labels=["version"])
        info.add_metric([__version__], 1)
        self._info = info
        self._stats: EngineStats | None = None
        self._registry.register(self)

    def first_token(self, seconds: float) -> None:
        """Note the time to the first token of a choice."""
        self._histograms["first"].observe(seconds)

    def tokens(self, count: int, seconds: float) -> None:
        """Note ``count`` tokens of a stream that came ``seconds`` after the one before."""
        self._histograms["between"].observe(seconds / count)

    def phases(self, finish: FinishInfo, tokens: int) -> None:
        """Note how long a choice of ``tokens`` waited, and how long its prompt and tokens took."""
        queue_s, first_s, latency_s = finish.queue_s, finish.first_token_s, finish.latency_s
        if queue_s is None:  # it was aborted before its first step
            return
        observed = {"queue": queue_s, "inference": latency_s - queue_s}
        if first_s is not None:
            observed |= {"prefill": first_s - queue_s, "decode": latency_s - first_s}
        if first_s is not None and tokens > 1:
            observed["mean_between"] = (latency_s - first_s) / (tokens - 1)
        for name, seconds in observed.items():
            self._histograms[name].observe(seconds)

    def ended(
        self,
        reason: str,
        prompt_tokens: int,
        completion_tokens: int,
        seconds: float,
        cached_tokens: int = 0,
    ) -> None:
        """Note a choice that is complete; those of one prompt count its tokens once."""
        self._counters["requests"].inc()
        self._counters["prompt"].inc(prompt_tokens)
        self._counters["cached"].inc(cached_tokens)
        self._counters["generation"].inc(completion_tokens)
        if prompt_tokens:
            self._histograms["prompt_size"].observe(prompt_tokens)
        self._histograms["generation_size"].observe(completion_tokens)
        self._histograms["whole"].observe(seconds)
        self._ended.labels(**self._labels, finished_reason=reason).inc()

    def refused(self, status: int, code: str) -> None:
        """Note a request that is answered with an error."""
        self._refused.labels(**self._labels, status=str(status), code=code).inc()

    def render(self, stats: EngineStats | None) -> bytes:
        """Return all of it as Prometheus reads it.

        Args:
            stats: what the engine is doing now; None if it does not answer.
        """
        self._stats = stats
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Yield what is not counted here: what the engine does, and everything again under its
        other names.
        """
        yield self._info
        for metric in self._doubled.collect():
            for name in OTHER_NAMES[metric.name]:
                yield _renamed(metric, name)
        if self._stats is None:
            return
        for name, (names, help) in GAUGES.items():
            for title in names:
                yield self._gauge(title, help, getattr(self._stats, name))
        hits = self._stats.prefix_hits
        queries = self._stats.prefix_queries
        for title, help, value in (
            ("vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", queries),
            ("vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache.", hits),
            (
                "vllm:num_preemptions",
                "Times that a request lost its pages and was computed again.",
                self._stats.preemptions,
            ),
        ):
            yield self._count(title, help, value)
        yield self._gauge(
            "sglang:cache_hit_rate",
            "Share of prompt tokens found in the prefix cache.",
            hits / queries if queries else 0.0,
        )
        if self._stats.spec is not None:
            yield from self._speculation(self._stats.spec)

    def _speculation(self, counts: SpecCounts) -> Iterator[Metric]:
        """Yield what came of drafted tokens; vLLM 0.33 `v1/spec_decode/metrics.py`, SGLang as
        above.
        """
        for title, help, value in (
            ("vllm:spec_decode_num_drafts", "Drafts that were verified.", counts.drafts),
            ("vllm:spec_decode_num_draft_tokens", "Tokens drafted.", counts.proposed),
            ("vllm:spec_decode_num_accepted_tokens", "Drafted tokens accepted.", counts.correct),
        ):
            yield self._count(title, help, value)
        yield self._gauge(
            "sglang:spec_accept_length",
            "Mean tokens of a step of a request that decodes; 1 without drafts that are right.",
            counts.accept_length,
        )
        yield self._gauge(
            "sglang:spec_accept_rate",
            "Share of drafted tokens that were accepted.",
            counts.accept_rate,
        )

    def _count(self, name: str, help: str, value: int) -> CounterMetricFamily:
        counter = CounterMetricFamily(name, help, labels=list(self._labels))
        counter.add_metric(list(self._labels.values()), value)
        return counter

    def _gauge(self, name: str, help: str, value: float) -> GaugeMetricFamily:
        gauge = GaugeMetricFamily(name, help, labels=list(self._labels))
        gauge.add_metric(list(self._labels.values()), value)
        return gauge

    def _counter(self, name: str, help: str, registry: CollectorRegistry) -> Counter:
        return Counter(name, help, ["model_name"], registry=registry).labels(**self._labels)


def _renamed(metric: Metric, name: str) -> Metric:
    twin = Metric(name, metric.documentation, metric.type)
    twin.samples = [
        sample._replace(name=sample.name.replace(metric.name, name, 1)) for sample in metric.samples
    ]
    return twin
