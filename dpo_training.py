"""Direct preference optimization: teach a model which of two replies is better, without a reward model.

Input: preference pairs (question with response_chosen and response_rejected, TRL's and ShareGPT's forms; jsonl,
json, csv, parquet); for --loss_type kto dialogues whose last reply has `label` or `kto_tag`, true or false.
Output: `--output_dir` with checkpoint-N, checkpoint-best (a LoRA adapter, or a model with --use_peft False),
train_results.json, eval_results.json, trainer_state.json, loss.png and TensorBoard events in runs/.
Loss: -log sigmoid(beta x (log-ratio of the chosen reply - log-ratio of the rejected one)), where a log-ratio is the
reply's log-prob under the policy less that under the reference (Rafailov et al. 2023,
https://arxiv.org/abs/2305.18290, equation 7); others by --loss_type, all in medtune/training/preference_trainer.py
and kto_trainer.py. The reference is what the run starts from.

    CUDA_VISIBLE_DEVICES=0 python dpo_training.py --model_name_or_path outputs-sft-qwen2.5-3b/checkpoint-best ...
    CUDA_VISIBLE_DEVICES=0,1 torchrun --nproc_per_node 2 dpo_training.py ...

Launcher: run_dpo.sh.
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import medtune.libraries  # noqa: F401 - first: it imports the libraries in half of their time

# isort: split
import torch
from datasets import Dataset
from loguru import logger
from transformers import PreTrainedTokenizerBase, TrainerCallback

from medtune.arguments import DataArguments, LoraArguments, ModelArguments, RunArguments, StageArgumentParser
from medtune.errors import run_script
from medtune.measuring.text_metrics import repetition_rate
from medtune.models.adapters import load_for_training
from medtune.models.generation import Decoding, generate_replies
from medtune.models.lineage import base_of, check_model_path, is_adapter
from medtune.models.loading import load_base_model, load_tokenizer
from medtune.models.lora_layers import describe_trainable
from medtune.models.model_folder import lineage_of
from medtune.models.vocabulary import check_vocabulary, warn_of_dead_tokens
from medtune.reading.chat_template import ChatTemplate
from medtune.reading.encoders import FeedbackEncoder, PairEncoder
from medtune.reading.readers import read_feedback, read_pairs
from medtune.reading.stage_data import prepare_data
from medtune.reading.tokenization import IGNORED_LABEL, load_chat_template, mark_learned, stop_token_ids, turn_token_ids
from medtune.training.batches import FeedbackCollator, PairCollator
from medtune.training.checkpoints import BEST
from medtune.training.kto_trainer import KTOTrainer
from medtune.training.log import log_facts
from medtune.training.precision import base_dtype
from medtune.training.preference_arguments import PairArguments, PreferenceConfig
from medtune.training.preference_trainer import PreferenceTrainer
from medtune.training.run import finish_run, inference_command, is_finished, start_run, train
from medtune.training.template_choice import choose_thinking

N_SAMPLES = 8
# Longer samples are cut; repetition shows by then.
SAMPLE_TOKENS = 256
# Share of a sample's runs of four characters that it had before, and the number of such samples, for an alarm.
REPEATING = 0.5
TOO_MANY_REPEATING = 2
# The chosen log-probs have fallen in so many evaluations in a row, and by this share in all, for an alarm.
N_FALLS = 3
TOO_DEEP_A_FALL = 0.05

# ---------------------------------------------------------------- policy and reference


def name_reference(path: str, use_peft: bool, training_args: PreferenceConfig) -> str:
    """What the policy is held to, for the log."""
    if not training_args.has_reference:
        return f"none: {training_args.loss_type[0]} compares the replies' own log-probs"
    if is_adapter(path):
        return f"a frozen copy of the adapter {path} on {base_of(path)}"
    return f"the base model {path} without the new adapter" if use_peft else f"a frozen second copy of {path}"


# ---------------------------------------------------------------- what the policy says while it learns


class GreedySamples:
    """Logs greedy replies to the first evaluation questions, and measures whether they end and repeat themselves."""

    def __init__(
        self,
        eval_dataset: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: ChatTemplate,
        max_new_tokens: int,
    ):
        rows = {tuple(row["prompt_ids"]): row["source"] for row in eval_dataset}
        self.prompts = [list(ids) for ids in rows][:N_SAMPLES]
        self.sources = list(rows.values())[:N_SAMPLES]
        self.tokenizer = tokenizer
        self.stop_ids = stop_token_ids(tokenizer, chat_template)
        self.decoding = Decoding(max_new_tokens=min(max_new_tokens, SAMPLE_TOKENS))

    def __call__(self, model: torch.nn.Module) -> dict[str, float]:
        replies = generate_replies(model, self.tokenizer, self.prompts, self.stop_ids, self.decoding, N_SAMPLES)
        rates = [repetition_rate(reply.text) for reply in replies]
        for source, reply, rate in zip(self.sources, replies, rates, strict=True):
            text = " ".join(reply.text.split())
            logger.info(
                f"sample for {source} ({reply.n_tokens} tokens, {'ended' if reply.ended else 'cut'}, {rate:.0%} "
                f"repeated): {text[:80]}{' ...' if len(text) > 80 else ''}"
            )
        return {
            "samples_ended": sum(reply.ended for reply in replies) / len(replies),
            "sample_repetition": sum(rates) / len(rates),
            "samples_repeating": sum(rate > REPEATING for rate in rates),
        }


def relative_fall(values: Sequence[float]) -> float | None:
    """The share by which the values fell over the last N_FALLS steps; None unless each step was a fall."""
    last = values[-N_FALLS - 1 :]
    if len(last) <= N_FALLS or any(later >= earlier for earlier, later in pairwise(last)):
        return None
    return (last[0] - last[-1]) / max(abs(last[0]), 1e-9)


class DegenerationAlarm(TrainerCallback):
    """Warns if the chosen replies become less likely or samples repeat themselves; rewards show neither.

    See Razin et al. 2024, https://arxiv.org/abs/2410.08847.
    """

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        evaluated = [entry for entry in state.log_history if "eval_chosen_logps" in entry]
        values = [entry["eval_chosen_logps"] for entry in evaluated]
        if args.has_reference and evaluated:
            # Where the policy started, since a reward is beta x (logp - ref_logp).
            values.insert(0, values[0] - evaluated[0]["eval_chosen_reward"] / args.beta)
        share = relative_fall(values)
        if share is not None and share > TOO_DEEP_A_FALL:
            values_text = ", ".join(f"{value:.1f}" for value in values[-N_FALLS - 1 :])
            logger.warning(
                f"step {state.global_step}: the chosen replies become less likely from evaluation to evaluation "
                f"(log-probs {values_text}); lower --learning_rate, raise --beta, or add a term that holds them: "
                "--loss_type sigmoid sft"
            )
        n_repeating = metrics.get("eval_samples_repeating", 0)
        if n_repeating >= TOO_MANY_REPEATING:
            logger.warning(
                f"step {state.global_step}: {n_repeating} samples repeat themselves; look at them above, and if they "
                "did not before training (--eval_on_start True shows it), lower --learning_rate or raise --beta"
            )


# ---------------------------------------------------------------- what the log shows


def describe_loss(training_args: PreferenceConfig, lora_args: LoraArguments) -> dict[str, str]:
    losses = [f"{weight:g} x {name}" for name, weight in training_args.weighted_losses.items()]
    facts = {"loss": f"{' + '.join(losses)}, beta {training_args.beta:g}"}
    if lora_args.use_peft and lora_args.lora_dropout:
        facts["dropout"] = f"off, not --lora_dropout {lora_args.lora_dropout:g}: it would blur what is compared"
    return facts


def log_first(tokenizer: PreTrainedTokenizerBase, row: dict) -> None:
    """The first pair, or the first reply with its verdict, and which of their tokens count."""
    texts = {name: row[f"{name}_ids"] for name in ("chosen", "rejected", "reply") if f"{name}_ids" in row}
    for name, reply_ids in texts.items():
        labels = [IGNORED_LABEL] * len(row["prompt_ids"]) + reply_ids
        marked = mark_learned(tokenizer, row["prompt_ids"] + reply_ids, labels)
        what = f"pair, its {name} reply"
        if name == "reply":
            what = f"reply, {'desirable' if row['is_desirable'] else 'undesirable'}"
        logger.info(f"the first {what}, between « and »:\n{marked}")


# ---------------------------------------------------------------- main


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    # ------------------------------------------------------------ arguments
    parser = StageArgumentParser(
        [ModelArguments, DataArguments, LoraArguments, RunArguments, PairArguments, PreferenceConfig]
    )
    model_args, data_args, lora_args, run_args, pair_args, training_args = parser.parse(argv)
    check_model_path(model_args.model_name_or_path, "--model_name_or_path", model_args.allow_pickle_weights)

    # ------------------------------------------------------------ run
    checkpoint = start_run("direct preference optimization", training_args, run_args, parser.notes)
    model_args.torch_dtype = base_dtype(model_args, lora_args, training_args, parser.given, checkpoint)

    # ------------------------------------------------------------ tokenizer and template
    path = model_args.model_name_or_path
    tokenizer = load_tokenizer(path, model_args.tokenizer_name_or_path, **model_args.hub_options)
    thinking = choose_thinking(pair_args, path, checkpoint)
    chat_template = load_chat_template(tokenizer, pair_args.template_name, thinking)

    # ------------------------------------------------------------ data
    of_pairs = read_pairs, PairEncoder, PairCollator, PreferenceTrainer
    of_feedback = read_feedback, FeedbackEncoder, FeedbackCollator, KTOTrainer
    kind = of_feedback if training_args.is_unpaired else of_pairs
    read_records, encoder_class, collator_class, trainer_class = kind
    encoder = encoder_class(tokenizer, chat_template, pair_args.max_source_length, pair_args.max_target_length)
    data = prepare_data(read_records, encoder, data_args, training_args, model_args.cache_dir)

    # ------------------------------------------------------------ what a resumed run goes on with
    template = pair_args.template_name
    record = {"stage": "dpo", "template": template, "thinking": chat_template.thinking, "flags": parser.given}
    lineage = lineage_of(model_args, data_args, **record)
    if is_finished(training_args, data.train, lineage, checkpoint):
        return {}

    # ------------------------------------------------------------ model
    model = load_for_training(path, lora_args, checkpoint=checkpoint, **model_args.loading_options)
    check_vocabulary(tokenizer, model)
    warn_of_dead_tokens(model, tokenizer, *turn_token_ids(tokenizer, chat_template))
    reference = name_reference(path, lora_args.use_peft, training_args)
    ref_model = None
    if training_args.has_reference and not lora_args.use_peft and not training_args.precompute_ref_log_probs:
        ref_model = load_base_model(lineage.base_model, **model_args.loading_options).requires_grad_(False)

    # ------------------------------------------------------------ train
    trainer = trainer_class(
        model=model,
        args=training_args,
        reference=reference,
        continues_adapter=is_adapter(path),
        ref_model=ref_model,
        ref_logps_dir=Path(model_args.cache_dir or "cache", "ref_logps"),
        overwrite_ref_logps=data_args.overwrite_cache,
        sample=data.eval and GreedySamples(data.eval, tokenizer, chat_template, pair_args.max_target_length),
        data_collator=collator_class(tokenizer.pad_token_id),
        train_dataset=data.train,
        eval_dataset=data.eval,
        processing_class=tokenizer,
        callbacks=[DegenerationAlarm()],
    )
    facts = {"model": f"{path}: {describe_trainable(model)}", "reference": reference}
    facts |= describe_loss(training_args, lora_args) | {"template": lineage.asked_by} | data.facts
    log_facts(trainer, facts)
    log_first(tokenizer, data.train[0])
    keeper = train(trainer, lineage, checkpoint, run_args, model_args.hub_options)

    # ------------------------------------------------------------ save and evaluate
    best = Path(training_args.output_dir, BEST)
    return finish_run(trainer, keeper, inference_command(lineage, best, lora_args.use_peft))


if __name__ == "__main__":
    run_script(main)
