"""Proximal policy optimization: raise the reward model's scores of a model's own replies, held near where it started.

Input: dialogues as in SFT, whose user turns (with their history) are the prompts; the SFT model; the reward model.
Output: `--output_dir` with checkpoint-N, checkpoint-best (the policy's LoRA adapter, relative to the base model),
train_results.json, eval_results.json, trainer_state.json, curves.png and TensorBoard events in runs/.
Loss: the clipped surrogate of Schulman et al. 2017 (https://arxiv.org/abs/1707.06347) on token rewards made of the
score and of the KL from the start (Ziegler et al. 2019, https://arxiv.org/abs/1909.08593); details after Huang et al.
2024, "The N+ Implementation Details of RLHF with PPO" (https://arxiv.org/abs/2403.17031). docs/ppo.md lists them.

    for each update:
        sample a reply to each of a batch of prompts
        log-probs of its tokens under policy and reference, a value for each token, a score for the whole
        token rewards: -kl_coef x KL each, the score at the last one
        advantages and returns by GAE
        for each of --num_ppo_epochs, for each minibatch:
            a step on the clipped policy loss and the clipped value loss

    role       weights                                                       trained
    policy     base + adapter "default": the SFT adapter continued           yes
    reference  base + adapter "reference": a copy of that start              no
    reward     base + adapter "reward" + score head, or a model of its own   no
    value      base + adapter "value" + head: starts as the reward model     yes

    CUDA_VISIBLE_DEVICES=0 python ppo_training.py --sft_model_path outputs-sft-.../checkpoint-best \\
        --reward_model_path outputs-rm-.../checkpoint-best ...
    CUDA_VISIBLE_DEVICES=0,1 torchrun --nproc_per_node 2 ppo_training.py ...

Launcher: run_ppo.sh.
"""

import json
import math
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Literal

# Before the libraries: it keeps one of them from a misleading line.
from medtune.errors import UserError, run_script

# isort: split
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from loguru import logger
from transformers import GenerationConfig, PreTrainedTokenizerBase

from medtune.arguments import DataArguments, LoraArguments, ModelArguments, RunArguments, StageArgumentParser
from medtune.errors import Unusable
from medtune.models.lineage import Lineage, base_of, check_model_path, read_lineage
from medtune.models.loading import load_tokenizer, weights_fingerprint
from medtune.models.vocabulary import check_vocabulary
from medtune.reading.encoding import encode_exchange, load_chat_template, stop_token_ids
from medtune.reading.rows import cached_prompts, load_part
from medtune.rl.alarms import find_alarm, find_update_alarm, summarize
from medtune.rl.ppo_math import (
    InverseTransformSampler,
    adapted_kl_coef,
    advantages_and_returns,
    draw_uniforms,
    episode_order,
    k3,
    masked_whiten,
    policy_losses,
    reply_mask,
    token_rewards,
    value_losses,
)
from medtune.rl.roles import CHECKED_PROMPTS, Learner, Roles, load_roles
from medtune.rl.run import (
    PPOTrainingArguments,
    Run,
    State,
    Stopped,
    StopSignal,
    count_updates,
    out_of_memory_advice,
    read_state,
    start_accelerator,
)
from medtune.training.checkpoints import BEST, find_checkpoint, no_other_run
from medtune.training.log import peak_memory_gib
from medtune.training.out_of_memory import explain_full_memory_or_disk
from medtune.training.processes import leave_process_group
from medtune.training.run import start_run
from template import ChatTemplate

# Held-out prompts without --max_eval_samples: a greedy reply to each is written at every evaluation.
EVAL_PROMPTS = 100
# The dialogues' own replies whose mean score becomes the score 0.
CENTERING_REPLIES = 64
# Replies of the first evaluation and of the last that the log shows.
SHOWN_REPLIES = 2

# ---------------------------------------------------------------- arguments


@dataclass(kw_only=True)
class PPOModelArguments(ModelArguments):
    sft_model_path: str = field(
        metadata={"help": "Hub name or folder of the model to start from, or the folder of a LoRA adapter."}
    )
    reward_model_path: str = field(
        metadata={"help": "Folder of a reward model of reward_modeling.py: an adapter, or a model of its own."}
    )
    model_name_or_path: str = field(default="", init=False)
    device_map: str | None = field(default=None, init=False)


@dataclass
class PPORunArguments(RunArguments):
    max_bad_steps: int = field(default=1, init=False)  # a loss that is not finite stops the run at once


