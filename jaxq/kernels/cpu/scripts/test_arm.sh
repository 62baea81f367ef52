#!/usr/bin/env bash
# Builds the kernels for 64-bit Arm with a cross compiler and runs them in an emulator: scripts/test_arm.sh [--quick]
#
# Needs aarch64-linux-gnu-g++, qemu-aarch64, cmake, and a Python with jaxlib for XLA's headers (PYTHON=...). On Debian:
# apt-get install g++-aarch64-linux-gnu qemu-user. Exits with 77 where one is missing: nothing was tested then.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
build=${BUILD_DIRECTORY:-$here/../../../build/arm}
python=${PYTHON:-python3}
for tool in aarch64-linux-gnu-g++ qemu-aarch64 cmake; do
  command -v "$tool" >/dev/null || { echo "NOT TESTED: $tool is missing (see the head of $0)"; exit 77; }
done
headers=$("$python" -c 'import jaxlib, os; print(os.path.join(jaxlib.__path__[0], "include"))') ||
  { echo "NOT TESTED: $python has no jaxlib"; exit 77; }
cmake -S "$here" -B "$build" -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
  -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DJAXQ_FFI_INCLUDE="$headers" -DJAXQ_CHECK=ON >/dev/null
cmake --build "$build" --parallel 2
root=$(aarch64-linux-gnu-g++ -print-sysroot)
[ -d "$root/lib" ] && [ "$root" != / ] || root=/usr/aarch64-linux-gnu
isas=neon,neon_dotprod,neon_i8mm,neon_bf16
qemu-aarch64 -cpu max -L "$root" "$build/check_kernels" --only $isas --require $isas "$@"
qemu-aarch64 -L "$root" "$build/check_repack"
qemu-aarch64 -cpu max -L "$root" "$build/fuzz_handlers" --seconds 15
# A CPU of 2012: what it lacks must be found out, not run.
isas=neon_dotprod
[ "${1:-}" = --quick ] || isas=neon,neon_dotprod
qemu-aarch64 -cpu cortex-a53 -L "$root" "$build/check_kernels" --quick --only $isas | tee "$build/old.txt"
grep -q 'neon_dotprod *not run' "$build/old.txt"
