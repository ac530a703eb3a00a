"""What a model folder is: its base, adapter, tokenizer, template, kind and context, and the record of a run."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PretrainedConfig

from medtune.arguments import DataArguments, ModelArguments
from medtune.errors import UserError
from medtune.models.chat_models import ChatModelArguments, RewardModel
from medtune.models.lineage import Lineage, tokenizer_source
from medtune.models.loading import load_base_model, load_tokenizer, weights_fingerprint
from medtune.models.model_folder import choose_template, describe_folder, lineage_of, refuse_reward_model
from medtune.models.reward_models import reward_ids
from medtune.reading.tokenization import encode_replies, load_chat_template

FLAG = "--lora_model"
QUESTION = [{"role": "user", "content": "头痛"}]
CHATML = "<|im_start|>user\n头痛<|im_end|>\n<|im_start|>assistant\n"
QWEN = "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"


@pytest.fixture(scope="module")
def base(tiny_model_dir) -> str:
    return str(tiny_model_dir)


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory) -> dict[str, str]:
    """What PEFT alone saves: a language model's adapter and a reward model's."""
    folder = tmp_path_factory.mktemp("adapters")
    classes = {
        "CAUSAL_LM": (AutoModelForCausalLM, {}),
        "SEQ_CLS": (AutoModelForSequenceClassification, {"num_labels": 1}),
    }
    for task_type, (model_class, options) in classes.items():
        model = model_class.from_pretrained(base, **options)
        get_peft_model(model, LoraConfig(task_type=task_type, r=2, init_lora_weights=False)).save_pretrained(
            folder / task_type
        )
    return {name: str(folder / name) for name in classes}


@pytest.fixture
def trained(base, adapters, tmp_path):
    """A function that gives an adapter's folder as a stage leaves it, with the tokenizer and the template of it."""

    def make(template: str, stage: str = "sft", in_tokenizer: bool = True) -> str:
        folder = tmp_path / f"{template}-{stage}"
        shutil.copytree(adapters["CAUSAL_LM"], folder)
        tokenizer = load_tokenizer(base)
        load_chat_template(tokenizer, template)
        if not in_tokenizer:
            tokenizer.chat_template = None
        tokenizer.save_pretrained(folder)
        Lineage(base, None, stage, template, "data", 128, 600).save(folder)
        return str(folder)

    return make


def prompt_of(path: str, template_name: str | None = None) -> str:
    return choose_template(describe_folder(path, FLAG), template_name).prompt(QUESTION)


# ---------------------------------------------------------------- base, adapter, kind, context


def test_a_whole_model_and_an_adapter(base, adapters):
    whole, adapter = describe_folder(base, FLAG), describe_folder(adapters["CAUSAL_LM"], FLAG)
    assert (whole.base_model, whole.lora_model) == (base, None)
    assert (adapter.base_model, adapter.lora_model) == (base, adapters["CAUSAL_LM"])
    assert whole.context == adapter.context == 2048
    assert not (whole.is_reward_model or adapter.is_reward_model)


def test_an_adapter_on_a_base_that_has_moved(base, adapters, tmp_path):
    shutil.copytree(base, tmp_path / "copy")
    folder = shutil.copytree(adapters["CAUSAL_LM"], tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = "./gone"
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UserError, match=f"^{FLAG} .*: its base model ./gone: no such folder"):
        describe_folder(str(folder), FLAG)
    described = describe_folder(str(folder), FLAG, str(tmp_path / "copy"))
    assert (described.base_model, described.tokenizer_source) == (str(tmp_path / "copy"),) * 2
    with pytest.raises(UserError, match=r"^--base_model \./nowhere: no such folder"):
        describe_folder(str(folder), FLAG, "./nowhere")
    with pytest.raises(UserError, match=f"^{FLAG} {base}: .* so it is no LoRA adapter"):
        describe_folder(base, FLAG, base)


def test_reward_models_are_told_from_those_that_write(base, adapters, tmp_path):
    AutoModelForSequenceClassification.from_pretrained(base, num_labels=1).save_pretrained(tmp_path)
    load_tokenizer(base).save_pretrained(tmp_path)
    for path in (adapters["SEQ_CLS"], str(tmp_path)):
        folder = describe_folder(path, FLAG)
        assert folder.is_reward_model
        with pytest.raises(UserError, match=f"^{FLAG} {path}: a reward model, .* writes none; take it elsewhere$"):
            refuse_reward_model(folder, "; take it elsewhere")
    on_reward_model = describe_folder(adapters["CAUSAL_LM"], FLAG, str(tmp_path))
    with pytest.raises(UserError, match=f"^--base_model {tmp_path}: a reward model"):
        refuse_reward_model(on_reward_model)
    refuse_reward_model(describe_folder(adapters["CAUSAL_LM"], FLAG))


def test_a_model_that_names_no_limit_has_none(base):
    assert replace(describe_folder(base, FLAG), config=PretrainedConfig()).context == sys.maxsize


# ---------------------------------------------------------------- tokenizer and template


