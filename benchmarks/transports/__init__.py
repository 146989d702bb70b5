"""Ways to hand a message to another thread or process, all driven alike: see ``benchmarks.transport``."""
