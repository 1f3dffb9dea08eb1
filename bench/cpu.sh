#!/usr/bin/env bash
# The CPU figures of README.md and docs/performance.md, and the tables made of them, with one command. The machine should
# do nothing else meanwhile. A section that fails is named, and the others go on.
#
#   bench/cpu.sh [--out FOLDER] [SECTION...]
#
#   sections, in this order:
#     large         N 4096 by every implementation and loss (cpu.csv)
#     small         fewer rows and another head (cpu.csv)
#     avx2          with AVX2 alone, fp32 and bf16 (cpu-avx2.csv)
#     edges         N 1 to 131072, V 2 to 262144, H 8 to 8192 (edges-cpu.csv, .png)
#     threads       beside other busy processes (threads-cpu.csv)
#   and, where no --out is given, the tables of the pages
#
#   --out FOLDER    instead of bench/results
#   PYTHON=python3  which must have torch and the other libraries ('.[bench]')
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2
PYTHON=${PYTHON:-python3}
COMMIT=$(git describe --always --dirty=+ 2>/dev/null || echo unknown) # before results change the tree
SECTIONS=(large small avx2 edges threads)
OUT='' NAMED=() FAILED=0
usage() { echo "bench/cpu.sh: $1. See the head of the script."; exit 2; }
while (($#)); do
    case "$1" in
        --out) OUT=${2:?bench/cpu.sh: --out must have a folder}; shift ;;
        -*) usage "an option must be --out, got $1" ;;
        *) [[ " ${SECTIONS[*]} " == *" $1 "* ]] || usage "a section must be one of ${SECTIONS[*]}, got $1"
           NAMED+=("$1") ;;
    esac
    shift
done
((${#NAMED[@]})) || NAMED=("${SECTIONS[@]}")
TO=${OUT:-bench/results}
mkdir -p "$TO" || exit 2
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
CACHE=$(mktemp -d)
trap 'rm -rf "$CACHE"' EXIT

bench() { "$PYTHON" -m dft_kernels.commands.main bench --device cpu --commit "$COMMIT" "$@"; }

few=(--backend native --peer eager torch.compile "Liger chunked, compiled" "CCE torch_compile")
few_losses=(--loss cross_entropy forward_kl jensen_shannon)

run() {
    case "$1" in
        large) bench --preset smollm2 --csv "$TO/cpu.csv" ;;
        small)
            bench --rounds 5 --shape 1024,576,49152 "${few_losses[@]}" "${few[@]}" "Liger chunked" --csv "$TO/cpu.csv" &&
                bench --rounds 5 --shape 2048,2048,32000 --loss cross_entropy forward_kl "${few[@]}" "Liger chunked" --csv "$TO/cpu.csv"
            ;;
        avx2)
            # torch's cache does not ask which instructions there are: what this machine compiled must not be found
            ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 TORCHINDUCTOR_CACHE_DIR=$CACHE \
                bench --rounds 5 --shape 1024,576,49152 --dtype float32 bfloat16 "${few_losses[@]}" "${few[@]}" \
                --csv "$TO/cpu-avx2.csv"
            ;;
        edges) bench --preset edges --csv "$TO/edges-cpu.csv" --plot "$TO/edges-cpu.png" ;;
        threads) "$PYTHON" bench/threads.py --commit "$COMMIT" --csv "$TO/threads-cpu.csv" ;;
    esac
}

for name in "${SECTIONS[@]}"; do
    [[ " ${NAMED[*]} " == *" $name "* ]] || continue
    began=$SECONDS
    if run "$name"; then
        echo "$name: ok, $((SECONDS - began)) s"
    else
        echo "$name: FAILED, $((SECONDS - began)) s"
        FAILED=1
    fi
done
if [[ -z "$OUT" ]]; then
    "$PYTHON" bench/readme.py || FAILED=1
fi
exit "$FAILED"
