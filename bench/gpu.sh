#!/usr/bin/env bash
# Everything that wants a GPU, in under nine minutes: build from source, the GPU tests, compute-sanitizer, a profile of
# one step, the benchmarks against the floor and the peers. A part that fails is named and the others go on.
#
#   bench/gpu.sh [--dry-run]       --dry-run: the same parts on a CPU, small, with what is already built
#
#   OUT=FOLDER      where log.txt, summary.txt, bench.csv, sweep.csv, bench.png and trace.json.gz go
#                   (default: bench/results/gpu-DATE, of a dry run build/gpu-dry-run)
#   WHEELS=FOLDER   wheels of peers; pip unpacks them beside, nothing is fetched and nothing is installed
#   PYTHON=python3  which must have torch
#   COMMIT=TEXT     what is measured, where git cannot say
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
COMMIT=${COMMIT:-$(git describe --always --dirty=+ 2>/dev/null || echo unknown)}
DRY=
case "${1:-}" in
    --dry-run) DRY=1 ;;
    "") ;;
    *) echo "bench/gpu.sh: the only option is --dry-run, got $1"; exit 2 ;;
esac
OUT=${OUT:-$([[ -n "$DRY" ]] && echo build/gpu-dry-run || echo "bench/results/gpu-$(date +%Y-%m-%d)")}
mkdir -p "$OUT" || exit 2
OUT=$(cd "$OUT" && pwd)
rm -f "$OUT"/{log.txt,summary.txt,bench.csv,sweep.csv,bench.png,trace.json.gz}
SITE=$(mktemp -d)
trap 'rm -rf "$SITE"' EXIT
echo "import os, site; site.addsitedir(os.path.dirname(__file__))" >"$SITE/sitecustomize.py" # for wheels with a .pth
export PYTHONPATH=$PWD:$SITE${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
DEADLINE=$((SECONDS + 510))
FAILED=0

note() { echo "$*" | tee -a "$OUT/summary.txt"; }

# part NAME SECONDS COMMAND...: at most SECONDS, and never past the deadline
part() {
    local name=$1 limit=$2 began=$SECONDS left=$((DEADLINE - SECONDS)) code
    shift 2
    if ((limit > left)); then limit=$left; fi
    if ((limit < 5)); then note "$name: NOT RUN, no time left"; FAILED=$((FAILED + 1)); return 1; fi
    printf '\n==== %s: %s\n' "$name" "$*" >>"$OUT/log.txt"
    timeout --kill-after=5 "$limit" "$@" >>"$OUT/log.txt" 2>&1 </dev/null
    code=$?
    if ((code == 0)); then note "$name: ok, $((SECONDS - began)) s"; return 0; fi
    FAILED=$((FAILED + 1))
    if ((code == 124 || code == 137)); then code="$code (stopped after $limit s)"; fi
    note "$name: FAILED with $code after $((SECONDS - began)) s. $(tail -n 1 "$OUT/log.txt" | cut -c1-160)"
    return 1
}

bench() { # NAME SECONDS OPTIONS...
    local name=$1 limit=$2
    shift 2
    part "$name" "$limit" "$PYTHON" -m dft_kernels.commands.main bench --commit "$COMMIT" "$@"
}

note "commit $COMMIT, $(date -u +%Y-%m-%dT%H:%MZ)"
note "$("$PYTHON" -c 'import platform, torch
gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
print(gpu + ", Python", platform.python_version() + ", torch", torch.__version__ + ", CUDA", torch.version.cuda)' 2>&1)"

MAIN="--loss forward_kl cross_entropy jensen_shannon"
if [[ -n "$DRY" ]]; then
    BUILD=("$PYTHON" -m dft_kernels.commands.main info)
    TESTS=(tests/teachers/test_streams.py -k "iterator")
    CHECKED=(tests/test_structure.py -k "table or small")
    SANITIZER="env TOOL="
    SMALL="--device cpu --dtype float32 --backend native --peer eager --rounds 2 --shape"
    BIG="$SMALL 32,16,64 --loss cross_entropy" ONE="$SMALL 32,16,64 --loss forward_kl"
    SWEEP="$SMALL 8,16,32 --loss cross_entropy" OTHER="$SMALL 16,16,64 --loss cross_entropy"
else
    ARCH=$("$PYTHON" -c 'import torch
major, minor = torch.cuda.get_device_capability()
print(f"{major}.{minor}" + ("a" if major >= 9 else ""))')
    BUILD=(env DFT_KERNELS_CUDA=1 DFT_KERNELS_CPU=1 TORCH_CUDA_ARCH_LIST="$ARCH"
        "$PYTHON" setup.py -q build_ext --inplace)
    TESTS=(tests/backends/test_device.py --maxfail=20)
    # tests compile the Triton kernels that they run: on many cores, where pytest-xdist is installed
    if "$PYTHON" -c 'import xdist' 2>/dev/null; then TESTS+=(-n 8); fi
    CHECKED=(tests/backends/test_device.py -k "on_a_gpu and everything and bfloat16 and cuda")
    SANITIZER="env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --kernel-name kns=dft --error-exitcode 9 --tool "
    BIG="--preset llama3-8b --rounds 10 $MAIN" ONE="--preset llama3-8b --loss forward_kl --backend cuda --peer --rounds 2"
    SWEEP="--sweep n --shape 8192,4096,128256 --loss forward_kl --backend cuda triton --peer eager TRL --rounds 3"
    OTHER="--preset smollm2 --rounds 10 $MAIN"
fi

# shellcheck disable=SC2086 # options are words
{
    if [[ -n "${WHEELS:-}" ]]; then
        part wheels 60 "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --target "$SITE" "$WHEELS"/*.whl
    fi
    part build 120 "${BUILD[@]}"
    part info 20 "$PYTHON" -m dft_kernels.commands.main info
    part tests 120 "$PYTHON" -m pytest -p no:cacheprovider "${TESTS[@]}"
    for tool in memcheck racecheck; do
        part $tool 45 ${SANITIZER}$tool "$PYTHON" -m pytest -p no:cacheprovider "${CHECKED[@]}"
    done
    bench trace 40 $ONE --trace "$OUT/trace.json.gz"
    bench main 210 $BIG --csv "$OUT/bench.csv"
    bench sweep 60 $SWEEP --csv "$OUT/sweep.csv" --plot "$OUT/bench.png"
    bench other 60 $OTHER --csv "$OUT/bench.csv"
}

timeout 20 "$PYTHON" -m dft_kernels.commands.main bench --show "$OUT/bench.csv" --brief 2>&1 | tee -a "$OUT/summary.txt"
if (($(stat -c %s "$OUT/log.txt") > 8 << 20)); then
    tail -c $((8 << 20)) "$OUT/log.txt" >"$OUT/log.tail" && mv "$OUT/log.tail" "$OUT/log.txt"
fi
if ((FAILED)); then note "$FAILED parts failed; see $OUT/log.txt"; exit 1; fi
