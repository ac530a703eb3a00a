"""Rollouts: the policy's replies to prompts, with log-probs, values and scores."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import ClassVar, Self, TypeVar

import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerBase

from medtune.errors import UserError
from medtune.models.decoding import Decoding
from medtune.models.running_batch import Row, order_of_prompts
from medtune.reading.chat_template import ChatTemplate
from medtune.reading.tokenization import stop_token_ids
from medtune.rl.arguments import RolloutArguments
from medtune.rl.ppo_math import draw_uniforms, episode_seed, inverse_transform, reply_mask
from medtune.rl.reward_texts import RewardTexts
from medtune.rl.rewards import Rewards
from medtune.rl.roles import Roles
from medtune.rl.scored_replies import ScoredReply, scored_replies
from medtune.rl.vllm_servers import VllmServers, raise_in_all
from medtune.training.interruption import SignalListener, StoppedInRolloutError

# ---------------------------------------------------------------- the tensors


@dataclass(kw_only=True)
class Replies:
    """Replies to N prompts: P prompt columns, padded on the left, then T reply columns, padded on the right.

    ids: [N, P + T] int64; attention_mask: the same shape, True on real tokens.
    mask: [N, T] True on a reply's tokens, its end token included.
    ended: [N] True where the reply has an end token.
    sampler_logps: [N, T] float32, of the vLLM server that drew the tokens, 0 outside the mask; None for our own.
    """

    of_replies: ClassVar[Sequence[str]] = ("ended",)  # the tensors that have no columns of tokens

    ids: torch.Tensor
    attention_mask: torch.Tensor
    mask: torch.Tensor
    ended: torch.Tensor
    sampler_logps: torch.Tensor | None = None

    @property
    def n_prompt(self) -> int:
        return self.ids.shape[1] - self.mask.shape[1]

    def reply_ids(self) -> list[list[int]]:
        """The tokens of each reply, without padding."""
        return [row[mask].tolist() for row, mask in zip(self.ids[:, self.n_prompt :], self.mask, strict=True)]

    def take(self, rows: torch.Tensor | Sequence[int]) -> Self:
        """Some rows, without the columns that are padding in all of them."""
        rows = torch.as_tensor(rows, device=self.ids.device)
        left = int((~self.attention_mask[rows, : self.n_prompt]).long().sum(dim=1).min())
        right = int(self.mask[rows].sum(dim=1).max())
        whole, reply = slice(left, self.n_prompt + right), slice(0, right)

        def part(name: str, tensor: torch.Tensor) -> torch.Tensor:
            if name in self.of_replies:
                return tensor[rows]
            return tensor[rows, whole if self._has_prompt(tensor) else reply]

        return type(self)(**{name: part(name, tensor) for name, tensor in self.tensors().items()})

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """Several as one, padded to the widest."""
        n_prompt = max(part.n_prompt for part in parts)
        n_reply = max(part.mask.shape[1] for part in parts)

        def padded(part: Self, name: str) -> torch.Tensor:
            tensor = getattr(part, name)
            left = n_prompt - part.n_prompt if part._has_prompt(tensor) else 0
            return tensor if name in cls.of_replies else F.pad(tensor, (left, n_reply - part.mask.shape[1]))

        return cls(**{name: torch.cat([padded(part, name) for part in parts]) for name in parts[0].tensors()})

    def tensors(self) -> dict[str, torch.Tensor]:
        """Those that there are, by name."""
        values = {spec.name: getattr(self, spec.name) for spec in fields(self)}
        return {name: tensor for name, tensor in values.items() if tensor is not None}

    def _has_prompt(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor has the columns of prompt and reply, not those of the reply alone."""
        return tensor.shape == self.ids.shape


@dataclass(kw_only=True)
class PolicyReplies(Replies):
    """Replies with their log-probs under the policy that wrote them, and under the reference where there is one.

    policy_logps, entropies, variances (of the surprisal), ref_logps: [N, T] float32, 0 outside the mask.
    """

    policy_logps: torch.Tensor
    entropies: torch.Tensor
    variances: torch.Tensor
    ref_logps: torch.Tensor | None = None


