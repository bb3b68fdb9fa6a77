"""What a recipe says of the dual encoder: two towers by their sizes, or a name."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from pairstream.recipe import Config


class ViT(Config):
    """A vision transformer of open_clip's, by its sizes."""

    kind: Literal["vit"] = "vit"
    image_size: int = Field(default=64, ge=8)
    """Side of the square input, pixels."""
    patch_size: int = Field(default=8, ge=1)
    """Side of a patch, pixels."""
    width: int = Field(default=192, ge=8)
    layers: int = Field(default=6, ge=1)
    head_width: int = Field(default=64, ge=1)
    mlp_ratio: float = 4.0
    pool: Literal["tok", "avg"] = "tok"

    @model_validator(mode="after")
    def fits(self) -> ViT:
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}"
            )
        if self.width % self.head_width:
            raise ValueError(f"width {self.width} is not a multiple of head_width {self.head_width}")
        return self

    def vision_cfg(self) -> dict[str, Any]:
        """The tower in open_clip's words."""
        return {
            "image_size": self.image_size,
            "patch_size": self.patch_size,
            "width": self.width,
            "layers": self.layers,
            "head_width": self.head_width,
            "mlp_ratio": self.mlp_ratio,
            "pool_type": self.pool,
        }


class ResNet(Config):
    """CLIP's modified ResNet (three-convolution stem, anti-aliased strides, attention pooling)."""

    kind: Literal["resnet"] = "resnet"
    image_size: int = Field(default=64, ge=32)
    """Side of the square input, pixels; a multiple of 32."""
    width: int = Field(default=32, ge=8)
    """Channels of the stem; the last stage has 32 times as many."""
    layers: tuple[int, int, int, int] = (1, 1, 1, 1)
    """Bottleneck blocks in each stage; ResNet-50 has (3, 4, 6, 3)."""

    @model_validator(mode="after")
    def fits(self) -> ResNet:
        if self.image_size % 32:
            raise ValueError(f"image_size {self.image_size} is not a multiple of 32")
        return self

    def vision_cfg(self) -> dict[str, Any]:
        """The tower in open_clip's words."""
        return {"image_size": self.image_size, "width": self.width, "layers": list(self.layers)}


class TimmTower(Config):
    """Any image model of timm's, with a projection on its pooled features."""

    kind: Literal["timm"] = "timm"
    name: str
    """The name timm knows, such as `tf_efficientnet_lite0`."""
    image_size: int = Field(default=224, ge=8)
    projection: Literal["linear", "mlp", "classifier"] = "linear"
    """`classifier`: the network's own last layer, behind its hidden ones (VGG, MobileNetV3 and V4, GhostNet)."""
    weights: str | None = None
    """Start from this state dict: a .safetensors or .pth file, or `package:NAME/path/in/it`."""
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    def vision_cfg(self) -> dict[str, Any]:
        """The tower in open_clip's words."""
        return {
            "timm_model_name": self.name,
            "timm_model_pretrained": False,
            # open_clip's words for "the classifier is the projection", which keeps the trunk's own pooling else.
            "timm_pool": "avg" if self.projection == "classifier" else "",
            "timm_proj": "" if self.projection == "classifier" else self.projection,
            "image_size": self.image_size,
        }


class TextTransformer(Config):
    """CLIP's causal text transformer over its byte-pair vocabulary."""

    kind: Literal["transformer"] = "transformer"
    context_length: int = Field(default=77, ge=4)
    """Tokens, start and end included."""
    width: int = Field(default=256, ge=8)
    heads: int = Field(default=4, ge=1)
    layers: int = Field(default=4, ge=1)

    @model_validator(mode="after")
    def fits(self) -> TextTransformer:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        return self

    def text_cfg(self) -> dict[str, Any]:
        """The tower in open_clip's words."""
        return {
            "context_length": self.context_length,
            "vocab_size": 49408,
            "width": self.width,
            "heads": self.heads,
            "layers": self.layers,
        }


