"""What training wraps for its devices and processes."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.encoder import Encoder
from pretrain.objectives import Features
from pretrain.short_texts import cut_features
from pretrain.terms import Seen, Terms


class DualEncoder(nn.Module):
    """What is wrapped for several processes: pixels and tokens in, unit-norm features and logit_scale out.

    And logit_bias, of a model that has one, and the outputs of the recipe's terms.

    Args:
        encoder: The model.
        terms: Those of the recipe; None for none.
    """

    def __init__(self, encoder: Encoder, terms: Terms | None = None):
        super().__init__()
        self.model = encoder.model
        self.normalize = encoder.normalize
        self.terms = Terms() if terms is None else terms

    def forward(self, images: Tensor, tokens: Tensor, *more: Tensor) -> Features:
        """uint8 `(b, 3, h, w)` and int64 `(b, context)` to two `(b, d)`, the exponentiated scale, any bias, and terms.

        Tokens of several captions an image, `(b, k, context)`, give text features `(b, k, d)`. They may be cut to any
        length from `pretrain.short_texts.used_length` on, without the captioning term. The first of `more` are
        the pictures' views where a term wants them; the others are the objective's.
        """
        pixels, texts = self.normalize(images), tokens.flatten(0, -2)
        image_tokens = text_tokens = None
        if "captioning" in self.terms:  # CoCa's towers give both at once
            image_features, image_tokens = self.model._encode_image(pixels, normalize=True)
            text_features, text_tokens = self.model._encode_text(texts, normalize=True)
        else:
            image_features = self.model.encode_image(pixels, normalize=True)  # (b, d)
            text_features = F.normalize(cut_features(self.model, texts), dim=-1)
        if tokens.ndim > 2:
            text_features = text_features.unflatten(0, tokens.shape[:-1]).clone()  # (b, k, d)
        bias = getattr(self.model, "logit_bias", None)
        # FSDP2 holds scalars as (1,), and its hooks want no views, neither here nor of the terms.
        scale = self.model.logit_scale.exp().sum()
        scalars = (scale,) if bias is None else (scale, bias.sum())
        views = more[0] if "self_supervision" in self.terms else None
        seen = Seen(image_features, text_features, tokens, self.embed, views, image_tokens, text_tokens)
        return image_features, text_features, *scalars, *self.terms(seen)

    def embed(self, images: Tensor) -> Tensor:
        """uint8 `(n, 3, h, w)` to `(n, d)`, not normalised."""
        return self.model.encode_image(self.normalize(images), normalize=False)
