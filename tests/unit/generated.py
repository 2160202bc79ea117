"""What `generate()` says of a checkpoint, and whether float32 can tell another output from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, T5ForConditionalGeneration

from serve_app.engine.checkpoint import Checkpoint
from serve_app.engine.protocol import GenerationSettings

# Standard deviation of what float32 adds to a log probability of the random models here: theirs
# are off by up to 0.002 from those in float64, and so are their sums over an output.
ROUNDING = 1e-3


class _Noise(LogitsProcessor):
    def __init__(self, scale: float) -> None:
        self._scale = scale
        self._random = torch.Generator().manual_seed(0)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        noise = torch.randn(scores.shape, generator=self._random) * self._scale
        return scores + noise.to(scores)


class Reference:
    """`generate()` of a checkpoint, and its logits."""

    def __init__(self, checkpoint: Checkpoint, device: str, dtype: torch.dtype) -> None:
        self._device = device
        model: Any = T5ForConditionalGeneration.from_pretrained(str(checkpoint.path), dtype=dtype)
        self._model = model.to(device).eval()

    @torch.inference_mode()
    def generate(
        self, inputs: Sequence[list[int]], settings: GenerationSettings, noise: float = 0.0
    ) -> list[list[int]]:
        """Output ids without special tokens; `noise` is added to the scores that it chooses by."""
        width = max(map(len, inputs))
        ids = torch.tensor([one + [0] * (width - len(one)) for one in inputs], device=self._device)
        mask = torch.tensor(
            [[1] * len(one) + [0] * (width - len(one)) for one in inputs], device=self._device
        )
        said: dict[str, Any] = {key: value or None for key, value in asdict(settings).items()}
        if settings.num_beams == 1:
            del said["length_penalty"], said["early_stopping"]
        if noise:
            said["logits_processor"] = LogitsProcessorList([_Noise(noise)])
        found = self._model.generate(input_ids=ids, attention_mask=mask, do_sample=False, **said)
        rows = [row[1:] for row in found.tolist()]
        return [row[: row.index(1)] if 1 in row else row[: settings.max_new_tokens] for row in rows]

    @torch.inference_mode()
    def logits(self, source: list[int], output: list[int]) -> Tensor:
        """Logits of each token of an output, (tokens, vocabulary), float32."""
        found = self._model(
            input_ids=torch.tensor([source], device=self._device),
            decoder_input_ids=torch.tensor([[0, *output[:-1]]], device=self._device),
        )
        return found.logits[0].float().cpu()

    def tied(self, source: list[int], output: list[int], settings: GenerationSettings) -> bool:
        """Whether `generate()` may say so, too, if its scores are off by what float32 rounds.

        Comparing its output's log probabilities with the other's would not do: where two beams
        come in nearly level for the last place, the outputs that descend from them part later,
        and may end far from each other.
        """
        said = self.generate([source] * 32, settings, noise=ROUNDING)
        print(f"of {len(said)} outputs with noise {said.count(output)} are the one that was found")
        return output in said

    def differing(
        self,
        inputs: Sequence[list[int]],
        found: Sequence[list[int]],
        expected: Sequence[list[int]],
        asked: Sequence[GenerationSettings],
    ) -> list[int]:
        """Inputs whose outputs are neither equal nor tied; one in sixteen may be tied."""
        parts = [i for i, ids in enumerate(found) if ids != expected[i]]
        assert len(parts) <= max(1, len(inputs) // 16)
        return [i for i in parts if not self.tied(inputs[i], found[i], asked[i])]
