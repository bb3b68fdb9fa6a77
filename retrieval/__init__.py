"""A dual encoder to embeddings, a FAISS index, zero-shot numbers and reports."""
