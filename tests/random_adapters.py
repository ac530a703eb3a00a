"""LoRA adapters with random weights, as the stages save them."""

from pathlib import Path

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, set_seed

from medtune.models.lineage import Lineage
from medtune.models.loading import load_tokenizer
from medtune.reading.tokenization import load_chat_template


def save_adapter(model: PeftModel, base_dir: Path, folder: Path, template: str = "qwen", stage: str = "sft") -> Path:
    model.save_pretrained(folder)
    tokenizer = load_tokenizer(str(base_dir))
    load_chat_template(tokenizer, template or None)
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 128, "vocab_size": model.config.vocab_size}
    Lineage(str(base_dir), None, stage, template, "data", **sizes).save(folder)
    return folder


def random_adapter(base_dir: Path, folder: Path, template: str = "qwen", **lora) -> Path:
    """An adapter that says other things than its base."""
    set_seed(1)
    settings = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False} | lora
    base = AutoModelForCausalLM.from_pretrained(base_dir)
    return save_adapter(get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings)), base_dir, folder, template)


def random_reward_adapter(base_dir: Path, folder: Path) -> Path:
    set_seed(3)
    base = AutoModelForSequenceClassification.from_pretrained(base_dir, num_labels=1)
    config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules="all-linear")
    return save_adapter(get_peft_model(base, config), base_dir, folder, template="", stage="rm")
