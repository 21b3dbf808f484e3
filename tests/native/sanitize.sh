# sanitize.sh CMAKE NAME SANITIZERS: builds core_test with -fsanitize=SANITIZERS in build/NAME and runs it; one line if all is well.
set -eu
cmake=$1 folder=build/$2 sanitizers=$3

quietly() {
    "$@" >"$folder/log" 2>&1 || { cat "$folder/log" >&2; exit 1; }
}

mkdir -p "$folder"
quietly "$cmake" -S . -B "$folder" -DEBMFAST_NATIVE_TESTS=ON -DEBMFAST_SANITIZE="$sanitizers" -DEBMFAST_CUDA=OFF
quietly "$cmake" --build "$folder" --parallel "$(getconf _NPROCESSORS_ONLN)"

# Sanitizers map their shadow memory at fixed places, which a randomised address space may occupy (vm.mmap_rnd_bits above 28).
fixed="setarch $(uname -m) -R"
$fixed true 2>/dev/null || fixed=
# What the pool's threads work on lives on a caller's stack. Fresh memory is filled with NaN.
export ASAN_OPTIONS=detect_stack_use_after_return=1:malloc_fill_byte=255:max_malloc_fill_size=1000000000 UBSAN_OPTIONS=print_stacktrace=1
if $fixed "$folder/core_test" >"$folder/log" 2>&1; then
    echo "$sanitizers: $(cat "$folder/log")"
elif grep -q 'FATAL: ThreadSanitizer: unexpected memory mapping' "$folder/log"; then
    echo "$sanitizers: NOT RUN, its runtime cannot start in this address space: allow setarch -R, or sysctl vm.mmap_rnd_bits=28" >&2
    test -z "${CI:-}"
else
    cat "$folder/log" >&2
    exit 1
fi