@dataclass
class PPOArguments:
    template_name: str | None = field(
        default=None, metadata={"help": "Named prompt template of template.py instead of the tokenizer's own."}
    )
    max_source_length: int = field(default=1024, metadata={"help": "Longest prompt in tokens."})
    truncation: Literal["drop", "cut_prompt_start"] = field(
        default="cut_prompt_start",
        metadata={
            "help": "A prompt over --max_source_length: left out, or without its oldest exchanges and its start."
        },
    )
    response_length: int = field(default=512, metadata={"help": "A reply is cut after so many tokens."})
    total_episodes: int | None = field(
        default=None, metadata={"help": "Replies to learn from in all; without it --num_train_epochs of the prompts."}
    )
    rollout_batch_size: int = field(default=16, metadata={"help": "Replies that a device generates at a time."})
    stop_token: str | None = field(
        default=None, metadata={"help": "The token that ends a reply; without it the template's and the tokenizer's."}
    )
    missing_eos_penalty: float = field(
        default=0.0, metadata={"help": "Taken off the score of a reply that has no end token."}
    )
    kl_coef: float = field(default=0.05, metadata={"help": "Reward lost for a nat of KL from the reference."})
    adaptive_kl: bool = field(default=False, metadata={"help": "Steer --kl_coef so that the KL nears --target_kl."})
    target_kl: float = field(default=6.0, metadata={"help": "Adaptive: KL of a reply in nats to steer to."})
    kl_horizon: int = field(default=10000, metadata={"help": "Adaptive: episodes over which --kl_coef adapts."})
    stop_at_kl: float = field(default=50.0, metadata={"help": "Stop when the mean KL of a reply exceeds it, in nats."})
    num_ppo_epochs: int = field(default=4, metadata={"help": "Passes over the replies of an update."})
    num_mini_batches: int = field(default=1, metadata={"help": "Optimizer steps in a pass."})
    cliprange: float = field(default=0.2, metadata={"help": "Clip of the probability ratio."})
    cliprange_value: float = field(
        default=0.2, metadata={"help": "Clip of a value's change, in standard deviations of the returns."}
    )
    vf_coef: float = field(default=0.1, metadata={"help": "Factor of the value loss."})
    gamma: float = field(default=1.0, metadata={"help": "Discount of later rewards."})
    lam: float = field(default=0.95, metadata={"help": "Lambda of GAE."})
    temperature: float = field(default=0.7, metadata={"help": "Of sampling, and of the log-probs learned from."})
    whiten_rewards: bool = field(default=False, metadata={"help": "Scale token rewards to variance 1."})

    def __post_init__(self):
        positive = ("response_length", "rollout_batch_size", "stop_at_kl", "num_ppo_epochs", "num_mini_batches")
        positive += ("cliprange", "cliprange_value", "temperature", "target_kl", "kl_horizon")
        for name in positive:
            if getattr(self, name) <= 0:
                raise UserError(f"--{name} {getattr(self, name)}: give more than 0")
        for name in ("missing_eos_penalty", "kl_coef", "vf_coef"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name} {getattr(self, name):g}: give 0 or more")
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"--{name} {getattr(self, name):g}: give a number from 0 to 1")
        if self.max_source_length < 8:
            raise UserError(f"--max_source_length {self.max_source_length}: no prompt fits; give a number of tokens")
        if self.total_episodes is not None and self.total_episodes < 1:
            raise UserError(f"--total_episodes {self.total_episodes}: give at least 1")


# ---------------------------------------------------------------- what the reward model reads


