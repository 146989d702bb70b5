"""KV-cache blocks, the prefix cache over them, and the other resources a request holds. No torch, no threads."""
