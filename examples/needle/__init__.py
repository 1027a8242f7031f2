"""A small video-language model with trained weights, and a task that shows what sparse attention loses."""