@dataclass
class Codec:
    """Between ids and texts: what the policy writes, and what the reward model reads of it.

    stop_ids: the tokens that end a reply; the reward model was trained on the first.
    reward_tokenizer, reward_template: of a reward model that reads other ids than the policy writes; None otherwise.
    """

    tokenizer: PreTrainedTokenizerBase
    chat_template: ChatTemplate
    stop_ids: list[int]
    reward_tokenizer: PreTrainedTokenizerBase | None = None
    reward_template: ChatTemplate | None = None

    def reward_ids(self, row: dict, reply_ids: list[int]) -> list[int]:
        """What the reward model reads for a prompt and the reply to it."""
        ended = bool(reply_ids) and reply_ids[-1] in self.stop_ids
        words = reply_ids[:-1] if ended else reply_ids
        if self.reward_tokenizer is None:
            return row["prompt_ids"] + words + self.stop_ids[:1] * ended
        text = self.tokenizer.decode(words, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return self.reward_ids_of_text(row, text.strip(), ended)

    def reward_ids_of_text(self, row: dict, reply: str, ended: bool = True) -> list[int]:
        """What the reward model reads for a prompt and a reply that is words, such as the dialogue's own."""
        messages, tools = json.loads(row["messages"])
        tokenizer, chat_template = self.reward_tokenizer, self.reward_template
        if tokenizer is None:
            tokenizer, chat_template = self.tokenizer, self.chat_template
        try:
            prompt_ids, ids = encode_exchange(tokenizer, chat_template, messages, reply, tools, ended=ended)
        except (Unusable, UserError) as error:
            raise UserError(
                f"--reward_model_path: its prompt template does not write the reply {reply!r:.60} "
                f"({error.args[-1]}), so it was never trained on one like it; take another reward model"
            ) from error
        return prompt_ids + ids


def load_codec(
    tokenizer: PreTrainedTokenizerBase,
    chat_template: ChatTemplate,
    stop_token: str | None,
    reward_model_path: str,
    hub_options: dict,
) -> Codec:
    """The policy's tokens, and the reward model's where a conversation has other ids there."""
    stop_ids = stop_token_ids(tokenizer, chat_template)
    if stop_token is not None:
        stop_ids = tokenizer.encode(stop_token, add_special_tokens=False)
        if len(stop_ids) != 1:
            raise UserError(f"--stop_token {stop_token}: {len(stop_ids)} tokens of this tokenizer; name a single one")
    codec = Codec(tokenizer, chat_template, stop_ids)
    own_tokenizer = load_tokenizer(reward_model_path, flag="--reward_model_path", **hub_options)
    lineage = read_lineage(reward_model_path)
    own_name = lineage.template or None if lineage and own_tokenizer.chat_template is None else None
    own_template = load_chat_template(own_tokenizer, own_name)
    reads_the_same = (
        tokenizer.get_vocab() == own_tokenizer.get_vocab()
        and _probe(tokenizer, chat_template) == _probe(own_tokenizer, own_template)
        and stop_ids[:1] == stop_token_ids(own_tokenizer, own_template)[:1]
    )
    return codec if reads_the_same else replace(codec, reward_tokenizer=own_tokenizer, reward_template=own_template)


def _probe(tokenizer: PreTrainedTokenizerBase, chat_template: ChatTemplate) -> list:
    """The ids of a conversation and the reply to it, without and with a system prompt; None where that is refused."""
    messages = [{"role": "user", "content": "发烧38.5℃ fever?"}, {"role": "assistant", "content": "请就诊。"}]
    messages += [{"role": "user", "content": "谢谢 thank you"}]
    found = []
    for system in ([], [{"role": "system", "content": "你是医生。"}]):
        try:
            found.append(encode_exchange(tokenizer, chat_template, [*system, *messages], "不客气 you're welcome"))
        except (Unusable, UserError):
            found.append(None)
    return found


# ---------------------------------------------------------------- rollout


@dataclass
class Rollout:
    """Replies to N prompts: P prompt columns, padded on the left, then T reply columns, padded on the right.

    ids: [N, P + T] int64; attention_mask: the same shape, True on real tokens.
    mask: [N, T] True on a reply's tokens, its end token included.
    policy_logps, ref_logps, values, entropies, variances (of the surprisal): [N, T] float32, 0 outside the mask.
    scores: [N] float32, less the mean of the dialogues' own replies, the penalty for a missing end not yet taken off.
    ended: [N] True where the reply has an end token.
    """

    ids: torch.Tensor
    attention_mask: torch.Tensor
    mask: torch.Tensor
    policy_logps: torch.Tensor
    ref_logps: torch.Tensor
    values: torch.Tensor
    entropies: torch.Tensor
    variances: torch.Tensor
    scores: torch.Tensor
    ended: torch.Tensor

    def take(self, rows: torch.Tensor) -> "Rollout":
        """Some rows, without the columns that are padding in all of them."""
        n_prompt = self.ids.shape[1] - self.mask.shape[1]
        left = int((~self.attention_mask[rows, :n_prompt]).long().sum(dim=1).min())
        right = int(self.mask[rows].sum(dim=1).max())
        whole, reply = slice(left, n_prompt + right), slice(0, right)
        return Rollout(
            *(tensor[rows, whole] for tensor in (self.ids, self.attention_mask)),
            *(tensor[rows, reply] for tensor in (self.mask, self.policy_logps, self.ref_logps)),
            *(tensor[rows, reply] for tensor in (self.values, self.entropies, self.variances)),
            self.scores[rows],
            self.ended[rows],
        )

    @classmethod
    def join(cls, parts: Sequence["Rollout"]) -> "Rollout":
        """Several rollouts as one, padded to the widest."""
        n_reply = max(part.mask.shape[1] for part in parts)
        n_prompt = max(part.ids.shape[1] - part.mask.shape[1] for part in parts)
        columns = []
        for spec in fields(cls):
            tensors = []
            for part in parts:
                tensor = getattr(part, spec.name)
                right = n_reply - part.mask.shape[1]
                left = n_prompt - (part.ids.shape[1] - part.mask.shape[1])
                if tensor.dim() == 2:
                    tensor = F.pad(tensor, (left if spec.name in ("ids", "attention_mask") else 0, right))
                tensors.append(tensor)
            columns.append(torch.cat(tensors))
        return cls(*columns)


@torch.no_grad()
def collect_rollout(
    roles: Roles,
    rows: Sequence[dict],
    episodes: Sequence[int] | None,
    ppo_args: PPOArguments,
    codec: Codec,
    stop: StopSignal,
    seed: int,
) -> Rollout:
    """Reply to the prompts and measure the replies; the rows of the result are in the order given.

    Args:
        rows: of `tokenize_prompts`.
        episodes: the number of each, which decides its random draws; None takes the likeliest tokens.
    """
    device, core = roles.model.device, roles.model.get_base_model()
    # Like lengths together waste little padding; the longest first, so that too large a batch fails at once.
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]["prompt_ids"]), reverse=True)
    parts = []
    for begin in range(0, len(order), ppo_args.rollout_batch_size):
        stop.check()
        chosen = order[begin : begin + ppo_args.rollout_batch_size]
        prompts = [rows[index]["prompt_ids"] for index in chosen]
        # 1. Sample. Detail: prompts are padded on the left, so that all replies start at one column.
        n_prompt = max(map(len, prompts))
        pad = codec.tokenizer.pad_token_id
        prompt_ids = torch.tensor([[pad] * (n_prompt - len(ids)) + ids for ids in prompts], device=device)
        lengths = torch.tensor([len(ids) for ids in prompts], device=device)
        prompt_mask = torch.arange(n_prompt, device=device) >= n_prompt - lengths[:, None]
        processors = []
        if episodes is not None:
            uniforms = draw_uniforms(ppo_args.response_length, seed, [episodes[index] for index in chosen]).to(device)
            processors = [InverseTransformSampler(uniforms, n_prompt, ppo_args.temperature)]
        roles.act_as("policy")
        ids = core.generate(
            input_ids=prompt_ids,
            attention_mask=prompt_mask.long(),
            logits_processor=processors,
            generation_config=GenerationConfig(
                max_new_tokens=ppo_args.response_length, eos_token_id=codec.stop_ids, pad_token_id=pad, use_cache=True
            ),
        )
        # 2. Cut at the end token; the mask says what is reply (detail: one mask for policy and value).
        mask, ended = reply_mask(ids[:, n_prompt:], codec.stop_ids)
        attention_mask = torch.cat([prompt_mask, mask], dim=1)
        # 3. Log-probs under policy and reference. Detail: the old ones are computed anew by a full forward pass.
        policy_logps, *spread = roles.logps(ids, attention_mask, mask, ppo_args.temperature)
        roles.act_as("reference")
        ref_logps, *_ = roles.logps(ids, attention_mask, mask, ppo_args.temperature)
        # 4. A value before each token.
        roles.act_as("value")
        values = roles.values(ids, attention_mask, mask)
        # 5. A score for the whole, at its last token.
        replies = [row[is_reply].tolist() for row, is_reply in zip(ids[:, n_prompt:], mask, strict=True)]
        texts = [codec.reward_ids(rows[index], reply) for index, reply in zip(chosen, replies, strict=True)]
        scores = roles.scores(texts) - roles.score_shift
        parts.append(Rollout(ids, attention_mask, mask, policy_logps, ref_logps, values, *spread, scores, ended))
    back = torch.tensor(order).argsort()
    return Rollout.join(parts).take(back.to(device))


