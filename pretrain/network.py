"""What training wraps for its devices and processes."""

from __future__ import annotations

from torch import Tensor, nn

from pretrain.encoder import Encoder
from pretrain.objectives import Features


class DualEncoder(nn.Module):
    """What is wrapped for several processes: pixels and tokens in, unit-norm features and logit_scale out.

    And logit_bias, of a model that has one.
    """

    def __init__(self, encoder: Encoder):
        super().__init__()
        self.model = encoder.model
        self.normalize = encoder.normalize

    def forward(self, images: Tensor, tokens: Tensor) -> Features:
        """uint8 `(b, 3, h, w)` and int64 `(b, context)` to two `(b, d)`, the exponentiated scale and any bias.

        Tokens of several captions an image, `(b, k, context)`, give text features `(b, k, d)`.
        """
        image_features = self.model.encode_image(self.normalize(images), normalize=True)  # (b, d)
        text_features = self.model.encode_text(tokens.flatten(0, -2), normalize=True)
        if tokens.ndim > 2:
            text_features = text_features.unflatten(0, tokens.shape[:-1]).clone()  # (b, k, d)
        bias = getattr(self.model, "logit_bias", None)
        # FSDP2 holds scalars as (1,), and its hooks want no views.
        features = image_features, text_features, self.model.logit_scale.exp().sum()
        return features if bias is None else (*features, bias.sum())
