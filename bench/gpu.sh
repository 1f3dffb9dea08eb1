#!/usr/bin/env bash
# Everything that wants a GPU, in four minutes: times against the floor and torch.compile, times of the row kernels alone,
# the device tests, the cases beyond 2^31 logits, compute-sanitizer, a profile. A section that fails or runs out of its
# time is named, and the others go on. What it takes: the compiled extensions, built here (section `build`) or elsewhere
# for the same Python and torch and carried along; without them Triton is still measured, and the exit status says so.
#
#   bench/gpu.sh [--out FOLDER] [--limit SECONDS] [--dry-run] [SECTION...]
#
#   sections, in this order: check timings rows suite large memcheck racecheck trace; and, only where named, build
#   (before them), errors and active (gradient_error), both of real hidden states, see docs/performance.md;
#   CACHE=FOLDER has the file of the inputs
#
#   --out FOLDER    log.txt, summary.txt, bars.txt, timings.csv, rows.csv, trace.json.gz, errors.csv, active.csv
#                   (default: $OUT, else bench/results/gpu-DATE)
#   --limit S       of all default sections together (default: 240); each has its share, and what was left before it
#   --dry-run       the same sections on a CPU, tiny
#
#   WHEELS=FOLDER   wheels of peers and of pytest-xdist; pip unpacks them beside, nothing is fetched or installed
#   PYTHON=python3  which must have torch
#   COMMIT=TEXT     what is measured, where git cannot say
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2
PYTHON=${PYTHON:-python3}
COMMIT=${COMMIT:-$(git describe --always --dirty=+ 2>/dev/null || echo unknown)}
DEFAULT=(check timings rows suite large memcheck racecheck trace)
declare -A SHARE=([check]=10 [timings]=75 [rows]=20 [suite]=80 [large]=13 [memcheck]=19 [racecheck]=14 [trace]=9)
SHARE[build]=180 SHARE[errors]=120 SHARE[active]=60 # beyond the limit: only where named
DRY='' LIMIT=240 NAMED=()
usage() { echo "bench/gpu.sh: $1. See the head of the script."; exit 2; }
while (($#)); do
    case "$1" in
        --dry-run) DRY=1 ;;
        --out) OUT=${2:?bench/gpu.sh: --out must have a folder}; shift ;;
        --limit) LIMIT=${2:?bench/gpu.sh: --limit must have seconds}; shift ;;
        -*) usage "there is no option $1" ;;
        *) [[ -n "${SHARE[$1]:-}" ]] || usage "a section must be one of build ${DEFAULT[*]} errors active, got $1"
           NAMED+=("$1") ;;
    esac
    shift
