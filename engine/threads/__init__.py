"""The threads of one engine. Each loop's body is a plain method that a test calls without a thread."""
