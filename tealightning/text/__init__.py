"""Text and token ids: the chat template, shared by prompts and rewards."""
