#!/usr/bin/env bash
# Runs the kernels under sanitizers: scripts/sanitize.sh address|thread [arguments of check_kernels]
#
# address: AddressSanitizer and UndefinedBehaviorSanitizer over the table of cases, on every instruction set of this
# machine; then fuzz.py, which sends random shapes, formats and contents, right and wrong ones, through the handlers.
# thread: ThreadSanitizer over the same table. (XLA's own pool is not instrumented, so the handlers are left out.)
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
kind=${1:?address or thread}
shift
build=${BUILD_DIRECTORY:-$here/../../../build/sanitize}-$kind
flags=$kind
[ "$kind" = address ] && flags=address,undefined
cmake -S "$here" -B "$build" -DJAXQ_SANITIZE="$flags" -DJAXQ_CHECK=ON -DPython_EXECUTABLE="$("$python" -c 'import sys; print(sys.executable)')" \
  >/dev/null
cmake --build "$build" --parallel "$(nproc)"
# The table's buffers end at unmapped pages of their own; the sanitizer sees to the kernels' scratch.
"$build/check_kernels" --quick "$@"
if [ "$kind" = address ]; then
  # Python itself keeps memory until it ends, so leaks are looked for by fuzz.py --leaks.
  # libstdc++ comes along, since the sanitizer looks for what throws before the library brings it.
  LD_PRELOAD="$(c++ -print-file-name=libasan.so) $(c++ -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 \
    "$python" "$here/scripts/fuzz.py" --library "$build/libjaxq_cpu.so" --seconds 30
fi
