"""Making a store: options, workers and their tasks, encoding, and the assembly of what they leave."""
