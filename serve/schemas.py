"""Requests and answers of the API."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

# A picture of 8 x 8 pixels, for the examples.
EXAMPLE = (
    "iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAIAAABLbSncAAAAFUlEQVR42mPUiDrBgA0wMeAAg1MCAAWzAVqiKYDVAAAAAElFTkSuQmCC"
)


def whole_text(text: str) -> str:
    """Text that UTF-8 can hold: JSON can name half a character, which no answer could repeat."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("expected text without lone surrogates") from None
    return text


Text = Annotated[str, AfterValidator(whole_text)]


class Request(BaseModel):
    """Base of every request: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Picture(Request):
    """A picture: its file's bytes in base64, or its address where the server allows addresses."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"data": EXAMPLE}]})
    data: Text | None = Field(
        default=None, description="A JPEG, PNG or WebP file in base64; a `data:` address will do."
    )
    url: Text | None = Field(default=None, description="http or https; off unless the server allows it.")

    @model_validator(mode="after")
    def one_of_both(self) -> Picture:
        if (self.data is None) == (self.url is None):
            raise ValueError("expected either data or url")
        return self


class ImagesRequest(Request):
    """Pictures."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"images": [{"data": EXAMPLE}]}]})
    images: list[Picture] = Field(min_length=1)


class TextsRequest(Request):
    """Texts."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"texts": ["two dogs on a beach", "a red car"]}]}
    )
    texts: list[Text] = Field(min_length=1)


class SearchRequest(Request):
    """A query in words or as a picture."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"text": "two dogs on a beach", "k": 5}]})
    text: Text | None = None
    image: Picture | None = None
    among: Literal["images", "texts"] | None = Field(
        default=None, description="What is searched; by default what the query is not."
    )
    k: int = Field(default=10, ge=1, description="Results.")

    @model_validator(mode="after")
    def one_of_both(self) -> SearchRequest:
        if (self.text is None) == (self.image is None):
            raise ValueError("expected either text or image")
        return self


class ClassifyRequest(Request):
    """Pictures and the labels to choose among."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"images": [{"data": EXAMPLE}], "labels": ["cat", "dog"]}]}
    )
    images: list[Picture] = Field(min_length=1)
    labels: list[Text] = Field(min_length=1)
    template: Text = Field(
        default="a photo of a {}", description="`{}` stands for the label; `{}` alone will do."
    )


class VqaRequest(Request):
    """A picture and questions about it."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"image": {"data": EXAMPLE}, "questions": ["Is there a dog?"]}]}
    )
    image: Picture
    questions: list[Text] = Field(min_length=1)


class Post(Request):
    """A picture, a text, or both."""

    image: Picture | None = None
    text: Text | None = None

    @model_validator(mode="after")
    def one_at_least(self) -> Post:
        if self.image is None and not (self.text or "").strip():
            raise ValueError("expected an image, a text of some words, or both")
        return self


class SentimentRequest(Request):
    """Posts to be labelled."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"posts": [{"image": {"data": EXAMPLE}, "text": "what a day"}]}]}
    )
    posts: list[Post] = Field(min_length=1)


class ModelIdentity(BaseModel):
    """Which model answered."""

    name: str
    fingerprint: str = Field(description="Hash of weights and configuration.")


class EncoderIdentity(ModelIdentity):
    """Which dual encoder answered."""

    dim: int = Field(description="Width of its rows.")


class ClassifierIdentity(ModelIdentity):
    """Which classifier answered."""

    labels: list[str] = Field(description="What it chooses among.")


class IndexIdentity(BaseModel):
    """Which index was searched."""

    name: str
    fingerprint: str = Field(description="Hash of its manifest, which has the hash of each of its files.")
    images: int
    texts: int


class EmbeddingsAnswer(BaseModel):
    """Unit rows, in the order of the request."""

    embeddings: list[list[float]]
    model: EncoderIdentity


class Found(BaseModel):
    """One result."""

    rank: int
    score: float = Field(description="Cosine with the query.")
    key: str = Field(description="Key of the sample.")
    text: str | None = Field(description="The caption that was found; null for a picture.")
    row: int | None = Field(
        description="Row of its picture, for /v1/pictures/ROW; null where the picture is not in the index."
    )


class SearchAnswer(BaseModel):
    """Results, best first."""

    hits: list[Found]
    among: Literal["images", "texts"]
    model: EncoderIdentity
    index: IndexIdentity


class Label(BaseModel):
    """One label's share."""

    label: str
    probability: float = Field(description="Among the given labels; they sum to one.")
    score: float = Field(description="Cosine of picture and label.")


class ClassifyAnswer(BaseModel):
    """Labels of each picture, most probable first."""

    results: list[list[Label]]
    model: EncoderIdentity


class CaptionAnswer(BaseModel):
    """One caption a picture."""

    captions: list[str]
    model: ModelIdentity


class VqaAnswer(BaseModel):
    """One answer a question."""

    answers: list[str]
    model: ModelIdentity


class Likelihood(BaseModel):
    """One label's share."""

    label: str
    probability: float = Field(description="Among the classifier's labels; they sum to one.")


class SentimentAnswer(BaseModel):
    """Labels of each post, most probable first."""

    results: list[list[Likelihood]]
    model: ClassifierIdentity


class Info(BaseModel):
    """What is served, and its bounds."""

    model: EncoderIdentity
    captioner: ModelIdentity | None
    vqa: ModelIdentity | None
    classifier: ClassifierIdentity | None
    index: IndexIdentity | None
    pictures: bool = Field(description="Whether /v1/pictures/ROW has the index's pictures.")
    urls: bool = Field(description="Whether pictures may be given by address.")
    limits: dict[str, int]


class Problem(BaseModel):
    """What was wrong."""

    code: str
    message: str


class ErrorAnswer(BaseModel):
    """The answer to a request that was refused."""

    error: Problem
