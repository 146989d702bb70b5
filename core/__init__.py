"""The words every part shares. Standard library only: no torch, no threads, no I/O."""
