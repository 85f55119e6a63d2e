#!/usr/bin/env python3
"""Each header of src/ compiles as the only include of a file, so that no file depends on the order of its includes.
usage: headers_alone.py COMPILER SRC [-IDIR ...]   (registered by CMake with the compiler and include folders of the build)"""
import concurrent.futures
import os
import pathlib
import subprocess
import sys


def compile_alone(compiler, header, flags):
    command = [compiler, "-std=c++20", "-O0", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-x", "c++", *flags, "-"]
    # Twice: the second include must be a no-op.
    done = subprocess.run(command, input=f'#include "{header}"\n' * 2, capture_output=True, text=True)
    return header, done.returncode, done.stderr


def main():
    compiler, source, *flags = sys.argv[1:]
    headers = sorted(p.relative_to(source).as_posix() for p in pathlib.Path(source).rglob("*.h"))
    headers = [h for h in headers if "/cuda/" not in h]  # those need the CUDA toolkit
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(lambda h: compile_alone(compiler, h, flags), headers))
    failed = [(header, text) for header, code, text in results if code]
    for header, text in failed:
        print(f"{header} does not compile alone:\n{text}")
    print(f"{len(headers)} headers, {len(failed)} do not compile alone")
    return 1 if failed or not headers else 0


if __name__ == "__main__":
    sys.exit(main())