class TransformersText(Config):
    """A text encoder of transformers' (BERT, RoBERTa, ...) with its own tokenizer and weights."""

    kind: Literal["transformers"] = "transformers"
    name: str
    """A hub name, a folder, or `package:NAME/path/in/it`."""
    context_length: int = Field(default=77, ge=4)
    projection: Literal["linear", "mlp"] = "linear"
    pooler: Literal["mean_pooler", "cls_pooler", "max_pooler"] = "mean_pooler"

    def text_cfg(self) -> dict[str, Any]:
        """The tower in open_clip's words."""
        return {
            "hf_model_name": self.name,
            "hf_tokenizer_name": self.name,
            "hf_proj_type": self.projection,
            "hf_pooler_type": self.pooler,
            "context_length": self.context_length,
        }


ImageTower = Annotated[ViT | ResNet | TimmTower, Field(discriminator="kind")]
TextTower = Annotated[TextTransformer | TransformersText, Field(discriminator="kind")]


class Decoder(Config):
    """CoCa's caption decoder: a causal transformer over the text tower's tokens that looks at the picture's.

    The image tower then pools its patches by attention to `queries` tokens for the decoder, one of them the embedding.
    """

    layers: int = Field(default=4, ge=1)
    heads: int = Field(default=4, ge=1)
    queries: int = Field(default=256, ge=2)
    """Tokens of a picture that the decoder sees."""
    pooler_heads: int = Field(default=8, ge=1)
    """Heads of the image tower's attention pooling."""


class TowersModel(Config):
    """A dual encoder from two towers given by their sizes."""

    kind: Literal["towers"] = "towers"
    embed_dim: int = Field(default=256, ge=2)
    image_tower: ImageTower = ViT()
    text_tower: TextTower = TextTransformer()
    decoder: Decoder | None = None
    """Makes it a CoCa model, for `terms.captioning`; None is a dual encoder alone."""

    @model_validator(mode="after")
    def fits(self) -> TowersModel:
        if self.decoder is None:
            return self
        if not (isinstance(self.image_tower, ViT) and isinstance(self.text_tower, TextTransformer)):
            raise ValueError(
                f"a decoder wants open_clip's own towers, kinds vit and transformer, got {self.image_tower.kind} and "
                f"{self.text_tower.kind}"
            )
        if self.embed_dim != self.text_tower.width:
            raise ValueError(
                f"open_clip's decoder has one width for pictures and texts: expected embed_dim to be the text tower's "
                f"width {self.text_tower.width}, got {self.embed_dim}"
            )
        for heads in (self.decoder.heads, self.decoder.pooler_heads):
            if self.embed_dim % heads:
                raise ValueError(
                    f"embed_dim {self.embed_dim} is not a multiple of the decoder's {heads} heads"
                )
        return self

    def model_cfg(self) -> dict[str, Any]:
        """All of it in open_clip's words."""
        vision, text = self.image_tower.vision_cfg(), self.text_tower.text_cfg()
        if self.decoder is None:
            return {"embed_dim": self.embed_dim, "vision_cfg": vision, "text_cfg": text}
        shape = {key: text[key] for key in ("context_length", "vocab_size", "width")}
        return {
            "embed_dim": self.embed_dim,
            "vision_cfg": {
                **vision,
                "attentional_pool": True,
                "attn_pooler_queries": self.decoder.queries,
                "attn_pooler_heads": self.decoder.pooler_heads,
                "output_tokens": True,
            },
            "text_cfg": {**text, "embed_cls": True, "output_tokens": True},
            "multimodal_cfg": {**shape, "heads": self.decoder.heads, "layers": self.decoder.layers},
            "custom_text": True,
        }


class OpenClipModel(Config):
    """A dual encoder by the name open_clip knows, or one of our checkpoints."""

    kind: Literal["open_clip"] = "open_clip"
    name: str
    """`ViT-B-32`, `hf-hub:ORG/REPO`, `local-dir:PATH`, or the path of a checkpoint or run folder."""
    pretrained: str | None = None
    """A tag of open_clip's, such as `laion2b_s34b_b79k`; None starts from random weights."""


Model = Annotated[TowersModel | OpenClipModel, Field(discriminator="kind")]
