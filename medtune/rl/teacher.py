"""Distillation's teacher: what it thinks of replies that others wrote, by a model loaded here or by vLLM servers.

Both kinds give log-probs of the tokens and the student's KL from the teacher. A model that is loaded here gives its
states too, from which whole distributions are made in chunks.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from medtune.errors import UserError
from medtune.models.adapters import put_adapter_on
from medtune.models.loading import load_base_model, weights_fingerprint
from medtune.models.model_folder import ModelFolder, describe_folder, refuse_reward_model
from medtune.models.text_part import inside_peft
from medtune.models.vocabulary import check_vocabulary
from medtune.rl.arguments import RolloutArguments, split_urls
from medtune.rl.distillation_arguments import DistillationArguments, TeacherArguments
from medtune.rl.distillation_math import Head
from medtune.rl.ppo_math import position_ids, token_logps
from medtune.rl.roles import OwnLogps, Roles, at_tokens, predicting_states
from medtune.rl.rollout import Replies, Sampling
from medtune.rl.vllm_servers import VllmServer, ask_together, raise_in_all, served_name
from medtune.training.interruption import SignalListener, StoppedInRolloutError

TEACHER = "--teacher_model_path"

# ---------------------------------------------------------------- before weights load


def describe_teacher(
    teacher_args: TeacherArguments, args: RolloutArguments, tokenizer: PreTrainedTokenizerBase, **folder_options
) -> ModelFolder:
    """The teacher's folder; raises UserError for one that cannot judge the tokens of the student's tokenizer.

    folder_options: of `describe_folder`.
    """
    path = teacher_args.teacher_model_path
    folder = describe_folder(path, TEACHER, **folder_options)
    refuse_reward_model(folder)
    own, others = tokenizer.get_vocab(), folder.tokenizer.get_vocab()
    if different := [token for token, number in own.items() if others.get(token) != number]:
        raise UserError(
            f"{TEACHER} {path}: its tokenizer is not the student's: {len(different)} of {len(own)} tokens have another "
            f"id or none there, such as {min(different)!r}, so that the ids of replies are other words to it; take a "
            "teacher of the student's family"
        )
    if folder.context < (longest := args.max_source_length + args.response_length):
        raise UserError(
            f"{TEACHER} {path}: its context is {folder.context} tokens, and prompts and replies have up to {longest}; "
            "give a shorter --max_source_length or --response_length"
        )
    if teacher_args.teacher_url and folder.lora_model:
        raise UserError(
            f"{TEACHER} {path}: an adapter; a server of --teacher_url has it merged (merge_peft_adapter.py)"
        )
    return folder


def choose_device(teacher_args: TeacherArguments, student_device: torch.device) -> torch.device:
    """The teacher's device in this process; raises UserError for one that is not there."""
    named = teacher_args.teacher_device
    if named is None:
        return student_device
    rank, n_processes = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    try:
        device = torch.device(named)
    except RuntimeError:
        raise UserError(f"--teacher_device {named}: no device; give one such as cuda:1") from None
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise UserError(f"--teacher_device {named}: no device of a teacher; give one such as cuda:1, or cpu")
    n_gpus, first = torch.cuda.device_count(), device.index or 0
    if first + n_processes > n_gpus:
        raise UserError(
            f"--teacher_device {named}: {n_processes} process(es) have teachers up to cuda:{first + n_processes - 1}, "
            f"and there are {n_gpus} GPU(s); without it (TEACHER_DEVICE= before the launcher) it is beside the student"
        )
    return torch.device("cuda", first + rank)


def teacher_settings(teacher_args: TeacherArguments, args: DistillationArguments, **hub_options) -> dict[str, object]:
    """What a resumed run must keep of the teacher and of how the student learns from it."""
    path = teacher_args.teacher_model_path
    settings: dict[str, object] = {TEACHER: path, "--teacher_bits": teacher_args.teacher_bits}
    if not teacher_args.teacher_url:  # whose weights are not needed here
        settings["weights of the teacher"] = weights_fingerprint(path, flag=TEACHER, **hub_options)[:12]
    return settings | {"--beta": args.beta, "--on_policy_share": args.on_policy_share}


# ---------------------------------------------------------------- loaded here


