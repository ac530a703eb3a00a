#!/usr/bin/env bash
# Serve a trained model by OpenAI's chat completions: with vLLM on a GPU that has it, otherwise with openai_server.py.
#
# Needs: 1 GPU of 16 GB or more for Qwen2.5-3B with vLLM (see requirements/serve.txt). No GPU: a small model on the CPU.
#
#   mkdir -p logs && nohup bash run_serve.sh > logs/serve.log 2>&1 &
#   tail -f logs/serve.log
#
# A variable of the edit block set in the environment wins over it, a flag after the script's name goes to the server:
#   MODEL=Qwen/Qwen2.5-3B-Instruct LORA=outputs-dpo-qwen2.5-3b/checkpoint-best PORT=8001 bash run_serve.sh
set -euo pipefail
cd "$(dirname "$0")"

# ---------------------------------------------------------------- edit block
MODEL=${MODEL:-outputs-dpo-qwen2.5-3b-merged}   # merged model, full checkpoint, base of LORA, or an adapter
LORA=${LORA:-}                                  # adapter on MODEL; "" for none
HOST=${HOST:-127.0.0.1}                         # 0.0.0.0 opens it to the network: set API_KEY then
PORT=${PORT:-8000}
API_KEY=${API_KEY:-}                            # clients send it as their Bearer token; "" asks for none
MAX_LENGTH=${MAX_LENGTH:-4096}                  # tokens of prompt and reply
GPU_MEMORY=${GPU_MEMORY:-0.9}                   # share of the GPU that vLLM takes

PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}
VLLM_PYTHON=${VLLM_PYTHON:-$([ -x .venv-serve/bin/python ] && echo .venv-serve/bin/python || echo "$PYTHON")}

of_adapter() { # a value of an adapter's configuration
    "$PYTHON" -c 'if True:
        import json, sys
        file, key = sys.argv[1] + "/adapter_config.json", sys.argv[2]
        try:
            print(json.load(open(file))[key])
        except (ValueError, LookupError, TypeError):
            print(f"error: {file}: no adapter configuration with {key!r}; copy or download it again", file=sys.stderr)
            sys.exit(2)' "$1" "$2"
}

if [ -f "$MODEL/adapter_config.json" ] && [ -z "$LORA" ]; then
    LORA=$MODEL
    MODEL=$(of_adapter "$LORA" base_model_name_or_path)
fi
NAME=${NAME:-${LORA:-$MODEL}}                   # what requests call the model
if [ -n "$LORA" ] && [ ! -f "$LORA/adapter_config.json" ]; then
    echo "error: LORA $LORA: no adapter_config.json in it; give an adapter's folder, such as a checkpoint-best" >&2
    exit 2
fi

gpus=$("$VLLM_PYTHON" -m medtune.devices "$@") # it ends here, with a line, where torch cannot use the GPUs
if [[ $gpus =~ ^[1-9] ]] && "$VLLM_PYTHON" -c 'import vllm' 2> /dev/null; then
    [ -z "$API_KEY" ] || export VLLM_API_KEY=$API_KEY
    args=(
        --model "$MODEL"
        --host "$HOST"
        --port "$PORT"
        --dtype bfloat16
        --max-model-len "$MAX_LENGTH"
        --gpu-memory-utilization "$GPU_MEMORY"
        --shutdown-timeout 600                  # seconds for the running requests; by itself vLLM breaks them off
    )
    if [ -n "$LORA" ]; then
        rank=$(of_adapter "$LORA" r)
        for max_rank in 8 16 32 64 128 256 320 512; do [ "$max_rank" -lt "$rank" ] || break; done
        args+=(--enable-lora --max-lora-rank "$max_rank" --lora-modules "$NAME=$LORA")
        # The adapter's tokenizer has the template and the end token of its training.
        [ ! -f "$LORA/tokenizer_config.json" ] || args+=(--tokenizer "$LORA")
        # Once the server answers, a line says what the adapter changes; flags win over HOST and PORT there too.
        ("$VLLM_PYTHON" -m medtune.models.adapter_effect "$NAME" $$ --host "$HOST" --port "$PORT" "$@" &)
    else
        args+=(--served-model-name "$NAME")
    fi
    server=("$VLLM_PYTHON" -m vllm.entrypoints.openai.api_server)
else
    args=(
        --base_model "$MODEL"
        --host "$HOST"
        --port "$PORT"
        --served_model_name "$NAME"
        --max_model_len "$MAX_LENGTH"
    )
    [ -z "$LORA" ] || args+=(--lora_model "$LORA")
    [ -z "$API_KEY" ] || args+=(--api_key "$API_KEY")
    server=("$PYTHON" openai_server.py)
fi

# exec: a signal to this script's process id reaches the server, which finishes the running requests.
exec "${server[@]}" "${args[@]}" "$@"
