#!/usr/bin/env bash
# Everything that wants a GPU, in under nine minutes: build from source, the GPU tests, compute-sanitizer, the
# benchmarks against the floor and the peers, a profile of one step. A part that fails is named and the others go on.
#
#   bench/gpu.sh [--dry-run]       --dry-run: the same parts on a CPU, small, with what is already built
#
#   OUT=FOLDER      where log.txt, summary.txt, bench.csv, sweep.csv, bench.png, trace.json.gz go (default: bench/results/gpu-DATE)
#   WHEELS=FOLDER   wheels of peers; they are unpacked beside, nothing is fetched and nothing is installed
#   PYTHON=python3  which must have torch
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-bench/results/gpu-$(date +%Y-%m-%d)}
DRY=
case "${1:-}" in
    --dry-run) DRY=1 ;;
    "") ;;
    *) echo "bench/gpu.sh: the only option is --dry-run, got $1"; exit 2 ;;
esac
mkdir -p "$OUT" || exit 2
OUT=$(cd "$OUT" && pwd)
SITE=$(mktemp -d)
trap 'rm -rf "$SITE"' EXIT
export PYTHONPATH=$PWD:$SITE PYTHONUNBUFFERED=1
: >"$OUT/log.txt"
: >"$OUT/summary.txt"
DEADLINE=$((SECONDS + 530))
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

bench() { # NAME SECONDS OPTIONS...: into the one CSV
    local name=$1 limit=$2
    shift 2
    part "$name" "$limit" "$PYTHON" -m dft_kernels.benchmarks.command --csv "$OUT/bench.csv" "$@"
}

note "commit $(git describe --always --dirty=+ 2>/dev/null || echo unknown), $(date -u +%Y-%m-%dT%H:%MZ)"
note "$("$PYTHON" -c 'import platform, torch
gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
print(gpu + ", Python", platform.python_version() + ", torch", torch.__version__ + ", CUDA", torch.version.cuda)' 2>&1)"

if [[ -n "${WHEELS:-}" ]]; then
    part wheels 60 "$PYTHON" -c 'import pathlib, sys, zipfile
found = sorted(pathlib.Path(sys.argv[1]).glob("*.whl"))
if not found:
    sys.exit(f"no wheels in {sys.argv[1]}")
for wheel in found:
    zipfile.ZipFile(wheel).extractall(sys.argv[2])
    print(wheel.name)' "$WHEELS" "$SITE"
fi

if [[ -n "$DRY" ]]; then
    part build 60 "$PYTHON" -m dft_kernels.cli info
    part tests 120 "$PYTHON" -m pytest tests/test_contract.py -k "cross_entropy and native and float32"
    bench bench 120 --device cpu --shape 32,16,64 --loss cross_entropy --backend native --peer eager --rounds 2 \
        --plot "$OUT/bench.png" --trace "$OUT/trace.json.gz"
else
    ARCH=$("$PYTHON" -c 'import torch
major, minor = torch.cuda.get_device_capability()
print(f"{major}.{minor}" + ("a" if major >= 9 else ""))')
    part build 150 env DFT_KERNELS_CUDA=1 DFT_KERNELS_REQUIRE_EXTENSION=1 TORCH_CUDA_ARCH_LIST="$ARCH" \
        "$PYTHON" setup.py -q build_ext --inplace
    part info 30 "$PYTHON" -m dft_kernels.cli info
    MANY=() # Triton's kernels are compiled by the tests that meet them: on many cores, if pytest can
    if "$PYTHON" -c 'import xdist' 2>/dev/null; then MANY=(-n 8); fi
    part tests 150 "$PYTHON" -m pytest -p no:cacheprovider tests/test_device.py --maxfail=20 "${MANY[@]}"
    bench llama3 240 --preset llama3-8b --rounds 10 --loss forward_kl cross_entropy jensen_shannon
    for tool in memcheck racecheck; do
        part $tool 60 compute-sanitizer --tool $tool --kernel-name kns=dft --error-exitcode 9 \
            "$PYTHON" -m pytest -p no:cacheprovider tests/test_device.py \
            -k "on_a_gpu and everything and bfloat16 and cuda"
    done
    part trace 40 "$PYTHON" -m dft_kernels.benchmarks.command --preset llama3-8b --loss forward_kl --backend cuda \
        --peer --rounds 2 --trace "$OUT/trace.json.gz"
    part sweep 90 "$PYTHON" -m dft_kernels.benchmarks.command --csv "$OUT/sweep.csv" --plot "$OUT/bench.png" \
        --sweep n --shape 8192,4096,128256 --loss forward_kl --backend cuda triton --peer eager TRL --rounds 3
    bench smollm2 90 --preset smollm2 --rounds 10 --loss forward_kl cross_entropy jensen_shannon
fi

"$PYTHON" -m dft_kernels.benchmarks.command --show "$OUT/bench.csv" --brief 2>&1 | tee -a "$OUT/summary.txt"
if ((FAILED)); then note "$FAILED parts failed; see $OUT/log.txt"; exit 1; fi
