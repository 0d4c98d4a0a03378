#!/usr/bin/env bash
# Fine-tuning on this machine: a real instruct model and real dialogues → records → LoRA on two ranks → evaluation before and
# after → the adapter and the merged model → chat. usage: scripts/demo_sft.sh [DIR [key=value …]]; DIR (default: demo-sft) is
# emptied first, but for DIR/material (93 MB that are fetched once).
set -euo pipefail

dir=${1:-demo-sft}
overrides=("${@:2}")
started=$SECONDS
here=$(cd "$(dirname "$0")" && pwd)
title() { printf '\n\033[1m== %s\033[0m  (%ds)\n' "$1" $((SECONDS - started)); }
run() { # says the command, quoted only where a shell needs it, and runs it
  local word line="$ zeropipe"
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./=-]+$ ]] && line+=" $word" || line+=" '$word'"
  done
  echo "$line"
  zeropipe "$@"
}

if [ -e "$dir" ] && [ ! -e "$dir/.demo" ]; then
  echo "demo-sft: $dir exists and is not a demo's; name another folder" >&2
  exit 1
fi
mkdir -p "$dir"
cd "$dir"
touch .demo
rm -rf data runs adapter

title "material: SmolLM2-135M-Instruct and English dialogues"
python "$here/material.py" material
for split in train valid; do
  title "prepare: the $split dialogues as records, the assistant's turns learnt"
  run prepare --format sft --input "material/dialogues/$split.jsonl" --tokenizer material/smollm2 --output "data/sft-$split" --quiet
done
run inspect data/sft-train --document 3
title "plan: what will be trained, and how much memory it takes"
run plan lora --deepspeed_config zero1 --devices 2 "${overrides[@]}"
title "before: the held-out dialogues"
run eval material/smollm2 --store data/sft-valid --seq-len 512
title "LoRA on two ranks"
run launch lora --deepspeed_config zero1 --devices 2 "${overrides[@]}"
title "after"
run eval runs/lora
title "export: the merged model, verified, and the adapter alone, for peft"
run export runs/lora
run export runs/lora --adapter --output adapter
title "chat with it"
printf 'What is AI?\nDo you like it?\n' | run chat runs/lora/export --max-new-tokens 40
title "done: $dir/runs/lora/export holds the model, $dir/adapter the adapter; talk to it with
   (cd $dir && zeropipe chat runs/lora/export)"
