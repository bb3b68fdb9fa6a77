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


class ExplainRequest(Request):
    """Why a model said something about a picture."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"image": {"data": EXAMPLE}, "text": "two dogs on a beach"}]}
    )
    image: Picture
    of: Literal["text", "caption", "answer", "label"] = Field(
        default="text",
        description="`text`: its cosine with the picture; `caption`: each word of the captioner's; `answer`: to the "
        "question; `label`: of the classifier.",
    )
    text: Text | None = Field(
        default=None,
        description="The text; for `caption`, one to explain instead of the model's own; for `label`, the post's.",
    )
    question: Text | None = Field(default=None, description="For `answer`.")
    label: Text | None = Field(default=None, description="For `label`; the most probable when not given.")
    method: Literal[
        "auto", "chefer", "gradcam", "rollout", "occlusion", "integrated_gradients", "lime", "shap"
    ] = Field(default="auto", description="Those that this server offers are in /v1/info.")
    png: bool = Field(default=False, description="Also draw the maps and the picture as the model saw it.")

    @model_validator(mode="after")
    def fitting(self) -> ExplainRequest:
        needed = {"text": "text", "answer": "question"}.get(self.of)
        if needed and not (getattr(self, needed) or "").strip():
            raise ValueError(f"expected some words in {needed} to explain {self.of}")
        for name, of in (("question", "answer"), ("label", "label")):
            if getattr(self, name) is not None and self.of != of:
                raise ValueError(f"{name} goes with of={of}, got of={self.of}")
        if self.of == "answer" and self.text is not None:
            raise ValueError("text does not go with of=answer: an answer is explained by its question")
        if self.of == "caption" and self.text is not None and not self.text.strip():
            raise ValueError("expected some words in text, or no text for the model's own caption")
        return self


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


class Word(BaseModel):
    """A word and how much it matters."""

    word: str
    relevance: float = Field(description="For the score where positive, against it where negative.")


class Map(BaseModel):
    """One heatmap."""

    title: str = Field(description="The model, the word of a caption, question and answer, or the label.")
    score: float = Field(description="What is explained: a cosine, a log-probability or a logit.")
    heat: list[list[float]] = Field(description="Rows from the top; larger matters more. At most 32 x 32.")
    words: list[Word] = Field(description="Of the text or the question; empty for a caption's words.")
    png: str | None = Field(description="The map over the picture in grey, a PNG file in base64.")


class Explained(BaseModel):
    """Heatmaps of one picture."""

    said: str = Field(description="The text, caption, answer or label that is explained.")
    method: str
    maps: list[Map] = Field(description="One; of a caption, one for each word.")
    picture: str | None = Field(description="The picture as the model saw it, a PNG file in base64.")


class ExplainAnswer(Explained):
    """Heatmaps of one picture, and whose they are."""

    model: ModelIdentity


class Info(BaseModel):
    """What is served, and its bounds."""

    model: EncoderIdentity
    captioner: ModelIdentity | None
    vqa: ModelIdentity | None
    classifier: ClassifierIdentity | None
    index: IndexIdentity | None
    pictures: bool = Field(description="Whether /v1/pictures/ROW has the index's pictures.")
    urls: bool = Field(description="Whether pictures may be given by address.")
    explain: dict[str, list[str]] = Field(
        description="What /v1/explain explains, and by which methods, the default first."
    )
    limits: dict[str, int]


class Problem(BaseModel):
    """What was wrong."""

    code: str
    message: str


class ErrorAnswer(BaseModel):
    """The answer to a request that was refused."""

    error: Problem