def center_scores(roles: Roles, rows: Sequence[dict], codec: Codec, batch_size: int) -> float:
    """The mean score of the dialogues' own replies, which becomes 0 (detail: scores alone have no fixed origin).

    Prompts alone have none: then scores stay as they are.
    """
    texts = [codec.reward_ids_of_text(row, row["reply"]) for row in rows if row["reply"]]
    if not texts:
        return 0.0
    batches = [texts[begin : begin + batch_size] for begin in range(0, len(texts), batch_size)]
    return torch.cat([roles.scores(batch) for batch in batches]).mean().item()


def episode_measures(rollout: Rollout) -> list[list[float]]:
    """Of each reply: score, ended, tokens, sum of KL (k1 and k3), of entropy, and of surprisal less entropy with the
    variance that the policy gives it."""
    mask = rollout.mask
    kl = (rollout.policy_logps - rollout.ref_logps) * mask
    surprise = (-rollout.policy_logps - rollout.entropies) * mask
    sums = [(k3(rollout.policy_logps, rollout.ref_logps) * mask), rollout.entropies * mask, surprise, rollout.variances]
    columns = [rollout.scores, rollout.ended, mask.sum(dim=1), kl.sum(dim=1), *(column.sum(dim=1) for column in sums)]
    return torch.stack([column.double() for column in columns], dim=1).tolist()


