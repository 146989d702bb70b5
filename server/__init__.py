"""The OpenAI-compatible API on plain threads. Importing this package loads neither Flask nor an engine."""