@dataclass
class LocalTeacher:
    """A frozen model, on a device of its own or on the student's."""

    model: PreTrainedModel | PeftModel
    sampling: Sampling
    description: str

    @torch.no_grad()
    def predict(self, replies: Replies) -> tuple[torch.Tensor, Head]:
        """`predicting_states` of the N tokens of the replies, on the teacher's device."""
        core = inside_peft(self.model)
        text = replies.ids, replies.attention_mask, replies.mask
        ids, attention_mask, mask = (tensor.to(core.device) for tensor in text)
        positions = position_ids(attention_mask)
        outputs = core.base_model(
            input_ids=ids, attention_mask=attention_mask.long(), position_ids=positions, use_cache=False
        )
        return predicting_states(core, outputs, mask)

    def logps(self, replies: Replies, stop: SignalListener) -> torch.Tensor:
        """[N, T] log-probs of the replies' tokens at the temperature of sampling, 0 outside the mask."""
        return of_batches(replies, self.sampling.batch_size, self._logps)

    @torch.no_grad()
    def _logps(self, replies: Replies) -> torch.Tensor:
        states, head = self.predict(replies)
        ids = replies.ids[:, replies.n_prompt :][replies.mask].to(states.device)
        flat, *_ = token_logps(states, ids, head, self.sampling.temperature)
        return at_tokens(replies.mask, flat.to(replies.mask.device))

    def kl(self, roles: Roles, replies: Replies, stop: SignalListener) -> torch.Tensor:
        """[N, T] KL of the student's distribution from the teacher's at each token, 0 outside the mask."""

        def of_part(part: Replies) -> torch.Tensor:
            text = part.ids, part.attention_mask, part.mask
            return roles.divergences(*text, self.sampling.temperature, *self.predict(part), beta=1.0)[1]

        return of_batches(replies, self.sampling.batch_size, of_part)

    def check_logps(self, prompts: list[list[int]]) -> None:
        """Raise UserError unless `logps` are those of the model's own forward pass."""
        own = OwnLogps(self.model, prompts, self.sampling.temperature)
        mask = own.mask[:, 1:]
        texts = Replies(ids=own.ids, attention_mask=own.mask, mask=mask, ended=mask.any(dim=1))
        own.refuse_other(own.difference(self._logps(texts)), TEACHER)


@torch.no_grad()
def of_batches(replies: Replies, batch_size: int, of_part: Callable[[Replies], torch.Tensor]) -> torch.Tensor:
    """[N, T] figures of the tokens, computed for so many replies at a time, those of like lengths together."""
    figures = torch.zeros(replies.mask.shape, device=replies.mask.device)
    longest_first = replies.attention_mask.sum(dim=1).argsort(descending=True, stable=True)
    for rows in longest_first.split(batch_size):
        part = replies.take(rows)
        figures[rows, : part.mask.shape[1]] = of_part(part)
    return figures


# ---------------------------------------------------------------- on a server


@dataclass
class ServerTeacher:
    """vLLM servers that have the teacher under a name."""

    servers: Sequence[VllmServer]
    name: str
    sampling: Sampling
    description: str

    def logps(self, replies: Replies, stop: SignalListener) -> torch.Tensor:
        """[N, T] log-probs of the replies' tokens, 0 outside the mask.

        Raises StoppedInRolloutError in all processes once a signal has reached one of them, ServerError if a server
        fails.
        """
        texts = [ids[is_token].tolist() for ids, is_token in zip(replies.ids, replies.attention_mask, strict=True)]
        n_reply = replies.mask.sum(dim=1).tolist()
        logps: list[list[float]] = [[] for _ in texts]

        def ask(server: VllmServer, row: int) -> None:
            logps[row] = server.logps(texts[row], n_reply[row], self.name)

        failure = ask_together(self.servers, range(len(texts)), ask, stop)
        if stop.any_received():
            raise StoppedInRolloutError
        raise_in_all(failure)
        return at_tokens(replies.mask, torch.tensor([*chain(*logps)], device=replies.mask.device))

    def kl(self, roles: Roles, replies: Replies, stop: SignalListener) -> torch.Tensor:
        """[N, T] estimates of the student's KL from the teacher, by the log-ratio of each sampled token."""

        def of_part(part: Replies) -> torch.Tensor:
            return roles.logps("policy", part.ids, part.attention_mask, part.mask, self.sampling.temperature)[0]

        return of_batches(replies, self.sampling.batch_size, of_part) - self.logps(replies, stop)


Teacher = LocalTeacher | ServerTeacher


def load_teacher(
    folder: ModelFolder,
    teacher_args: TeacherArguments,
    args: RolloutArguments,
    sampling: Sampling,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    training_args: TrainingArguments,
    **loading_options,
) -> Teacher:
    """The teacher, ready to be asked: its servers if there are any, otherwise its weights on the device.

    Raises ServerError for a server that is not there, has another model or too short a context, or gives no log-probs.
    """
    path = teacher_args.teacher_model_path
    if teacher_args.teacher_url:
        urls = split_urls(teacher_args.teacher_url)
        servers = [VllmServer(url, training_args.ddp_timeout, "--teacher_url") for url in urls]
        n_tokens = args.max_source_length + args.response_length + 1  # the one that a server generates
        names = {served_name(server, path, n_tokens, f"{TEACHER}'s") for server in servers}
        if len(names) > 1:
            raise UserError(
                f"--teacher_url {teacher_args.teacher_url}: the servers name the model {' and '.join(sorted(names))}; "
                "start them with one --served-model-name"
            )
        for server in servers:  # before the student's weights load, and its first replies are written
            server.logps([*sampling.stop_ids][:1] * 2, 1, *names)
        return ServerTeacher(servers, *names, sampling, f"{path} by vLLM at {', '.join(urls)}")
    bits = teacher_args.teacher_bits
    options = loading_options | {"load_in_8bit": bits == 8, "load_in_4bit": bits == 4, "device_map": device}
    model = load_base_model(folder.base_model, flag=TEACHER, **options)
    if folder.lora_model:
        model = put_adapter_on(model, folder.lora_model, TEACHER)
    check_vocabulary(tokenizer, model)
    dtype = f"{bits} bit" if bits != 16 else str(model.dtype).removeprefix("torch.")
    return LocalTeacher(model.eval().requires_grad_(False), sampling, f"{path}, {dtype}, on {device}")
