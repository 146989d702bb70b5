"""``python -m llm_engine``: the ``llm-engine`` command."""

from .cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
