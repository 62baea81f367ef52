#!/usr/bin/env bash
# Runs the AMX kernels over emulated tile instructions: scripts/test_amx.sh [--quick]
#
# For machines without AMX; the rest of those kernels needs AVX-512 with VNNI and VBMI (Ice Lake, Zen 4 and later), a
# C++ compiler and cmake. Exits with 77 where one is missing: nothing was tested then.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
build=${BUILD_DIRECTORY:-$here/../../../build/amx}
command -v cmake >/dev/null || { echo "NOT TESTED: AMX kernels: cmake is missing"; exit 77; }
for flag in avx512_vnni avx512vbmi; do
  grep -qw "$flag" /proc/cpuinfo || { echo "NOT TESTED: AMX kernels: this CPU has no $flag"; exit 77; }
done
cmake -S "$here" -B "$build" -DJAXQ_EMULATE_AMX=ON -DJAXQ_ISAS=JAXQ_AMX -DJAXQ_CHECK=ON -DJAXQ_FFI_INCLUDE=unused >/dev/null
cmake --build "$build" --parallel 2 --target check_kernels
"$build/check_kernels" --only amx --require amx "$@"