@dataclass(kw_only=True)
class Rollout(PolicyReplies):
    """Of PPO: with values and scores.

    values: [N, T] float32, 0 outside the mask.
    rewards: [N, K] float32, a reward model's minus the mean of the dialogues' own replies; scores: [N], their weighted
        sum, before the penalty for a missing end token.
    """

    of_replies: ClassVar[Sequence[str]] = (*PolicyReplies.of_replies, "rewards", "scores")

    values: torch.Tensor
    rewards: torch.Tensor
    scores: torch.Tensor


SomeReplies = TypeVar("SomeReplies", bound=Replies)


# ---------------------------------------------------------------- scoring


@dataclass(frozen=True)
class Scorer:
    """What scores replies, whoever wrote them: the rewards of the flags, and what the reward model reads where it is
    among them, so many replies at a time."""

    tokenizer: PreTrainedTokenizerBase
    rewards: Rewards
    reward_texts: RewardTexts | None
    batch_size: int

    def read(self, rows: Sequence[dict], replies: Replies) -> list[ScoredReply]:
        """The replies to rows of `PromptEncoder` as text."""
        return scored_replies(self.tokenizer, rows, replies.reply_ids(), replies.ended.tolist())

    def score(self, roles: Roles, rows: Sequence[dict], replies: Replies, stop: SignalListener) -> torch.Tensor:
        """[N, K] rewards of the replies to rows of `PromptEncoder`.

        Raises StoppedInRolloutError and ServerError as `collect_replies` does, of the server of a judge.
        """
        model_scores = None
        if self.reward_texts is not None:
            rows_and_ids = zip(rows, replies.reply_ids(), strict=True)
            texts = [self.reward_texts.of_ids(row, ids) for row, ids in rows_and_ids]
            model_scores = score_texts(roles, texts, self.batch_size) - roles.score_shift
        return self.rewards(self.read(rows, replies), model_scores, stop).to(roles.model.device)


# ---------------------------------------------------------------- sampling


@dataclass(frozen=True)
class Sampling:
    """How replies are sampled: `batch_size` at a time, of at most `max_tokens` tokens each; or by servers, together."""

    temperature: float
    max_tokens: int
    batch_size: int
    stop_ids: list[int]
    pad_id: int
    seed: int
    servers: VllmServers | None = None


def choose_sampling(
    args: RolloutArguments, tokenizer: PreTrainedTokenizerBase, chat_template: ChatTemplate, seed: int
) -> Sampling:
    """The sampling of the flags; a reply ends at --stop_token, or at the template's and tokenizer's end tokens."""
    stop_ids = stop_token_ids(tokenizer, chat_template)
    if args.stop_token is not None:
        stop_ids = tokenizer.encode(args.stop_token, add_special_tokens=False)
        if len(stop_ids) != 1:
            n_tokens = f"{len(stop_ids)} tokens of this tokenizer"
            raise UserError(f"--stop_token {args.stop_token}: {n_tokens}; name a single one")
    return Sampling(
        temperature=args.temperature,
        max_tokens=args.response_length,
        batch_size=args.rollout_batch_size,
        stop_ids=stop_ids,
        pad_id=tokenizer.pad_token_id,
        seed=seed,
    )


class EpisodeRow(Row):
    """A row each of whose tokens is drawn by a uniform number of its episode, so that a reply depends only on seed and
    episode: batch, number of processes and a resume do not change it."""

    def __init__(self, prompt: list[int], sampling: Sampling, episode: int | None):
        """episode: None decodes greedily."""
        temperature = 0.0 if episode is None else sampling.temperature
        seed = 0 if episode is None else episode_seed(sampling.seed, episode)
        super().__init__(prompt, frozenset(sampling.stop_ids), Decoding(sampling.max_tokens, temperature), seed)
        self.uniforms = [] if episode is None else draw_uniforms(sampling.max_tokens, sampling.seed, episode)

    @staticmethod
    def draw(logits: torch.Tensor, rows: "Sequence[EpisodeRow]") -> torch.Tensor:
        uniforms = [row.uniforms[len(row.ids)] for row in rows]
        return inverse_transform(logits, uniforms, rows[0].decoding.temperature)


