#!/usr/bin/env bash
# What each stage of the demo is worth: SFT beside SFT without the continued pretraining before it, and DPO and PPO each
# beside more SFT, in the same minutes, on the better replies of the same data.
#
#   bash run_demo.sh && bash run_demo.sh scripts/compare_stages.sh
#
# run_demo.sh sets the flags. Started again it goes on where it stopped; `rm -r outputs-*-compared` starts anew.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() { echo "error: $*" >&2; exit 2; }
[ -n "${SFT_FLAGS:-}" ] || fail "start it by: bash run_demo.sh scripts/compare_stages.sh"
sft=outputs-sft-demo/checkpoint-best dpo=outputs-dpo-demo/checkpoint-best ppo=outputs-ppo-demo/checkpoint-best
for model in $sft $dpo $ppo; do
    [ -d "$model" ] || fail "$model is not there: bash run_demo.sh makes it"
done

echo "== SFT without the continued pretraining"
# shellcheck disable=SC2086  # words: flags without blanks in their values
OUTPUT=outputs-nopt-compared bash run_sft.sh $SFT_FLAGS

more_sft() { # NAME DATA: an adapter on the demo's SFT model, for as many seconds as the stage NAME took
    local output=outputs-more-$1-compared seconds
    ! ls "$output"/checkpoint-[0-9]* > /dev/null 2>&1 || return 0
    seconds=$("$PYTHON" -c "
import json
results = json.load(open('outputs-$1-demo/train_results.json'))
print(round(results.get('train_runtime') or results['seconds']))")
    MODEL=$sft OUTPUT=$output TRAIN_DATA=$2 EVAL_DATA=$2 BATCH=8 ACCUMULATION=1 timeout "$seconds" bash run_sft.sh \
        --learning_rate 8e-4 --lr_scheduler_type constant --max_steps 100000 --lora_rank 32 --lora_alpha 64 \
        --lora_dropout 0 --weight_decay 0 --gradient_checkpointing False --eval_strategy no --report_to none ||
        [ $? = 124 ] # it saves a checkpoint at the signal
}

echo "== more SFT in DPO's minutes, on the better replies of its pairs"
chosen=cache/chosen-compared
mkdir -p $chosen
"$PYTHON" -c "
import json, sys
for pair in map(json.loads, sys.stdin):
    turns = [text for exchange in pair['history'] for text in exchange] + [pair['question'], pair['response_chosen']]
    roles = ['user', 'assistant'] * len(turns)
    messages = [{'role': 'system', 'content': pair['system']}] if pair['system'] else []
    messages += [{'role': role, 'content': text} for role, text in zip(roles, turns)]
    print(json.dumps({'messages': messages}, ensure_ascii=False))
" < data/reward/train.jsonl > $chosen/train.jsonl
more_sft dpo $chosen

echo "== more SFT in PPO's minutes, on the replies that stand beside its prompts"
more_sft ppo data/ppo

echo "== figures with their intervals"
newest() { ls -d outputs-more-"$1"-compared/checkpoint-[0-9]*; }
# shellcheck disable=SC2086
"$PYTHON" scripts/evaluate_model.py --base_model $sft --compare outputs-nopt-compared/checkpoint-best $sft $dpo \
    "$(newest dpo)" $ppo "$(newest ppo)" --test_file $TEST_FILES $EVAL_FLAGS --output_dir outputs-eval-compared \
    --reuse --overwrite
"$PYTHON" scripts/write_report.py --runs outputs-sft-demo outputs-nopt-compared outputs-dpo-demo outputs-ppo-demo \
    --evaluation outputs-eval-compared --output_dir outputs-report-compared --overwrite
echo "the report: outputs-report-compared/report.md"
