"""Reward modelling: teach a model to score replies, from pairs of a better and a worse one.

Input: preference pairs (question with response_chosen and response_rejected, TRL's and ShareGPT's forms; jsonl,
json, csv, parquet), a margin where the record has one.
Output: `--output_dir` with checkpoint-N, checkpoint-best (a LoRA adapter with a trained score head, or a model with
--use_peft False), train_results.json, eval_results.json, trainer_state.json, loss.png and TensorBoard events in runs/.
Loss: -log sigmoid(score of the chosen reply - score of the rejected one - margin), the mean over the pairs of a step
(Ouyang et al. 2022, https://arxiv.org/abs/2203.02155, section 3.5; margin: Touvron et al. 2023,
https://arxiv.org/abs/2307.09288, section 3.2.2). A score is the head's output at the reply's last token.

    CUDA_VISIBLE_DEVICES=0 python reward_modeling.py --model_name_or_path outputs-sft-qwen2.5-3b/checkpoint-best ...
    CUDA_VISIBLE_DEVICES=0,1 torchrun --nproc_per_node 2 reward_modeling.py ...

The README.md of a saved model has the lines that load it without this repository.

Launcher: run_rm.sh.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import medtune.libraries  # noqa: F401 - first: it imports the libraries in half of their time

# isort: split
from loguru import logger
from peft import TaskType
from transformers import PreTrainedTokenizerBase

from medtune.arguments import DataArguments, LoraArguments, ModelArguments, RunArguments, StageArgumentParser
from medtune.errors import UserError, run_script
from medtune.measuring.intervals import wilson_interval
from medtune.models.adapters import load_for_training
from medtune.models.lineage import check_model_path
from medtune.models.loading import load_tokenizer
from medtune.models.lora_layers import describe_trainable
from medtune.models.model_folder import lineage_of
from medtune.models.score_heads import has_untrained_head
from medtune.models.vocabulary import check_vocabulary
from medtune.reading.chat_template import ChatTemplate
from medtune.reading.encoders import ScoredPairEncoder
from medtune.reading.readers import read_pairs
from medtune.reading.stage_data import prepare_data
from medtune.reading.tokenization import IGNORED_LABEL, load_chat_template, mark_learned, stop_token_ids
from medtune.training.batches import PairCollator
from medtune.training.checkpoints import BEST
from medtune.training.log import log_facts
from medtune.training.precision import base_dtype
from medtune.training.preference_arguments import PairArguments
from medtune.training.reward_trainer import RewardTrainer, RMTrainingArguments
from medtune.training.run import finish_run, is_finished, start_run, train
from medtune.training.template_choice import choose_thinking

# ---------------------------------------------------------------- data


def set_pad_token(tokenizer: PreTrainedTokenizerBase, chat_template: ChatTemplate) -> None:
    """Choose a pad token that ends no reply, since the score is read at the last token that is not padding."""
    ends = set(stop_token_ids(tokenizer, chat_template))
    special = {index: str(token) for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    never_last = [token for index, token in sorted(special.items()) if index not in ends]
    if tokenizer.pad_token in never_last:
        return
    if not never_last:
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path} has no special token besides those that end a reply, so "
            "nothing can pad; add a pad token to it"
        )
    logger.info(f"the pad token is {never_last[0]}: a reply may end with {tokenizer.pad_token}")
    tokenizer.pad_token = never_last[0]


# ---------------------------------------------------------------- the score against the length


def compare_with_length(metrics: dict[str, float]) -> None:
    """Log the accuracy's interval, and warn if the replies' length alone predicts as well as the model."""
    accuracy, n_pairs, longer_wins = (metrics[f"eval_{name}"] for name in ("accuracy", "pairs", "longer_wins"))
    low, high = wilson_interval(accuracy * n_pairs, n_pairs)
    logger.info(
        f"{accuracy:.1%} of {n_pairs:.0f} held-out pairs are ordered right (95 % interval {low:.1%} to {high:.1%}); "
        f'the rule "longer wins" orders {longer_wins:.1%}'
    )
    rule, by_length = max(("longer", longer_wins), ("shorter", 1 - longer_wins), key=lambda pair: pair[1])
    if accuracy <= by_length:
        logger.warning(
            f'the model does not beat the rule "{rule} wins" ({accuracy:.1%} against {by_length:.1%}): a policy '
            "trained on its scores may learn length alone; train longer, or balance the lengths of the pairs"
        )


# ---------------------------------------------------------------- main


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    # ------------------------------------------------------------ arguments
    parser = StageArgumentParser(
        [ModelArguments, DataArguments, LoraArguments, RunArguments, PairArguments, RMTrainingArguments]
    )
    model_args, data_args, lora_args, run_args, pair_args, training_args = parser.parse(argv)
    check_model_path(model_args.model_name_or_path, "--model_name_or_path", model_args.allow_pickle_weights)

    # ------------------------------------------------------------ run
    checkpoint = start_run("reward modelling", training_args, run_args, parser.notes)
    model_args.torch_dtype = base_dtype(model_args, lora_args, training_args, parser.given, checkpoint)

    # ------------------------------------------------------------ tokenizer and template
    path = model_args.model_name_or_path
    tokenizer = load_tokenizer(path, model_args.tokenizer_name_or_path, **model_args.hub_options)
    thinking = choose_thinking(pair_args, path, checkpoint)
    chat_template = load_chat_template(tokenizer, pair_args.template_name, thinking)
    set_pad_token(tokenizer, chat_template)

    # ------------------------------------------------------------ data
    encoder = ScoredPairEncoder(tokenizer, chat_template, pair_args.max_source_length, pair_args.max_target_length)
    data = prepare_data(read_pairs, encoder, data_args, training_args, model_args.cache_dir)

    # ------------------------------------------------------------ what a resumed run goes on with
    template, reads_thoughts = pair_args.template_name, any(data.train["n_thoughts"])
    record = {"stage": "rm", "template": template, "thinking": chat_template.thinking, "flags": parser.given}
    lineage = lineage_of(model_args, data_args, **record, reads_thoughts=reads_thoughts)
    if is_finished(training_args, data.train, lineage, checkpoint):
        return {}

    # ------------------------------------------------------------ model
    model = load_for_training(
        path,
        lora_args,
        task_type=TaskType.SEQ_CLS,
        checkpoint=checkpoint,
        pad_token_id=tokenizer.pad_token_id,
        **model_args.loading_options,
    )
    check_vocabulary(tokenizer, model)
    if not training_args.do_train and has_untrained_head(model):
        raise UserError(f"--model_name_or_path {path}: no trained score head to evaluate; add --do_train")

    # ------------------------------------------------------------ train
    trainer = RewardTrainer(
        model=model,
        args=training_args,
        data_collator=PairCollator(tokenizer.pad_token_id),
        train_dataset=data.train,
        eval_dataset=data.eval,
        processing_class=tokenizer,
    )
    facts = {"model": f"{path}: {describe_trainable(model)}"}
    facts |= {"template": lineage.asked_by} | data.facts
    log_facts(trainer, facts)
    first = data.train[0]
    texts = (first["prompt_ids"] + first["chosen_ids"], first["rejected_ids"])
    chosen, rejected = (mark_learned(tokenizer, ids, [IGNORED_LABEL] * (len(ids) - 1) + ids[-1:]) for ids in texts)
    logger.info(f"the first example, scored at the tokens in « »:\n{chosen}\nagainst\n{rejected}")
    # checkpoint-best is the lowest loss: among a hundred held-out pairs many checkpoints have the same accuracy.
    keeper = train(trainer, lineage, checkpoint, run_args, model_args.hub_options)

    # ------------------------------------------------------------ save and evaluate
    best = Path(training_args.output_dir, BEST)
    metrics = finish_run(
        trainer, keeper, next_command=f"{Path(sys.executable).name} ppo_training.py --reward_model_path {best} ..."
    )
    if metrics:
        compare_with_length(metrics)
    return metrics


if __name__ == "__main__":
    run_script(main)
