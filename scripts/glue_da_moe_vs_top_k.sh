#!/usr/bin/env bash
# DA-MoE against top-k on GLUE: two models that differ in the number of experts alone learn the same text, then each task
# with the same seeds, and one table compares them. What is there already is not run again.
#
#   scripts/glue_da_moe_vs_top_k.sh OUTPUT [FLAGS OF FINE-TUNING]
#   CORPUS='books/*.jsonl.xz' GLUE=glue scripts/glue_da_moe_vs_top_k.sh runs/glue --max_train_examples 1000
#
# CORPUS  text to learn first, as --dataset of `dynmoe train`
# GLUE    folder with TASK/train.* and TASK/validation.* (or TASK/test.* with labels); without it, GLUE of the Hub
# METHODS TASKS SEEDS  to run a part
set -euo pipefail
scripts=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
configs=$scripts/../configs/finetune
output=${1:?the folder for models and results}
shift

declare -A routing=(
    [top_k]='{method: top_k, selector: {k: 2, norm_topk_prob: false}}'
    [da_moe]='{method: da_moe, selector: {statistic: row_max_norm, scale: 0.5, k_max: 4}}'
)
for method in ${METHODS:-top_k da_moe}; do
    pretrained=$output/pretrained/$method
    if [ ! -e "$pretrained/all_results.json" ]; then
        dynmoe train --config "$configs/pretrain.yaml" --dataset "${CORPUS:-python-stdlib}" \
            --routing "${routing[$method]}" --output_dir "$pretrained"
    fi
    for task in ${TASKS:-cola mrpc rte sst2 wnli}; do
        files=()
        if [ -n "${GLUE:-}" ]; then
            held_out=("$GLUE/$task"/validation.* "$GLUE/$task"/test.*)
            [ -e "${held_out[0]}" ] || held_out=("${held_out[1]}")
            files=(--train_files "$GLUE/$task"/train.* --validation_files "${held_out[0]}")
        fi
        for seed in ${SEEDS:-0 1 2}; do
            run=$output/$method/$task/$seed
            [ -e "$run/all_results.json" ] || python "$scripts/finetune_glue.py" --config "$configs/glue.yaml" \
                --model "$pretrained" --task "$task" --seed "$seed" --output_dir "$run" "${files[@]}" "$@"
        done
    done
done
python "$scripts/glue_table.py" "$output"
