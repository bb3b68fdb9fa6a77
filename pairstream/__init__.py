"""PairStream: contrastive image-text pretraining, from web pairs to numbers that can be trusted."""

__version__ = "0.1.0"