@torch.no_grad()
def sample_replies(
    roles: Roles, prompts: Sequence[list[int]], episodes: Sequence[int] | None, sampling: Sampling
) -> Replies:
    """The policy's replies to B prompts.

    Args:
        episodes: the episode number of each, which decides its random draws; None decodes greedily.
    """
    rows = episode_rows(prompts, episodes, sampling)
    roles.complete(rows)
    return replies_of(rows, sampling, roles.model.device)


def episode_rows(prompts: Sequence[list[int]], episodes: Sequence[int] | None, sampling: Sampling) -> list[EpisodeRow]:
    numbers = [None] * len(prompts) if episodes is None else episodes
    return [EpisodeRow(prompt, sampling, number) for prompt, number in zip(prompts, numbers, strict=True)]


def replies_of(rows: Sequence[EpisodeRow], sampling: Sampling, device: torch.device) -> Replies:
    """The tensors of finished rows."""
    # Detail: prompts are padded on the left, so that all replies start at one column.
    n_prompt, n_reply = max(len(row.prompt) for row in rows), max(len(row.ids) for row in rows)
    padding = [(n_prompt - len(row.prompt), n_reply - len(row.ids)) for row in rows]
    pad = [sampling.pad_id]
    ids = [pad * left + row.prompt + row.ids + pad * right for row, (left, right) in zip(rows, padding, strict=True)]
    ids = torch.tensor(ids, device=device)
    n_padding = torch.tensor([left for left, _ in padding], device=device)
    prompt_mask = torch.arange(n_prompt, device=device) >= n_padding[:, None]
    # Cut at the end token; the mask marks the reply (detail: one mask for policy and value).
    mask, ended = reply_mask(ids[:, n_prompt:], sampling.stop_ids)
    sampler_logps = None
    if all(row.logps and row.decoding.temperature for row in rows):
        sampler_logps = torch.tensor([row.logps + [0.0] * (n_reply - len(row.logps)) for row in rows], device=device)
    return Replies(
        ids=ids,
        attention_mask=torch.cat([prompt_mask, mask], dim=1),
        mask=mask,
        ended=ended,
        sampler_logps=sampler_logps,
    )


# ---------------------------------------------------------------- collecting


def collect_replies(
    roles: Roles, rows: Sequence[dict], episodes: Sequence[int] | None, sampling: Sampling, stop: SignalListener
) -> Replies:
    """Sample replies to the prompts, in the given order.

    Args:
        rows: of `PromptEncoder`.
        episodes: of `sample_replies`.

    Raises StoppedInRolloutError in all processes once a signal has reached one of them, ServerError if a server that
    writes the replies fails.
    """
    if sampling.servers is not None:
        sampling.servers.load_policy(roles.model)
        written = episode_rows([row["prompt_ids"] for row in rows], episodes, sampling)
        failure = sampling.servers.complete(written, stop)
        if stop.any_received():
            raise StoppedInRolloutError
        raise_in_all(failure)
        return replies_of(written, sampling, roles.model.device)

    def sample(chosen: list[int]) -> Replies:
        prompts = [rows[index]["prompt_ids"] for index in chosen]
        return sample_replies(roles, prompts, episodes and [episodes[index] for index in chosen], sampling)

    return _in_batches(rows, sampling.batch_size, stop, sample)


def replies_of_data(rows: Sequence[dict], sampling: Sampling, device: torch.device) -> Replies:
    """The dialogues' own replies, cut at the longest that is sampled; rows of `AnsweredPromptEncoder`."""
    copied = episode_rows([row["prompt_ids"] for row in rows], None, sampling)
    for row, its in zip(copied, rows, strict=True):
        for token in its["reply_ids"]:
            if not row.finished:
                row.append(token)
    return replies_of(copied, sampling, device)


