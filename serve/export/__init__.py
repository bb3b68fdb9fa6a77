"""Towers for machines without torch. `serve.export.runtime` runs them and imports nothing else of PairStream."""
