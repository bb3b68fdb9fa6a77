"""Web pairs to shards to batches; knows no model."""
