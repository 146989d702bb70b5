"""``python -m llm_engine.native`` compiles the CPU kernels now, so that the first start need not."""

from __future__ import annotations

import subprocess
import sys

from .build import cache_folder, compiled, find_compiler


def main() -> int:
    """Prints where the kernels are. A machine that cannot compile them serves all the same, so the exit code is 0."""
    compiler = find_compiler()
    if compiler is None:
        print("no C++ compiler: the CPU kernels are left out (on Debian: apt-get install g++)", file=sys.stderr)
        return 0
    try:
        print(compiled(compiler, cache_folder()))
    except (OSError, subprocess.SubprocessError) as error:
        print(f"the CPU kernels do not compile here and are left out: {error}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
