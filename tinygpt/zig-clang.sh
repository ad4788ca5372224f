#!/bin/sh
# The clang inside zig, as the single executable without arguments that tinygrad's CC has to be.
exec "${TINYGPT_ZIG:?is set by tinygpt/device.py}" clang "$@"