done
[[ "$LIMIT" =~ ^[1-9][0-9]*$ ]] || usage "--limit must be whole seconds, got $LIMIT"
((${#NAMED[@]})) || NAMED=("${DEFAULT[@]}")
OUT=${OUT:-$([[ -n "$DRY" ]] && echo build/gpu-dry-run || echo "bench/results/gpu-$(date +%Y-%m-%d)")}
mkdir -p "$OUT" || exit 2
OUT=$(cd "$OUT" && pwd)
rm -f "$OUT"/{log.txt,summary.txt,bars.txt,timings.csv,rows.csv,trace.json.gz,errors.csv,active.csv}
SITE=$(mktemp -d)
trap 'rm -rf "$SITE"' EXIT
echo "import os, site; site.addsitedir(os.path.dirname(__file__))" >"$SITE/sitecustomize.py" # for wheels with a .pth
export PYTHONPATH=$PWD:$SITE${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
FAILED=0 SAVED=0

note() { echo "$*" | tee -a "$OUT/summary.txt"; }

last() { grep -v '^[[:space:]]*$' "$OUT/log.txt" | tail -n 1 | cut -c1-200; }

# section NAME COMMAND...: within its share of the time, and what the sections before it have left
section() {
    local name=$1 began=$SECONDS share limit code
    shift
    share=${SHARE[$name]}
    if [[ " ${DEFAULT[*]} " == *" $name "* ]]; then share=$((share * LIMIT / 240)); fi
    if ((share < 1)); then share=1; fi
    limit=$((share + SAVED))
    printf '\n==== %s, at most %d s: %s\n' "$name" "$limit" "$*" >>"$OUT/log.txt"
    TIME_LEFT=$limit timeout --kill-after=5 "$limit" "$@" >>"$OUT/log.txt" 2>&1 </dev/null
    code=$?
    SAVED=$((limit - (SECONDS - began)))
    if ((SAVED < 0)); then SAVED=0; fi
    if [[ "$name" == timings && -f "$OUT/bars.txt" ]]; then tee -a "$OUT/summary.txt" <"$OUT/bars.txt"; fi
    if ((code == 0)); then
        note "$name: ok, $((SECONDS - began)) of $limit s. $(last)"
        return
    fi
    FAILED=$((FAILED + 1))
    if ((code == 124 || code == 137)); then
        note "$name: OUT OF TIME after $limit s. $(last)"
    else
        note "$name: FAILED with $code after $((SECONDS - began)) of $limit s. $(last)"
    fi
}

# whether the compiled extensions load into this Python and torch, and which GPUs they are for
CHECK='import platform, sys, torch
from dft_kernels.backends import extension
gpu = torch.cuda.is_available()
where = torch.cuda.get_device_name() if gpu else "no GPU"
print(where + ", Python", platform.python_version() + ", torch", torch.__version__ + ", CUDA", torch.version.cuda)
cuda = extension.CUDA_REASON
if cuda is None and gpu:
    cuda = extension.not_compiled_for(torch.cuda.get_device_capability())
for name, reason in (("CPU kernels", extension.REASON), ("CUDA kernels", cuda)):
    print(f"{name}:", reason or "they load")
parts = [("CPU kernels", extension.REASON)] if "DFT_KERNELS_CPU=0" not in (extension.REASON or "") else []
parts += [] if sys.argv[1] else [("CUDA kernels", cuda)]
bad = [] if gpu or sys.argv[1] else ["torch sees no GPU"]
bad += [f"{name} do not load ({reason.split(chr(10))[0]})" for name, reason in parts if reason]
print("carry the .so files and _build.json of this Python and torch, or name the section build: " + "; ".join(bad)
      if bad else "the extensions load")
sys.exit(bool(bad))'

run() {
    local sanitizer=(env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --kernel-name kns=dft --error-exitcode 9)
    local pytest=("$PYTHON" -m pytest -p no:cacheprovider tests/backends/test_device.py)
    local checked=(-k "on_a_gpu and everything and bfloat16 and cuda")
    local small=() few=() cores=() preset=(--device cuda --rounds 5 --shape 8192,576,49152)
    local within=(--device cuda --shape 8192 576 49152 --rounds 5)
    if [[ -n "$DRY" ]]; then
        sanitizer=(env) small=(--dry-run --calls 5) few=(--dry-run) checked=(-k "table or small")
        pytest=("$PYTHON" -m pytest -p no:cacheprovider tests/test_structure.py)
        preset=(--device cpu --rounds 1) within=(--inputs random --shape 64 32 2000 --rounds 2)
    elif "$PYTHON" -c 'import xdist' 2>/dev/null; then # tests compile the Triton kernels that they run
        cores=(-n "$(($(nproc) < 14 ? $(nproc) : 14))")
    fi
    case "$1" in
        build)
            section build env DFT_KERNELS_CUDA=1 DFT_KERNELS_CPU=1 "$PYTHON" setup.py -q build_ext --inplace ;;
        check) section check "$PYTHON" -c "$CHECK" "$DRY" ;;
        timings)
            section timings bash -c 'exec "$@" --limit $((TIME_LEFT > 20 ? TIME_LEFT - 12 : TIME_LEFT))' timings \
                "$PYTHON" bench/timings.py --out "$OUT" --commit "$COMMIT" "${small[@]}" ;;
        rows)
            section rows "$PYTHON" bench/rows.py --designs "cuda lean" "cuda generic" --out "$OUT/rows.csv" "${few[@]}" ;;
        suite)
            if [[ -n "$DRY" ]]; then section suite "${pytest[@]}" -k "table"
            else section suite "${pytest[@]}" --maxfail=20 -k "not 2_to" "${cores[@]}"; fi ;;
        large)
            if [[ -n "$DRY" ]]; then section large "${pytest[@]}" -k "small or table"
            else section large "${pytest[@]}" -k "2_to"; fi ;;
        memcheck | racecheck)
            if [[ -z "$DRY" ]]; then sanitizer+=(--tool "$1"); fi
            section "$1" "${sanitizer[@]}" "${pytest[@]}" "${checked[@]}" ;;
        trace) section trace "$PYTHON" bench/timings.py --trace "$OUT/trace.json.gz" "${small[@]}" ;;
        errors)
            section errors "$PYTHON" -m dft_kernels.commands.main bench --inputs smollm2 --commit "$COMMIT" \
                --csv "$OUT/errors.csv" ${CACHE:+--cache "$CACHE"} "${preset[@]}" ;;
        active)
            section active "$PYTHON" bench/active.py --csv "$OUT/active.csv" ${CACHE:+--cache "$CACHE"} "${within[@]}" ;;
    esac
}

note "commit $COMMIT, $(date -u +%Y-%m-%dT%H:%MZ)"
if [[ -n "${WHEELS:-}" ]]; then
    if ! "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --target "$SITE" "$WHEELS"/*.whl \
        >>"$OUT/log.txt" 2>&1; then
        FAILED=$((FAILED + 1))
        note "wheels: FAILED. $(last)"
    fi
fi
for name in build "${DEFAULT[@]}" errors active; do
    if [[ " ${NAMED[*]} " == *" $name "* ]]; then run "$name"; fi
done
if (($(stat -c %s "$OUT/log.txt") > 8 << 20)); then
    tail -c $((8 << 20)) "$OUT/log.txt" >"$OUT/log.tail" && mv "$OUT/log.tail" "$OUT/log.txt"
fi
if ((FAILED)); then note "$FAILED sections failed; see $OUT/log.txt"; exit 1; fi
