#!/usr/bin/env bash
# Measures on one GPU what a CPU cannot show: a JSON file a part, written row by row.
#
#   benchmarks/gpu.sh [PART...]     by default all parts, in this order:
#       check            the attention kernels against torch in float64
#       attention        attention with maps at real shapes, by method; which backends take what
#       sd15             guided steps of Stable Diffusion 1.5's size, batch 1 and 4, peak memory
#       sdxl             the same of SDXL's
#       tests            pytest -m gpu
#       compiled-sd15    the denoiser in CUDA graphs, batch 1
#       compiled-sdxl    the same of SDXL's
#
# A part that is finished in OUT is passed over, so a second start goes on where the first ended.
#   OUT      folder of the results (out/gpu)
#   BUDGET   seconds for all parts together (460); a part that does not fit is cut and said to be
#   PYTHON   python3, with torch, diffusers, transformers and this project's other dependencies;
#            packages in folders come by PYTHONPATH, the project itself from this checkout
#   BACKEND  cudagraphs, or inductor, which takes minutes to compile (cudagraphs)
#   TINY=1   every part at tiny sizes, also on a CPU
#   TRITON_PTXAS_PATH   a ptxas for triton's; without it the newest at hand
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-out/gpu} PYTHON=${PYTHON:-python3} BUDGET=${BUDGET:-460} TINY=${TINY:-}
BACKEND=${BACKEND:-cudagraphs}
mkdir -p "$OUT"
export PYTHONPATH="$PWD:$PWD/plugins:$PWD/kernels:$PWD/tests/support${PYTHONPATH:+:$PYTHONPATH}"
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1

newest_ptxas() { # path of the newest ptxas: triton's own, a wheel's, the system's
    "$PYTHON" - <<'PY'
import glob, re, shutil, subprocess, sys

found = [shutil.which("ptxas")]
for folder in sys.path:
    found += glob.glob(f"{folder}/nvidia/*/bin/ptxas")
    found += glob.glob(f"{folder}/triton/backends/nvidia/bin/ptxas")


def version(path):
    told = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", told)
    return tuple(map(int, release.groups())) if release else (0, 0)


print(max(filter(None, found), key=version, default=""))
PY
}
[ -n "${TRITON_PTXAS_PATH:-}" ] || TRITON_PTXAS_PATH=$(newest_ptxas)
[ -n "$TRITON_PTXAS_PATH" ] && export TRITON_PTXAS_PATH || unset TRITON_PTXAS_PATH

command_of() { # PART: its arguments
    local model=${1#compiled-}
    case $1 in
    check | tests) echo benchmarks/gpu_verdicts.py "$1" ;;
    attention) echo benchmarks/attention_map.py ${TINY:+--tiny} ;;
    sd15 | sdxl) echo benchmarks/guided_steps.py --model ${TINY:+tiny-}"$1" ${TINY:+--quick} ;;
    compiled-sd15 | compiled-sdxl)
        echo benchmarks/guided_steps.py --model ${TINY:+tiny-}"$model" ${TINY:+--quick} \
            --batch 1 --only CFG --only Zest --only pww --only pag --backend "$BACKEND"
        ;;
    *) return 1 ;;
    esac
}

finished() { grep -qs '"finished": true' "$OUT/$1.json"; }

[ $# -gt 0 ] || set -- check attention sd15 sdxl tests compiled-sd15 compiled-sdxl
for part in "$@"; do
    command_of "$part" >/dev/null || { echo "no part '$part'; see the head of $0" >&2; exit 2; }
done
for part in "$@"; do
    left=$((BUDGET - SECONDS))
    if finished "$part"; then
        echo "$part: finished before"
    elif [ "$left" -lt 5 ]; then
        echo "$part: no time left; start again for it"
    else
        begun=$SECONDS
        # shellcheck disable=SC2046
        timeout "$left" "$PYTHON" $(command_of "$part") --json "$OUT/$part.json" \
            >>"$OUT/log.txt" 2>&1
        code=$?
        finished "$part" && state=finished || state="cut or failed, exit code $code"
        echo "$part: $state, $((SECONDS - begun)) s"
    fi
done
