#!/usr/bin/env bash
# Runs the kernels and their handlers under sanitizers: scripts/sanitize.sh address|thread [--quick]
#
# address: AddressSanitizer, UndefinedBehaviorSanitizer and LeakSanitizer. The table of cases on every instruction set
# of this machine; the repacking of checkpoints; 1e5 random calls, right and wrong ones, of the handlers
# (fuzz_handlers.cc); then random calls through XLA (fuzz.py), and 1e5 calls of the library as it is installed, whose
# memory must not grow.
# thread: ThreadSanitizer over the handlers on thread pools of every temper (check_threads.cc), over the same random
# calls, and over the table of cases.
# --quick: fewer cases, and seconds instead of 1e5 random calls.
#
# Needs Linux, cmake, a C++ compiler with the sanitizers' libraries, and a Python with jaxlib (PYTHON=...). Exits with
# 77 where one is missing: nothing was tested then.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
kind=${1:?address or thread}
quick=()
if [ "${2:-}" = --quick ]; then quick=(--quick); fi
build=${BUILD_DIRECTORY:-$here/../../../build/sanitize}-$kind
not_tested() { echo "NOT TESTED: $kind sanitizer: $1 (see the head of $0)"; exit 77; }

[ "$(uname)" = Linux ] || not_tested "this is no Linux"
for tool in cmake c++; do command -v $tool >/dev/null || not_tested "$tool is missing"; done
headers=$("$python" -c 'import jaxlib, os; print(os.path.join(jaxlib.__path__[0], "include"))') ||
  not_tested "$python has no jaxlib"
flags=$kind
[ "$kind" = address ] && flags=address,undefined
mkdir -p "$build"
echo 'int main(int count, char**) { return count - 1; }' > "$build/probe.cc"
c++ -fsanitize=$flags "$build/probe.cc" -o "$build/probe" 2>/dev/null && "$build/probe" ||
  not_tested "this compiler can't build for it, or this system can't run it"

# Where the CPU has all but the tiles, the AMX kernels run on emulated ones, whose loads and stores a sanitizer sees.
amx=OFF
if ! grep -qw amx_bf16 /proc/cpuinfo && grep -qw avx512_vnni /proc/cpuinfo && grep -qw avx512vbmi /proc/cpuinfo; then
  amx=ON
fi
cmake -S "$here" -B "$build" -DJAXQ_SANITIZE="$flags" -DJAXQ_CHECK=ON -DJAXQ_EMULATE_AMX=$amx \
  -DJAXQ_FFI_INCLUDE="$headers" >/dev/null
cmake --build "$build" --parallel "$(nproc)"
run() { echo "-- $*"; "$@"; }

amount=(--calls 100000)
seconds=60
if [ ${#quick[@]} != 0 ]; then amount=(--seconds 10) seconds=10; fi

if [ "$kind" = thread ]; then
  run "$build/check_threads" "${quick[@]}"
  run "$build/fuzz_handlers" "${amount[@]}"
  [ ${#quick[@]} != 0 ] || run "$build/check_kernels" --quick
  exit
fi

"$here/scripts/check_symbols.sh" "$build" || [ $? = 77 ]
# gcc before 14 aligns its substitutes for stack frames too little for AVX-512 (GCC bug 110027).
export ASAN_OPTIONS=detect_stack_use_after_return=0:detect_leaks=1 UBSAN_OPTIONS=print_stacktrace=1
run "$build/check_kernels" "${quick[@]}"
run "$build/check_repack"
run "$build/check_threads" --quick
run "$build/fuzz_handlers" "${amount[@]}"
# Python itself keeps memory until it ends, so leaks are looked for otherwise. libstdc++ comes along, since the
# sanitizer looks for what throws before the library brings it.
LD_PRELOAD="$(c++ -print-file-name=libasan.so) $(c++ -print-file-name=libstdc++.so)" \
  ASAN_OPTIONS=$ASAN_OPTIONS:detect_leaks=0 \
  run "$python" "$here/scripts/fuzz.py" --library "$build/libjaxq_cpu.so" --seconds "$seconds"
run "$python" "$here/scripts/fuzz.py" --leaks
