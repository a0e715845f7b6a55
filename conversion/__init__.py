"""Original checkpoints onto the Hub format: key tables, shapes to config, tokenizer."""
