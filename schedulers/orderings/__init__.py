"""Who waits first."""