# ---------------------------------------------------------------- update


def ppo_update(
    learners: dict[str, Learner],
    roles: Roles,
    rollout: Rollout,
    kl_coef: float,
    ppo_args: PPOArguments,
    training_args: PPOTrainingArguments,
    accelerator: Accelerator,
    update: int,
) -> dict[str, float]:
    """The epochs of optimizer steps on one rollout; returns the means over its tokens, all processes together.

    Raises UserError where a loss or gradient is not finite, or a matrix of the policy's adapter gets none.
    """
    sum_over_processes = partial(accelerator.reduce, reduction="sum")
    mask = rollout.mask
    kl = (rollout.policy_logps - rollout.ref_logps) * mask  # k1: its token-wise sum is the reply's log-ratio
    scores = rollout.scores - ppo_args.missing_eos_penalty * ~rollout.ended
    rewards = token_rewards(scores, kl, mask, kl_coef)
    if ppo_args.whiten_rewards:
        rewards = masked_whiten(rewards, mask, shift_mean=False, sum_over_processes=sum_over_processes)
    advantages, returns = advantages_and_returns(rewards, rollout.values, mask, ppo_args.gamma, ppo_args.lam)
    # Detail: whitened after the returns are made of them, over all replies of the update.
    advantages = masked_whiten(advantages, mask, sum_over_processes=sum_over_processes)
    error = (returns - rollout.values) * mask
    moments = [mask.sum(), (returns * mask).sum(), (returns**2 * mask).sum(), error.sum(), (error**2).sum(), kl.sum()]
    n_all, *moments = sum_over_processes(torch.stack([moment.double() for moment in moments])).tolist()
    r1, r2, e1, e2, kl_mean = (moment / n_all for moment in moments)
    # Detail: the value's clip counts in standard deviations of the returns, or a reward model of large scores would
    # hold the value where it is.
    cliprange_value = ppo_args.cliprange_value * math.sqrt(max(r2 - r1**2, 0.0))

    sums = torch.zeros(7, dtype=torch.float64, device=rollout.ids.device)
    norms: dict[str, list[float]] = {role: [] for role in learners}
    for epoch in range(ppo_args.num_ppo_epochs):
        # Detail: one shuffle for all processes, from the seed and the place in the run.
        generator = torch.Generator().manual_seed(training_args.seed + 7919 * update + epoch)
        shuffled = torch.randperm(len(rollout.ids), generator=generator).to(rollout.ids.device)
        for minibatch in shuffled.chunk(ppo_args.num_mini_batches):
            # Every token of a minibatch counts the same, in whatever micro-batch and process it is.
            n_tokens = sum_over_processes(mask[minibatch].sum().double())
            for rows in minibatch.split(training_args.per_device_train_batch_size):
                part, width = rollout.take(rows), int(mask[rows].sum(dim=1).max())
                advantage, wanted = advantages[rows, :width], returns[rows, :width]
                text = part.ids, part.attention_mask, part.mask
                roles.act_as("policy", trained=True)
                logps, *_ = learners["policy"](roles.logps, *text, ppo_args.temperature)
                losses, clipped = policy_losses(logps, part.policy_logps, advantage, ppo_args.cliprange)
                learners["policy"].backward((losses * part.mask).sum() / n_tokens)
                roles.act_as("value", trained=True)
                values = learners["value"](roles.values, *text)
                errors, held = value_losses(values, part.values, wanted, cliprange_value)
                learners["value"].backward(ppo_args.vf_coef * (errors * part.mask).sum() / n_tokens)
                with torch.no_grad():
                    log_ratio = logps - part.policy_logps
                    columns = (losses, clipped, k3(part.policy_logps, logps), log_ratio.exp(), errors, held)
                    sums[:6] += torch.stack([(column * part.mask).sum().double() for column in columns])
                    sums[6] += part.mask.sum()
            if not torch.isfinite(sum_over_processes(sums)).all():
                raise UserError(
                    f"update {update + 1}: the loss is not finite; lower --learning_rate, and see that the scores in "
                    "the lines above are of a sound size"
                )
            if dead := learners["policy"].unreached:
                raise UserError(
                    f"update {update + 1}: {len(dead)} adapter matrices of the policy get no gradient, such as "
                    f"{min(dead)}; without --gradient_checkpointing, or with other --target_modules, they may"
                )
            for role, learner in learners.items():
                norms[role].append(learner.step())
                if not math.isfinite(norms[role][-1]):
                    raise UserError(f"update {update + 1}: the {role}'s gradient is not finite; lower --learning_rate")
    for learner in learners.values():
        learner.scheduler.step()

    total = sum_over_processes(sums)
    means = (total[:6] / total[6]).tolist()
    names = ("policy/loss", "policy/clip_frac", "policy/approx_kl", "policy/ratio", "value/loss", "value/clip_frac")
    return {
        **dict(zip(names, means, strict=True)),
        **{f"{role}/grad_norm": sum(found) / len(found) for role, found in norms.items()},
        "value/explained_var": 1 - (e2 - e1**2) / max(r2 - r1**2, 1e-12),
        "reply/non_score_reward": -kl_coef * kl_mean,
    }


