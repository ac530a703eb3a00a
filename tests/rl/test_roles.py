"""The four roles: whose weights each has, log-probs, values and scores of replies alone and in a batch."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_families import tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from medtune.arguments import LoraArguments
from medtune.errors import UserError
from medtune.models.adapters import load_with_adapter
from medtune.models.reward_models import load_reward_model
from medtune.rl import ppo_math
from medtune.rl.roles import Roles, load_roles


def write_adapter(folder: Path, model_dir: Path, model_class: type, task_type: str, **options) -> Path:
    """A random adapter on the model, as a stage leaves one."""
    model = model_class.from_pretrained(model_dir, **options)
    lora = LoraConfig(task_type=task_type, r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(model, lora).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_dir).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sft_adapter(tiny_model_dir, tmp_path_factory) -> Path:
    torch.manual_seed(0)
    return write_adapter(tmp_path_factory.mktemp("sft"), tiny_model_dir, AutoModelForCausalLM, "CAUSAL_LM")


@pytest.fixture(scope="module")
def rm_adapter(tiny_model_dir, tmp_path_factory) -> Path:
    torch.manual_seed(1)
    model_class = AutoModelForSequenceClassification
    return write_adapter(tmp_path_factory.mktemp("rm"), tiny_model_dir, model_class, "SEQ_CLS", num_labels=1)


@pytest.fixture
def roles(sft_adapter, rm_adapter) -> Roles:
    roles, _ = load_roles(str(sft_adapter), str(rm_adapter), LoraArguments(), torch.device("cpu"))
    roles.add_value_head(score_shift=0.0)
    return roles


# Two replies to prompts of other lengths: left padding, right padding, an end token (1) inside a prompt.
IDS = torch.tensor([[0, 0, 30, 31, 50, 51, 0], [40, 1, 41, 42, 60, 61, 62]])
ATTENTION = torch.tensor([[0, 0, 1, 1, 1, 1, 0], [1] * 7], dtype=torch.bool)
MASK = ATTENTION[:, 4:]


def test_log_probs_of_the_base_leave_the_adapters_as_they_are(roles, tiny_model_dir):
    before = roles.logps("policy", IDS, ATTENTION, MASK, 0.7)[0].detach()
    logps = roles.base_logps(IDS, ATTENTION, MASK, 0.7).detach()
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    with torch.no_grad():
        logits = base(input_ids=IDS[1:]).logits[0, 3:-1] / 0.7
    torch.testing.assert_close(logps[1], logits.log_softmax(-1).gather(1, IDS[1, 4:, None]).squeeze(1))
    after = roles.logps("policy", IDS, ATTENTION, MASK, 0.7)[0]
    assert torch.equal(after, before)
    assert after.requires_grad  # the policy still learns
    assert not torch.allclose(logps, before)


@torch.no_grad()
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("role", ["policy", "reference"])
def test_log_probs_are_the_sft_adapters_of_each_reply_alone(roles, tiny_model_dir, sft_adapter, role, temperature):
    """Of policy and reference, so the KL between them begins at 0."""
    logps, entropies, _ = roles.logps(role, IDS, ATTENTION, MASK, temperature)
    model = load_with_adapter(str(tiny_model_dir), str(sft_adapter)).eval()
    for row in range(2):
        ids = IDS[row][ATTENTION[row]]
        n_reply = int(MASK[row].sum())
        expected = (model(input_ids=ids[None]).logits[0] / temperature).log_softmax(dim=-1)[-n_reply - 1 : -1]
        picked = expected.gather(1, ids[-n_reply:, None]).squeeze(1)
        torch.testing.assert_close(logps[row, :n_reply], picked, atol=1e-5, rtol=1e-5)
        entropy = torch.distributions.Categorical(logits=expected).entropy()
        torch.testing.assert_close(entropies[row, :n_reply], entropy, atol=1e-5, rtol=1e-5)
    assert not logps[~MASK].any()


def test_a_role_is_its_own_whatever_was_called_before_and_learns_where_gradients_are_enabled(roles):
    policy, _, _ = roles.logps("policy", IDS, ATTENTION, MASK, 1.0)
    policy.sum().backward()
    roles.values(IDS, ATTENTION, MASK).sum().backward()
    learned = {name.split(".")[-2] for name, weights in roles.model.named_parameters() if weights.grad is not None}
    assert learned == {"default", "value"}
    with torch.no_grad():
        for name, weights in roles.model.named_parameters():
            if name.split(".")[-2] == "default":
                weights += 0.1 * weights.grad.sign()
        roles.scores([[30, 31, 50]])
        moved, _, _ = roles.logps("policy", IDS, ATTENTION, MASK, 1.0)
        reference, _, _ = roles.logps("reference", IDS, ATTENTION, MASK, 1.0)
    assert moved.sum() > reference.sum()
    torch.testing.assert_close(reference, policy)
    assert not moved.requires_grad


# What each class does between its last states and its logits besides the head.
OWN_WAYS = {
    "qwen2": {},
    "gemma2": {"final_logit_softcapping": 1.5, "head_dim": 16},
    "gemma4_text": {"final_logit_softcapping": 1.5, "head_dim": 16, "global_head_dim": 16, "num_kv_shared_layers": 0}
    | {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 100},
    "falcon_h1": {"lm_head_multiplier": 0.3, "mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8}
    | {"mamba_n_groups": 1, "mamba_d_state": 16},
    "granite": {"logits_scaling": 4.0},
    "cohere2": {"logit_scale": 0.25, "layer_types": ["full_attention"] * 2},
    "minicpm3": {"dim_model_base": 128, "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8}
    | {"qk_nope_head_dim": 16, "v_head_dim": 16, "num_key_value_heads": 4},
}


def roles_of_class(model_type: str, target_modules: list[str]) -> Roles:
    """A policy of a class of transformers, alone, with random weights and a random adapter."""
    shape = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **(shape | heads | ids | OWN_WAYS[model_type]))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=target_modules, init_lora_weights=False)
    return Roles(get_peft_model(model, lora), None, None)


@pytest.mark.parametrize(
    ("model_type", "target_modules"),
    [*((model_type, ["o_proj"]) for model_type in OWN_WAYS), ("qwen2", ["o_proj", "lm_head"])],
)
def test_log_probs_are_those_of_the_models_own_logits(model_type, target_modules, monkeypatch):
    monkeypatch.setattr(ppo_math, "CHUNK", 3)
    roles = roles_of_class(model_type, target_modules)
    rows_at_a_time = []
    head = roles.model.get_output_embeddings()
    hook = head.register_forward_hook(lambda module, args, out: rows_at_a_time.append(out.numel() // out.shape[-1]))
    logps, *_ = roles.logps("policy", IDS, ATTENTION, MASK, 0.7)
    logps[MASK].sum().backward()
    hook.remove()
    assert max(rows_at_a_time) <= 3, "no more logits at a time than those of a chunk"
    weights = [weights for weights in roles.model.parameters() if weights.requires_grad]
    gradients = [weight.grad.clone() for weight in weights]
    roles.model.zero_grad()

    position_ids = ppo_math.position_ids(ATTENTION)
    logits = roles.model(input_ids=IDS, attention_mask=ATTENTION.long(), position_ids=position_ids).logits[:, 3:-1]
    own = (logits / 0.7).log_softmax(dim=-1).gather(2, IDS[:, 4:, None]).squeeze(2)
    torch.testing.assert_close(logps[MASK], own[MASK], atol=1e-4, rtol=0)
    own[MASK].sum().backward()
    for weight, gradient in zip(weights, gradients, strict=True):
        torch.testing.assert_close(gradient, weight.grad, atol=1e-3, rtol=1e-3)
    roles.check_logps(IDS.tolist(), 0.7, "")


def scale_by_position(roles: Roles) -> None:
    """A head whose logits hang on the place in the row, which no single state shows."""
    head = roles.model.get_output_embeddings()
    head.register_forward_hook(lambda module, args, out: out * torch.linspace(0.5, 2, out.shape[-2])[:, None])


def test_log_probs_that_are_not_the_models_own_are_refused():
    roles = roles_of_class("qwen2", ["o_proj"])
    scale_by_position(roles)
    with pytest.raises(
        UserError, match=r"^here: this stage's log-probs differ .* by [\d.]+ nats a token, where rounding"
    ):
        roles.check_logps([list(range(5, 50))] * 2 + [[7, 8, 9]], 0.7, "here")


def test_rows_that_the_kernels_of_a_model_refuse_joined_stay_padded():
    """Convolutions without the package that separates texts."""
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["in_proj"])
    roles = Roles(get_peft_model(tiny_model("lfm2"), lora), None, None)
    prompts = [list(range(5, 30))] * 2
    roles.check_logps(prompts, 0.7, "", "auto")
    assert not roles.padding_free
    with pytest.raises(
        UserError, match=r"^--padding_free True: the rows do not stay apart in Lfm2ForCausalLM \(`causal_"
    ):
        roles.check_logps(prompts, 0.7, "", "True")


def test_no_gradient_comes_from_prompt_or_padding(roles):
    logps, *_ = roles.logps("policy", IDS, ATTENTION, MASK, 1.0)
    embedded = []
    layer = roles.model.get_input_embeddings()
    handle = layer.register_forward_hook(lambda module, args, out: embedded.append(out.requires_grad_()) or out)
    changed = IDS.masked_fill(~ATTENTION, 77)
    again, *_ = roles.logps("policy", changed, ATTENTION, MASK, 1.0)
    handle.remove()
    torch.testing.assert_close(again, logps)
    (gradient,) = torch.autograd.grad(again.sum(), embedded[0])
    assert not gradient[~ATTENTION].any()
    assert not gradient[:, -1].any(), "the last token predicts nothing"
    # A log-prob is a loss of a reply token alone: that of a prompt token stands nowhere.
    assert logps.shape == MASK.shape


@torch.no_grad()
def test_scores_are_those_of_the_reward_model_alone_and_in_a_batch(roles, tiny_model_dir, rm_adapter):
    texts = [IDS[row][ATTENTION[row]].tolist() for row in range(2)]
    scores = roles.scores(texts)
    model = load_reward_model(str(tiny_model_dir), str(rm_adapter))
    for text, score in zip(texts, scores, strict=True):
        torch.testing.assert_close(score, model(input_ids=torch.tensor([text])).logits[0, 0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(score, roles.scores([text])[0], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_value_model_starts_as_the_reward_model(roles):
    """The state before a reply's last token, scored, is the value of that token."""
    values = roles.values(IDS, ATTENTION, MASK)
    text = IDS[1].tolist()
    torch.testing.assert_close(values[1], torch.cat([roles.scores([text[:n]]) for n in (4, 5, 6)]))
    roles.add_value_head(score_shift=2.5, weight=0.5)
    torch.testing.assert_close(roles.values(IDS, ATTENTION, MASK)[1], 0.5 * (values[1] - 2.5))
