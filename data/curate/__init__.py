"""Curation: shards in, the shards worth training on and a report out (`pairstream data curate RECIPE`)."""
