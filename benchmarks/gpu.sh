#!/usr/bin/env bash
# What wants a GPU, within ten minutes: install, describe the machine, test, measure. A step that
# fails or runs out of its time does not stop the others; the exit status is 1 if any did.
#
#   bash benchmarks/gpu.sh                # every step
#   bash benchmarks/gpu.sh tests bench    # some of: install machine tests bench
#
# From the environment:
#   PYTHON   the interpreter (python3)
#   WHEELS   a folder of wheels to install from (.whl); where it has none, pip's index is asked
#   OUT      a folder for the logs and the tables, beside docs/benchmarks/
#   SECONDS_IN_ALL   for everything together (570)
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

python=${PYTHON:-python3}
deadline=$((SECONDS + ${SECONDS_IN_ALL:-570}))
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
logs=${OUT:-$scratch}
mkdir -p "$logs"
export PYTHONPATH="$PWD:$scratch/site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
wanted=" ${*:-install machine tests bench} "
failed=()

left() { # LIMIT: that many seconds, or what there is until the deadline
    local remaining=$((deadline - SECONDS))
    echo $((remaining < $1 ? remaining : $1))
}

step() { # NAME LIMIT COMMAND...: run it, into $logs/NAME.log too
    local name=$1 limit began=$SECONDS status
    limit=$(left "$2")
    shift 2
    if ((limit < 10)); then
        echo "== $name: not begun, the time is up"
        failed+=("$name (not begun)")
        return
    fi
    echo "== $name, at most $limit s: $*"
    # Interrupt first: pytest then still prints its summary.
    timeout --signal=INT --kill-after=8 "$((limit - 8))" "$@" 2>&1 | tee "$logs/$name.log"
    status=${PIPESTATUS[0]}
    echo "== $name: status $status after $((SECONDS - began)) s"
    if ((status != 0)); then
        failed+=("$name ($status)")
    fi
}

has() { [[ $wanted == *" $1 "* ]]; }

installed() { # MODULE
    "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"
}

for name in $wanted; do
    if [[ ! $name =~ ^(install|machine|tests|bench)$ ]]; then
        echo "gpu.sh: no step is called '$name'; the steps are install, machine, tests and bench" >&2
        exit 2
    fi
done

if has install; then
    pip=("$python" -m pip install -q --disable-pip-version-check --no-cache-dir)
    pip+=(--target "$scratch/site")
    wheels=("${WHEELS:-.whl}"/*.whl)
    missing=()
    for module in einops hypothesis parameterized pytest torchao; do
        installed "$module" || missing+=("$module")
    done
    if [[ -e ${wheels[0]} ]]; then
        step install 60 "${pip[@]}" --no-index --no-deps --no-compile "${wheels[@]}"
    elif ((${#missing[@]})); then
        step install 60 "${pip[@]}" -c constraints.txt "${missing[@]}"
    else
        echo "== install: nothing is missing"
    fi
fi

if has machine; then
    step nvidia-smi 20 nvidia-smi
    step doctor 70 "$python" -m qnn doctor
fi

if has tests; then
    # All of the CUDA kernels, and of the rest what compiles nothing; in parallel with xdist.
    chosen='test_triton or TestNumerics or TestModule or TestWhatIsAskedFor or TestState'
    chosen+=' or TestSpecialValues or (test_fake_equals_real and (float8 or fp8 or nvfp4))'
    parallel=()
    installed xdist && parallel=(-n 4)
    step tests 200 "$python" -m pytest -q "${parallel[@]}" -k "$chosen" \
        tests/test_triton.py tests/test_training.py tests/test_float_qlinear.py tests/test_spec.py
fi

if has bench; then
    # A case takes up to a minute, and the one that is under way when the time is up is lost.
    limit=$(left 420)
    budget=$((limit > 80 ? limit - 70 : 10))
    step bench "$limit" "$python" benchmarks/bench_fp8.py --budget "$budget"
    if [[ -n ${OUT:-} ]]; then
        for table in docs/benchmarks/bench_fp8.csv docs/benchmarks/bench_fp8.md; do
            [[ -e $table ]] && cp "$table" "$OUT/"
        done
    fi
fi

if ((${#failed[@]})); then
    echo "== failed: ${failed[*]}"
    exit 1
fi
echo "== all steps passed"
