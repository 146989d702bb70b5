"""C++ kernels for the CPU behind a plain C interface, compiled at first use. Everything here has a torch twin."""
