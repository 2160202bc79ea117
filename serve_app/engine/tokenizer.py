"""Text to token ids and back, with the `tokenizers` library alone: it starts in milliseconds."""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Encoding
from tokenizers import Tokenizer as HfTokenizer

from serve_app.engine.checkpoint import Checkpoint, CheckpointError

_SHORT_CHARACTERS = 4096


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids without special tokens, and the half-open character span of each in the text."""

    ids: list[int]
    offsets: list[tuple[int, int]]


class Tokenizer:
    """A checkpoint's tokenizer. Safe to use from several threads at once."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._tokenizer = _load(checkpoint)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._eos_id = checkpoint.eos_id

    def encode(self, text: str) -> Encoded:
        """Token ids and offsets of `text`, no special tokens added."""
        encoding = self._encode(text)
        return Encoded(encoding.ids, encoding.offsets)

    def model_input(self, text: str, max_tokens: int) -> tuple[list[int], bool]:
        """Encoder input for `text`: at most `max_tokens` ids ending in the end token.

        Returns:
            The ids, and whether the text had to be cut.
        """
        ids = self._encode(text).ids
        return [*ids[: max_tokens - 1], self._eos_id], len(ids) > max_tokens - 1

    def decode(self, ids: list[int]) -> str:
        """Text of `ids`, special tokens skipped."""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def _encode(self, text: str) -> Encoding:
        if len(text) <= _SHORT_CHARACTERS:
            return self._tokenizer.encode(text, add_special_tokens=False)
        # `encode` keeps Python's lock for as long as it takes, seconds for a long document, in
        # which an event loop on another thread stands still. `encode_batch` does not.
        return self._tokenizer.encode_batch([text], add_special_tokens=False)[0]


def _load(checkpoint: Checkpoint) -> HfTokenizer:
    path = checkpoint.path / "tokenizer.json"
    try:
        if path.exists():
            return HfTokenizer.from_file(str(path))
        # Older checkpoints (mT5 among them) ship only a SentencePiece model: let transformers
        # convert it. Its import takes seconds, so only they pay for it.
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(
            str(checkpoint.path), trust_remote_code=False, local_files_only=True
        ).backend_tokenizer
    except Exception as error:
        message = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise CheckpointError(f"model {checkpoint.name!r}: tokenizer: {message}") from error
