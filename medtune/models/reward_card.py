"""What the README.md of a saved reward model says about loading it without this repository."""

from pathlib import Path

import transformers
from peft import PeftModel
from transformers import PreTrainedModel

from medtune.models.text_part import inside_peft

_CARD = """
## Scores

A score is read at the last token of a text: prompt and reply as the chat template writes them, up to the reply's end
token and with it. By {libraries} alone:

```python
{imports}

{scoring_class}tokenizer = AutoTokenizer.from_pretrained(".")  # this folder
config = AutoConfig.from_pretrained({source}){of_text}
config.num_labels, config.get_text_config().pad_token_id = 1, tokenizer.pad_token_id
model = {class_name}.from_pretrained({source}, config=config)
{put_adapter_on}inputs = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
scores = model.eval()(**inputs).logits[:, 0]
```
"""
_SCORING_CLASS = """
class {name}(GenericForSequenceClassification, {family}):
    __module__ = {family}.__module__
    base_model_prefix = "{prefix}"


"""


def write_reward_card(folder: str | Path, model: PreTrainedModel | PeftModel) -> None:
    """Add to the README.md of a folder, in which the model was just saved, how it is loaded and what it reads."""
    is_adapter = isinstance(model, PeftModel)
    base = inside_peft(model)
    class_name, scoring_class = type(base).__name__, ""
    imports = ["from peft import PeftModel"] if is_adapter else []
    if getattr(transformers, class_name, None) is type(base):
        imports.append(f"from transformers import AutoConfig, AutoTokenizer, {class_name}")
    else:  # as medtune/models/score_heads.py makes it
        family = type(base).__bases__[-1]
        imports += [
            "from transformers import AutoConfig, AutoTokenizer",
            "from transformers.modeling_layers import GenericForSequenceClassification",
            f"from {family.__module__} import {family.__name__}",
        ]
        scoring_class = _SCORING_CLASS.format(name=class_name, family=family.__name__, prefix=base.base_model_prefix)
    # Of a wrapper's checkpoint the language model alone may be loaded.
    is_part = bool(base.config.base_config_key) and base.config.get_text_config() is base.config
    card = _CARD.format(
        libraries="transformers and peft" if is_adapter else "transformers",
        imports="\n".join(imports),
        scoring_class=scoring_class,
        source=f'"{model.peft_config["default"].base_model_name_or_path}"' if is_adapter else '"."',
        of_text=".get_text_config()" if is_part else "",
        class_name=class_name,
        put_adapter_on='model = PeftModel.from_pretrained(model, ".")\n' if is_adapter else "",
    )
    with Path(folder, "README.md").open("a", encoding="utf-8") as file:
        file.write(card)
