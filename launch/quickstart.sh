#!/usr/bin/env bash
# Sets up a virtual environment and trains the recipe tiny_cpu: four ranks, two-way expert parallel, on real text.
#
#   launch/quickstart.sh [key=value ...]      overrides as for `moedist train`
#
# Every call makes a new run folder below runs/, unless run.dir=... names one.
set -euo pipefail
# shellcheck source=launch/venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

run_dir=""
for argument in "$@"; do
    [[ $argument != run.dir=* ]] || run_dir="${argument#run.dir=}"
done
if [[ -z $run_dir ]]; then
    run_dir="runs/$(date +%Y-%m-%d_%H-%M-%S)_quickstart"
    set -- "run.dir=$run_dir" "$@"
fi

prepare_venv

# A signal to this script is for the training, which saves and leaves; the script then ends with its exit code.
SECONDS=0
signalled=""
trap 'signalled=yes; kill -TERM "$training" 2>/dev/null || true' INT TERM
"$VENV/bin/moedist" train experiment=tiny_cpu "$@" &
training=$!

first_step=""
heartbeat="$run_dir/logs/heartbeat_0.json"
if [[ ! -e $run_dir ]]; then
    while [[ -z $first_step ]] && kill -0 "$training" 2>/dev/null; do
        if grep -qs '"step": [1-9]' "$heartbeat"; then
            first_step=$SECONDS
        else
            sleep 0.5 || true
        fi
    done
fi

code=0
while :; do
    signalled=""
    wait "$training" && code=0 || code=$?
    [[ -n $signalled ]] || break
done
[[ $code == 0 ]] || exit "$code"
[[ -e $run_dir ]] || exit 0 # --help and the like

moedist="$VENV/bin/moedist"
[[ $moedist != "$PWD"/* ]] || moedist="${moedist#"$PWD"/}"
[[ -z $first_step ]] || echo "first step     done about $first_step s after the start"
cat <<END
metrics        $run_dir/metrics.jsonl
checkpoints    $run_dir/checkpoints
configuration  $run_dir/config.yaml
logs           $run_dir/logs

What to try next:
  $moedist eval $run_dir                        # its held-out loss without a capacity limit
  $moedist train data=text 'data.files=*.md'    # your own text, any files
  $moedist train --cfg job                      # every key of the configuration
END