def test_an_adapters_tokenizer_goes_before_its_bases(base, adapters, trained):
    own = trained("vicuna")
    assert tokenizer_source(base) == base
    assert tokenizer_source(own) == tokenizer_source(own, "other") == own
    assert (tokenizer_source(adapters["CAUSAL_LM"]), tokenizer_source(adapters["CAUSAL_LM"], "other")) == (
        base,
        "other",
    )
    assert load_tokenizer(own).chat_template != load_tokenizer(adapters["CAUSAL_LM"]).chat_template


def test_the_template_of_training_is_the_default(trained):
    assert prompt_of(trained("chatml")) == CHATML
    assert prompt_of(trained("qwen")) == QWEN + CHATML


def test_a_template_that_renders_the_same_may_be_named(trained):
    assert prompt_of(trained("chatml"), "yi") == CHATML


def test_a_pretrained_adapter_and_a_model_that_nobody_trained_here_take_any_template(base, trained):
    assert prompt_of(trained("qwen", stage="pt"), "vicuna") == prompt_of(base, "vicuna") != CHATML


def test_the_lineage_names_the_template_where_the_tokenizer_has_none(trained):
    folder = trained("chatml", in_tokenizer=False)
    assert prompt_of(folder) == CHATML
    with pytest.raises(UserError, match="--template_name qwen: it asks in another form"):
        prompt_of(folder, "qwen")


def test_a_model_without_turns_needs_a_name(base, tmp_path):
    folder = shutil.copytree(base, tmp_path / "model")
    Path(folder, "chat_template.jinja").unlink()
    assert describe_folder(str(folder), FLAG).chat_template is None
    with pytest.raises(UserError, match="has no chat template: name one with --template_name"):
        prompt_of(str(folder))
    assert prompt_of(str(folder), "chatml") == CHATML


# ---------------------------------------------------------------- what a reward model reads


def test_a_reward_model_is_asked_in_its_own_template(base, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    model.save_pretrained(tmp_path)
    load_tokenizer(base).save_pretrained(tmp_path)
    scorer = RewardModel(str(tmp_path), ChatModelArguments(base, template_name="plain"))
    assert scorer.chat_template.prompt(QUESTION) == QWEN + CHATML
    Path(tmp_path, "chat_template.jinja").unlink()
    scorer = RewardModel(str(tmp_path), ChatModelArguments(base, template_name="plain"))
    assert scorer.chat_template.prompt(QUESTION) == "头痛\n"


@pytest.mark.parametrize("name", ["chatml", "qwen3_nothink", "vicuna"])
def test_what_it_reads_is_what_it_was_trained_on(qwen_tokenizer, name):
    """Templates may write an empty thought or a blank before a reply: so the ids are those of `encode_replies`."""
    chat_template = load_chat_template(qwen_tokenizer, name)
    limits = {"max_prompt_length": 999, "max_reply_length": 999}
    prompt_ids, (chosen_ids,), _ = encode_replies(qwen_tokenizer, chat_template, QUESTION, ["多喝水"], **limits)
    assert reward_ids(qwen_tokenizer, chat_template, QUESTION, "多喝水") == prompt_ids + chosen_ids
    cut = reward_ids(qwen_tokenizer, chat_template, QUESTION, "多喝水", ended=False)
    assert cut == prompt_ids + chosen_ids[: len(cut) - len(prompt_ids)]
    assert chosen_ids[-1] not in cut[len(prompt_ids) :]


# ---------------------------------------------------------------- how it is loaded


def test_every_flag_of_loading_reaches_the_loader(base):
    model_args = ModelArguments(base, torch_dtype="bfloat16", cache_dir="models")
    named = {"model_name_or_path", "tokenizer_name_or_path", "cpu_bf16"}  # the last decides on torch_dtype
    assert model_args.loading_options == {name: value for name, value in vars(model_args).items() if name not in named}
    assert model_args.hub_options == {"cache_dir": "models", "trust_remote_code": False}
    assert load_base_model(base, **model_args.loading_options).dtype == torch.bfloat16


@pytest.mark.parametrize(("use_cpu", "has_gpu", "dtype"), [(0, 1, "bfloat16"), (1, 1, "float32"), (0, 0, "float32")])
def test_without_a_gpu_weights_are_float32(monkeypatch, base, use_cpu, has_gpu, dtype):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(has_gpu))
    model_args = ChatModelArguments(base, torch_dtype="bfloat16", use_cpu=bool(use_cpu))
    assert model_args.loading_options["torch_dtype"] == dtype


# ---------------------------------------------------------------- the record of a run


def test_the_record_of_a_run(base, trained):
    model, data_args = load_base_model(base), DataArguments(train_file_dir="data/sft")
    kept = {"stage": "sft", "template": "vicuna", "flags": {"--seed": "1"}}
    lineage = lineage_of(ModelArguments(base), data_args, **kept)
    sizes = (model.config.hidden_size, model.config.vocab_size, weights_fingerprint(base))
    assert lineage == Lineage(base, None, "sft", "vicuna", "data/sft", *sizes, sizes[-1], {"--seed": "1"})
    parent = trained("chatml")
    lineage = lineage_of(ModelArguments(parent), data_args, stage="dpo", flags={})
    assert lineage == Lineage(base, parent, "dpo", "", "data/sft", *sizes, weights_fingerprint(parent), {})
