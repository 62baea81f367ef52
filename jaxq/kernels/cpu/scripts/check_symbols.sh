#!/usr/bin/env bash
# Looks for what one file of kernels could lend to another: scripts/check_symbols.sh BUILD_DIRECTORY...
#
# Of a function that several files define alike (inline, or an instance of a template), the linker keeps any one. Were
# it one that was compiled with AVX-512, an older CPU would stop at it, in a file that has nothing to do with AVX-512.
# So no file that has compiler flags of its own may define such a function; see kernels.h.
set -euo pipefail
command -v nm >/dev/null || { echo "NOT TESTED: symbols: nm is missing"; exit 77; }
weak() { nm --defined-only "$1" | awk '$2 == "W" || $2 == "w" || $2 == "i"' | c++filt; }
found=0
for directory in "$@"; do
  objects=("$directory"/CMakeFiles/jaxq_kernels.dir/*.o)
  [ -e "${objects[0]}" ] || { echo "NOT TESTED: symbols: no objects of kernels in $directory"; exit 77; }
  for object in "${objects[@]}"; do
    if [ -n "$(weak "$object")" ]; then
      echo "FAILED: $object defines what the linker may share:"
      weak "$object" | head
      found=1
    fi
  done
  # This file has such functions, and may: it has no flags of its own. If none is seen here, none would be elsewhere.
  handlers=$directory/CMakeFiles/jaxq_handlers.dir/ffi.cc.o
  [ -n "$(weak "$handlers")" ] || { echo "FAILED: nm shows no weak function in $handlers"; found=1; }
  echo "symbols: ${#objects[@]} objects in $directory"
done
exit $found
