"""The ``llm-engine`` command."""