# ---------------------------------------------------------------- evaluation


def evaluate(
    roles: Roles,
    rows: Sequence[dict],
    ppo_args: PPOArguments,
    codec: Codec,
    stop: StopSignal,
    accelerator: Accelerator,
    shown: bool,
) -> dict[str, float]:
    """Measures of greedy replies to held-out prompts; `shown` puts the first replies into the log."""
    own = rows[accelerator.process_index :: accelerator.num_processes]
    # Every process takes part in each gathering, so all must have as many batches: the first prompt fills up.
    longest = math.ceil(len(rows) / accelerator.num_processes)
    padded = [*own, *rows[: longest - len(own)]]
    with accelerator.autocast():
        rollout = collect_rollout(roles, padded, None, ppo_args, codec, stop, seed=0)
    measures = gather_object(episode_measures(rollout)[: len(own)])
    if shown:
        for row, ids, mask in list(zip(own, rollout.ids, rollout.mask, strict=False))[:SHOWN_REPLIES]:
            question = json.loads(row["messages"])[0][-1]["content"]
            text = codec.tokenizer.decode(ids[-mask.shape[0] :][mask], skip_special_tokens=True)
            logger.info(f"question: {' '.join(question.split())[:120]}\nreply: {text}")
    metrics = summarize(measures, ppo_args.kl_coef, ppo_args.missing_eos_penalty)
    return {f"eval_{name.partition('/')[2]}": value for name, value in metrics.items()}


# ---------------------------------------------------------------- setting up


def check_combination(lora_args: LoraArguments, ppo_args: PPOArguments, training_args: PPOTrainingArguments) -> None:
    """Refuse flags that contradict each other."""
    if not lora_args.use_peft:
        raise UserError(
            "--use_peft False: the four roles are adapters on one base, so the policy is one too; a model of full "
            "weights is welcome as --sft_model_path"
        )
    if training_args.gradient_accumulation_steps % ppo_args.num_mini_batches:
        raise UserError(
            f"--num_mini_batches {ppo_args.num_mini_batches}: does not divide --gradient_accumulation_steps "
            f"{training_args.gradient_accumulation_steps}, so minibatches would differ in size"
        )


