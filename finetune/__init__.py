"""A dual encoder to a captioner, a VQA model, a classifier."""
