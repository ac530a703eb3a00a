"""Encode a prompt and a reply for the reward model, as in its training."""

import json
from dataclasses import dataclass, replace
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from medtune.errors import Unusable, UserError
from medtune.models.model_folder import choose_template, describe_folder
from medtune.models.reward_models import reward_ids
from medtune.reading.chat_template import ChatTemplate
from medtune.reading.reply_text import ReplyDecoder
from medtune.reading.thoughts import split_reply, with_opening
from medtune.reading.tokenization import stop_token_ids


@dataclass
class RewardTexts:
    """Converts the policy's ids, or a dialogue's text, to the reward model's ids.

    stop_ids: the tokens that end a reply; the reward model was trained on the first.
    reward_tokenizer, reward_template: of a reward model that reads other ids than the policy writes; None otherwise.
    reads_thoughts: whether the reward model scores thoughts too, and not the answer alone.
    """

    tokenizer: PreTrainedTokenizerBase
    chat_template: ChatTemplate
    stop_ids: list[int]
    reward_tokenizer: PreTrainedTokenizerBase | None = None
    reward_template: ChatTemplate | None = None
    reads_thoughts: bool = False

    def of_ids(self, row: dict, reply_ids: list[int]) -> list[int]:
        """What the reward model reads for a prompt and the reply that the policy wrote to it."""
        ended = bool(reply_ids) and reply_ids[-1] in self.stop_ids
        words = reply_ids[:-1] if ended else reply_ids
        text = with_opening(self._decode(words), self.chat_template.opens_thought)
        if self.reward_tokenizer is None and (self.reads_thoughts or not self._has_thought(row, text)):
            return row["prompt_ids"] + words + self.stop_ids[:1] * ended
        return self.of_text(row, text.strip(), ended)

    @cached_property
    def _decode(self) -> ReplyDecoder:
        return ReplyDecoder(self.tokenizer)

    def _has_thought(self, row: dict, reply: str) -> bool:
        """Whether the reply, or one before it in the prompt, has a thought."""
        messages, _ = json.loads(row["messages"])
        earlier = [message["content"] for message in messages if message["role"] == "assistant"]
        return any(split_reply(text).thought for text in [*earlier, reply])

    def of_text(self, row: dict, reply: str, ended: bool = True) -> list[int]:
        """What the reward model reads for a prompt and a reply that is words, such as the dialogue's own."""
        messages, tools = json.loads(row["messages"])
        tokenizer, chat_template = self.reward_tokenizer, self.reward_template
        if tokenizer is None:
            tokenizer, chat_template = self.tokenizer, self.chat_template
        try:
            options = {"ended": ended, "reads_thoughts": self.reads_thoughts}
            return reward_ids(tokenizer, chat_template, messages, reply, tools, **options)
        except (Unusable, UserError) as error:
            raise UserError(
                f"--reward_model_path: its prompt template does not write the reply {reply!r:.60} "
                f"({error.args[-1]}), so it was never trained on one like it; take another reward model"
            ) from error


def load_reward_texts(
    tokenizer: PreTrainedTokenizerBase,
    chat_template: ChatTemplate,
    stop_ids: list[int],
    reward_model_path: str,
    **folder_options,
) -> RewardTexts:
    """The encoding for the reward model; with its own tokenizer and template if its ids differ from the policy's.

    folder_options: of `describe_folder`.
    """
    own = describe_folder(reward_model_path, "--reward_model_path", **folder_options)
    reward_texts = RewardTexts(tokenizer, chat_template, stop_ids, reads_thoughts=own.reads_thoughts)
    own_template = choose_template(own, None)
    reads_the_same = (
        tokenizer.get_vocab() == own.tokenizer.get_vocab()
        and _probe(tokenizer, chat_template) == _probe(own.tokenizer, own_template)
        and stop_ids[:1] == stop_token_ids(own.tokenizer, own_template)[:1]
    )
    if reads_the_same:
        return reward_texts
    return replace(reward_texts, reward_tokenizer=own.tokenizer, reward_template=own_template)


def _probe(tokenizer: PreTrainedTokenizerBase, chat_template: ChatTemplate) -> list:
    """The ids of a conversation with a reply, without and with a system prompt; None if the template refuses it."""
    messages = [{"role": "user", "content": "发烧38.5℃ fever?"}, {"role": "assistant", "content": "请就诊。"}]
    messages += [{"role": "user", "content": "谢谢 thank you"}]
    exchanges = []
    for system in ([], [{"role": "system", "content": "你是医生。"}]):
        try:
            exchanges.append(reward_ids(tokenizer, chat_template, [*system, *messages], "不客气 you're welcome"))
        except (Unusable, UserError):
            exchanges.append(None)
    return exchanges
