"""The peers, each in a process of its own.

They batch statically, and get what suits them: all threads, padded batches of requests of similar
length, the best of several batch sizes. In greedy search a row is stopped at its own length
(CTranslate2 then takes it out of the batch; transformers goes on computing it). Beam search has no
such stop, so there, and as a second try in greedy search, they get the requests sorted by *output*
length, which no server knows beforehand: then nearly all of a batch stop at the right length.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from bench.engine.figures import Throughput, latencies
from bench.engine.progress import Progress
from bench.engine.workloads import Decoding, Work, sorted_batches, spread


class _Peer:
    name: str

    def _generate(self, works: list[Work], decoding: Decoding) -> None:
        """One batch; each request to its own length where that can be had."""
        raise NotImplementedError

    def alone(self, work: Work, decoding: Decoding) -> float:
        """Seconds for one request."""
        began = time.perf_counter()
        self._generate([work], decoding)
        return time.perf_counter() - began

    def offline(
        self, works: list[Work], decoding: Decoding, batch: int, order: str, limit: float
    ) -> Throughput:
        """All requests in batches of this size, sorted by `input` or `output` length; no further
        batch is begun after `limit` seconds."""
        batches = spread(sorted_batches(works, batch, order))
        progress = Progress(f"{self.name}, batches of {batch} by {order}", len(works))
        done: list[Work] = []
        began = time.perf_counter()
        for part in batches:
            self._generate(part, decoding)
            done += part
            progress.done(*part)
            if time.perf_counter() - began > limit:
                break
        seconds = time.perf_counter() - began
        return Throughput(len(done), sum(work.tokens for work in done), seconds)

    def poisson(
        self, works: list[Work], times: list[float], decoding: Decoding, batch: int
    ) -> list[float]:
        """Latencies in seconds, served as a dynamic batcher does: whenever the model is free it
        takes what waits, up to its best batch size. Answers come when the batch is done: that is
        how these calls return."""
        finished = [0.0] * len(works)
        progress = Progress(f"{self.name}, arrivals", len(works))
        began = time.perf_counter()
        first = 0
        while first < len(works):
            now = time.perf_counter() - began
            if times[first] > now:
                time.sleep(times[first] - now)
                continue
            end = first
            while end < len(works) and times[end] <= now and end - first < batch:
                end += 1
            self._generate(works[first:end], decoding)
            progress.done(*works[first:end])
            finished[first:end] = [time.perf_counter() - began] * (end - first)
            first = end
        return latencies(finished, times)

    def free(self, ids: list[int], least: int, most: int) -> tuple[float, int]:
        """Greedy, to wherever the model ends: seconds, and output tokens, the end among them."""
        began = time.perf_counter()
        tokens = self._free(ids, least, most)
        return time.perf_counter() - began, tokens

    def _free(self, ids: list[int], least: int, most: int) -> int:
        raise NotImplementedError


class HuggingFace(_Peer):
    """`generate()` of transformers; `compiled` on a GPU: its step, with caches that do not grow."""

    def __init__(
        self, path: str, dtype: str, device: str, threads: int, compiled: bool = False
    ) -> None:
        import torch
        from transformers import T5ForConditionalGeneration

        torch.set_num_threads(threads)
        self.name = f"transformers {dtype}"
        self._torch = torch
        self._device = device
        self._cache = {"cache_implementation": "static"} if compiled else {}
        model: Any = T5ForConditionalGeneration.from_pretrained(path, dtype=getattr(torch, dtype))
        self._model = model.to(device).eval()

    def _generate(self, works: list[Work], decoding: Decoding) -> None:
        torch = self._torch
        width = max(len(work.ids) for work in works)
        ids = torch.zeros(len(works), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, work in enumerate(works):
            ids[row, : len(work.ids)] = torch.tensor(work.ids)
            mask[row, : len(work.ids)] = 1
        longest = max(work.tokens for work in works)
        lengths = torch.tensor([work.tokens for work in works], device=self._device)

        def stop(generated: Any, _scores: Any, **_: Any) -> Any:
            return generated.shape[1] - 1 >= lengths

        with torch.inference_mode():
            self._model.generate(
                input_ids=ids.to(self._device),
                attention_mask=mask.to(self._device),
                do_sample=False,
                num_beams=decoding.beams,
                no_repeat_ngram_size=decoding.ngram or None,
                min_new_tokens=longest,
                max_new_tokens=longest,
                stopping_criteria=[stop] if decoding.beams == 1 else None,
                **self._cache,
            )

    def _free(self, ids: list[int], least: int, most: int) -> int:
        torch = self._torch
        with torch.inference_mode():
            inputs = torch.tensor([ids], device=self._device)
            found = self._model.generate(
                input_ids=inputs,
                do_sample=False,
                num_beams=1,
                min_new_tokens=least,
                max_new_tokens=most,
            )
        return int(found.shape[1]) - 1


class CTranslate(_Peer):
    """CTranslate2."""

    def __init__(self, path: str, kind: str, threads: int) -> None:
        import ctranslate2

        self.name = f"CTranslate2 {kind}"
        self._translator = ctranslate2.Translator(
            path, device="cpu", compute_type=kind, inter_threads=1, intra_threads=threads
        )
        self._names = json.loads((Path(path) / "shared_vocabulary.json").read_text())

    def _generate(self, works: list[Work], decoding: Decoding) -> None:
        longest = max(work.tokens for work in works)
        own = decoding.beams == 1 and any(work.tokens < longest for work in works)

        def stop(result: Any) -> bool:
            return bool(result.step + 1 >= works[result.batch_id].tokens)

        self._translator.translate_batch(
            [[self._names[i] for i in work.ids] for work in works],
            beam_size=decoding.beams,
            min_decoding_length=longest,
            max_decoding_length=longest,
            no_repeat_ngram_size=decoding.ngram,
            max_input_length=0,
            max_batch_size=0,
            callback=stop if own else None,
        )

    def _free(self, ids: list[int], least: int, most: int) -> int:
        (found,) = self._translator.translate_batch(
            [[self._names[i] for i in ids]],
            beam_size=1,
            min_decoding_length=least,
            max_decoding_length=most,
            max_input_length=0,
        )
        return min(len(found.hypotheses[0]) + 1, most)


def best_types() -> list[str]:
    """CTranslate2's int8 and its best other type on this CPU; none where it is not installed."""
    try:
        import ctranslate2
    except ImportError:
        return []
    has = ctranslate2.get_supported_compute_types("cpu")
    return ["int8", next(kind for kind in ("bfloat16", "float32") if kind in has)]