@torch.no_grad()
def add_logps(
    roles: Roles, rows: Sequence[dict], replies: Replies, sampling: Sampling, stop: SignalListener
) -> PolicyReplies:
    """The replies with their log-probs under the policy as it is, and under the reference where there is one."""
    return _in_batches(
        rows, sampling.batch_size, stop, lambda chosen: _with_logps(roles, replies.take(chosen), sampling.temperature)
    )


@torch.no_grad()
def collect_rollout(
    roles: Roles,
    rows: Sequence[dict],
    episodes: Sequence[int] | None,
    sampling: Sampling,
    scorer: Scorer,
    stop: SignalListener,
) -> Rollout:
    """PPO's rollout: replies to the prompts, and all roles evaluated on them; arguments as of `collect_replies`."""
    replies = collect_replies(roles, rows, episodes, sampling, stop)

    def evaluate(chosen: list[int]) -> Rollout:
        part = _with_logps(roles, replies.take(chosen), sampling.temperature)
        values = roles.values(part.ids, part.attention_mask, part.mask)
        rewards = scorer.score(roles, [rows[index] for index in chosen], part, stop)
        return Rollout(**vars(part), values=values, rewards=rewards, scores=scorer.rewards.total(rewards))

    return _in_batches(rows, sampling.batch_size, stop, evaluate)


def without_unjudged(rollout: Rollout) -> Rollout:
    """The rollout with other replies of this process in place of those that the judge could not judge.

    Raises ServerError in all processes if one of them has none.
    """
    is_judged = ~rollout.scores.isnan()
    raise_in_all(None if is_judged.any() else "the judge has judged no reply of an update")
    rows = torch.arange(len(is_judged), device=is_judged.device)
    rows[~is_judged] = is_judged.nonzero().flatten().repeat(len(rows))[: int((~is_judged).sum())]
    return rollout.take(rows)


def _with_logps(roles: Roles, replies: Replies, temperature: float) -> PolicyReplies:
    text = replies.ids, replies.attention_mask, replies.mask
    # Detail: the old log-probs are computed anew by a full forward pass.
    policy_logps, entropies, variances = roles.logps("policy", *text, temperature)
    ref_logps = roles.logps("reference", *text, temperature)[0] if roles.has_reference else None
    of_policy = {"policy_logps": policy_logps, "entropies": entropies, "variances": variances}
    return PolicyReplies(**vars(replies), **of_policy, ref_logps=ref_logps)


def _in_batches(
    rows: Sequence[dict], batch_size: int, stop: SignalListener, of_batch: Callable[[list[int]], SomeReplies]
) -> SomeReplies:
    """What `of_batch` gives for the indices of each batch of rows, joined in the order of the rows."""
    order = order_of_prompts([row["prompt_ids"] for row in rows])
    parts = []
    for begin in range(0, len(order), batch_size):
        if stop.any_received():
            raise StoppedInRolloutError
        parts.append(of_batch(order[begin : begin + batch_size]))
    return type(parts[0]).join(parts).take(torch.tensor(order).argsort())


def score_texts(roles: Roles, texts: Sequence[list[int]], batch_size: int) -> torch.Tensor:
    """[N] scores of the reward model, so many texts at a time."""
    batches = [texts[begin : begin + batch_size] for begin in range(0, len(texts), batch_size)]
    return torch.cat([roles.scores(batch) for batch in batches])


def center_scores(roles: Roles, rows: Sequence[dict], reward_texts: RewardTexts, batch_size: int) -> float:
    """The mean score of the dialogues' own replies, which is subtracted from scores (detail: they have no origin).

    0 if the data has prompts only.
    """
    texts = [reward_texts.of_text(row, row["reply"]) for row in rows if row["reply"]]
    if not texts:
        return 0.0
    return score_texts(roles, texts, batch_size).mean().item()
