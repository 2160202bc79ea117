"""Bodies of the HTTP API, as clients see them in `/openapi.json`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    field_validator,
    model_validator,
)

OnOverflow = Literal["error", "truncate", "map_reduce"]


# Strict, but JSON has one number type: 2 is a fine length_penalty.
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]

# For the API's description; `requests.check_text` is what checks. Something else than white space
# (Python's, which regular expressions of other languages do not agree on), and no NUL.
_SPACE = r"\t-\r\x1c-\x20\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
TEXT_PATTERN = rf"^[^\x00]*[^\x00{_SPACE}][^\x00]*$"
Text = Annotated[StrictStr, Field(json_schema_extra={"pattern": TEXT_PATTERN})]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")

    @field_validator("*", mode="before")
    @classmethod
    def _whole(cls, value: Any) -> Any:
        # The other way round as well: 2.0 is an integer (JSON Schema, section 6.1.1).
        return int(value) if isinstance(value, float) and value.is_integer() else value


class Length(_Body):
    """An upper bound the summary keeps to: whole sentences up to it, never more."""

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [
                {"required": [name], "properties": {name: {"type": "integer"}}}
                for name in ("words", "sentences")
            ]
        }
    )

    words: StrictInt | None = Field(None, ge=1, le=10_000)
    sentences: StrictInt | None = Field(None, ge=1, le=1_000)

    @model_validator(mode="after")
    def _one(self) -> Length:
        if (self.words is None) == (self.sentences is None):
            raise ValueError("give either words or sentences")
        return self


class SummarizeOptions(_Body):
    """How to summarize. What is left out follows the model's own summarization settings."""

    num_beams: StrictInt | None = Field(None, ge=1, description="1 is greedy search, and streams")
    min_new_tokens: StrictInt | None = Field(None, ge=0)
    max_new_tokens: StrictInt | None = Field(None, ge=1)
    length_penalty: Number | None = Field(
        None, ge=-10, le=10, description="beam search: above 0 favours longer summaries"
    )
    no_repeat_ngram_size: StrictInt | None = Field(None, ge=0, le=100)
    early_stopping: StrictBool | None = Field(
        None, description="beam search: stop at num_beams finished candidates"
    )
    length: Length | None = None
    on_overflow: OnOverflow = Field(
        "map_reduce",
        description="a text longer than the model's input: refuse it, cut it, or summarize its "
        "parts and then their summaries",
    )
    stream: StrictBool = Field(False, description="answer with server-sent events")
    timeout_s: Number | None = Field(None, gt=0, description="deadline, in seconds from arrival")


class SummarizeRequest(SummarizeOptions):
    """One text to summarize."""

    text: Text


class BatchOptions(SummarizeOptions):
    """Options of a batch: one deadline for all of it, no streaming."""

    # Not Literal[False], which 0 equals.
    stream: StrictBool = Field(False, json_schema_extra={"const": False})

    @field_validator("stream")
    @classmethod
    def _in_one_piece(cls, value: bool) -> bool:
        if value:
            raise ValueError("must be false: a batch is answered in one piece")
        return value


class BatchRequest(BatchOptions):
    """Several texts, one set of options."""

    texts: list[StrictStr] = Field(min_length=1)


class ModelRef(BaseModel):
    """Which weights answered."""

    name: str
    revision: str


class Chunk(BaseModel):
    """One part of a long document: its half-open character span and its own summary."""

    index: int
    start: int
    end: int
    summary: str


class UsageBody(BaseModel):
    """What the request cost.

    Tokens are summed over every pass through the model. `queue_ms` and `compute_ms` add up, over
    the stages of the request (parts, summaries of summaries, final), the slowest pass of each.
    """

    input_tokens: int
    output_tokens: int
    chunks: int
    queue_ms: float
    compute_ms: float
    total_ms: float


class SummarizeResponse(BaseModel):
    """A summary."""

    id: str
    model: ModelRef
    summary: str
    truncated: bool = Field(description="part of the text was left out")
    finish_reason: Literal["stop", "max_new_tokens", "length"] = Field(
        description="the model ended, ran out of tokens, or was cut to the length asked for"
    )
    chunks: list[Chunk] = Field(description="the parts, when the text was split")
    usage: UsageBody


class FieldErrorBody(BaseModel):
    """One field that broke a rule."""

    field: str
    message: str
    limit: Any = None
    value: Any = None


class Problem(BaseModel):
    """RFC 9457 problem details."""

    type: str
    title: str
    status: int
    detail: str
    request_id: str
    errors: list[FieldErrorBody] | None = None


class BatchItem(BaseModel):
    """The answer to one text of a batch: a result or an error."""

    index: int
    result: SummarizeResponse | None = None
    error: Problem | None = None


class BatchResponse(BaseModel):
    """Answers in the order of the texts."""

    id: str
    results: list[BatchItem]


class HfGenerateParameters(_Body):
    """Decoding settings in the Hugging Face Inference API."""

    num_beams: StrictInt | None = Field(None, ge=1)
    min_length: StrictInt | None = Field(None, ge=0)
    max_length: StrictInt | None = Field(None, ge=2)
    min_new_tokens: StrictInt | None = Field(None, ge=0)
    max_new_tokens: StrictInt | None = Field(None, ge=1)
    length_penalty: Number | None = Field(None, ge=-10, le=10)
    no_repeat_ngram_size: StrictInt | None = Field(None, ge=0, le=100)
    early_stopping: StrictBool | None = None


class HfParameters(_Body):
    """Parameters of the Hugging Face summarization task."""

    clean_up_tokenization_spaces: StrictBool | None = None
    truncation: Literal["do_not_truncate", "longest_first", "only_first"] | None = None
    generate_parameters: HfGenerateParameters | None = None


class HfRequest(_Body):
    """The Hugging Face Inference API's summarization task."""

    inputs: Text
    parameters: HfParameters | None = None


class HfResponse(BaseModel):
    """One summary in the Hugging Face Inference API's form."""

    summary_text: str


_FIELDS = frozenset(
    name
    for model in (SummarizeRequest, BatchRequest, HfRequest)
    for name in (*model.model_fields, "body", "Content-Type", "Content-Encoding")
) | {"tokens_per_minute", "concurrent_requests"}  # of `rate_limits`


def known_fields(names: Iterable[str]) -> list[str]:
    """Fields and limits of the API among dotted names, by their first part; `other` for all else.

    A field that the API does not have is named by the client, after anything it likes.
    """
    first = (name.partition(".")[0] for name in names)
    return sorted({name if name in _FIELDS else "other" for name in first})
