"""Batches to a trained dual encoder."""
