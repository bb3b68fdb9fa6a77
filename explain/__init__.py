"""Why did the model say that: heatmaps, relevant words, and whether both are true."""
