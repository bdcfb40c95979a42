"""What requests to a served judge and its answers look like. Knows judgements; knows nothing of HTTP or of queues."""

import json
import math
import time
import uuid
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from trl_tract.judge.judge import CoTRAILJudge, Judgement
from trl_tract.rows.row import Row
from trl_tract.scale.scale import Scale

SEEDS = 2**32
TAGS = ("one", "many", "text", "messages")
"""Which form of a body or a prompt was taken; they stand in places of errors, and nowhere in a request."""

Prompt = Annotated[
    Annotated[list[dict[str, Any]], Tag("messages")] | Annotated[str, Tag("text")],
    Discriminator(lambda prompt: "messages" if isinstance(prompt, list) else "text"),
]


class Item(BaseModel):
    """One response to be judged: a whole prompt, or fields from which the judge's rubric makes one."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: Prompt | None = Field(
        default=None, description="The judge's prompt as text or chat messages, written like its training prompts."
    )
    response: str | None = Field(
        default=None, description="The response to judge with the rubric saved with the judge."
    )
    instruction: str = Field(default="", description="The instruction that the response answers. Only with `response`.")
    reference: str | None = Field(
        default=None, description="An answer that would get the highest score. Only with `response`."
    )
    seed: int | None = Field(
        default=None, ge=0, lt=SEEDS, description="Random seed of the rationale; the judge's by default."
    )

    @model_validator(mode="after")
    def _one_of_both(self) -> "Item":
        if (self.prompt is None) == (self.response is None):
            raise ValueError("give `prompt`, or give `response`, optionally with `instruction` and `reference`")
        if self.prompt is not None and (self.instruction or self.reference is not None):
            raise ValueError("`instruction` and `reference` belong to `response`. Do not give them with `prompt`")
        return self

    def row(self, judge: CoTRAILJudge) -> Row:
        """The row that the judge takes.

        Raises:
            ValueError: Fields for a judge that has no rubric.
        """
        if self.prompt is not None:
            return {"prompt": self.prompt}
        assert self.response is not None
        return judge.response_row(self.response, self.instruction, self.reference)


OneOrMany = Annotated[
    Annotated[Item, Tag("one")] | Annotated[list[Item], Tag("many")],
    Discriminator(lambda body: "many" if isinstance(body, list) else "one"),
]


class Answer(BaseModel):
    """What the judge says of one item. Numbers that do not exist are null."""

    score: float | None = Field(description="Expected score in rubric units; null if there is an error.")
    scores: list[float] = Field(description="One for each rationale.")
    rationale: str | None = Field(description="The first rationale.")
    rationales: list[str] = Field(description="All rationales. For a judge of several aspects: its completions.")
    distribution: dict[str, float] = Field(
        description="Score -> its probability under the full vocabulary, averaged over the rationales."
    )
    spread: float | None = Field(description="Standard deviation of the score under the model, rubric units.")
    grid_mass: float | None = Field(
        description="Probability mass on the score grid. A value far below 1 means that "
        "the model did not expect a score."
    )
    error: str | None = Field(description="Reason for a missing score.")
    aspects: dict[str, "Answer"] | None = Field(
        default=None, description="For a judge of several aspects: the result for each aspect."
    )


def answer(judgement: Judgement, scales: Sequence[Scale]) -> Answer:
    """A judgement as it is sent."""

    def of(judged: Judgement, texts: Sequence[str]) -> Answer:
        means = judged.probs.mean(axis=0) if len(judged.probs) else []
        return Answer(
            score=_number(judged.score),
            scores=judged.scores,
            rationale=judged.rationales[0] if judged.rationales else None,
            rationales=judged.rationales,
            distribution=dict(zip(texts, map(float, means), strict=False)),
            spread=_number(judged.std),
            grid_mass=_number(judged.grid_mass),
            error=judged.error,
        )

    grids = {scale.name: scale.grid.texts for scale in scales}
    whole = of(judgement, grids.get("", ()))
    if judgement.aspects:
        whole.aspects = {name: of(own, grids[name]) for name, own in judgement.aspects.items()}
    return whole


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


class ChatRequest(BaseModel):
    """A request in the form of OpenAI's chat completions. Other fields are not applied, and named in the answer."""

    model_config = ConfigDict(extra="allow")

    model: str = Field(description="Name of the judge, as in /v1/models.")
    messages: list[dict[str, Any]] = Field(min_length=1, description="The judge's prompt.")
    seed: int | None = Field(
        default=None, ge=0, lt=SEEDS, description="Random seed of the rationale; the judge's by default."
    )
    n: int | None = Field(
        default=None, ge=1, le=1, description="Must be 1. Several rationales are an option of the server."
    )
    stream: bool | None = Field(default=None, description="Must be false. Judgements are not streamed.")
    response_format: dict[str, Any] | None = Field(
        default=None, description='`{"type": "json_object"}`: the message is the answer of /judge as JSON.'
    )
    tools: list[Any] | None = Field(default=None, description="Must be null. A judge calls no tools.")

    @model_validator(mode="after")
    def _can_be_done(self) -> "ChatRequest":
        if self.stream:
            raise ValueError("stream: judgements cannot be streamed. Leave it out, or set it to false")
        if self.tools:
            raise ValueError("tools: a judge calls none. Leave them out")
        if (self.response_format or {}).get("type", "text") not in ("text", "json_object"):
            raise ValueError('response_format: give {"type": "json_object"} for the answer of /judge as JSON')
        return self

    @property
    def ignored(self) -> list[str]:
        """Fields that were given and are not applied, such as a temperature: the server's options decide."""
        return sorted(self.model_extra or {})

    def row(self, judge: CoTRAILJudge) -> Row:
        """The row that the judge takes.

        Raises:
            ValueError: More than one message for a judge that was trained on plain text.
        """
        if judge.asks_chat:
            return {"prompt": self.messages}
        content = self.messages[0].get("content")
        if len(self.messages) > 1 or self.messages[0].get("role") != "user" or not isinstance(content, str):
            raise ValueError("this judge was trained on plain text. Send its whole prompt as one user message")
        return {"prompt": content}

    def completion(self, judgement: Judgement, scales: Sequence[Scale]) -> dict[str, Any]:
        """The answer; its message is rationale, marker and the nearest score of the grid, as the judge writes them."""
        told = answer(judgement, scales)
        content = told.rationale or ""
        if (self.response_format or {}).get("type") == "json_object":
            content = json.dumps(told.model_dump(exclude_none=True), ensure_ascii=False)
        elif not judgement.aspects:
            content = scales[0].format.join(content, scales[0].grid.nearest_text(judgement.score)).strip()
        return {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": self.model,
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": content, "refusal": None},
                    "finish_reason": "stop",
                    "logprobs": None,
                }
            ],
            "judgement": told.model_dump(),
            "ignored": self.ignored,
        }
