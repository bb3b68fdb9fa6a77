"""Image-text classification: features of a picture and of a text, fused, and a label."""
