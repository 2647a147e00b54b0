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

prepare_venv report

# A signal to this script is for the training, which saves and leaves; the script then ends with its exit code.
trap 'signalled=yes; kill -TERM "$training" 2>/dev/null || true' INT TERM
"$VENV/bin/moedist" train experiment=tiny_cpu "$@" &
training=$!
code=0
while :; do
    signalled=""
    wait "$training" && code=0 || code=$?
    [[ -n $signalled ]] || break
done
[[ $code == 0 ]] || exit "$code"
[[ -f $run_dir/config.yaml ]] || exit 0 # it only looked: --help, --cfg job, --dry-run

moedist="$VENV/bin/moedist"
[[ $moedist != "$PWD"/* ]] || moedist="${moedist#"$PWD"/}"
"$VENV/bin/moedist" report "$run_dir" >/dev/null
cat <<END

report         $run_dir/report.html
metrics        $run_dir/metrics.jsonl
checkpoints    $run_dir/checkpoints
configuration  $run_dir/config.yaml
logs           $run_dir/logs

What to try next:
  # the held-out loss of what was trained, without a capacity limit
  $moedist eval $run_dir
  # the page of a run while it trains
  $moedist report --watch $run_dir
  # your own text
  $moedist train data=text 'data.files=*.md'
  # every key of the configuration
  $moedist train --cfg job
END
