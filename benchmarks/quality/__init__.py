"""What is forgotten and what it costs: every method on the same adapters, data and seeds."""