# ---------------------------------------------------------------- main


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    # ------------------------------------------------------------ arguments
    parser = StageArgumentParser(
        [PPOModelArguments, DataArguments, LoraArguments, PPORunArguments, PPOArguments, PPOTrainingArguments]
    )
    model_args, data_args, lora_args, run_args, ppo_args, training_args = parser.parse(argv)
    check_model_path(model_args.sft_model_path, "--sft_model_path", model_args.allow_pickle_weights)
    check_model_path(model_args.reward_model_path, "--reward_model_path", model_args.allow_pickle_weights)
    check_combination(lora_args, ppo_args, training_args)

    # ------------------------------------------------------------ run
    start_run("proximal policy optimization", training_args, parser.notes)
    checkpoint = find_checkpoint(training_args, run_args.overwrite_output_dir)
    accelerator = start_accelerator(training_args, run_args.logging_dir)
    output_dir = Path(training_args.output_dir)

    # ------------------------------------------------------------ tokenizer and template
    hub_options = {"cache_dir": model_args.cache_dir, "trust_remote_code": model_args.trust_remote_code}
    tokenizer = load_tokenizer(
        model_args.sft_model_path, model_args.tokenizer_name_or_path, flag="--sft_model_path", **hub_options
    )
    chat_template = load_chat_template(tokenizer, ppo_args.template_name)
    codec = load_codec(tokenizer, chat_template, ppo_args.stop_token, model_args.reward_model_path, hub_options)

    # ------------------------------------------------------------ data
    read = partial(
        cached_prompts,
        tokenizer=tokenizer,
        chat_template=chat_template,
        cache_dir=Path(model_args.cache_dir or "cache", "tokenized"),
        max_prompt_length=ppo_args.max_source_length,
        truncation=ppo_args.truncation,
        seed=training_args.seed,
    )
    n_eval = data_args.max_eval_samples or EVAL_PROMPTS
    load = partial(
        load_part,
        kind="prompts",
        data_args=replace(data_args, max_eval_samples=n_eval),
        do_eval=training_args.do_eval,
        read=read,
        describe=lambda rows: f"the longest prompt {max(rows['length'])}",
    )
    train_dataset, data_facts = load("train")
    eval_rows: list[dict] = []
    if training_args.do_eval:
        eval_dataset, eval_facts = load("eval")
        eval_rows = eval_dataset.select(range(min(n_eval, len(eval_dataset)))).to_list()  # a dialogue has several
        data_facts |= eval_facts | {"eval replies": str(len(eval_rows))}
    per_process = training_args.per_device_train_batch_size * training_args.gradient_accumulation_steps
    per_update = per_process * accelerator.num_processes
    n_updates = count_updates(len(train_dataset), per_update, ppo_args.total_episodes, training_args)
    order = episode_order(len(train_dataset), n_updates * per_update, training_args.seed)

    # ------------------------------------------------------------ model
    roles, facts = load_roles(
        model_args.sft_model_path,
        model_args.reward_model_path,
        vars(lora_args),
        accelerator.device,
        torch_dtype=model_args.torch_dtype,
        load_in_4bit=model_args.load_in_4bit,
        load_in_8bit=model_args.load_in_8bit,
        flash_attn=model_args.flash_attn,
        allow_pickle_weights=model_args.allow_pickle_weights,
        **hub_options,
    )
    check_vocabulary(tokenizer, roles.model)
    with accelerator.autocast():
        checked = train_dataset.select(range(min(CHECKED_PROMPTS, len(train_dataset))))["prompt_ids"]
        roles.check_logps(checked, ppo_args.temperature, f"--sft_model_path {model_args.sft_model_path}")
    if training_args.gradient_checkpointing:
        roles.model.get_base_model().gradient_checkpointing_enable(
            training_args.gradient_checkpointing_kwargs or {"use_reentrant": False}
        )
    base_model = base_of(model_args.sft_model_path)
    lineage = Lineage(
        base_model=base_model,
        parent=model_args.sft_model_path if base_model != model_args.sft_model_path else None,
        stage="ppo",
        template=ppo_args.template_name or "",
        data=str(data_args.train_file_dir),
        hidden_size=roles.model.config.hidden_size,
        vocab_size=roles.model.config.vocab_size,
        base_weights=weights_fingerprint(base_model, **hub_options),
        start_weights=weights_fingerprint(model_args.sft_model_path, **hub_options),
        flags=parser.given,
    )
    reward_weights = weights_fingerprint(model_args.reward_model_path, flag="--reward_model_path", **hub_options)
    state = State(
        settings={
            "--sft_model_path": model_args.sft_model_path,
            "--reward_model_path": model_args.reward_model_path,
            "weights of the reward model": reward_weights[:12],
            "--seed": training_args.seed,
            "--learning_rate": training_args.learning_rate,
            "--weight_decay": training_args.weight_decay,
            "--optim": str(training_args.optim.value),
            "--kl_coef": ppo_args.kl_coef,
            "episodes an update": per_update,
            "training prompts": len(train_dataset),
            "processes under DeepSpeed": accelerator.num_processes if training_args.deepspeed else 0,
        },
        kl_coef=ppo_args.kl_coef,
    )
    if checkpoint:
        state = read_state(checkpoint, state.settings)
        finished = state.global_step >= n_updates and (output_dir / "train_results.json").is_file()
        lineage.refuse_other_run(checkpoint, finished)
        if finished:
            logger.warning(
                f"{output_dir} holds a finished run ({state.global_step} updates): nothing is trained. To train it "
                "again: --resume_from_checkpoint False --overwrite_output_dir True, or another --output_dir"
            )
            leave_process_group()
            return {}
    else:
        centering_rows = train_dataset.select(range(min(CENTERING_REPLIES, len(train_dataset)))).to_list()
        state.score_shift = center_scores(roles, centering_rows, codec, ppo_args.rollout_batch_size)
    roles.add_value_head(state.score_shift)
    learn = partial(Learner, training_args=training_args, n_updates=n_updates, accelerator=accelerator)
    learners = {role: learn(roles.trained_weights(role)) for role in ("policy", "value")}
    run = Run(training_args, accelerator, roles, learners, state, tokenizer, lineage, n_updates, per_update)
    if checkpoint:
        run.load(checkpoint)

    # ------------------------------------------------------------ train
    facts |= {"template": ppo_args.template_name or "the tokenizer's own"} | data_facts
    if codec.reward_tokenizer is not None:
        facts["reward"] += ", which reads replies again in its own tokens and template"
    facts["stop tokens"] = ", ".join(tokenizer.convert_ids_to_tokens(codec.stop_ids))
    facts["scores"] = "as the reward model gives them, since the prompts have no replies to centre them by"
    if state.score_shift:
        facts["scores"] = (
            f"less {state.score_shift:.3f}, the mean of up to {CENTERING_REPLIES} replies of the dialogues"
        )
    facts["batch"] = (
        f"{training_args.per_device_train_batch_size} a device x {training_args.gradient_accumulation_steps} "
        f"accumulated x {accelerator.num_processes} process(es) = {per_update} episodes an update, "
        f"{ppo_args.num_ppo_epochs} epochs of {ppo_args.num_mini_batches} step(s)"
    )
    facts["updates"] = f"{n_updates} ({n_updates * per_update} episodes, {len(train_dataset)} prompts)"
    if lora_args.lora_dropout:
        facts["dropout"] = "off in all roles: it would blur what is compared"
    if training_args.deepspeed:
        facts["DeepSpeed"] = f"{training_args.deepspeed}: gradients and optimizers in parts"
    facts |= {"precision": "bfloat16 autocast" if training_args.bf16 else "float32", "output": str(output_dir)}
    for name, value in facts.items():
        logger.info(f"  {name:<{max(map(len, facts))}}  {value}")

    run.refuse_small_disk()
    stop = StopSignal(accelerator)
    measure = partial(evaluate, roles, eval_rows, ppo_args, codec, stop, accelerator)
    is_quantized = model_args.load_in_4bit or model_args.load_in_8bit
    advice = partial(out_of_memory_advice, training_args, ppo_args.rollout_batch_size, is_quantized)
    alone = no_other_run(output_dir) if accelerator.is_main_process else nullcontext()
    with explain_full_memory_or_disk(output_dir, advice), alone:
        try:
            if eval_rows and run.evaluation_is_due():
                run.record_evaluation(measure(shown=state.global_step in (0, n_updates)))
            for update in range(state.global_step, n_updates):
                started = time.monotonic()
                # Detail: process r takes every n-th episode, so that more processes or more accumulation are the same.
                episodes = list(range(update * per_update, (update + 1) * per_update))
                episodes = episodes[accelerator.process_index :: accelerator.num_processes]
                rows = [train_dataset[order[episode]] for episode in episodes]
                with accelerator.autocast():
                    rollout = collect_rollout(roles, rows, episodes, ppo_args, codec, stop, training_args.seed)
                measures = gather_object(episode_measures(rollout))
                has_end = any(ended for _, ended, *_ in measures)
                state.updates_without_end = 0 if has_end else state.updates_without_end + 1
                if alarm := find_alarm(measures, ppo_args.stop_at_kl, state.updates_without_end):
                    raise UserError(f"update {update + 1}: {alarm}")
                # From here on the weights change: a signal waits for the end of the update.
                metrics = summarize(measures, state.kl_coef, ppo_args.missing_eos_penalty)
                metrics |= {"objective/kl_coef": state.kl_coef, "learning_rate": run.learning_rate()}
                metrics |= ppo_update(
                    learners, roles, rollout, state.kl_coef, ppo_args, training_args, accelerator, update
                )
                if alarm := find_update_alarm(metrics):
                    raise UserError(f"update {update + 1}: {alarm}")
                if ppo_args.adaptive_kl:
                    state.kl_coef = adapted_kl_coef(
                        state.kl_coef, metrics["objective/kl"], ppo_args.target_kl, per_update, ppo_args.kl_horizon
                    )
                run.record_update(metrics | {"peak_memory_gib": peak_memory_gib()}, time.monotonic() - started)
                if eval_rows and run.evaluation_is_due():
                    run.record_evaluation(measure(shown=state.global_step == n_updates))
                if run.save_is_due():
                    run.save()
            # ------------------------------------------------------------ save and evaluate
            if not eval_rows:
                run.keep_best({})
            run.save()
        except Stopped:
            run.save_interrupted(stop.received)
            accelerator.end_training()
            leave_process_group()
            sys.exit(128 + stop.received)
    metrics = run.write_results()
    logger.info(f"done: {output_dir / BEST} (update {state.best_step} of {state.global_step})")
    logger.info(f"results: {output_dir}; curves: tensorboard --logdir {output_dir}")
    command = f"inference.py --base_model {base_model} --lora_model {output_dir / BEST}"
    logger.info(f"next: {Path(sys.executable).name} {command}")
    accelerator.end_training()
    leave_process_group()
    return metrics


if __name__ == "__main__":
    run_script(main)
