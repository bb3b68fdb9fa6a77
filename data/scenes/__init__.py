"""The embedded data set: pictures composed from OpenMoji art, with captions, questions and masks."""
