#!/usr/bin/env bash
# Tests, speed, and bfloat16 against float32 on the card that is there; prints a table for the README.
#
#     bash tests/gpu.sh              (about twenty minutes with a card)
#     bash tests/gpu.sh -k label     (what is added goes to pytest)
#
# Without a card its lines say "no card". The exit status is 1 where something failed.
set -uo pipefail
project=$(cd "$(dirname "$0")/.." && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
cd "$scratch"
card=$(python -c 'import torch as t; print(t.cuda.get_device_name() if t.cuda.is_available() else "")')
table="| ${card:-no card} | |\n|---|---|\n"
failed=0

line() {  # title, "cpu" or "card", a command whose last line of output is the result
  local title=$1 device=$2 result="no card"
  shift 2
  if [[ $device == cpu || -n $card ]]; then
    echo "$title ..." >&2
    if "$@" >"$scratch/output" 2>"$scratch/errors"; then
      result=$(tail -n 1 "$scratch/output")
    else
      failed=1 result=failed
      tail -n 30 "$scratch/output" "$scratch/errors" >&2
    fi
  fi
  table+="| $title | $result |\n"
}

row() {  # name, then flags: a row of the benchmark on the miniature
  python "$project/baseline.py" --row source_only --out "runs/$1" "${@:2}" >&2 || return 1
  python - "runs/$1/result.json" <<'END'
import json, sys
result = json.load(open(sys.argv[1]))
print("mIoU {miou:.1f}, {seconds:.0f} s, {peak_memory_mb:.0f} MB".format(**result))
END
}

all_rows() {
  python "$project/benchmark.py" --devices cuda --steps 60 --out all >&2 || return 1
  python -c 'import json; rows = json.load(open("all/results.json")); print(len(rows), "rows finished")'
}

line "tests" cpu python -m pytest -q -p no:cacheprovider --rootdir "$project" "$project/tests" "$@"
line "source_only, 60 updates, CPU" cpu row cpu --device cpu --steps 60
line "source_only, default updates, float32" card row float32 --device cuda --no-amp
line "source_only, default updates, bfloat16" card row bfloat16 --device cuda
line "BiSeNet at 512x1024, 60 updates of 8, float32" card row large32 --device cuda --no-amp \
  --net bisenet --size 512 1024 --batch-size 8 --steps 60
line "BiSeNet at 512x1024, 60 updates of 8, bfloat16" card row large16 --device cuda \
  --net bisenet --size 512 1024 --batch-size 8 --steps 60
line "all rows of the miniature, 60 updates" card all_rows
for figure in training input_pipeline; do
  line "speed of $figure" card python "$project/tests/bench.py" --device cuda --only "$figure"
done
printf "%b" "$table"
exit $failed
