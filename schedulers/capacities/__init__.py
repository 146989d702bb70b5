"""Who may hold KV memory, and whom to pause."""
