#!/usr/bin/env bash
# The whole road on this machine: text → tokens → plan → pretraining on two ranks → a kill → resume → evaluation → export →
# generated text. usage: scripts/demo.sh [DIR [key=value …]]; DIR (default: demo) is emptied first.
set -euo pipefail

dir=${1:-demo}
# small matrices: a larger micro batch than the plan would choose
overrides=(ds.train_micro_batch_size_per_gpu=16 "${@:2}")
started=$SECONDS
title() { printf '\n\033[1m== %s\033[0m  (%ds)\n' "$1" $((SECONDS - started)); }
say() { # the command, quoted only where a shell needs it
  local word line="$ zeropipe"
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./=-]+$ ]] && line+=" $word" || line+=" '$word'"
  done
  echo "$line"
}
run() {
  say "$@"
  zeropipe "$@"
}
fail() {
  echo "demo: $1" >&2
  exit 1
}
launch=(launch demo --deepspeed_config demo --devices 2 "${overrides[@]}")

# Starts the training, kills rank 0 without warning once the run has a checkpoint and has gone on from it.
train_and_kill() {
  say "${launch[@]}"
  zeropipe "${launch[@]}" &
  local launcher=$! status=0
  until [ -e runs/demo/checkpoints/latest ] && gone_on; do
    kill -0 $launcher 2>/dev/null || fail "training ended before it could be killed"
    sleep 0.5
  done
  kill -KILL "$(sed -E 's/process ([0-9]+) .*/\1/' runs/demo/.lock)"
  wait $launcher || status=$?
  echo "zeropipe launch has ended with exit code $status"
  [ $status -eq 3 ] || fail "a rank was killed, so exit code 3 was expected"
}

# Whether steps were logged after the newest checkpoint: they will be lost, and trained again.
gone_on() { [ "$(tail -n 1 runs/demo/metrics.jsonl | grep -c '"kind": *"train"')" = 1 ]; }

[ -e "$dir" ] && [ ! -e "$dir/.demo" ] && fail "$dir exists and is not a demo's; name another folder"
rm -rf "$dir"
mkdir -p "$dir"
cd "$dir"
touch .demo

title "prepare: this Python's standard library, 16 MB of source code, and a tokenizer trained on it"
run prepare --builtin stdlib --limit-bytes 16M --shuffle 1 --train-tokenizer 2048 --output data/demo
run inspect data/demo --document 3 --tokens 40
title "plan: what the recipe and the DeepSpeed JSON come to; no torch, no GPU"
run plan demo --deepspeed_config demo --devices 2 "${overrides[@]}"
title "pretrain on two ranks, and kill one of them"
train_and_kill
title "the same command resumes from the newest checkpoint"
run "${launch[@]}"
title "evaluate on held-out text, beside the entropy of counts over the same tokens"
run eval runs/demo
title "export: a Hugging Face folder, verified against the logits of training"
run export runs/demo
title "generate"
run generate runs/demo --prompt 'def __init__(self' --prompt 'import ' --max-new-tokens 48 --temperature 0.7 --top-p 0.9 --seed 1
title "done: $dir/runs/demo holds the run, $dir/runs/demo/export the model"
run report runs/demo
