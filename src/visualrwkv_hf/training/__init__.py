"""Train a model: conversations to tokens, batches, and a Trainer with the original's recipe."""
