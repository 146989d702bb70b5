"""The engine's own scheduler and books on a virtual clock: what a pipeline would do, without one."""
